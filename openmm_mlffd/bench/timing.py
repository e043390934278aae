"""Times of an evaluation and of a step in OpenMM, and the memory that it takes."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlffd.batched import BatchedEvaluator
from openmm_mlffd.bench.systems import Structure, water
from openmm_mlffd.engine import FastEvaluator
from openmm_mlffd.evaluator import Evaluator, StudentSource
from openmm_mlffd.interfaces.openmm_force import VERSION, ComputationSettings, StudentComputation
from openmm_mlffd.potential import Potential
from openmm_mlffd.units import ANGSTROM_PER_NM

N_SAMPLES = 20
"""Samples of which the median is taken, at least."""

_SHAKE = 0.01  # Å: positions differ from one evaluation to the next
_LONGEST = 8.0  # s, of the samples of one number; fewer samples beyond


def evaluation_time(
    evaluator: Evaluator, structure: Structure, *, shift: float = 0.0
) -> dict[str, float]:
    """Median time [s] of energy and forces, from positions in numpy to forces on the host.

    Parameters
    ----------
    evaluator
        What is timed.
    structure
        The atoms, which move a little from one evaluation to the next.
    shift
        Move all of them by so much [Å] more; beyond the skin, neighbors are searched each time.

    Returns
    -------
    dict
        ``median``, ``fastest`` and ``n``, the number of samples.
    """
    rng = np.random.default_rng(0)
    x, cell = structure.positions, structure.cell
    places = [x + _SHAKE * rng.uniform(-1, 1, x.shape) + k % 2 * shift for k in range(4)]
    k = 0

    def evaluate() -> None:
        nonlocal k
        evaluator.energy_and_forces(places[k % len(places)], cell)
        k += 1

    return _sampled(evaluate)


def step_time(
    source: StudentSource,
    structure: Structure,
    *,
    engine: str | None,
    precision: str,
    platform: str,
    device: str | None,
) -> dict[str, float]:
    """Median time [s] of a step of 1 fs with a Langevin integrator, of blocks of steps.

    Parameters
    ----------
    source
        The student.
    structure
        Atoms, not far from equilibrium.
    engine
        One of `interfaces.openmm_potential.ENGINES`; None for OpenMM alone, without any force.
    precision
        Of the student.
    platform
        OpenMM's.
    device
        The student's; None for the default.
    """
    topology = make_topology(structure)
    if engine is None:
        system = openmm.System()
        for atom in topology.atoms():
            system.addParticle(atom.element.mass)
    else:
        system = make_potential(source.locate()).createSystem(
            topology, engine=engine, precision=precision,
            device=None if engine == "torchscript" else device,
        )  # fmt: skip
    integrator = openmm.LangevinMiddleIntegrator(
        300 * unit.kelvin, 5 / unit.picosecond, 1 * unit.femtosecond
    )
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform(platform))
    context.setPositions(structure.positions / ANGSTROM_PER_NM)
    context.setVelocitiesToTemperature(300 * unit.kelvin, 1)

    def energy() -> float:
        return float(context.getState(energy=True).getPotentialEnergy()._value)

    first = energy()
    integrator.step(5)
    energy()
    start = time.perf_counter()
    integrator.step(5)
    context.getState(positions=True)
    n_steps = max(5, round(0.02 / max(1e-5, (time.perf_counter() - start) / 5)))

    def block() -> None:
        integrator.step(n_steps)
        context.getState(positions=True)  # waits for the last step

    found = _sampled(block)
    if not math.isfinite(energy()) or (engine is not None and energy() > first + 1e5):
        raise RuntimeError("the simulation that was timed blew up")
    return {"median": found["median"] / n_steps, "fastest": found["fastest"] / n_steps} | {
        "n": found["n"], "steps": n_steps
    }  # fmt: skip


def callback_time(source: StudentSource, structure: Structure, precision: str) -> dict[str, float]:
    """Median time [s] of what a `PythonForce` does around its kernels, without them.

    From OpenMM's State to forces in numpy, with the evaluation itself left out: what Python costs
    in each step. On the CPU the check of how far atoms have moved is in it, on a GPU it is not.

    Parameters
    ----------
    source
        The student.
    structure
        The atoms.
    precision
        Of the student.
    """
    settings = ComputationSettings(
        version=VERSION, name=source.name, path=source.path, sha256=source.sha256,
        numbers=structure.numbers.tolist(), atoms=None, periodic=structure.cell is not None,
        precision=precision, device=None, kernels="fused", self_test=False,
    )  # fmt: skip
    computation = StudentComputation(settings)
    system = openmm.System()
    for _ in structure.numbers:
        system.addParticle(1.0)
    if structure.cell is not None:
        system.setDefaultPeriodicBoxVectors(*(structure.cell / ANGSTROM_PER_NM))
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
    )
    context.setPositions(structure.positions / ANGSTROM_PER_NM)
    state = context.getState(positions=True)
    computation(state)
    evaluator = computation.start()
    assert isinstance(evaluator, FastEvaluator)
    with evaluator.without_kernels():
        return _sampled(partial(_call, computation, state))


def _call(computation: StudentComputation, state: openmm.State) -> None:
    computation(state)


def batch_time(potential: Potential, n_systems: int, n_atoms: int) -> dict[str, float]:
    """Time [s] of many small systems in one batch, and of one system of as many atoms.

    Both are evaluated again and again with positions that change a little, as replicas and long
    simulations are.
    """
    small, large = water(n_atoms), water(n_systems * n_atoms)
    rng = np.random.default_rng(0)

    def moved(structure: Structure) -> NDArray[np.float64]:
        return structure.positions + _SHAKE * rng.uniform(-1, 1, structure.positions.shape)

    evaluator = BatchedEvaluator(potential)
    batches = [[(small.numbers, moved(small), small.cell)] * n_systems for _ in range(4)]
    ones = [[(large.numbers, moved(large), large.cell)] for _ in range(4)]
    found = {}
    for name, systems in (("batch", batches), ("one", ones)):
        found[name] = _sampled(partial(_next_batch, evaluator, itertools.cycle(systems)))
    return {
        "batch": found["batch"]["median"], "one": found["one"]["median"],
        "ratio": found["batch"]["median"] / found["one"]["median"],
    }  # fmt: skip


def _next_batch(evaluator: BatchedEvaluator, batches: Iterator[Any]) -> None:
    evaluator.evaluate(next(batches))


def device_memory(make: Callable[[], Evaluator], structure: Structure) -> dict[str, float]:
    """Most GPU memory [bytes] in use while an evaluator is made and works, and held by torch.

    On the CPU, nothing is measured.
    """
    if not torch.cuda.is_available():
        return {}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = torch.cuda.memory_reserved()
    evaluator = make()
    for _ in range(3):
        evaluator.predict(structure.positions, structure.cell, virial=False)
    torch.cuda.synchronize()
    return {
        "peak": torch.cuda.max_memory_allocated() - before,
        "held": torch.cuda.memory_reserved() - held,
    }


def _sampled(function: Callable[[], None]) -> dict[str, float]:
    """Times of a function, after it was warmed up."""
    start = time.perf_counter()
    for n in range(12):
        function()
        if n >= 2 and time.perf_counter() - start > 0.5:
            break
    _wait()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 10 * N_SAMPLES and (
        time.perf_counter() - start < 1.0
        or (len(times) < N_SAMPLES and time.perf_counter() - start < _LONGEST)
    ):
        before = time.perf_counter()
        function()
        times.append(time.perf_counter() - before)
    return {"median": statistics.median(times), "fastest": min(times), "n": len(times)}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_potential(path: Path | None = None) -> MLPotential:
    """The potential of a student, also where the package is not installed and has no entry point.

    Parameters
    ----------
    path
        Student file; None for the default student.
    """
    from openmm_mlffd.interfaces.openmm_factory import MLFFDPotentialImplFactory

    try:
        return MLPotential("mlffd", modelPath=path)
    except ValueError:
        MLPotential.registerImplFactory("mlffd", MLFFDPotentialImplFactory())
        return MLPotential("mlffd", modelPath=path)


def make_topology(structure: Structure) -> app.Topology:
    """A Topology of the atoms; consecutive O, H, H are molecules of water."""
    topology = app.Topology()
    chain, numbers = topology.addChain(), structure.numbers.tolist()
    residue: Any = None
    for i, z in enumerate(numbers):
        if residue is None or z == 8:
            residue = topology.addResidue("HOH", chain)
        element = app.Element.getByAtomicNumber(z)
        topology.addAtom(f"{element.symbol}{i}", element, residue)
    if structure.cell is not None:
        topology.setPeriodicBoxVectors(structure.cell / ANGSTROM_PER_NM * unit.nanometer)
    return topology
