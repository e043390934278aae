import copy
import sys

import pytest
import torch
from ase.build import molecule
from ase.collections import g2 as collection

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.modelfile import load_student, save_student
from openmm_mlffd.training.clash import (
    CLUSTER_BONDS,
    CLUSTER_GAP,
    CLUSTER_SIZES,
    DISTANCES,
    N_CLUSTERS,
    N_DISTANCES,
    N_TREES,
    PUSH,
    SQUEEZES,
    TREE_SIZES,
    lack_of_push,
    make_clashes,
)
from openmm_mlffd.training.config import LossConfig, TrainConfig
from openmm_mlffd.training.step import TrainingStep, predict
from openmm_mlffd.training.train import Trainer


@pytest.fixture
def student(make_student):
    return make_student(elements=["H", "C", "O"], references=[0.0] * 3)


def lack(potential):
    clashes = make_clashes(potential)
    found = predict(potential.network, clashes.batch, potential.energy_scale)
    return lack_of_push(found.forces.detach(), clashes).item()


def shares(student, batch):
    """Length of each edge over the sum of the covalent radii."""
    radii = torch.tensor([COVALENT_RADII[z] for z in student.numbers], dtype=torch.float64)
    bonds = radii[batch.species[batch.edge_index]].sum(0)
    return batch.vectors.double().norm(dim=1) / bonds


def test_all_pairs_of_elements_are_there_at_all_distances(student):
    batch = make_clashes(student).batch
    n = 6 * N_DISTANCES
    molecules = sum(
        len(m) > 2 and set(m.symbols) <= {"H", "C", "O"} for m in map(molecule, collection.names)
    )
    assert len(batch.energy) == n + N_CLUSTERS + 2 * molecules + 4 * N_TREES
    assert (batch.n_atoms[:n] == 2).all()
    assert {tuple(p) for p in batch.species[: 2 * n].view(-1, 2).tolist()} == {
        (0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)
    }  # fmt: skip
    found = shares(student, batch)[: 2 * n]  # one edge in each direction
    assert found.min() == pytest.approx(DISTANCES[0], abs=1e-6)
    assert found.max() == pytest.approx(DISTANCES[1], abs=1e-6)


def test_every_atom_of_a_cluster_has_a_short_bond_and_no_other_contact(student):
    batch = make_clashes(student).batch
    system = batch.system[batch.edge_index[0]]
    in_cluster = (system >= 6 * N_DISTANCES) & (system < 6 * N_DISTANCES + N_CLUSTERS)
    found, receiver = shares(student, batch)[in_cluster], batch.edge_index[0][in_cluster]
    short = found < CLUSTER_BONDS[1] + 1e-6
    assert found.min() >= CLUSTER_BONDS[0] - 1e-6
    assert (found[~short] > CLUSTER_GAP - 1e-6).all()
    assert set(receiver[short].tolist()) == set(receiver.tolist())
    sizes = batch.n_atoms[6 * N_DISTANCES :][:N_CLUSTERS]
    assert sizes.min() >= CLUSTER_SIZES[0]
    assert sizes.max() == CLUSTER_SIZES[1]
    # a tree has one bond less than atoms; each is two edges
    assert short.sum() == 2 * (sizes - 1).sum()


def squeezed(student):
    """Species, places around the middle and arms of squeezed molecules, then of trees."""
    clashes = make_clashes(student)
    batch = clashes.batch
    found = []
    for n in range(6 * N_DISTANCES + N_CLUSTERS, len(batch.energy)):
        atoms = (batch.system == n).nonzero()[:, 0]
        edges = batch.system[batch.edge_index[0]] == n
        to, of = batch.edge_index[:, edges] - atoms[0]
        differences = torch.eye(len(atoms), dtype=torch.float64)[of]
        differences -= torch.eye(len(atoms), dtype=torch.float64)[to]
        places = torch.linalg.pinv(differences) @ batch.vectors[edges].double()
        found.append((batch.species[atoms], places, clashes.arms[atoms].double()))
    return found


def test_molecules_are_squeezed_to_their_middle(student):
    water = molecule("H2O")
    names = [(student.numbers.index(z)) for z in water.numbers]
    ours = [m for m in squeezed(student) if m[0].tolist() == names]
    assert len(ours) == 2
    sizes = []
    for _, places, _ in ours:
        hydrogens = (places[1] - places[2]).norm().item() / water.get_distance(1, 2)
        bond = (places[0] - places[1]).norm().item() / water.get_distance(0, 1)
        assert hydrogens >= bond - 1e-6  # as small, or the hydrogens further out
        sizes.append(bond)
        assert SQUEEZES[0] < bond < 1.0
    assert sizes[0] != sizes[1]


def test_large_trees_are_squeezed_at_every_size(student):
    trees = squeezed(student)[-4 * N_TREES :]
    for n in range(N_TREES):
        same = trees[4 * n : 4 * n + 4]
        assert TREE_SIZES[0] <= len(same[0][0]) <= TREE_SIZES[1]
        heavy = same[0][0] != student.numbers.index(1)
        spreads = []
        for species, places, _ in same:
            assert torch.equal(species, same[0][0])
            spreads.append(places[heavy].std(0).norm())
        assert spreads == sorted(spreads)
        assert spreads[0] * 2 < spreads[-1]


def test_arms_of_squeezed_molecules_lead_back_to_their_shapes(student):
    for species, places, arms in squeezed(student):
        assert arms.norm(dim=1).sum() == pytest.approx(1.0, abs=1e-5)
        heavy = species != student.numbers.index(1)
        if heavy.sum() > 1:  # all by one factor: arms are parallel to the places
            middle = places[heavy].mean(0)
            relative = arms[heavy] - arms[heavy].mean(0)
            factor = (relative * (places[heavy] - middle)).sum() / (
                places[heavy] - middle
            ).square().sum()
            assert factor > 0
            assert relative == pytest.approx(factor * (places[heavy] - middle), abs=1e-5)


def test_repulsion_alone_pushes_apart(student):
    clashes = make_clashes(student)
    outward = torch.zeros(len(clashes.batch.energy), dtype=torch.float64).index_add(
        0, clashes.batch.system, (clashes.arms * clashes.batch.repulsion).sum(1)
    )
    assert (outward > 0).float().mean() > 0.98
    assert (outward[: 6 * N_DISTANCES + N_CLUSTERS] > 0).all()


def test_only_what_pushes_too_little_counts(student):
    clashes = make_clashes(student)
    batch = clashes.batch
    # forces along the arms, of the same size on all atoms: the outward force is that size
    directions = torch.nn.functional.normalize(clashes.arms, dim=1)
    size = torch.zeros_like(batch.energy)
    size[:] = 2 * PUSH
    size[3], size[-1] = 0.0, -PUSH
    forces = directions * size[batch.system, None]
    expected = torch.log1p(torch.tensor([PUSH, 2 * PUSH])).sum() / len(size)
    assert lack_of_push(forces, clashes).item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = batch.system < 6 * N_DISTANCES  # along x
    forces[pairs, 1:] = 7.0  # across does not matter
    assert lack_of_push(forces, clashes).item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_fills_the_wells_of_a_student(morse_config, tmp_path):
    trainer = Trainer(morse_config(output=str(tmp_path / "first")))
    last = trainer.average.network.readout[-1].weight
    start = last.detach().clone()
    for factor in (-1e3, 1e3, -1e4, 1e4):  # the untrained network pulls with one sign or the other
        with torch.no_grad():
            last.copy_(factor * start)
        if lack(trainer.average) > 0.05:
            break
    path = tmp_path / "wells.safetensors"
    save_student(path, trainer.average, trainer.header)
    before = lack(load_student(path))
    assert before > 0.05
    config = morse_config(
        initial=str(path),
        output=str(tmp_path / "second"),
        loss=LossConfig(energy=0.0, forces=0.0, stress=0.0, angle=0.0, clash=1.0),
    )
    second = Trainer(config)
    second.run()
    assert lack(second.average) < before / 3


def test_clashes_beyond_the_range_of_numbers_are_left_out(student, caplog):
    everything = make_clashes(student)
    with torch.no_grad():  # energies that grow with the number of close neighbors
        for interaction in student.network.interactions:
            interaction.filter.weight.mul_(1e3)
    energy = predict(student.network, everything.batch, student.energy_scale).energy
    beyond = int((~(energy.abs() < 1e30)).sum())
    assert 0 < beyond < len(energy)
    step = TrainingStep(
        student, copy.deepcopy(student), TrainConfig(data=None, loss=LossConfig(clash=1.0))
    )
    step.limit_clashes()
    kept = step.loss_gradient.clashes
    assert len(kept.batch.energy) == int(step.clashes_kept.sum()) == len(energy) - beyond
    assert f"{beyond} of {len(energy)} structures are left out" in caplog.text
    assert lack_of_push(
        predict(student.network, kept.batch, student.energy_scale).forces, kept
    ).isfinite()


def test_a_resumed_run_leaves_out_what_it_left_out_before(morse_config, tmp_path, monkeypatch):
    config = morse_config(output=str(tmp_path / "run"), loss=LossConfig(clash=1.0))
    probe = Trainer(morse_config(output=str(tmp_path / "probe"))).potential
    kept = torch.arange(len(make_clashes(probe).batch.energy)) % 2 == 0
    monkeypatch.setattr("openmm_mlffd.training.step.clashes_in_range", lambda _: kept)
    first = Trainer(config)
    first.save_checkpoint()
    monkeypatch.undo()
    second = Trainer(config)
    assert second.progress == first.progress
    assert torch.equal(second.training_step.clashes_kept, kept)
    assert len(second.training_step.loss_gradient.clashes.batch.energy) == int(kept.sum())


def test_training_without_clashes_needs_no_ase(student, monkeypatch):
    monkeypatch.setitem(sys.modules, "ase.collections", None)
    TrainingStep(student, copy.deepcopy(student), TrainConfig(data=None))
    with pytest.raises(ImportError, match=r"loss\.clash .*openmm-mlffd\[training\]"):
        make_clashes(student)
