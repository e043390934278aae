"""The self-test at first use: what it finds, what it says, what it costs."""

import logging
import time

import numpy as np
import openmm
import pytest
import torch
from openmmml import MLPotential

from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.interfaces.openmm_selftest import (
    SelfTestError,
    self_test_evaluator,
)
from openmm_mlffd.interfaces.openmm_stored import student_functions
from openmm_mlffd.potential import Potential

LOGGER = "openmm_mlffd.interfaces.openmm_selftest"


@pytest.fixture
def make_system(student_file, make_topology):
    def make(structure, **keywords):
        potential = MLPotential("mlffd", modelPath=student_file, device="cpu")
        return potential.createSystem(
            make_topology(*structure), allowMissingHydrogens=True, **keywords
        )

    return make


@pytest.fixture(params=["molecule", "box"])
def structure(request, ethanol, reduced_box):
    return ethanol if request.param == "molecule" else reduced_box


@pytest.mark.parametrize("precision", ["single", "double"])
@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_a_sound_student_passes_and_says_so_once(
    make_system, make_context, structure, caplog, precision, platform
):
    context = make_context(
        make_system(structure, precision=precision), structure.positions, platform=platform
    )
    with caplog.at_level(logging.INFO, logger=LOGGER):
        for _ in range(3):
            context.getState(energy=True)
    assert len(caplog.messages) == 1
    assert f"{len(structure.numbers)} atoms, {precision} precision on cpu" in caplog.messages[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["single", "double"])
def test_the_bundled_student_passes_on_a_gpu(
    make_topology, make_context, energy_and_forces, ethanol, caplog, precision
):
    found = []
    for device, platform in (("cuda", "CUDA"), ("cpu", "Reference")):
        system = MLPotential("mlffd", device=device).createSystem(
            make_topology(*ethanol), precision=precision
        )
        context = make_context(system, ethanol.positions, platform=platform)
        with caplog.at_level(logging.INFO, logger=LOGGER):
            found.append(energy_and_forces(context))
    assert "precision on cuda" in caplog.messages[0]
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-3)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-3)


def broken(kind):
    """A potential's forward that is wrong as engines have been wrong."""
    right = Potential.forward
    calls = []

    def forward(self, graph):
        found = right(self, graph)
        if self.network.embedding.weight.dtype == torch.float64:
            return found  # the comparison itself
        calls.append(None)
        if kind == "energy offset":
            return found._replace(energy=found.energy + 0.3)
        if kind == "offset from the second call on":
            return found._replace(energy=found.energy + 0.3 * (len(calls) > 2))
        if kind == "force of the last atom lost":
            forces = found.forces.clone()
            forces[-1] = 0.0
            return found._replace(forces=forces)
        return found._replace(forces=1.002 * found.forces)

    return forward


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("energy offset", "energy"),
        ("offset from the second call on", "energy"),
        ("force of the last atom lost", "forces"),
        ("forces of other units", "forces"),
    ],
)
def test_an_engine_that_computes_something_else_is_an_exception(
    make_system, make_context, ethanol, monkeypatch, kind, said
):
    context = make_context(make_system(ethanol), ethanol.positions)
    monkeypatch.setattr(Potential, "forward", broken(kind))
    for _ in range(2):  # it does not pass the second time either
        with pytest.raises(openmm.OpenMMException, match=f"failed its self-test .*{said}"):
            context.getState(energy=True)


def test_forces_that_are_no_derivative_are_an_exception(
    make_system, make_context, ethanol, monkeypatch
):
    right = Potential.forward

    def forward(self, graph):
        found = right(self, graph)
        swirl = torch.linalg.cross(graph.positions, torch.ones_like(graph.positions))
        return found._replace(forces=found.forces + 0.01 * swirl)

    context = make_context(make_system(ethanol), ethanol.positions)
    monkeypatch.setattr(Potential, "forward", forward)
    with pytest.raises(openmm.OpenMMException, match="finite differences"):
        context.getState(energy=True)


def test_selftest_false_skips_it_and_is_stored(make_system, make_context, ethanol, monkeypatch):
    monkeypatch.setattr(Potential, "forward", broken("energy offset"))
    system = make_system(ethanol, selfTest=False)
    for s in (system, openmm.XmlSerializer.clone(system)):
        make_context(s, ethanol.positions).getState(energy=True)
        assert student_functions(s)[0].settings["self_test"] is False
    again = openmm.XmlSerializer.clone(make_system(ethanol))
    with pytest.raises(openmm.OpenMMException, match="self-test"):
        make_context(again, ethanol.positions).getState(energy=True)


def test_selftest_takes_only_true_and_false(make_system, ethanol):
    with pytest.raises(ValueError, match="selfTest must be True or False, got 'no'"):
        make_system(ethanol, selfTest="no")


def test_atoms_that_clash_pass_too(make_topology, make_context, ethanol):
    system = MLPotential("mlffd", device="cpu").createSystem(make_topology(*ethanol))
    computation = openmm.XmlSerializer.clone(system)
    positions = ethanol.positions.copy()
    positions[4] = positions[6] + 0.3
    energy = make_context(computation, positions).getState(energy=True).getPotentialEnergy()
    assert np.isfinite(energy._value)


def test_the_bundled_student_passes_within_the_cost_of_some_steps(ethanol, caplog):
    from openmm_mlffd.evaluator import StudentSource

    source = StudentSource.find()
    evaluator = Evaluator(source.load(), ethanol.numbers)
    found = self_test_evaluator(evaluator, source, "single", ethanol.positions, None)
    assert not found.failures
    assert found.force_error < 1e-4
    assert found.difference_error < 1e-4
    began = time.perf_counter()
    for _ in range(5):
        evaluator.predict(ethanol.positions)
    step = (time.perf_counter() - began) / 5
    again = self_test_evaluator(evaluator, source, "single", ethanol.positions, None)
    assert again.seconds < 40 * step + 0.2  # the file is read and hashed once more


def test_systems_too_large_to_be_compared_are_left_untested_and_that_is_said(
    monkeypatch, ethanol, student_file, caplog
):
    from openmm_mlffd.evaluator import StudentSource
    from openmm_mlffd.interfaces import openmm_selftest

    source = StudentSource.find(student_file)
    evaluator = Evaluator(source.load(), ethanol.numbers)
    monkeypatch.setattr(openmm_selftest, "LARGEST", 8)
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        assert self_test_evaluator(evaluator, source, "single", ethanol.positions, None) is None
    assert "9 atoms are more than 8" in caplog.text


def test_the_error_is_a_runtime_error(ethanol):
    assert issubclass(SelfTestError, RuntimeError)
