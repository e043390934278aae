"""Electrostatic embedding: the function behind its `PythonForce`.

Imports neither openmm nor openmmml.
"""

from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_mlffd.charges import ChargeEvaluator
from openmm_mlffd.evaluator import StudentSource, resolve_device
from openmm_mlffd.faults import explained
from openmm_mlffd.interfaces.openmm_coulomb import PERIODIC, Surroundings
from openmm_mlffd.interfaces.openmm_force import positions_of
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

VERSION = 1
"""Version of the settings that are stored with a System."""


class EmbeddingSettings(TypedDict):
    """All that is stored with a System: plain values, never weights."""

    version: int
    """`VERSION` of the package that wrote it."""

    name: str
    """Name of the bundled student; empty for a file of one's own."""

    path: str
    """Where the student's file was; a hint."""

    sha256: str
    """Hash of the student; no other is accepted."""

    numbers: list[int]
    """Atomic number of each of the student's atoms."""

    atoms: list[int]
    """Index in the System of the student's atoms, then of the classical charges."""

    molecules: list[int]
    """Index of the molecule of each of the student's atoms."""

    totals: list[int]
    """Total charge of each molecule [e]."""

    charges: list[float]
    """Classical charges [e]."""

    periodic: bool
    """Whether the student's box is periodic."""

    method: str
    """One of `openmm_coulomb.METHODS`."""

    cutoff: float
    """Of the reaction field [Å]."""

    dielectric: float
    """Relative permittivity beyond that."""

    precision: str
    """Single, mixed or double: of the network; charges are summed in double."""

    device: str | None
    """Torch device; None for whatever is there."""


class ElectrostaticEmbedding:
    """Energy and forces between the student's charges and the classical ones.

    Parameters
    ----------
    settings
        What to compute with what. It is looked at in the first call, not before.

    Notes
    -----
    Contexts made from one System share an instance, from different threads too. It is pickled
    as its settings alone.
    """

    def __init__(self, settings: EmbeddingSettings) -> None:
        self.settings = settings
        self._ready: tuple[ChargeEvaluator, Surroundings] | None = None

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[EmbeddingSettings]]:
        return restore_embedding, (self.settings,)

    def __call__(self, state: Any) -> tuple[float, NDArray[np.float64]]:
        """Energy [kJ/mol] and forces [kJ/mol/nm] of the State's positions."""
        # OpenMM keeps nothing of an exception but its text
        try:
            positions = ANGSTROM_PER_NM * positions_of(state)
            box = None
            if self.periodic:
                vectors = np.array(state.getPeriodicBoxVectors()._value, dtype=np.float64)
                box = ANGSTROM_PER_NM * vectors
            energy, forces = self.energy_and_forces(positions, box)
        except Exception as error:
            better: BaseException = error
            if isinstance(error, RuntimeError):
                better = explained(error, len(self.settings["atoms"]), torch.device("cpu"))
            raise RuntimeError(
                f"{type(better).__name__} in the electrostatic embedding: {better}"
            ) from error
        return energy * KJ_PER_MOL_PER_EV, forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM

    @property
    def periodic(self) -> bool:
        """Whether the box counts, for the student or for the charges."""
        return self.settings["periodic"] or self.settings["method"] in PERIODIC

    def start(self) -> ChargeEvaluator:
        """Load the student, if that is not done; where it cannot be used, this says so."""
        return self._open()[0]

    def charges(
        self, positions: NDArray[np.float64], cell: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """The student's charges [e], shape ``(n_atoms,)``; arguments as of `ChargeEvaluator`."""
        return self.start().charges(positions, cell).values.cpu().numpy()

    def energy_and_forces(
        self, positions: NDArray[np.float64], box: NDArray[np.float64] | None = None
    ) -> tuple[float, NDArray[np.float64]]:
        """Energy [eV] and forces [eV/Å].

        Parameters
        ----------
        positions
            Of the student's atoms and of the classical charges [Å], shape ``(n + m, 3)``.
        box
            Box vectors as rows [Å], shape ``(3, 3)``; None if it is not periodic.

        Raises
        ------
        ValueError
            If positions, energy or forces are not finite, or the box is too small for the cutoff.
        """
        self._check_finite(positions, "position")
        evaluator, surroundings = self._open()
        n = len(self.settings["numbers"])
        found = evaluator.charges(positions[:n], box if self.settings["periodic"] else None)
        with torch.inference_mode(False), torch.no_grad():
            where = torch.tensor(positions, device=evaluator.device)
            cell = None if box is None else torch.tensor(box, device=evaluator.device)
            coulomb = surroundings.interact(found.values, where[:n], where[n:], cell)
        own = coulomb.forces + found.forces(coulomb.potentials)
        forces = torch.cat([own, coulomb.others]).cpu().numpy()
        self._check_finite(forces, "force")
        return float(coulomb.energy), forces

    def _open(self) -> tuple[ChargeEvaluator, Surroundings]:
        if self._ready is None:
            settings = self.settings
            if settings["version"] != VERSION:
                raise ValueError(
                    f"this System was stored in version {settings['version']} of the format of "
                    f"embeddings, and this openmm-mlffd reads version {VERSION}; another "
                    "openmm-mlffd is needed"
                )
            source = StudentSource(
                name=settings["name"], path=settings["path"], sha256=settings["sha256"]
            )
            device = resolve_device(settings["device"])
            precision = "double" if settings["precision"] == "double" else "single"
            evaluator = ChargeEvaluator(
                source.load(device=device, precision=precision),
                settings["numbers"],
                settings["molecules"],
                settings["totals"],
            )
            charges = torch.tensor(settings["charges"], dtype=torch.float64, device=device)
            surroundings = Surroundings(
                charges, settings["method"], settings["cutoff"], settings["dielectric"]
            )
            self._ready = evaluator, surroundings
        return self._ready

    def _check_finite(self, values: NDArray[np.float64], what: str) -> None:
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise ValueError(
                f"the {what} of atom {self.settings['atoms'][bad[0]]} is not finite, nor are those "
                f"of {len(bad) - 1} others: atoms lie upon one another, or the structure is broken"
            )


def restore_embedding(settings: EmbeddingSettings) -> ElectrostaticEmbedding:
    """Make the function of a stored embedding; like `restore_computation` it never raises."""
    return ElectrostaticEmbedding(settings)
