import openmm
import pytest
import torch
from openmmml import MLPotential

from openmm_mlffd.interfaces.openmm_device import (
    AmbiguousDeviceError,
    Running,
    device_of,
    running_contexts,
)


def test_device_is_that_of_the_only_context():
    assert device_of([Running(1, 22, 7, 0.5)], 22, 3, 0.1) == 1
    assert device_of([Running(1, 22, 7, 0.5), Running(1, 22, 9, 0.7)], 22, 3, 0.1) == 1


def test_context_at_the_same_step_and_time_is_the_one():
    contexts = [Running(0, 22, 7, 0.5), Running(1, 22, 3, 0.1), Running(2, 22, 3, 0.2)]
    assert device_of(contexts, 22, 3, 0.1) == 1


def test_context_with_too_few_particles_is_not_the_one():
    contexts = [Running(0, 10, 3, 0.1), Running(3, 5000, 3, 0.1)]
    assert device_of(contexts, 22, 3, 0.1) == 3


def test_contexts_that_cannot_be_told_apart_are_an_error():
    contexts = [Running(0, 22, 0, 0.0), Running(1, 22, 0, 0.0)]
    with pytest.raises(AmbiguousDeviceError, match="GPUs 0, 1 and are at the same step"):
        device_of(contexts, 22, 0, 0.0)


def test_context_on_the_cpu_has_no_device(student_file, make_topology, make_context, ethanol):
    system = MLPotential("mlffd", modelPath=student_file).createSystem(
        make_topology(ethanol.numbers), selfTest=False
    )
    context = make_context(system, ethanol.positions)
    before = running_contexts()
    assert all(c.n_particles != len(ethanol.numbers) for c in before)
    assert device_of([], 9, 0, 0.0) is None
    del context


@pytest.mark.gpu
def test_student_is_on_the_device_of_its_context(student_file, make_topology, ethanol):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    energies = []
    for index in range(2):
        system = MLPotential("mlffd", modelPath=student_file).createSystem(
            make_topology(ethanol.numbers)
        )
        context = openmm.Context(
            system, openmm.VerletIntegrator(0.0005), openmm.Platform.getPlatform("CUDA"),
            {"DeviceIndex": str(index)},
        )  # fmt: skip
        assert Running(index, 9, 0, 0.0) in running_contexts()
        before = torch.cuda.memory_allocated(index)
        context.setPositions(ethanol.positions / 10)
        energies.append(context.getState(energy=True).getPotentialEnergy()._value)
        assert torch.cuda.memory_allocated(index) > before
        del context
    assert abs(energies[0] - energies[1]) < 1e-6
