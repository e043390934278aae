import math

import numpy as np
import pytest

from openmm_mlffd.units import FEMTOSECONDS_PER_TIME_UNIT
from openmm_mlffd.validation import analysis
from openmm_mlffd.validation.suite.models import StudentModel
from openmm_mlffd.validation.suite.static import (
    bond_angles,
    bond_lengths_and_angles,
    dimer_piece,
    frequencies,
    proper_torsions,
    relax,
    rmsd,
    torsion_piece,
    turn,
)
from openmm_mlffd.validation.suite.store import Store
from openmm_mlffd.validation.suite.systems import System, dimers, load_system, molecules


def test_the_wavenumber_of_a_spring_is_that_of_the_textbook(make_springs):
    water = load_system("water")
    two = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.1]])
    from openmm import app

    topology = app.Topology()
    residue = topology.addResidue("CO", topology.addChain())
    atoms = [topology.addAtom(s, app.Element.getBySymbol(s), residue) for s in ("C", "O")]
    topology.addBond(*atoms)
    system = System("CO", topology, two)
    (found,) = frequencies(make_springs(two, stiffness=119.0), system, two)
    reduced = 1 / (1 / system.masses).sum()
    period = 2 * math.pi * math.sqrt(reduced / 119.0) * FEMTOSECONDS_PER_TIME_UNIT  # fs
    light = 2.99792458e-5  # cm/fs
    assert found == pytest.approx(1 / (period * light), rel=1e-4)
    assert found == pytest.approx(2170, rel=0.02)  # carbon monoxide
    assert len(frequencies(make_springs(water.positions), water, water.positions)) == 3


def test_relaxing_finds_the_minimum(make_springs):
    system = load_system("methanol")
    rng = np.random.default_rng(0)
    start = system.positions + rng.normal(scale=0.05, size=system.positions.shape)
    found = relax(make_springs(system.positions), system, start)
    assert rmsd(start, system.positions) > 0.02
    assert rmsd(found, system.positions) < 2e-3


def test_rmsd_knows_no_motion_of_the_whole_but_a_mirror_image():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 3))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)
    assert rmsd(x, x @ turn + 5.0) < 1e-6
    assert rmsd(x, x * [1, 1, -1]) > 0.1
    moved = x.copy()
    moved[0, 0] += 1e-3
    assert rmsd(x, moved) == pytest.approx(1e-3 * math.sqrt(5 / 36), rel=0.3)


def test_lengths_and_angles_of_water():
    system = load_system("water")
    positions = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [0.0, 0.97, 0.0]])
    lengths, angles = bond_lengths_and_angles(system, np.stack([positions, 2 * positions]))
    np.testing.assert_allclose(lengths, [[0.96, 0.97], [1.92, 1.94]])
    np.testing.assert_allclose(angles, [[90.0], [90.0]])


def test_angles_and_torsions_are_counted_once():
    butane = load_system("butane")
    assert len(bond_angles(butane)) == 4 * 6
    np.testing.assert_array_equal(proper_torsions(butane), [[0, 1, 2, 3]])
    assert len(proper_torsions(butane, heavy=False)) == 3


@pytest.mark.parametrize("name", ["butane", "N-methylacetamide", "styrene"])
def test_turning_sets_a_torsion_and_nothing_else(name):
    import mdtraj

    system = load_system(name)
    for degrees in (-180.0, -100.0, 35.0):
        turned = turn(system, system.positions, system.torsion, degrees)
        frame = analysis.make_trajectory(turned[None], system.topology)
        (found,) = np.degrees(mdtraj.compute_dihedrals(frame, [system.torsion]))[0]
        assert abs((found - degrees + 180) % 360 - 180) < 0.01
        for mine, before in zip(
            bond_lengths_and_angles(system, turned),
            bond_lengths_and_angles(system, system.positions),
            strict=True,
        ):
            np.testing.assert_allclose(mine, before, atol=1e-9)


def test_a_ring_cannot_be_turned():
    benzene = load_system("benzene")
    with pytest.raises(ValueError, match="in a ring"):
        turn(benzene, benzene.positions, (0, 1, 2, 3), 60.0)


@pytest.mark.slow
def test_a_scan_holds_its_torsion_and_the_molecule_together(tmp_path):
    import mdtraj

    student = StudentModel("default", "cpu")
    piece = torsion_piece(Store(tmp_path), student, "glycol", 60.0)
    found = piece.arrays()
    system = load_system("glycol")
    frames = analysis.make_trajectory(found["positions"], system.topology)
    angles = np.degrees(mdtraj.compute_dihedrals(frames, [system.torsion]))[:, 0]
    wrapped = (angles - found["angles"] + 180) % 360 - 180
    assert np.abs(wrapped).max() < 5
    assert np.ptp(found["energies"]) == pytest.approx(piece.numbers["barrier"])
    assert found["intact"].all()
    assert 0.1 < piece.numbers["barrier"] < 0.6


def test_a_molecule_without_a_marked_torsion_is_refused(toy, tmp_path):
    with pytest.raises(ValueError, match="benzene has no torsion"):
        torsion_piece(Store(tmp_path), toy, "benzene", 90.0)


def test_molecules_far_apart_do_not_interact(toy, tmp_path):
    dimer = dimers()["water–water"]
    found = dimer_piece(Store(tmp_path), toy, dimer).arrays()
    assert found["distances"][-1] > toy.potential.cutoff + 2
    assert abs(found["energies"][-1]) < 1e-9
    assert np.abs(found["energies"]).max() > 1e-3


def test_every_molecule_has_its_hydrogens_and_bonds():
    for name, system in molecules().items():
        lengths, _ = bond_lengths_and_angles(system, system.positions)
        assert lengths.min() > 0.9, name
        assert lengths.max() < 2.0, name
        assert len(system.bonds) >= len(system.numbers) - 1, name
    assert sum(system.torsion is not None for system in molecules().values()) == 5
