"""Errors of a student on labelled structures, by subset."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from openmm_mlffd.potential import Potential, Prediction
from openmm_mlffd.training.batches import Batch

ANGLE_THRESHOLD = 0.3
"""Angles are counted for reference forces longer than this [eV/Å]."""

_COLUMNS = (
    "structures",
    "atoms",
    "energy",  # Σ |ΔE| / n_atoms over structures
    "force_abs",  # Σ |ΔF| over components
    "force_square",  # Σ ΔF² over components
    "reference_square",  # Σ F² over components
    "angle",  # Σ angle over atoms with a long force
    "angle_atoms",
    "stressed",  # structures with a stress label
    "stress_square",
    "stress_reference",
)


class ErrorSums:
    """Adds up errors by subset, on the device, without waiting for it.

    Parameters
    ----------
    n_subsets
        Number of subsets.
    device
        Where the predictions are.
    """

    def __init__(self, n_subsets: int, device: torch.device) -> None:
        self._sums = torch.zeros((len(_COLUMNS), n_subsets), dtype=torch.float64, device=device)

    def add(self, prediction: Prediction, batch: Batch) -> None:
        """Count the errors of a batch."""
        atom_subset = batch.subset[batch.graph.system]
        difference = prediction.forces.detach() - batch.forces
        length = batch.forces.norm(dim=1)
        long = (length > ANGLE_THRESHOLD).double()
        cross = torch.linalg.cross(prediction.forces.detach(), batch.forces).norm(dim=1)
        angle = torch.atan2(cross, (prediction.forces.detach() * batch.forces).sum(1))
        known = batch.virial.isfinite().all(2).all(1).double()
        volume = torch.linalg.det(batch.graph.cell).abs().clamp(min=1e-9)
        label = batch.virial.nan_to_num() / volume[:, None, None]
        stress = prediction.virial.detach() / volume[:, None, None]
        per_system = {
            "structures": torch.ones_like(batch.n_atoms),
            "atoms": batch.n_atoms,
            "energy": (prediction.energy.detach() - batch.energy).abs() / batch.n_atoms,
            "stressed": known,
            "stress_square": known * (stress - label).square().sum((1, 2)),
            "stress_reference": known * label.square().sum((1, 2)),
        }
        per_atom = {
            "force_abs": difference.abs().sum(1),
            "force_square": difference.square().sum(1),
            "reference_square": batch.forces.square().sum(1),
            "angle": angle * long,
            "angle_atoms": long,
        }
        for row, name in enumerate(_COLUMNS):
            if name in per_system:
                self._sums[row].index_add_(0, batch.subset, per_system[name])
            else:
                self._sums[row].index_add_(0, atom_subset, per_atom[name])

    def table(self, subsets: list[str]) -> dict[str, dict[str, float]]:
        """Errors by subset, and of "all" together.

        Returns
        -------
        dict
            Subset to: structures, atoms, force_mae and force_rmse [meV/Å, per component],
            force_relative [%], energy_mae [meV/atom], angle [degrees], stress_relative [%].
        """
        sums = self._sums.cpu()
        rows = {
            name: _summary(sums[:, i]) for i, name in enumerate(subsets) if sums[0, i].item() > 0
        }
        return rows | {"all": _summary(sums.sum(1))}


def _summary(sums: Tensor) -> dict[str, float]:
    s = dict(zip(_COLUMNS, sums.tolist(), strict=True))

    def ratio(a: float, b: float) -> float:
        return a / b if b > 0 else math.nan

    return {
        "structures": s["structures"],
        "atoms": s["atoms"],
        "force_mae": 1e3 * ratio(s["force_abs"], 3 * s["atoms"]),
        "force_rmse": 1e3 * math.sqrt(ratio(s["force_square"], 3 * s["atoms"])),
        "force_relative": 100 * math.sqrt(ratio(s["force_square"], s["reference_square"])),
        "energy_mae": 1e3 * ratio(s["energy"], s["structures"]),
        "angle": math.degrees(ratio(s["angle"], s["angle_atoms"])),
        "stress_relative": 100 * math.sqrt(ratio(s["stress_square"], s["stress_reference"])),
    }


def evaluate(
    potential: Potential, batches: Iterable[Batch], subsets: list[str], device: torch.device
) -> dict[str, dict[str, float]]:
    """Errors of a potential by subset; see `ErrorSums.table`."""
    sums = ErrorSums(len(subsets), device)
    training = potential.training
    potential.eval()
    for batch in batches:
        sums.add(potential(batch.graph), batch)
    potential.train(training)
    return sums.table(subsets)


_LAYOUT = "{:14s} {:>10s} {:>7s} | {:>9s} {:>6s} {:>5s} | {:>10s} | {:>6s} | {:>6s}"


def format_table(table: dict[str, dict[str, Any]]) -> str:
    """The table as text."""
    heading = _LAYOUT.format(
        "subset",
        "structures",
        "atoms",
        "force MAE",
        "RMSE",
        "rel.",
        "energy MAE",
        "angle*",
        "stress",
    )
    units = _LAYOUT.format("", "", "", "meV/Å", "meV/Å", "%", "meV/atom", "deg", "%")
    lines = [heading, units, "-" * len(heading)]
    for name, r in table.items():
        values = (
            f"{r['structures']:.0f}",
            f"{r['atoms']:.0f}",
            f"{r['force_mae']:.1f}",
            f"{r['force_rmse']:.1f}",
            f"{r['force_relative']:.1f}",
            f"{r['energy_mae']:.2f}",
            f"{r['angle']:.2f}",
            "-" if math.isnan(r["stress_relative"]) else f"{r['stress_relative']:.1f}",
        )
        lines.append(_LAYOUT.format(name, *values))
    lines.append(f"* mean angle between forces, where the reference exceeds {ANGLE_THRESHOLD} eV/Å")
    return "\n".join(lines)
