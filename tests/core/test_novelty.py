"""Novelty: what it is, that it belongs to one student, and that it tells errors."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.graph import build_graph
from openmm_mlffd.modelfile import ModelFileError, bundled_students, load_student, save_student
from openmm_mlffd.novelty import (
    COVERAGE,
    SHRINKAGE,
    STOP_ERROR,
    FeatureSums,
    Novelty,
    NoveltyHeader,
    NoveltyMeter,
    atom_features,
    load_novelty,
    novelty_path,
    save_novelty,
)


def make_novelty(potential, features, species, **changes):
    sums = FeatureSums(len(potential.numbers), features.shape[1])
    sums.add(features, species)
    values = {
        "student": potential.header.sha256,
        "elements": potential.header.elements,
        "counts": sums.counts.tolist(),
        "warn": 2.0,
        "stop": 4.0,
        "error_factor": 0.2,
        "error_exponent": 1.5,
    }
    return Novelty(NoveltyHeader(**values | changes), *sums.statistics())


@pytest.fixture
def student_file(tmp_path, make_student, make_header):
    save_student(tmp_path / "toy.safetensors", make_student(), make_header())
    return tmp_path / "toy.safetensors"


@pytest.fixture
def toy(student_file):
    return load_student(student_file)


@pytest.fixture
def statistics(toy, make_box):
    """Of the toy on random boxes."""
    features, species = [], []
    for seed in range(6):
        numbers, positions, cell = make_box(n_atoms=12, length=6.0, seed=seed)
        graph = build_graph(
            torch.tensor(positions), toy.species(torch.tensor(numbers)), cutoff=toy.cutoff,
            cell=torch.tensor(cell),
        )  # fmt: skip
        features.append(atom_features(toy, graph))
        species.append(graph.species)
    return make_novelty(toy, torch.cat(features), torch.cat(species))


def test_novelty_is_the_mahalanobis_distance_by_the_root_of_the_number_of_features(toy):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(16, 16))
    features = torch.tensor(rng.normal(size=(4000, 16)) @ mixing + 3.0)
    species = torch.zeros(4000, dtype=torch.int64)
    novelty = make_novelty(toy, features, species)
    found = novelty.of_features(features, species).numpy()
    assert np.sqrt((found**2).mean()) == pytest.approx(1.0, abs=5e-3)
    covariance = np.cov(features.numpy().T, bias=True)
    covariance += SHRINKAGE * np.linalg.eigvalsh(covariance).max() * np.eye(16)
    inverse = np.linalg.inv(covariance)
    away = features.numpy()[:5] - features.numpy().mean(0)
    expected = np.sqrt(np.einsum("ij,jk,ik->i", away, inverse, away) / 16)
    np.testing.assert_allclose(found[:5], expected, rtol=1e-6)
    # an element without training atoms is as novel as can be, and so is what is no number
    assert novelty.of_features(features[:1], torch.ones(1, dtype=torch.int64)).item() == np.inf
    assert novelty.of_features(features[:1] * torch.nan, species[:1]).item() == np.inf


def test_features_are_those_of_the_readout_and_invariant(toy, ethanol):
    numbers = toy.species(torch.tensor(ethanol.numbers))
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    found = []
    for positions in (ethanol.positions, ethanol.positions @ rotation + 7.0):
        graph = build_graph(torch.tensor(positions), numbers, cutoff=toy.cutoff)
        found.append(atom_features(toy, graph))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    energies = toy.network.readout(found[0])[:, 0].double() * toy.energy_scale
    np.testing.assert_allclose(energies, toy(graph).atom_energies - toy.repulsion_energies(
        graph, graph.positions[graph.edge_index[1]] - graph.positions[graph.edge_index[0]]
    ), atol=1e-5)  # fmt: skip
    assert not toy.network.readout._forward_pre_hooks


def test_statistics_are_read_as_they_were_written(student_file, statistics, make_box):
    assert novelty_path(student_file) == student_file.with_suffix(".novelty")
    header = save_novelty(novelty_path(student_file), statistics)
    assert len(header.sha256) == 64
    read = load_novelty(student_file)
    assert read.header == header
    numbers, positions, cell = make_box(seed=9)
    written = NoveltyMeter(numbers, student_file, novelty=statistics).measure(positions, cell)
    found = NoveltyMeter(numbers, student_file).measure(positions, cell)
    np.testing.assert_allclose(found, written, rtol=1e-3)
    assert np.isinf(NoveltyMeter(numbers, student_file).measure(positions * np.nan, cell)).all()


def test_statistics_of_another_student_are_refused(
    student_file, statistics, make_student, make_header
):
    save_novelty(novelty_path(student_file), statistics)
    other = save_student(student_file, make_student(seed=3), make_header())
    with pytest.raises(ModelFileError, match=f"this student .*{other.sha256}.*mlffd novelty"):
        NoveltyMeter([1, 6], student_file)


def test_missing_statistics_come_with_the_command_that_makes_them(student_file):
    with pytest.raises(ModelFileError, match=r"mlffd novelty .*toy.safetensors data.h5"):
        load_novelty(student_file)


def test_damaged_statistics_are_refused(student_file, statistics):
    path = novelty_path(student_file)
    save_novelty(path, statistics)
    good = path.read_bytes()
    length = 8 + struct.unpack("<Q", good[:8])[0]
    for place in np.random.default_rng(0).integers(length, len(good), 20):
        damaged = bytearray(good)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        with pytest.raises(ModelFileError, match="damaged or altered"):
            load_novelty(student_file)
    for size in (0, 5, length - 3, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ModelFileError, match="not a readable"):
            load_novelty(student_file)
    header = json.loads(good[8:length])
    content = json.loads(header["__metadata__"]["mlffd"])
    for change, text in (({"version": 2}, "version 2"), ({"stop": 1e9}, "damaged or altered")):
        header["__metadata__"]["mlffd"] = json.dumps(content | change)
        raw = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + good[length:])
        with pytest.raises(ModelFileError, match=text):
            load_novelty(student_file)


def test_measuring_changes_neither_energy_nor_forces_nor_global_state(
    student_file, statistics, ethanol
):
    save_novelty(novelty_path(student_file), statistics)
    evaluator = Evaluator(load_student(student_file), ethanol.numbers)
    before = evaluator.compute(ethanol.positions)
    random, grad = torch.random.get_rng_state(), torch.is_grad_enabled()
    NoveltyMeter(ethanol.numbers, student_file).measure(ethanol.positions)
    after = evaluator.compute(ethanol.positions)
    assert after.energy == before.energy
    np.testing.assert_array_equal(after.forces, before.forces)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.is_grad_enabled() == grad


# the bundled student


def test_each_bundled_student_has_statistics_of_its_own():
    for name, path in bundled_students().items():
        novelty = load_novelty(name)
        assert novelty.header.student == load_student(path).header.sha256
        assert all(count > 100 for count in novelty.header.counts)
        figures = novelty.header.figures
        assert figures["spearman"] > 0.4
        assert figures["auroc_1"] > 0.9
        assert abs(figures["coverage"] - COVERAGE) < 0.03
        bound = novelty.error_bound([1.0, novelty.header.stop])
        assert bound[0] < 0.5
        assert bound[1] == pytest.approx(STOP_ERROR)


def test_what_the_student_knows_is_not_novel_and_what_it_does_not_is(ethanol):
    meter = NoveltyMeter(ethanol.numbers)
    header = meter.novelty.header
    assert meter.measure(ethanol.positions).max() < header.warn
    for place in (0.5, 0.6, 0.7):  # a hydrogen pushed into the carbon that it is bound to
        positions = ethanol.positions.copy()
        positions[4] = positions[0] + place * (positions[4] - positions[0])
        assert meter.measure(positions).max() > header.warn
    torn = ethanol.positions.copy()
    torn[3] += 5.0  # a radical and a lone hydrogen
    assert meter.measure(torn).max() > header.warn


def test_the_alarm_comes_before_the_first_error_of_5_electronvolts_per_angstrom(data_folder):
    """Frames of a molecule heated to destruction, with the teacher's forces (make_heated.py)."""
    with np.load(data_folder / "heated.npz") as heated:
        numbers, positions, forces = heated["numbers"], heated["positions"], heated["forces"]
    evaluator, meter = Evaluator(load_student(), numbers), NoveltyMeter(numbers)
    rows = []
    for x, f in zip(positions.astype(float), forces, strict=True):
        errors = np.linalg.norm(evaluator.compute(x).forces - f, axis=1)
        rows.append((errors.max(), meter.measure(x).max()))
    errors, scores = np.array(rows).T
    alarm = int(np.argmax(scores > meter.novelty.header.stop))
    assert errors.max() > 5.0
    assert scores[alarm] > meter.novelty.header.stop
    assert errors[:alarm].max() < 5.0
    assert alarm < int(np.argmax(errors > 5.0))
    assert scores[:10].max() < meter.novelty.header.warn  # at 300 to 700 K nothing is novel


def test_a_header_may_not_be_changed_in_memory(statistics):
    with pytest.raises(AttributeError):
        statistics.header.stop = 3.0
    assert replace(statistics.header, stop=3.0).stop == 3.0


@pytest.mark.parametrize("boxed", [False, True])
def test_fused_kernels_measure_the_same(ethanol, make_box, boxed):
    pytest.importorskip("warp")
    system = make_box(40, 8.3, seed=1) if boxed else ethanol
    numbers = np.where(system.numbers == 7, 8, system.numbers)
    plain, fused = (NoveltyMeter(numbers, fused=on) for on in (False, True))
    rng = np.random.default_rng(0)
    cell = system.cell if boxed else None
    for _ in range(3):
        positions = system.positions + rng.normal(scale=0.3, size=system.positions.shape)
        expected = plain.measure(positions, cell)
        assert fused.measure(positions, cell) == pytest.approx(expected, rel=2e-4)
    assert np.isinf(fused.measure(positions * np.nan, cell)).all()


def test_elements_without_statistics_are_new_to_the_fused_kernels_too(ethanol):
    pytest.importorskip("warp")
    statistics = load_novelty()
    elements, counts = statistics.header.elements, statistics.header.counts
    left = [0 if s == "O" else n for s, n in zip(elements, counts, strict=True)]
    without = replace(statistics, header=replace(statistics.header, counts=left))
    found = NoveltyMeter(ethanol.numbers, novelty=without, fused=True).measure(ethanol.positions)
    assert np.isinf(found[ethanol.numbers == 8]).all()
    assert np.isfinite(found[ethanol.numbers != 8]).all()
