"""How far each engine and precision is from plain torch in float64."""

import numpy as np
import openmm
import torch
from openmm import unit

from openmm_mlffd.bench.systems import Structure, relaxed, water
from openmm_mlffd.bench.timing import make_potential, make_topology
from openmm_mlffd.engine import FastEvaluator
from openmm_mlffd.evaluator import Evaluation, StudentSource
from openmm_mlffd.potential import Potential
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

PRECISIONS = ("double", "single", "mixed")


def structures(potential: Potential) -> dict[str, Structure]:
    """What is compared: boxes with several bins and with none, skewed, and no box."""
    device = next(potential.parameters()).device
    found = {}
    for name, n in [("water box", 51), ("water box", 999), ("water box", 6000)]:
        s = water(n)
        x = relaxed(FastEvaluator(potential, s.numbers), s.positions, s.cell)
        found[f"{name}, {n}"] = s._replace(positions=x)
        if device.type == "cpu" and n > 500:
            break
    n = max(len(s.numbers) for s in found.values() if len(s.numbers) < 1000)
    base = found[f"water box, {n}"]
    assert base.cell is not None
    skewed = base.cell.copy()
    skewed[1, 0] = 0.4 * base.cell[0, 0]
    skewed[2, :2] = -0.3 * base.cell[0, 0], 0.2 * base.cell[1, 1]
    found[f"skewed box, {n}"] = base._replace(cell=skewed)
    found[f"cluster, {n}"] = base._replace(cell=None)
    return found


def deviation(
    potential: Potential, structure: Structure, exact: Evaluation, precision: str
) -> dict[str, float]:
    """Differences to plain torch in float64.

    Parameters
    ----------
    potential
        The student in double precision, on the device to be tested.
    structure
        The atoms.
    exact
        What `Evaluator` says of them.
    precision
        Of the fused kernels.

    Returns
    -------
    dict
        ``force_max`` and ``force_rms`` [eV/Å], ``energy`` and ``virial`` [eV/atom], and, to compare
        with, the root mean square ``force`` itself [eV/Å].
    """
    fast = FastEvaluator(potential, structure.numbers, precision=precision)
    found = fast.compute(structure.positions, structure.cell)
    difference, n_atoms = found.forces - exact.forces, len(structure.numbers)
    return {
        "force_max": float(np.abs(difference).max()),
        "force_rms": float(np.sqrt(np.mean(difference**2))),
        "energy": abs(found.energy - exact.energy) / n_atoms,
        "virial": float(np.abs(found.virial - exact.virial).max()) / n_atoms,
        "force": float(np.sqrt(np.mean(exact.forces**2))),
    }


def energy_drift(
    source: StudentSource,
    structure: Structure,
    precision: str,
    *,
    platform: str,
    n_steps: int,
    time_step: float = 0.0005,
) -> dict[str, float]:
    """Drift and scatter of a student's total energy, after a short equilibration.

    Returns
    -------
    dict
        ``drift`` [meV/(atom ps)], the slope of a straight line, and ``scatter`` [meV/atom] about
        it, over ``time`` [ps].
    """
    topology = make_topology(structure)
    system = make_potential(source.locate()).createSystem(
        topology, engine="python", precision=precision
    )
    bath = openmm.LangevinMiddleIntegrator(300.0, 10.0, 0.0005)
    bath.setRandomNumberSeed(1)
    integrator = openmm.CompoundIntegrator()
    integrator.addIntegrator(bath)
    integrator.addIntegrator(openmm.VerletIntegrator(time_step))
    name = openmm.Platform.getPlatform(platform)
    properties = {"Precision": "mixed"} if platform in ("CUDA", "HIP", "OpenCL") else {}
    context = openmm.Context(system, integrator, name, properties)
    context.setPositions(structure.positions / ANGSTROM_PER_NM)
    context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    integrator.step(n_steps // 4)
    integrator.setCurrentIntegrator(1)
    times, energies = [], []
    for k in range(50):
        integrator.step(max(1, n_steps // 50))
        state = context.getState(energy=True)
        total = state.getPotentialEnergy()._value + state.getKineticEnergy()._value
        times.append((k + 1) * max(1, n_steps // 50) * time_step)
        energies.append(total / KJ_PER_MOL_PER_EV * 1e3 / len(structure.numbers))
    slope, intercept = np.polyfit(times, energies, 1)
    rest = np.array(energies) - (slope * np.array(times) + intercept)
    return {"drift": float(slope), "scatter": float(rest.std()), "time": times[-1]}


def kernel_times(
    potential: Potential, structure: Structure, precision: str, *, n: int = 10
) -> list[dict[str, float | str]]:
    """Where the time of an evaluation goes on a GPU: kernels by their share, largest first.

    Returns
    -------
    list of dict
        ``kernel``, ``calls`` and ``time`` [s] in one evaluation.
    """
    from torch.profiler import ProfilerActivity, profile

    evaluator = FastEvaluator(potential, structure.numbers, precision=precision)
    for _ in range(3):
        evaluator.predict(structure.positions, structure.cell, virial=False)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(n):
            evaluator.predict(structure.positions, structure.cell, virial=False)
        torch.cuda.synchronize()
    rows: list[dict[str, float | str]] = [
        {"kernel": e.key[:70], "calls": e.count / n, "time": e.self_device_time_total / n * 1e-6}
        for e in profiler.key_averages()
        if e.self_device_time_total > 0 and e.device_type != torch.autograd.DeviceType.CPU
    ]
    return sorted(rows, key=lambda row: -float(row["time"]))
