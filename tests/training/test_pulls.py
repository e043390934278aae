"""Hydrogens that are drawn to other atoms, with the bundled student `small` as the force field."""

import numpy as np
import pytest

pytest.importorskip("warp")

from openmm_mlffd.engines import open_evaluator
from openmm_mlffd.evaluator import StudentSource
from openmm_mlffd.modelfile import find_student
from openmm_mlffd.training.active.config import ExploreConfig
from openmm_mlffd.training.active.explore import Students, explore
from openmm_mlffd.training.active.pulls import BEYOND, Pull, PulledForces, choose_pulls
from openmm_mlffd.training.hdf5 import concatenate
from openmm_mlffd.training.replicas import EvaluatorForces, Failure, Guard, Replica, Replicas
from openmm_mlffd.training.sources import Frame, pack
from openmm_mlffd.validation.suite.systems import load_system

GLYCOL = load_system("glycol")


def replicas_of(*names, forces=None, seed=0):
    systems = [load_system(name) for name in names]
    numbers = np.concatenate([s.numbers for s in systems])
    if forces is None:
        evaluator = open_evaluator(StudentSource.find("small"), numbers.tolist(), device="cpu")
        forces = PulledForces(EvaluatorForces(evaluator))
    made = [Replica(s.numbers, s.positions, 300.0) for s in systems]
    return forces, Replicas(made, forces, cutoff=5.0, rng=np.random.default_rng(seed))


def difference(pull, positions):
    h = positions[pull.hydrogen]
    return np.linalg.norm(h - positions[pull.donor]) - np.linalg.norm(h - positions[pull.acceptor])


def test_springs_are_derivatives_of_their_energies():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, 3))
    forces = PulledForces(lambda x, _: (np.zeros(len(x)), np.zeros_like(x)))
    forces.start([Pull(0, 1, 2), Pull(3, 4, 2)], x + 0.3 * rng.normal(size=x.shape))
    forces.move(0.4)
    energies, found = forces.spring(x)
    assert energies.min() > 0.01
    h = 1e-5
    for i, k in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i, k] = h
        slope = (forces.spring(x + step)[0].sum() - forces.spring(x - step)[0].sum()) / (2 * h)
        assert -found[i, k] == pytest.approx(slope, abs=1e-7)
    np.testing.assert_allclose(forces(x, None)[1], found)
    np.testing.assert_allclose(forces(x, None)[0], 0.0)  # energies are the force field's own
    np.testing.assert_allclose(found.sum(0), 0.0, atol=1e-12)
    forces.move(0.7)
    assert not forces(x, None)[1].any()  # the spring is off


def test_chosen_hydrogens_have_a_bond_and_a_place_to_go():
    _, dynamics = replicas_of("glycol", "benzene", "water", "glycol")
    chosen = {}
    for seed in range(60):
        for pull in choose_pulls(dynamics, 1.0, np.random.default_rng(seed)):
            assert dynamics.numbers[pull.hydrogen] == 1
            assert dynamics.numbers[pull.acceptor] > 1
            assert len({int(dynamics.system[k]) for k in pull}) == 1
            d = np.linalg.norm(
                dynamics.local[list(pull)[::2]] - dynamics.local[pull.hydrogen], axis=1
            )
            assert d[0] < 1.2 < 1.5 < d[1] < 3.5
            where = int(dynamics.system[pull.hydrogen])
            chosen.setdefault(where, []).append(int(dynamics.numbers[pull.donor]))
    assert set(chosen) == {0, 1, 3}  # water has no other heavy atom
    # of six hydrogens of glycol two are of hydroxyls, which are the likelier ones
    assert np.mean(np.array(chosen[0]) == 8) > 0.4
    assert not choose_pulls(dynamics, 0.0, np.random.default_rng(0))
    half = [len(choose_pulls(dynamics, 0.5, np.random.default_rng(s))) for s in range(40)]
    assert 1.0 < np.mean(half) < 2.0


def test_hydrogen_comes_to_its_new_place_and_is_no_failure():
    forces, dynamics = replicas_of("glycol")
    pulls = choose_pulls(dynamics, 1.0, np.random.default_rng(3))
    forces.start(pulls, dynamics.positions)
    limits = Failure(energy=2.0, closest=0.4, stretched=1.3)
    guard = Guard(dynamics, limits, free=[p.hydrogen for p in pulls])
    strict = Guard(dynamics, limits)
    (pull,) = pulls
    assert difference(pull, dynamics.positions) < -0.5
    seen = []
    for done in range(0, 60, 10):
        forces.move(done / 100)
        assert not dynamics.run(40)
        seen.append(difference(pull, dynamics.positions))
    assert seen[-1] > 0.5 * BEYOND
    assert not guard.look()
    assert "times as long as at the start" in strict.look()[0]


def test_exploring_with_pulls_collects_transfers(monkeypatch):
    frame = Frame(GLYCOL.numbers, GLYCOL.positions, 0, "glycol", "molecules")
    starts = concatenate([pack(frame, ["molecules"])] * 3)
    students = Students([find_student("small")], "cpu")

    def collected(pull):
        config = ExploreConfig(
            starts=["none"], temperatures=[300.0], picoseconds=0.1, look=10, spacing=0.01,
            threshold=0.0, pull=pull, energy_jump=3.0,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        frames = explore(starts, [0, 1, 2], config, students, rng, lambda _: None)
        x = frames.positions.reshape(-1, len(GLYCOL.numbers), 3)
        hydrogens, heavy = np.flatnonzero(GLYCOL.numbers == 1), np.flatnonzero(GLYCOL.numbers > 1)
        far = np.linalg.norm(x[:, hydrogens, None] - x[:, None, heavy], axis=-1).min(2)
        nearest = np.linalg.norm(x[:, hydrogens, None] - x[:, None, heavy], axis=-1).argmin(2)
        return frames, far, nearest

    frames, far, nearest = collected(1.0)
    home = collected(0.0)[2][0]
    assert len(frames.time) > 15
    assert far.max() > 1.25  # on its way, with a bond to none
    assert (nearest != home).any(1).sum() >= 3  # and at another atom
    assert not (collected(0.0)[2] != home).any()
