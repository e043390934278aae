"""Multiple time steps: the student every step, what a slow teacher says beyond it less often."""

from pathlib import Path
from typing import Any

try:
    import openmm
    from openmm import unit
    from openmmml import MLPotential
except ImportError as error:
    raise ImportError(
        f"OpenMM and OpenMM-ML are needed ({error}): pip install 'openmm-mlffd[openmm]'"
    ) from error

from openmm_mlffd.interfaces.openmm_correction import (
    CalculatorTeacher,
    RememberingStudent,
    TeacherCorrection,
)
from openmm_mlffd.interfaces.openmm_force import ComputationSettings, StudentComputation
from openmm_mlffd.interfaces.openmm_stored import student_functions

SLOW_GROUP = 0
"""Force group of the correction, teacher minus student."""

FAST_GROUP = 1
"""Force group of the student."""


def respa_system(
    topology: Any,
    slow: Any,
    *,
    model: str | None = None,
    modelPath: str | Path | None = None,
    info: dict[str, Any] | None = None,
    removeCMMotion: bool = True,
    **keywords: Any,
) -> openmm.System:
    """Make a System with a student as the fast force and a teacher's correction as the slow one.

    The energy is the teacher's: the student in force group 1, teacher minus student in group 0.
    `respa_integrator` takes a long step for the correction, and short ones for the student.

    Parameters
    ----------
    topology
        The Topology; with box vectors, the box is periodic.
    slow
        The teacher: an ASE calculator, or the name or path of another student.
    model, modelPath
        The student, as for ``MLPotential('mlffd')``.
    info
        What the calculator shall find in `atoms.info`, such as ``{'charge': -1}``.
    removeCMMotion
        As for ``createSystem``.
    keywords
        As for ``createSystem``: precision, device, allowMissingHydrogens. They hold for a teacher
        that is a student, too.

    Returns
    -------
    openmm.System
        It can be stored and copied if the teacher is a student. Stored, it evaluates the student
        once more per outer step.

    Raises
    ------
    TypeError
        If a keyword is unknown, or the teacher is neither a calculator nor a student.
    ValueError
        As for ``createSystem``.

    References
    ----------
    Tuckerman, Berne, Martyna, J. Chem. Phys. 97, 1990 (1992). With a distilled model as the fast
    force: Cattin et al., arXiv 2510.06562.
    """
    system = MLPotential("mlffd", model=model, modelPath=modelPath).createSystem(
        topology, removeCMMotion=removeCMMotion, **keywords
    )
    fast = RememberingStudent(_settings_of(system))
    correction = TeacherCorrection(fast, _teacher(topology, slow, fast.settings, info, keywords))
    system.removeForce(0)
    for group, name, function in (
        (FAST_GROUP, "MLFFD", fast),
        (SLOW_GROUP, "MLFFD teacher correction", correction),
    ):
        _add(system, function, name, group, fast.settings["periodic"])
    return system


def teacher_system(
    topology: Any,
    slow: Any,
    *,
    info: dict[str, Any] | None = None,
    removeCMMotion: bool = True,
    **keywords: Any,
) -> openmm.System:
    """Make a System with the teacher alone, to compare one of `respa_system` with.

    Parameters
    ----------
    topology, slow, info, removeCMMotion, keywords
        As for `respa_system`.

    Raises
    ------
    TypeError, ValueError
        As for `respa_system`.
    """
    system = MLPotential("mlffd").createSystem(topology, removeCMMotion=removeCMMotion, **keywords)
    settings = _settings_of(system)
    function = _teacher(topology, slow, settings, info, keywords)
    system.removeForce(0)
    _add(system, function, "teacher", SLOW_GROUP, settings["periodic"])
    return system


def respa_integrator(
    timestep: float,
    inner_steps: int,
    *,
    temperature: float | None = None,
    friction: float = 1.0,
) -> openmm.CustomIntegrator:
    """Make OpenMM's integrator for a System of `respa_system`.

    Parameters
    ----------
    timestep
        Outer step, one evaluation of the teacher [fs].
    inner_steps
        Inner steps in an outer one, an evaluation of the student each.
    temperature
        [K]; None for constant energy.
    friction
        [1/ps]; only with a temperature.

    Raises
    ------
    ValueError
        If a step is not positive or there is no inner step.
    """
    if not timestep > 0.0 or inner_steps < 1:
        raise ValueError(
            f"a positive time step and at least one inner step are needed, got {timestep} fs and "
            f"{inner_steps}"
        )
    groups = [(SLOW_GROUP, 1), (FAST_GROUP, inner_steps)]
    if temperature is None:
        return openmm.MTSIntegrator(timestep * unit.femtosecond, groups)
    return openmm.MTSLangevinIntegrator(
        temperature * unit.kelvin, friction / unit.picosecond, timestep * unit.femtosecond, groups
    )


def _settings_of(system: openmm.System) -> ComputationSettings:
    functions = student_functions(system)
    settings: ComputationSettings = functions[min(functions)].settings
    return settings


def _teacher(
    topology: Any,
    slow: Any,
    settings: ComputationSettings,
    info: dict[str, Any] | None,
    keywords: dict[str, Any],
) -> StudentComputation | CalculatorTeacher:
    if isinstance(slow, str | Path):
        system = MLPotential("mlffd", model=str(slow)).createSystem(topology, **keywords)
        return StudentComputation(_settings_of(system))
    if not hasattr(slow, "get_potential_energy"):
        raise TypeError(
            "the teacher must be an ASE calculator, or the name or path of a student, got "
            f"{type(slow).__name__}"
        )
    return CalculatorTeacher(slow, settings["numbers"], settings["periodic"], info or {})


def _add(system: openmm.System, function: Any, name: str, group: int, periodic: bool) -> None:
    force = openmm.PythonForce(function)
    force.setName(name)
    force.setForceGroup(group)
    force.setUsesPeriodicBoundaryConditions(periodic)
    system.addForce(force)
