"""Orb as a teacher, in batches; a part of the worker process, which loads it by its path.

Both generations of orb-models are spoken to: those with `atomic_system` (up to 0.5) and those
with adapters (from 0.6), whose pretrained models come with one.

References
----------
M. Neumann et al., arXiv 2410.22570 (Orb v2). B. Rhodes et al., arXiv 2504.06231 (Orb v3).
"""

import difflib
import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch
    from ase import Atoms
    from orb_models.forcefield import pretrained
except ImportError as error:
    raise ImportError(
        f"orb-models is needed ({error}): mlffd teacher install orb, or pip install "
        "orb-models==0.5.5 in an environment whose Python is then given as --teacher-python"
    ) from error

PRECISIONS = ("float32-high", "float32-highest", "float64")
_VOIGT = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])


class Orb:
    """A pretrained Orb model, by its name in orb-models.

    Parameters
    ----------
    name
        Such as ``orb-v2``, ``orb-v3-conservative-inf-omat`` or ``orb-v3-conservative-omol``.
    weights_path
        Checkpoint of that model on this machine; without it orb-models looks for the published
        one in its cache, and downloads it.
    precision
        ``'float32-high'`` (TF32 where there is), ``'float32-highest'`` or ``'float64'``.
    device
        Torch device.

    Notes
    -----
    Only models that were trained with a total charge are given one; the others refuse charged
    structures. Forces of direct models are no gradient of their energy.

    Raises
    ------
    ValueError
        If there is no such model, or its checkpoint cannot be had or is of another model.
    """

    def __init__(
        self,
        name: str,
        *,
        weights_path: str | None = None,
        precision: str = "float32-highest",
        device: str = "cpu",
    ) -> None:
        known = pretrained.ORB_PRETRAINED_MODELS
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"orb-models {version('orb-models')} has no model {name!r}; {hint}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self._name, self._precision, self._device = name, precision, device
        self._weights = "published weights"
        settings: dict[str, Any] = {"device": device, "precision": precision, "compile": False}
        if weights_path is not None:
            path = Path(weights_path).expanduser()
            if not path.is_file():
                raise ValueError(f"{path}: there is no such checkpoint of {name}")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._weights = f"weights with SHA-256 {digest[:16]}"
            settings["weights_path"] = str(path)
        try:
            loaded = known[name](**settings)
        except RuntimeError as error:
            raise ValueError(
                f"{weights_path}: is no checkpoint of {name} ({str(error).splitlines()[0]})"
            ) from error
        except Exception as error:
            if weights_path is not None:
                raise
            raise ValueError(
                f"the weights of {name} cannot be downloaded ({type(error).__name__}); get them "
                "elsewhere and give their place as --teacher-option weights_path=FILE"
            ) from error
        self._model, self._adapter = loaded if isinstance(loaded, tuple) else (loaded, None)
        conditioner = self._model.model.conditioner
        self._charged = type(conditioner).__name__ == "ChargeSpinConditioner"
        # what a processor's cache holds; a GPU is best filled
        self.batch_atoms = 300 if torch.device(device).type == "cpu" else 4000

    def describe(self) -> str:
        """Name, version and settings."""
        package = f"orb-models {version('orb-models')}"
        return f"{self._name} ({package}), {self._weights}, {self._precision}"

    def refusal(self, numbers: np.ndarray, pbc: np.ndarray, charge: int) -> str:
        """Why a structure cannot be labelled, or an empty string."""
        if pbc.any() and not pbc.all():
            return "periodic in some directions only"
        if charge and not self._charged:
            return f"total charge {charge}, of which {self._name} knows nothing"
        electrons = int(numbers.sum()) - charge
        if self._charged and electrons % 2:
            return f"{electrons} electrons, an odd number, at total charge {charge}"
        return ""

    def label(self, batch: Any) -> Any:
        """Label a batch; its fields and those of the result are those of the worker process."""
        out = self._model.predict(self._graphs(batch))
        conservative = hasattr(self._model, "grad_forces_name")
        forces = str(self._model.grad_forces_name) if conservative else "forces"
        name = getattr(self._model, "grad_stress_name", None) if conservative else "stress"
        stress = str(name)  # None of models without

        def array(name: str) -> np.ndarray:
            return out[name].detach().cpu().double().numpy()

        n, n_atoms = len(batch.total_charge), len(batch.positions)
        labels = _Labels(
            energy=array("energy").reshape(n),
            forces=array(forces).reshape(n_atoms, 3),
            stress=np.full((n, 3, 3), np.nan),
            partial_charges=np.full(n_atoms, np.nan),
            failure=np.full(n, "", dtype=object),
        )
        periodic = batch.pbc.all(1)
        if stress in out and periodic.any():
            labels.stress[periodic] = array(stress).reshape(n, 6)[:, _VOIGT][periodic]
        return labels

    def _graphs(self, batch: Any) -> Any:
        structures = []
        for i, charge in enumerate(batch.total_charge.tolist()):
            own = slice(batch.offsets[i], batch.offsets[i + 1])
            atoms = Atoms(
                numbers=batch.atomic_numbers[own],
                positions=batch.positions[own],
                cell=batch.cell[i],
                pbc=batch.pbc[i],
            )
            if self._charged:
                atoms.info |= {"charge": float(charge), "spin": 1.0}
            structures.append(atoms)
        if self._adapter is not None:
            return self._adapter.batch(
                [self._adapter.from_ase_atoms(a, device=self._device) for a in structures]
            )
        from orb_models.forcefield import atomic_system
        from orb_models.forcefield.base import batch_graphs

        device = torch.device(self._device)
        return batch_graphs(
            [
                atomic_system.ase_atoms_to_atom_graphs(a, self._model.system_config, device=device)
                for a in structures
            ]
        )


class _Labels:
    """Carries fields by name: this file cannot import the worker's `Labels`."""

    stress: np.ndarray

    def __init__(self, **fields: np.ndarray) -> None:
        self.__dict__.update(fields)
