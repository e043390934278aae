import numpy as np
import pytest

from openmm_mlffd.training.teacher_worker import unknown_labels
from openmm_mlffd.validation.suite.models import PotentialModel, Structure, pack
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


@pytest.fixture
def make_methanol(make_springs):
    """Springs for one methanol, nothing between two of them."""

    class Copies(make_springs):
        def label(self, batch, *, precision="single"):
            labels = unknown_labels(batch)
            labels.energy[:] = 0.0
            for i, (a, b) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
                for rows in (slice(k, k + 6) for k in range(a, b, 6)):
                    one = pack([Structure(batch.atomic_numbers[rows], batch.positions[rows])])
                    found = super().label(one)
                    labels.energy[i] += found.energy[0]
                    labels.forces[rows] = found.forces
            return labels

    return Copies


def test_a_sound_model_has_no_holes(make_methanol, make_job):
    system = load_system("methanol")
    result = run_robustness(make_job(make_methanol(system.positions), robustness=PLAN))
    assert result.passed, [c for c in result.checks if not c.passed]
    assert result.numbers["minimizations"]["outcomes"] == {"converged": 2}
    assert result.numbers["preparations"]["outcomes"] == {"converged": 2}
    assert result.numbers["relaxations"]["silent_of"] == []
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


def test_a_model_that_tears_molecules_is_found_and_prepare_says_so(make_methanol, make_job):
    """Springs twice as long as methanol's distances: a torn molecule is 0.46 eV below it."""
    model = make_methanol(2.0 * load_system("methanol").positions, stiffness=0.018)
    result = run_robustness(make_job(model, robustness=PLAN))
    assert result.numbers["minimizations"]["silent"] == 2
    assert result.numbers["relaxations"]["silent_of"] == ["methanol (torn)"]
    assert result.numbers["preparations"]["outcomes"] == {"loud": 2}
    assert result.numbers["preparations"]["silent"] == 0
    failed = {c.name for c in result.checks if not c.passed}
    assert "robustness: minimisations that failed in silence" in failed
    assert "robustness: sound molecules whose minimisation failed in silence" in failed
    assert "robustness: preparations that failed in silence" not in failed


def test_a_hole_is_no_minimum_to_compare_with(make_methanol, make_job):
    """A molecule that falls 30 eV into a hole keeps the energy of its structure before."""
    system = load_system("methanol")
    model = make_methanol(1.3 * system.positions, stiffness=40.0)
    job = make_job(model, robustness=PLAN)
    given = model.label(pack([Structure(system.numbers, system.positions)])).energy[0]
    found = run_robustness(job).numbers["relaxations"]
    assert given > 10.0
    assert found["silent_of"] == ["methanol (hole)"]
    assert found["energies"]["methanol"] == pytest.approx(given)


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
        ({"longest": 1.6}, "torn"),
        ({"longest": 1.6, "energy": -3.0}, "hole"),
        ({"longest": 1.6, "error": "NaN"}, "loud"),
    ],
)
def test_every_end_of_a_minimisation_has_its_name(changes, expected):
    result = {"energy": 0.01, "largest_force": 0.01, "nearest": 0.95, "longest": 1.05, "error": ""}
    assert verdict(result | changes, minimum=0.0) == expected
