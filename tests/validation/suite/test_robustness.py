import numpy as np
import pytest

from openmm_mlffd.validation.suite.models import PotentialModel
from openmm_mlffd.validation.suite.plan import PEPTIDE, RobustnessPlan
from openmm_mlffd.validation.suite.robustness import SHORTEST, distort, verdict
from openmm_mlffd.validation.suite.robustness_section import run_robustness
from openmm_mlffd.validation.suite.systems import load_system

PLAN = RobustnessPlan(
    distorted=40, minimizations=2, hot_picoseconds=0.02, hot_molecules=("methanol",)
)


def nearest(x):
    distances = np.linalg.norm(x[:, None] - x, axis=2)
    return distances[np.triu_indices(len(x), 1)].min()


@pytest.mark.parametrize("kind", ["rattled", "clashing", "squeezed", "overlapping"])
def test_distorted_structures_are_distorted_but_no_atoms_coincide(kind):
    system = load_system(PEPTIDE)
    rng = np.random.default_rng(0)
    rest = nearest(system.positions)
    shortest = []
    for _ in range(20):
        found = distort(system, kind, rng)
        assert len(found.numbers) == len(found.positions)
        shortest.append(nearest(found.positions))
    assert min(shortest) >= SHORTEST
    assert np.mean(shortest) < rest
    if kind == "overlapping":
        assert len(found.numbers) == 2 * len(system.numbers)


def test_a_sound_model_has_no_holes(make_springs, make_job):
    system = load_system("methanol")

    class Any(type(make_springs(system.positions))):
        """Springs for one methanol, nothing between two of them."""

        def label(self, batch, *, precision="single"):
            from openmm_mlffd.training.teacher_worker import select

            labels = None
            parts = []
            for i, n in enumerate(np.diff(batch.offsets)):
                one = select(batch, np.array([i]))
                for k in range(n // 6):
                    rows = slice(6 * k, 6 * k + 6)
                    parts.append(
                        one._replace(positions=one.positions[rows], offsets=np.array([0, 6]))
                    )
            energies = [super(Any, self).label(p) for p in parts]
            from openmm_mlffd.training.teacher_worker import unknown_labels

            labels = unknown_labels(batch)
            labels.forces[:] = np.concatenate([e.forces for e in energies])
            owner = np.repeat(np.arange(len(labels.energy)), np.diff(batch.offsets) // 6)
            labels.energy[:] = np.bincount(owner, [e.energy[0] for e in energies])
            return labels

    result = run_robustness(make_job(Any(system.positions), robustness=PLAN))
    assert result.passed, [c for c in result.checks if not c.passed]
    assert result.numbers["minimizations"]["outcomes"] == {"converged": 2}
    assert result.numbers["distorted"]["lowest"] > 0


def test_a_hole_at_short_distances_is_found(toy, make_job):
    class Hole(PotentialModel):
        """Atoms nearer than 0.8 Å gain 1,000 eV."""

        def label(self, batch, *, precision="single"):
            labels = super().label(batch, precision=precision)
            for i, (a, b) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
                if nearest(batch.positions[a:b]) < 0.8:
                    labels.energy[i] -= 1000.0
            return labels

    result = run_robustness(make_job(Hole(toy.potential, "hole", "hole"), robustness=PLAN))
    (check,) = [c for c in result.checks if c.name == "robustness: distorted structures in a hole"]
    assert check.value >= 5
    assert not check.passed
    assert result.numbers["distorted"]["hole_of"]


def test_forces_that_are_not_finite_are_found(toy, make_job):
    class Infinite(PotentialModel):
        def label(self, batch, *, precision="single"):
            labels = super().label(batch, precision=precision)
            for i, (a, b) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
                if nearest(batch.positions[a:b]) < 0.7:
                    labels.forces[a] = np.nan
                    labels.energy[i] = np.nan
            return labels

    result = run_robustness(make_job(Infinite(toy.potential, "x", "x"), robustness=PLAN))
    assert result.numbers["distorted"]["not_finite"] >= 3
    assert not result.passed


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "converged"),
        ({"largest_force": 0.5}, "slow"),
        ({"error": "NaN"}, "loud"),
        ({"energy": float("nan")}, "not finite"),
        ({"energy": None}, "not finite"),
        ({"energy": -3.0}, "hole"),
        ({"nearest": 0.4}, "fused"),
    ],
)
def test_every_end_of_a_minimisation_has_its_name(changes, expected):
    result = {"energy": 0.01, "largest_force": 0.01, "nearest": 0.95, "error": ""}
    assert verdict(result | changes, minimum=0.0) == expected
