"""Distilled machine-learned force fields for OpenMM.

``MLPotential('mlffd').createSystem(topology)`` is the short way; `load_student` and
`MLFFDCalculator` are the student outside OpenMM.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a source checkout kernels/ and training/ lie beside this folder; in a wheel, inside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from openmm_mlffd.batched import BatchedEvaluator as BatchedEvaluator
    from openmm_mlffd.interfaces.ase_calculator import MLFFDCalculator as MLFFDCalculator
    from openmm_mlffd.interfaces.openmm_alarm import ExtrapolationError as ExtrapolationError
    from openmm_mlffd.interfaces.openmm_alarm import NoveltyProbe as NoveltyProbe
    from openmm_mlffd.interfaces.openmm_alarm import NoveltyReporter as NoveltyReporter
    from openmm_mlffd.interfaces.openmm_mts import respa_integrator as respa_integrator
    from openmm_mlffd.interfaces.openmm_mts import respa_system as respa_system
    from openmm_mlffd.interfaces.openmm_prepare import prepare as prepare
    from openmm_mlffd.interfaces.openmm_pressure import Barometer as Barometer
    from openmm_mlffd.interfaces.openmm_pressure import pressure as pressure
    from openmm_mlffd.interfaces.openmm_stored import last_good as last_good
    from openmm_mlffd.interfaces.openmm_stored import load_system as load_system
    from openmm_mlffd.interfaces.openmm_stored import save_system as save_system
    from openmm_mlffd.interfaces.torchscript import compile_student as compile_student
    from openmm_mlffd.interfaces.torchscript import load_compiled as load_compiled
    from openmm_mlffd.modelfile import load_student as load_student
    from openmm_mlffd.modelfile import save_student as save_student
    from openmm_mlffd.painn import PaiNN as PaiNN
    from openmm_mlffd.potential import Potential as Potential

_LAZY = {
    "BatchedEvaluator": "openmm_mlffd.batched",
    "Barometer": "openmm_mlffd.interfaces.openmm_pressure",
    "ExtrapolationError": "openmm_mlffd.interfaces.openmm_alarm",
    "MLFFDCalculator": "openmm_mlffd.interfaces.ase_calculator",
    "NoveltyProbe": "openmm_mlffd.interfaces.openmm_alarm",
    "NoveltyReporter": "openmm_mlffd.interfaces.openmm_alarm",
    "PaiNN": "openmm_mlffd.painn",
    "Potential": "openmm_mlffd.potential",
    "compile_student": "openmm_mlffd.interfaces.torchscript",
    "last_good": "openmm_mlffd.interfaces.openmm_stored",
    "load_compiled": "openmm_mlffd.interfaces.torchscript",
    "load_student": "openmm_mlffd.modelfile",
    "load_system": "openmm_mlffd.interfaces.openmm_stored",
    "prepare": "openmm_mlffd.interfaces.openmm_prepare",
    "pressure": "openmm_mlffd.interfaces.openmm_pressure",
    "respa_integrator": "openmm_mlffd.interfaces.openmm_mts",
    "respa_system": "openmm_mlffd.interfaces.openmm_mts",
    "save_student": "openmm_mlffd.modelfile",
    "save_system": "openmm_mlffd.interfaces.openmm_stored",
}
__all__ = [
    "Barometer",
    "BatchedEvaluator",
    "ExtrapolationError",
    "MLFFDCalculator",
    "NoveltyProbe",
    "NoveltyReporter",
    "PaiNN",
    "Potential",
    "__version__",
    "compile_student",
    "last_good",
    "load_compiled",
    "load_student",
    "load_system",
    "prepare",
    "pressure",
    "respa_integrator",
    "respa_system",
    "save_student",
    "save_system",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
