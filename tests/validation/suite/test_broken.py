"""Students that are broken on purpose fail the report, each at the right place."""

import numpy as np
import pytest
import torch

from openmm_mlffd.modelfile import load_student
from openmm_mlffd.validation.suite.force_section import run_forces
from openmm_mlffd.validation.suite.models import PotentialModel
from openmm_mlffd.validation.suite.nve_runs import measure_smoothness
from openmm_mlffd.validation.suite.nve_section import run_nve_section
from openmm_mlffd.validation.suite.plan import ForcePlan

GRADIENT = "NVE: forces − differences of energies, methanol"
JUMP = "NVE: jump of a force along a ramp, methanol"
RATIO = "NVE, methanol, double: rms(E) ratio for a halved time step, 0.5 to 0.25 fs"


class OneForceWrong(PotentialModel):
    """The force on the first atom of each structure has the wrong sign."""

    def label(self, batch, *, precision="single"):
        labels = super().label(batch, precision=precision)
        labels.forces[batch.offsets[:-1]] *= -1
        return labels


def failed(checks):
    return {check.name for check in checks if not check.passed}


@pytest.fixture
def cut(make_student):
    """Neighbors end at 3 Å, where the network still sees them: a cutoff that is not smooth."""
    potential = make_student()
    potential.cutoff = 3.0
    return PotentialModel(potential, "cut", "cut")


def test_a_sound_student_passes_at_constant_energy(toy, make_job):
    result = run_nve_section(make_job(toy))
    assert {GRADIENT, JUMP, RATIO} <= {check.name for check in result.checks}
    assert not failed(result.checks) & {GRADIENT, JUMP, RATIO}


def test_a_force_of_the_wrong_sign_fails_at_constant_energy(toy, make_job):
    wrong = OneForceWrong(toy.potential, "wrong", "wrong")
    found = failed(run_nve_section(make_job(wrong)).checks)
    assert {GRADIENT, RATIO} <= found
    assert JUMP not in found


def test_a_cutoff_that_is_not_smooth_fails_where_forces_jump(cut, make_job):
    _, checks = measure_smoothness(make_job(cut))
    assert failed(checks) == {JUMP}


def test_noise_on_the_weights_fails_against_the_labels(make_job, small_data):
    potential = load_student("default")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in potential.network.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight += 0.3 * weight.std(correction=0) * noise
    noisy = PotentialModel(potential, "noisy", "noisy")
    plan = ForcePlan(max_structures=10, n_worst=1)
    job = make_job(noisy, data=small_data, split="all", forces=plan)
    assert {"forces: force MAE", "forces: force RMSE"} <= failed(run_forces(job).checks)
    # it is a potential all the same: not there does it fail
    _, checks = measure_smoothness(job)
    assert GRADIENT not in failed(checks)

    sound = PotentialModel(load_student("default"), "sound", "sound")
    job = make_job(sound, data=small_data, split="all", forces=plan)
    assert "forces: force MAE" not in failed(run_forces(job).checks)


def test_numbers_that_are_not_finite_never_pass(toy, make_job):
    class Nothing(PotentialModel):
        def label(self, batch, *, precision="single"):
            labels = super().label(batch, precision=precision)
            labels.energy[:] = np.nan
            return labels

    _, checks = measure_smoothness(make_job(Nothing(toy.potential, "nothing", "nothing")))
    assert GRADIENT in failed(checks)
