"""Students in OpenMM: the implementation behind ``MLPotential('mlffd')``."""

import difflib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

try:
    import openmm
    from openmmml.mlpotential import MLPotentialImpl
except ImportError as error:
    raise ImportError(
        f"OpenMM and OpenMM-ML are needed ({error}): pip install 'openmm-mlffd[openmm]'"
    ) from error

from openmm_mlffd.elements import atomic_number
from openmm_mlffd.engines import PRECISIONS
from openmm_mlffd.evaluator import StudentSource, resolve_device
from openmm_mlffd.interfaces.openmm_force import VERSION, ComputationSettings, StudentComputation
from openmm_mlffd.interfaces.openmm_mixed import (
    ELECTROSTATIC,
    check_student,
    classical_part,
    embedding_force,
    interpolated,
)
from openmm_mlffd.interfaces.openmm_topology import (
    atomic_numbers,
    check_hydrogens,
)
from openmm_mlffd.modelfile import ModelFileError, read_header

ENGINES = {"auto": "auto", "python": "fused", "torchscript": "fused", "eager": "eager"}
"""Engines, and the kernels that each stands for."""

_STUDENT_KEYWORDS = ("model", "modelPath")
_EMBEDDING_KEYWORDS = ("linkAtomDistances", "mlLongRange")  # openmmml hands on its own, too


@dataclass(frozen=True)
class _Options:
    """The keywords that may be given to `MLPotential` and to `createSystem`."""

    engine: str | None = None
    precision: str | None = None
    device: Any = None
    charge: float | None = None
    multiplicity: int | None = None
    allowMissingHydrogens: bool = False
    selfTest: bool = True

    def updated(self, keywords: dict[str, Any]) -> "_Options":
        """Check and take over keywords; None leaves what is set."""
        new = replace(self, **{k: v for k, v in keywords.items() if v is not None})
        if new.precision is not None and new.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {new.precision!r}"
            )
        if new.engine is not None and new.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {new.engine!r}")
        if new.engine == "eager" and new.precision == "mixed":
            raise ValueError("engine='eager' has no mixed precision: single or double")
        if new.engine == "torchscript" and new.device is not None:
            raise ValueError(
                "with engine='torchscript' the student works on the device of its Context: leave "
                "device out, and give the Context a platform and a DeviceIndex"
            )
        if new.charge is not None and new.charge != 0:
            raise ValueError(
                f"charge={new.charge} was asked for, but the student has no charge to set: what "
                "is charged follows from the atoms (an ammonium has one hydrogen more than an "
                "amine). Check the protonation states, and leave charge out"
            )
        if new.multiplicity is not None and new.multiplicity != 1:
            raise ValueError(
                f"multiplicity={new.multiplicity} was asked for, but the student knows closed "
                "shells (multiplicity 1) only"
            )
        if new.device is not None:
            resolve_device(new.device)
        for name in ("allowMissingHydrogens", "selfTest"):
            if not isinstance(getattr(new, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(new, name)!r}")
        return new


_OPTIONS = tuple(field.name for field in fields(_Options))


class MLFFDPotentialImpl(MLPotentialImpl):
    """A student as an OpenMM potential.

    >>> MLPotential('mlffd')  # the bundled default student
    >>> MLPotential('mlffd', model='default')  # a bundled student by name
    >>> MLPotential('mlffd', modelPath='student.safetensors')  # a student file

    The following keywords may be given to `MLPotential` and to `createSystem` or
    `createMixedSystem`, where they override:

    engine
        ``'python'`` (fused kernels, a `PythonForce`), ``'torchscript'`` (fused kernels, a
        `TorchForce` of OpenMM-Torch), ``'eager'`` (plain torch, slow and simple, a `PythonForce`)
        or ``'auto'`` (default): on a GPU where both load, the one of the first two whose steps are
        shorter, measured once for each size and logged; else a `PythonForce`.
    precision
        ``'single'`` (default), ``'mixed'`` (half-precision storage of what is gathered; not for
        ``'eager'``) or ``'double'``: the arithmetic of the network. Energies and forces are summed
        in double either way.
    device
        Where the student runs, such as ``'cpu'`` or ``'cuda:1'``. By default CUDA if there is
        any, else the CPU. A `PythonForce` is not told on which device its Context runs: where
        the Context has a `DeviceIndex`, give the same one here.
    charge, multiplicity
        Only 0 and 1. Others are refused: the student cannot be told of a charge, it sees that of
        protonated and deprotonated groups from their hydrogens, and it knows closed shells only.
    allowMissingHydrogens
        Accept molecules that have carbon but, against expectation, no hydrogens.
    selfTest
        Whether the first evaluation compares the student at work with the plain network in double
        precision and with finite differences (the default), see `openmm_selftest`. It takes as
        long as about twenty steps, once for each System and process.

    The box is periodic if the Topology has box vectors. A System that is stored as XML holds
    the student's name, path and SHA-256, not its weights; reading it needs openmm_mlffd and the
    same student.

    Parameters
    ----------
    name
        Name under which the potential was asked for.
    model
        Name of a bundled student (default: ``'default'``), or path of a student file.
    modelPath
        Path of a student file.
    args
        The keywords above.

    Raises
    ------
    TypeError
        If a keyword is unknown.
    ValueError
        If the value of a keyword cannot be met, or there is no such student.
    """

    def __init__(
        self,
        name: str,
        model: str | None = None,
        modelPath: str | Path | None = None,
        **args: Any,
    ) -> None:
        self.name = name
        _refuse_unknown(args, (*_STUDENT_KEYWORDS, *_OPTIONS), "MLPotential")
        self._options = _Options().updated(args)
        if model is not None and modelPath is not None:
            raise ValueError("give either model or modelPath, not both")
        if modelPath is not None:
            path = Path(modelPath).expanduser()
            if not path.is_file():
                raise ModelFileError(f"modelPath: there is no file {path}")
            self.student = StudentSource.find(path.resolve())
        else:
            self.student = StudentSource.find(model)

    def addForces(
        self,
        topology: openmm.app.Topology,
        system: openmm.System,
        atoms: Iterable[int] | None,
        forceGroup: int,
        **args: Any,
    ) -> None:
        """Add the student's `PythonForce` to a System; called by openmmml.

        Parameters
        ----------
        topology
            The Topology, with the hydrogens that cap cut bonds at its end, if there are any.
        system
            The System; empty where openmmml interpolates.
        atoms
            Indices of the student's atoms, in any order; None for all.
        forceGroup
            The force group.
        args
            Keywords given to `createSystem` or `createMixedSystem`.

        Raises
        ------
        TypeError
            If a keyword is unknown.
        ValueError
            If there are no atoms, an atom has no element or one that the student does not know,
            hydrogens are missing, or the value of a keyword cannot be met.
        """
        options = self._call_options(args, mixed=atoms is not None)
        indices = None if atoms is None else [int(i) for i in atoms]
        chosen = _chosen_atoms(topology, indices)
        numbers = atomic_numbers(chosen, self._known_numbers())
        if not options.allowMissingHydrogens:
            check_hydrogens(topology, chosen)
        settings = ComputationSettings(
            version=VERSION,
            name=self.student.name,
            path=self.student.path,
            sha256=self.student.sha256,
            numbers=numbers,
            atoms=indices,
            periodic=_is_periodic(topology, system),
            precision=options.precision or "single",
            device=None if options.device is None else str(options.device),
            kernels=ENGINES[options.engine or "auto"],
            self_test=options.selfTest,
        )
        computation = StudentComputation(settings)
        computation.start()  # a damaged student is reported here, not in the first step
        if _engine(options, settings, system) == "torchscript":
            from openmm_mlffd.interfaces.openmm_torch import make_torch_force

            force = make_torch_force(settings | ComputationSettings(kernels="fused"))  # type: ignore[typeddict-item]
        else:
            force = openmm.PythonForce(computation)
            force.setUsesPeriodicBoundaryConditions(settings["periodic"])
            if indices is not None:
                force.setParticles(indices)
        force.setName("MLFFD")
        force.setForceGroup(forceGroup)
        system.addForce(force)

    def getSupportedEmbeddings(self) -> list[str]:
        """Embeddings besides openmmml's own; a student without charges refuses it in words."""
        return [ELECTROSTATIC]

    def createMixedSystem(
        self,
        topology: openmm.app.Topology,
        system: openmm.System,
        atoms: list[int],
        forceGroup: int,
        interpolate: bool,
        embedding: str,
        returnInfo: bool = False,
        **args: Any,
    ) -> openmm.System:
        """Make a mixed System with electrostatic embedding; called by openmmml.

        Parameters
        ----------
        topology, system, atoms, forceGroup, interpolate, returnInfo
            As of `MLPotential.createMixedSystem`; the atoms are whole molecules.
        embedding
            ``'electrostatic'``.
        args
            Keywords of this potential.

        Raises
        ------
        TypeError
            If a keyword is unknown.
        ValueError
            If the student has no charges, a molecule is cut, the System has charges in a form that
            cannot be embedded in, or as `addForces`.
        """
        options = self._call_options(args, mixed=True)
        check_student(read_header(self.student.locate()), args)
        atoms = [int(i) for i in atoms]
        chosen = _chosen_atoms(topology, atoms)
        periodic = _is_periodic(topology, system)
        student = {
            "name": self.student.name,
            "path": self.student.path,
            "sha256": self.student.sha256,
            "numbers": atomic_numbers(chosen, self._known_numbers()),
            "periodic": periodic,
            "precision": options.precision or "single",
            "device": None if options.device is None else str(options.device),
        }
        force = embedding_force(topology, system, atoms, student)
        force.setForceGroup(forceGroup)
        mixed = classical_part(topology, system, atoms)
        if not interpolate:
            self.addForces(topology, mixed, atoms, forceGroup, **args)
            mixed.addForce(force)
            return mixed

        def forces(helper: Any) -> None:
            helper.addMLPotentialTerms(self, topology, atoms, forceGroup, **args)
            helper.addMLTerm(force)

        return interpolated(topology, system, mixed, atoms, forces)

    def getMLLongRange(self) -> bool:
        """Students end at their cutoff: nothing reaches beyond."""
        return False

    def _known_numbers(self) -> list[int]:
        return [atomic_number(element) for element in read_header(self.student.locate()).elements]

    def _call_options(self, args: dict[str, Any], mixed: bool) -> _Options:
        misplaced = [key for key in _STUDENT_KEYWORDS if key in args]
        if misplaced:
            raise TypeError(f"give {misplaced[0]} to MLPotential, not when a System is made")
        known = (*_OPTIONS, *_EMBEDDING_KEYWORDS) if mixed else _OPTIONS
        _refuse_unknown(args, known, "createMixedSystem" if mixed else "createSystem")
        return self._options.updated({k: v for k, v in args.items() if k in _OPTIONS})


def _refuse_unknown(args: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    lowered = {name.lower(): name for name in known}
    for key in args:
        if key not in known:
            close = difflib.get_close_matches(key.lower().replace("_", ""), lowered, n=1)
            hint = f" did you mean {lowered[close[0]]!r}?" if close else ""
            raise TypeError(
                f"{where}: the mlffd potential has no keyword {key!r};{hint} it knows "
                f"{', '.join(known)}"
            )


def _chosen_atoms(topology: openmm.app.Topology, indices: list[int] | None) -> list[Any]:
    everything = list(topology.atoms())
    if indices is None:
        if not everything:
            raise ValueError("the Topology has no atoms")
        return everything
    if not indices:
        # for a PythonForce, no particles means all of them
        raise ValueError("there are no atoms for the student: the list of atoms is empty")
    outside = [i for i in indices if not 0 <= i < len(everything)]
    if outside:
        raise ValueError(f"there is no atom {outside[0]} in a Topology of {len(everything)} atoms")
    if len(set(indices)) != len(indices):
        twice = next(i for i in indices if indices.count(i) > 1)
        raise ValueError(f"atom {twice} is more than once in the list of atoms")
    return [everything[i] for i in indices]


def _engine(options: _Options, settings: ComputationSettings, system: openmm.System) -> str:
    """The engine that is asked for, or the one that is faster where either will do."""
    interpolates = system.getNumParticles() == 0  # a stand-in, whose forces are copied
    if options.engine == "torchscript" and interpolates:
        raise ValueError(
            "interpolate=True copies forces by way of XML, and a TorchForce is code that should "
            "not go that way: use engine='python'"
        )
    if interpolates:
        return "python"
    if options.engine == "torchscript":
        return "torchscript"
    # without a GPU a TorchForce has nothing to save, and on another device it would not run
    if options.engine not in (None, "auto") or options.device is not None:
        return "python"
    if importlib.util.find_spec("openmmtorch") is None or not torch.cuda.is_available():
        return "python"
    if importlib.util.find_spec("warp") is None:
        return "python"
    from openmm_mlffd.interfaces.openmm_torch import best_platform, faster_engine

    platform = best_platform()
    return faster_engine(settings, platform) if platform == "CUDA" else "python"


def _is_periodic(topology: openmm.app.Topology, system: openmm.System) -> bool:
    if topology.getPeriodicBoxVectors() is not None:
        return True
    # not the other way round: where openmmml interpolates, the System is an empty stand-in
    if system.usesPeriodicBoundaryConditions():
        raise ValueError(
            "the System is periodic, but the Topology has no box: call "
            "topology.setPeriodicBoxVectors(system.getDefaultPeriodicBoxVectors())"
        )
    return False
