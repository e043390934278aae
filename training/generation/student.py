"""The student itself as a sampler."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.evaluator import Evaluator, StudentSource


@lru_cache(maxsize=2)
def _load(model: str | None) -> Any:
    return StudentSource.find(model).load()


class StudentForces:
    """Forces of a student, for `sampling`.

    Parameters
    ----------
    numbers
        Atomic numbers, shape ``(n_atoms,)``.
    model
        Bundled name or path of a student; None for the default.
    cell
        Box vectors as rows [Å], shape ``(3, 3)``; None for no box.
    pbc
        Periodic box vectors.

    Raises
    ------
    ValueError
        If there is no such student, or it does not know an element.
    """

    def __init__(
        self,
        numbers: NDArray[np.integer[Any]],
        model: str | None = None,
        cell: NDArray[np.float64] | None = None,
        pbc: tuple[bool, bool, bool] | None = None,
    ) -> None:
        self._evaluator = Evaluator(_load(model), numbers)
        self._cell, self._pbc = cell, pbc if cell is not None else None

    def __call__(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Forces [eV/Å]."""
        return self._evaluator.compute(positions, self._cell, self._pbc).forces
