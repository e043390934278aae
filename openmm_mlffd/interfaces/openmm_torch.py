"""Students behind OpenMM-Torch's `TorchForce`: positions and forces stay on the GPU.

The module in the `TorchForce` is one operator with the student's settings. It replays the CUDA
graph that a `PythonForce` replays too, with neighbors that are kept and validated, so what goes
wrong is an exception. A graph of the whole module (`useCUDAGraphs`) would have to search neighbors
in each step, into rows of fixed length, and could not say that they are too short: it stays off.
"""

import functools
import json
import logging
import re
import statistics
import time
from collections import OrderedDict
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor, nn

from openmm_mlffd.interfaces.openmm_force import ComputationSettings, StudentComputation

_MOST_KEPT = 8  # students with their atoms; one that is dropped is made again when asked for
_N_STEPS, _LONGEST = 20, 1.0  # of a measurement: steps, seconds
_SPACING = 0.23  # nm, of the lattice of atoms that is measured on

_computations: "OrderedDict[str, StudentComputation]" = OrderedDict()
_chosen: dict[tuple[Any, ...], str] = {}
_log = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("mlffd_openmm", "DEF")
_LIBRARY.define("student_forces(Tensor positions, Tensor? box, str settings) -> (Tensor, Tensor)")


def computation_of(settings: str) -> StudentComputation:
    """The computation that the operator uses for these settings, as JSON."""
    found = _computations.get(settings)
    if found is None:
        found = _computations[settings] = StudentComputation(json.loads(settings))
    _computations.move_to_end(settings)
    while len(_computations) > _MOST_KEPT:
        _computations.popitem(last=False)
    return found


def _student_forces(positions: Tensor, box: Tensor | None, settings: str) -> tuple[Tensor, Tensor]:
    """Energy [kJ/mol] and forces [kJ/mol/nm], from positions and box vectors in nm."""
    return computation_of(settings).of_tensors(positions, box)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("student_forces", _student_forces, _key)


class _Bridge(nn.Module):
    """What a `TorchForce` holds: no weights, only which student it is."""

    settings: str

    def __init__(self, settings: str) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, positions: Tensor, box: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Energy [kJ/mol] and forces [kJ/mol/nm]."""
        return torch.ops.mlffd_openmm.student_forces(positions, box, self.settings)


def torch_force_class() -> Any:
    """`openmmtorch.TorchForce`.

    Raises
    ------
    ImportError
        If OpenMM-Torch is missing or cannot be loaded; says what to install.
    """
    try:
        from openmmtorch import TorchForce
    except (ImportError, OSError) as error:
        cuda = torch.version.cuda
        if cuda is None:
            advice = "it needs a PyTorch with CUDA, and then pip install 'openmmtorch[cuda13]'"
        else:
            advice = f"pip install 'openmmtorch[cuda{cuda.split('.')[0]}]'"
        raise ImportError(
            f"engine='torchscript' needs OpenMM-Torch, which cannot be loaded ({error}): {advice}; "
            "engine='python' needs nothing more"
        ) from error
    _load_late()
    return TorchForce


@functools.cache
def _load_late() -> None:
    """Load OpenMM-Torch's plugins that could not be loaded before PyTorch was.

    OpenMM loads plugins when it is imported, and these find PyTorch's libraries only where it has
    been imported before.
    """
    for failure in openmm.Platform.getPluginLoadFailures():
        found = re.search(r"Error loading library (\S*OpenMMTorch\S*?): ", failure)
        if found:
            try:
                openmm.Platform.loadPluginLibrary(found[1])
            except openmm.OpenMMException as error:
                _log.info("OpenMM-Torch: %s", error)


def make_torch_force(settings: ComputationSettings) -> Any:
    """The `TorchForce` of a student.

    Raises
    ------
    ImportError
        As of `torch_force_class`, or if OpenMM-Torch does not work with this PyTorch.
    """
    force_class = torch_force_class()
    reason = _failure(best_platform())
    if reason:
        raise ImportError(
            f"OpenMM-Torch does not work with PyTorch {torch.__version__} ({reason}): install a "
            "build of it for this PyTorch, or use engine='python'"
        )
    text = json.dumps(settings)
    module = torch.jit.script(_Bridge(text).eval())
    force = force_class(module)
    force.setOutputsForces(True)
    force.setUsesPeriodicBoundaryConditions(settings["periodic"])
    return force


def settings_of(force: openmm.Force) -> ComputationSettings | None:
    """Settings of the student behind a force; None if it is none of `make_torch_force`."""
    try:
        force_class = torch_force_class()
    except ImportError:
        return None
    if not force_class.isinstance(force):
        return None
    text = getattr(force_class.cast(force).getModule(), "settings", None)
    if not isinstance(text, str):
        return None
    settings: ComputationSettings = json.loads(text)
    return settings


def best_platform() -> str:
    """CUDA, where OpenMM and PyTorch have it; else the Reference platform."""
    names = [
        openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())
    ]
    return "CUDA" if torch.cuda.is_available() and "CUDA" in names else "Reference"


def faster_engine(settings: ComputationSettings, platform: str) -> str:
    """Which of the engines has shorter steps; measured once, then remembered and logged.

    Parameters
    ----------
    settings
        Of the student; its atoms are measured alone, on a lattice.
    platform
        OpenMM's.

    Returns
    -------
    str
        "python" or "torchscript"; "python" where the other does not work.
    """
    n_atoms = len(settings["numbers"])
    key = (settings["sha256"], settings["precision"], n_atoms.bit_length(), platform)
    if key in _chosen:
        return _chosen[key]
    try:
        torch_force_class()
        reason = _failure(platform)
    except ImportError as error:
        reason = str(error)
    if reason:
        _log.info("engine='python': %s", reason)
        _chosen[key] = "python"
        return "python"
    alone = settings | ComputationSettings(atoms=None, self_test=False)  # type: ignore[typeddict-item]
    times = {}
    for name, make in (("python", _python_force), ("torchscript", make_torch_force)):
        try:
            times[name] = step_time(make(alone), alone, platform)
        except openmm.OpenMMException as error:
            _log.warning("engine=%r does not work here: %s", name, error)
    _computations.pop(json.dumps(alone), None)
    best = min(times, key=lambda name: times[name], default="python")
    measured = ", ".join(f"{name} {1e3 * value:.3f} ms" for name, value in times.items())
    _log.info("engine=%r for %d atoms on %s (a step: %s)", best, n_atoms, platform, measured)
    _chosen[key] = best
    return best


def step_time(force: openmm.Force, settings: ComputationSettings, platform: str) -> float:
    """Median time of a step with nothing but this force [s]."""
    n_atoms = len(settings["numbers"])
    edge = int(np.ceil(n_atoms ** (1 / 3)))
    points = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"), -1).reshape(-1, 3)
    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(12.0)
    if settings["periodic"]:
        system.setDefaultPeriodicBoxVectors(*(max(0.6, edge * _SPACING) * np.eye(3)))
    system.addForce(force)
    # nothing moves: the lattice is no structure to start from
    context = openmm.Context(
        system, openmm.VerletIntegrator(1e-9), openmm.Platform.getPlatform(platform)
    )
    context.setPositions(_SPACING * points[:n_atoms])
    context.getIntegrator().step(3)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < _N_STEPS and (time.perf_counter() - began < _LONGEST or not times):
        before = time.perf_counter()
        context.getIntegrator().step(5)
        context.getState(positions=True)  # waits for the last step
        times.append((time.perf_counter() - before) / 5)
    return statistics.median(times)


def _python_force(settings: ComputationSettings) -> openmm.PythonForce:
    force = openmm.PythonForce(StudentComputation(settings))
    force.setUsesPeriodicBoundaryConditions(settings["periodic"])
    return force


class _Spring(nn.Module):
    """The simplest module of a `TorchForce`."""

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and forces of springs to the origin."""
        return (positions * positions).sum(), -2.0 * positions


@functools.cache
def _failure(platform: str) -> str:
    """Why OpenMM-Torch does not work on a platform; empty if it does.

    It is compiled for some versions of PyTorch, and says nothing before its first evaluation.
    """
    force = torch_force_class()(torch.jit.script(_Spring().eval()))
    force.setOutputsForces(True)
    system = openmm.System()
    system.addParticle(1.0)
    system.addForce(force)
    try:
        context = openmm.Context(
            system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform(platform)
        )
        context.setPositions([[1.0, 2.0, 3.0]])
        energy = context.getState(energy=True).getPotentialEnergy()._value
    except openmm.OpenMMException as error:
        return str(error).strip().split("\n")[0]
    return "" if abs(energy - 14.0) < 1e-4 else f"an energy of 14 became {energy}"
