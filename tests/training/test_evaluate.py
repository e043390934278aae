import math

import numpy as np
import pytest
import torch

from openmm_mlffd.modelfile import load_student
from openmm_mlffd.potential import Prediction
from openmm_mlffd.training.batches import StructureSource, make_batch, prefetch
from openmm_mlffd.training.evaluate import ErrorSums, evaluate, format_table
from openmm_mlffd.training.hdf5 import Dataset

CPU = torch.device("cpu")


@pytest.fixture
def sample(data_folder):
    return Dataset(data_folder / "sample.h5")


@pytest.fixture
def batch(sample, make_student):
    elements = ["H", "C", "N", "O", "F", "P", "S", "Cl"]
    student = make_student(elements=elements, references=[0.0] * 8)
    return make_batch(sample.read(0, len(sample)), student, CPU)


@pytest.fixture
def prediction(batch):
    generator = torch.Generator().manual_seed(0)

    def near(label, size):
        noise = torch.randn(label.shape, generator=generator, dtype=torch.float64)
        return label + size * noise

    return Prediction(
        near(batch.energy, 0.5),
        near(batch.forces, 0.2),
        near(batch.virial.nan_to_num(), 1.0),
        torch.zeros(len(batch.forces), dtype=torch.float64),
    )


def errors_by_hand(prediction, batch, structures):
    """The same numbers, structure by structure."""
    system = batch.graph.system.numpy()
    energy, components, labels, angles, stress, stress_labels = [], [], [], [], [], []
    for s in structures:
        mine = system == s
        energy.append(abs(float(prediction.energy[s] - batch.energy[s])) / mine.sum())
        for p, f in zip(prediction.forces[mine].numpy(), batch.forces[mine].numpy(), strict=True):
            components.extend(p - f)
            labels.extend(f)
            if np.linalg.norm(f) > 0.3:
                cosine = p @ f / np.linalg.norm(p) / np.linalg.norm(f)
                angles.append(math.degrees(math.acos(min(1.0, cosine))))
        if batch.virial[s].isfinite().all():
            volume = abs(np.linalg.det(batch.graph.cell[s].numpy()))
            label = batch.virial[s].numpy() / volume
            stress.extend((prediction.virial[s].numpy() / volume - label).ravel())
            stress_labels.extend(label.ravel())
    components, labels = np.array(components), np.array(labels)
    relative = np.linalg.norm(stress) / np.linalg.norm(stress_labels) if stress else np.nan / 1
    return {
        "structures": len(energy),
        "atoms": len(components) / 3,
        "force_mae": 1e3 * np.abs(components).mean(),
        "force_rmse": 1e3 * np.sqrt((components**2).mean()),
        "force_relative": 100 * np.linalg.norm(components) / np.linalg.norm(labels),
        "energy_mae": 1e3 * np.mean(energy),
        "angle": np.mean(angles),
        "stress_relative": 100 * relative,
    }


def test_errors_are_those_computed_by_hand(batch, prediction, sample):
    sums = ErrorSums(len(sample.subsets), CPU)
    sums.add(prediction, batch)
    table = sums.table(sample.subsets)
    subset = batch.subset.numpy()
    found = {sample.subsets[k] for k in np.unique(subset)}
    assert set(table) == found | {"all"}
    for name, row in table.items():
        mine = range(len(subset))
        if name != "all":
            mine = np.flatnonzero(subset == sample.subsets.index(name))
        assert row == pytest.approx(errors_by_hand(prediction, batch, mine), rel=1e-6, nan_ok=True)
    assert table["all"]["force_rmse"] == pytest.approx(200, rel=0.05)
    assert math.isnan(table["dimer"]["stress_relative"])
    assert table["box_water"]["stress_relative"] > 1


def test_errors_of_parts_add_up_to_those_of_the_whole(batch, prediction, sample, make_student):
    elements = ["H", "C", "N", "O", "F", "P", "S", "Cl"]
    student = make_student(elements=elements, references=[0.0] * 8)
    source = StructureSource([sample], "all")
    tables = [
        evaluate(student, prefetch(source.batches(size), student, CPU), source.subsets, CPU)
        for size in (100, 3000)
    ]
    for name in tables[0]:
        assert tables[0][name] == pytest.approx(tables[1][name], rel=1e-6, nan_ok=True)


def test_evaluation_leaves_the_mode_of_the_potential(batch, make_student):
    student = make_student(elements=["H", "C", "N", "O", "F", "P", "S", "Cl"], references=[0.0] * 8)
    for training in (True, False):
        student.train(training)
        evaluate(student, [], ["a"], CPU)
        assert student.training is training


def test_bundled_student_agrees_with_its_teacher(sample):
    # molecules that it may have seen: this is about the file and the units, not about learning
    potential = load_student()
    source = StructureSource([sample], "all")
    batches = prefetch(source.batches(1000), potential, CPU)
    table = evaluate(potential, batches, source.subsets, CPU)
    assert table["all"]["force_mae"] < 100
    assert table["all"]["energy_mae"] < 10
    assert table["all"]["angle"] < 8
    assert table["all"]["stress_relative"] < 25


def test_table_has_a_row_for_each_subset_and_no_number_where_there_is_none(
    batch, prediction, sample
):
    sums = ErrorSums(len(sample.subsets), CPU)
    sums.add(prediction, batch)
    table = sums.table(sample.subsets)
    text = format_table(table).splitlines()
    rows = {line.split()[0]: line for line in text[3:-1]}
    assert list(rows) == list(table)
    assert rows["dimer"].split()[-1] == "-"
    assert f"{table['box_water']['stress_relative']:.1f}" in rows["box_water"]
    assert len({len(line) for line in text[:-1]}) == 1
