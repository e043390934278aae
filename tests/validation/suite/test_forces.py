import re
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.io import read

from openmm_mlffd.modelfile import load_student
from openmm_mlffd.training.batches import StructureSource, make_batch
from openmm_mlffd.training.evaluate import evaluate
from openmm_mlffd.training.hdf5 import Dataset
from openmm_mlffd.validation.suite import force_section
from openmm_mlffd.validation.suite.forces import (
    as_batch,
    choose,
    conformer_errors,
    measure_forces,
    worst_structures,
)
from openmm_mlffd.validation.suite.job import Job
from openmm_mlffd.validation.suite.models import PotentialModel, StudentModel, pack
from openmm_mlffd.validation.suite.plan import make_plan
from openmm_mlffd.validation.suite.store import Store
from openmm_mlffd.validation.suite.surroundings import describe_surroundings, distances_to


@pytest.fixture(scope="module")
def student():
    return StudentModel("default", "cpu")


@pytest.fixture(scope="module")
def measured(student, small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forces")
    job = Job(
        model=student, plan=make_plan("tiny"), store=Store(folder / "pieces"), output=folder,
        data=small_data, split="all", training=small_data,
    )  # fmt: skip
    return job, *measure_forces(job, small_data)


def test_errors_are_those_of_mlffd_evaluate(measured, small_data):
    _, _, numbers = measured
    potential, device = load_student("default"), torch.device("cpu")
    with Dataset(small_data) as dataset:
        source = StructureSource([dataset], "all")
        batches = [make_batch(part, potential, device) for part in source.batches(2000)]
        table = evaluate(potential, batches, source.subsets, device)
    for name, row in {**numbers["subsets"], "all": numbers["all"]}.items():
        for key in ("force_mae", "force_rmse", "angle", "energy_mae", "stress_relative"):
            expected = pytest.approx(table[name][key], rel=1e-4, abs=1e-4, nan_ok=True)
            assert row[key]["value"] == expected, (name, key)
    assert numbers["all"]["stress_relative"]["value"] > 1
    assert numbers["all"]["force_r2"] > 0.98
    low, high = (numbers["all"]["force_mae"][k] for k in ("low", "high"))
    assert low < numbers["all"]["force_mae"]["value"] < high


def test_elements_add_up_to_all(measured):
    _, evaluated, numbers = measured
    rows = numbers["elements"].values()
    assert sum(row["atoms"] for row in rows) == len(evaluated.error)
    mean = sum(row["atoms"] * row["force_mae"]["value"] for row in rows) / len(evaluated.error)
    assert mean == pytest.approx(numbers["all"]["force_mae"]["value"], rel=1e-6)


def test_relative_energies_forgive_a_shift_of_a_molecule_but_not_of_a_structure(measured):
    _, e, _ = measured
    first = np.flatnonzero(e.count == e.count[0])[:1]
    structures = e.structures._replace(
        group=np.zeros_like(e.structures.group),
        atomic_numbers=np.ones_like(e.structures.atomic_numbers),
        energy=np.zeros_like(e.structures.energy),
    )
    same = np.bincount(e.count)[e.count] > 1
    shifted = type(e)(structures, e.count * 0.7, e.forces, e.stress, e.index, e.subsets, e.distance)
    error, known = conformer_errors(shifted)
    np.testing.assert_array_equal(known, same.astype(float))
    np.testing.assert_allclose(error, 0.0, atol=1e-12)
    energy = e.count * 0.7
    energy[first] += 1.0
    wrong = type(e)(structures, energy, e.forces, e.stress, e.index, e.subsets, e.distance)
    error, _ = conformer_errors(wrong)
    n = int((e.count == e.count[first[0]]).sum())
    assert error[first[0]] == pytest.approx((n - 1) / n if n > 1 else 0.0)


def test_surroundings_that_were_trained_on_are_at_no_distance(measured):
    _, e, _ = measured
    trained = np.isin(e.owner, np.flatnonzero(e.structures.split == 0))
    assert trained.any()
    np.testing.assert_allclose(e.distance[trained], 0.0, atol=1e-3)
    assert (e.distance[~trained] > 1e-3).mean() > 0.9


def test_surroundings_know_neither_place_nor_orientation_nor_box(measured):
    _, e, _ = measured
    periodic = int(np.flatnonzero(e.structures.pbc.all(1))[0])
    structure, _ = e.structure(periodic)
    elements = np.unique(structure.numbers)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    moved = structure._replace(
        positions=structure.positions @ turn + 3.0, cell=structure.cell @ turn
    )
    a, b = (describe_surroundings(pack([s]), elements) for s in (structure, moved))
    np.testing.assert_allclose(a, b, atol=1e-4)
    alone = describe_surroundings(pack([structure._replace(cell=None)]), elements)
    assert np.abs(alone - a).max() > 0.1


def test_unknown_elements_have_no_distance():
    features = np.ones((2, 3), np.float32)
    found = distances_to(np.array([1, 9]), features, np.array([1]), features[:1])
    assert found[0] == 0.0
    assert np.isnan(found[1])


def test_forces_of_the_wrong_sign_fail(student, make_job, small_data):
    class Wrong(PotentialModel):
        def label(self, batch, *, precision="single"):
            labels = super().label(batch, precision=precision)
            labels.forces[batch.atomic_numbers == 1] *= -1
            return labels

    job = make_job(Wrong(student.potential, "wrong", "wrong"), data=small_data, split="all")
    result = force_section.run_forces(job)
    failed = {c.name for c in result.checks if not c.passed}
    assert {"forces: force MAE", "forces: mean angle between forces"} <= failed
    assert "forces: energy MAE" not in failed
    elements = result.numbers["elements"]
    assert elements["H"]["angle"] > 90 > elements["C"]["angle"]


def test_of_each_molecule_the_worst_structure_alone_is_shown(measured):
    _, e, _ = measured
    groups = e.structures.group // 3
    e = replace(e, structures=e.structures._replace(group=groups))
    chosen = worst_structures(e, 100)
    assert len(chosen) == len(set(groups.tolist())) < len(groups)
    assert sorted(e.rmse[chosen], reverse=True) == e.rmse[chosen].tolist()
    for i in chosen:
        assert e.rmse[i] == e.rmse[groups == groups[i]].max()


def test_the_worst_structures_are_files_that_others_read(measured, monkeypatch):
    job, e, numbers = measured
    files = force_section.write_worst(job, e)
    assert len(files) == 2 * job.plan.forces.n_worst
    worst = int(np.argmax(e.rmse))
    atoms = read(job.output / files[0])
    structure, rows = e.structure(worst)
    np.testing.assert_array_equal(atoms.numbers, structure.numbers)
    np.testing.assert_allclose(atoms.positions, structure.positions, atol=1e-6)
    np.testing.assert_allclose(atoms.arrays["teacher_forces"], e.labels[rows], atol=1e-6)
    np.testing.assert_allclose(atoms.arrays["student_forces"], e.forces[rows], atol=1e-6)
    assert numbers["worst"][0]["place"] == e.index[worst]

    # the part of the script that is Python, with something in the place of PyMOL
    script = (job.output / files[1]).read_text()
    assert f"load {files[0].split('/')[1]}" in script
    shapes = {}
    pymol, cgo = types.ModuleType("pymol"), types.ModuleType("pymol.cgo")
    pymol.cmd = types.SimpleNamespace(load_cgo=lambda shape, name: shapes.update({name: shape}))
    cgo.CONE, cgo.CYLINDER = 27.0, 9.0
    monkeypatch.setitem(sys.modules, "pymol", pymol)
    monkeypatch.setitem(sys.modules, "pymol.cgo", cgo)
    code = re.search(r"^python\n(.*)^python end$", script, re.M | re.S).group(1)
    exec(compile(code, "worst.pml", "exec"), {})
    per_atom = 1 + 3 + 3 + 1 + 6 + 1 + 3 + 3 + 2 + 6 + 2
    for name, forces in (("teacher", e.labels[rows]), ("student", e.forces[rows])):
        assert len(shapes[name]) == per_atom * len(structure.numbers)
        tips = np.array(shapes[name]).reshape(-1, per_atom)[:, 18:21]
        np.testing.assert_allclose(tips, structure.positions + 0.5 * forces, atol=1e-3)


def test_each_panel_is_a_figure_of_its_own(measured):
    job, e, numbers = measured
    drawn = force_section.make_figures(e, numbers, job.plan.forces.n_worst)
    captions = " ".join(f.caption for f in drawn)
    for what in (
        "Energy per atom", "components of the forces", "Length of the force",
        "Errors of the energy", "Errors of the force", "Share of the atoms", "Angle between",
        "against its length",
        "against the size", "against the temperature", "training set", "by element", "by subset",
        "worst structures", "arrows are the forces", "stress",
    ):  # fmt: skip
        assert what in captions, what
    assert all(f.svg.startswith("<?xml") and len(f.svg) < 300_000 and f.alt for f in drawn)


def test_a_random_part_is_always_the_same():
    index = np.arange(5, 500)
    np.testing.assert_array_equal(choose(index, 20), choose(index, 20))
    assert len(set(choose(index, 20))) == 20
    assert choose(index, None) is index
    assert (np.diff(choose(index, 20)) > 0).all()


def test_a_section_without_data_says_what_it_needs(student, make_job):
    with pytest.raises(ValueError, match="--data"):
        force_section.run_forces(make_job(student))


def test_batches_have_what_models_need(measured):
    _, e, _ = measured
    batch = as_batch(e.structures)
    assert batch.positions.dtype == np.float64
    assert batch.offsets[-1] == len(batch.atomic_numbers)
