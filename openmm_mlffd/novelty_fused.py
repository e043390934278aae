"""Novelty of atoms by the fused kernels."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from openmm_mlffd.captured import CapturedStep
from openmm_mlffd.engine import REMEMBERED
from openmm_mlffd.fast import FastPotential, Rows
from openmm_mlffd.novelty import Novelty
from openmm_mlffd.potential import Potential, Prediction
from openmm_mlffd.rows import VerletRows

_INFINITE = 1e30


class FusedNovelty:
    """Novelty of the same atoms by the fused kernels; on a GPU by the replay of a CUDA graph.

    Parameters
    ----------
    potential
        The student in double precision, on the device of the work.
    species
        Index of each atom's element.
    novelty
        The statistics.
    atoms
        From `atoms_of_elements`.

    Raises
    ------
    ValueError
        As of `FastPotential`.
    """

    def __init__(
        self,
        potential: Potential,
        species: Tensor,
        novelty: Novelty,
        atoms: Sequence[tuple[int, Tensor]],
    ) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._fast = FastPotential(potential, remember=len(species) <= REMEMBERED)
        self._species, self._novelty, self._atoms = species, novelty, atoms
        self._steps: dict[bool, CapturedStep] = {}

    def _evaluate(self, rows: Rows, with_virial: bool) -> Prediction:
        """Novelty in the place of the atoms' energies; `CapturedStep` wants the rest too."""
        found = self._novelty.of_features(self._fast.features(rows), self._species, self._atoms)
        # what is not finite would be taken for a broken evaluation
        found = torch.where(found.isfinite(), found, _INFINITE)
        nothing = torch.zeros_like(rows.positions)
        return Prediction(found.new_zeros(1), nothing, found.new_zeros((1, 3, 3)), found)

    def measure(
        self, positions: NDArray[np.float64], cell: ArrayLike | None
    ) -> NDArray[np.float64]:
        """As of `NoveltyMeter`, of finite positions."""
        periodic = cell is not None
        step = self._steps.get(periodic)
        if step is None:
            with torch.inference_mode(False), torch.no_grad():
                lists = VerletRows(
                    self._species, self._fast.cutoff, periodic=torch.tensor([periodic] * 3)
                )
                step = CapturedStep(self._evaluate, lists, False, False, lambda _: None, None)
            self._steps[periodic] = step
        try:
            step(positions, None if cell is None else np.array(cell, dtype=np.float64), 1.0)
        except (RuntimeError, MemoryError):
            self._steps.pop(periodic)
            raise
        novelty: NDArray[np.float64] = step.prediction().atom_energies.numpy()
        return np.where(novelty < _INFINITE, novelty, np.inf)
