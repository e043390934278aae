import numpy as np
import pytest

from openmm_mlffd.engines import open_evaluator
from openmm_mlffd.evaluator import StudentSource
from openmm_mlffd.training.replicas import EvaluatorForces, Failure, Guard, Replica, Replicas

METHANE = np.array([6, 1, 1, 1, 1])
TETRAHEDRON = np.array([[0, 0, 0], [1, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]]) * 0.629


class Springs:
    """Harmonic bonds from the first atom of each five to the others; nothing else."""

    def __call__(self, positions, cell):
        x = positions.reshape(-1, 5, 3)
        vectors = x[:, 1:] - x[:, :1]
        r = np.linalg.norm(vectors, axis=2, keepdims=True)
        pull = 20.0 * (r - 1.089) * vectors / r
        forces = np.concatenate([pull.sum(1, keepdims=True), -pull], 1)
        energies = np.zeros(x.shape[:2])
        energies[:, 0] = 10.0 * ((r - 1.089) ** 2).sum((1, 2))
        return energies.ravel(), forces.reshape(-1, 3)


def make(temperatures, forces=None, seed=0, **settings):
    replicas = [Replica(METHANE, TETRAHEDRON, t) for t in temperatures]
    rng = np.random.default_rng(seed)
    return Replicas(replicas, forces or Springs(), cutoff=5.0, rng=rng, **settings)


def student_forces(n):
    source = StudentSource.find("default")
    return EvaluatorForces(open_evaluator(source, METHANE.tolist() * n, device="cpu"))


def test_each_replica_has_its_own_temperature():
    replicas = make([300.0] * 20 + [600.0] * 20, friction=50.0)
    replicas.run(400)
    seen = []
    for _ in range(150):
        replicas.run(10)
        seen.append(replicas.kinetic_temperature())
    mean = np.mean(seen, axis=0)
    assert mean[:20].mean() == pytest.approx(300.0, rel=0.03)
    assert mean[20:].mean() == pytest.approx(600.0, rel=0.03)


def test_replicas_do_not_feel_one_another():
    together, alone = make([300.0, 300.0], student_forces(2)), make([300.0], student_forces(1))
    np.testing.assert_allclose(together.force[:5], alone.force, rtol=0, atol=1e-6)
    assert together.energy() == pytest.approx([alone.energy()[0]] * 2, abs=1e-5)
    distance = np.linalg.norm(together.positions[:5, None] - together.positions[5:], axis=2)
    assert distance.min() > 2 * 15.0


def test_centers_of_mass_stay_where_they_are():
    replicas = make([900.0] * 3)
    replicas.run(500)
    masses = np.array([12.011, *[1.008] * 4])
    centers = masses @ replicas.local.reshape(3, 5, 3) / masses.sum()
    np.testing.assert_allclose(centers, 0.0, atol=1e-9)
    assert np.abs(replicas.local.reshape(3, 5, 3) - TETRAHEDRON).max() > 0.1


def test_replica_that_loses_all_sense_is_stopped_and_the_others_go_on():
    class Exploding(Springs):
        def __call__(self, positions, cell):
            energies, forces = super().__call__(positions, cell)
            forces[6] += np.array([np.nan, 0.0, 0.0]) if self.bad else 0.0
            return energies, forces

    forces = Exploding()
    forces.bad = False
    replicas = make([300.0] * 3, forces)
    forces.bad = True
    replicas.run(1)  # the force of the new positions is the first that is wrong
    assert list(replicas.run(1)) == [1]
    forces.bad = False
    assert replicas.run(5) == {}
    assert replicas.moving.tolist() == [True, False, True]
    assert np.isfinite(replicas.positions).all()
    np.testing.assert_allclose(replicas.local[5:10], replicas.start[5:10], rtol=0, atol=1e-12)
    assert (replicas.kinetic_temperature()[[0, 2]] > 1.0).all()


@pytest.mark.parametrize(
    ("move", "reason"),
    [
        ([0.7, 0.7, 0.7], "the bond of C0 and H1 is 2.11 times as long as at the start"),
        ([-0.4, -0.4, -0.4], "C0 and H1 are 0.40 Å apart"),
        ([20.0, 20.0, 20.0], "the bond of C0 and H1"),
    ],
)
def test_guard_tells_what_is_no_molecule_any_more(move, reason):
    replicas = make([300.0, 300.0])
    guard = Guard(replicas, Failure())
    assert len(guard.length) == 8
    assert guard.length == pytest.approx(1.0895, abs=1e-3)
    assert guard.look() == {}
    replicas.positions[6] += move
    found = guard.look()
    assert list(found) == [1]
    assert found[1].startswith(reason)


def test_guard_tells_a_jump_of_the_energy():
    replicas = make([300.0, 300.0])
    guard = Guard(replicas, Failure(energy=0.1))
    replicas.energies[7] -= 0.6
    assert guard.look() == {1: "the energy changed by -0.12 eV/atom"}
    replicas.energies[:] = np.nan
    assert set(guard.look().values()) == {"the energy is not finite"}


def test_bonds_reach_across_the_box():
    cell = 6.0 * np.eye(3)
    moved = TETRAHEDRON + np.array([0.0, 0.0, 5.9])
    moved[moved[:, 2] > 6.0, 2] -= 6.0
    replica = Replica(METHANE, moved, 300.0, cell)

    def nothing(positions, cell):
        return np.zeros(5), np.zeros((5, 3))

    replicas = Replicas([replica], nothing, cutoff=5.0, rng=np.random.default_rng(0))
    guard = Guard(replicas, Failure())
    assert guard.length == pytest.approx([1.0895] * 4, abs=1e-3)
    assert guard.stretch() == pytest.approx([1.0] * 4)
    assert guard.look() == {}


def test_run_that_was_interrupted_is_the_same_as_one_that_was_not():
    whole, first = make([300.0, 500.0]), make([300.0, 500.0])
    for replicas in (whole, first):
        replicas.run(20)
    second = make([300.0, 500.0], seed=9)
    second.restore(first.state(), np.random.default_rng(5))
    whole._rng = np.random.default_rng(5)
    for replicas in (whole, second):
        replicas.run(20)
    np.testing.assert_array_equal(whole.positions, second.positions)
    assert second.steps == 40


def test_several_boxes_at_once_are_refused():
    box = Replica(METHANE, TETRAHEDRON, 300.0, 9.0 * np.eye(3))
    with pytest.raises(ValueError, match="several molecules without a box"):
        Replicas([box, box], Springs(), cutoff=5.0, rng=np.random.default_rng(0))
