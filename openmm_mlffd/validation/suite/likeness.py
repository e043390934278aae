"""How alike two trajectories are: distributions of geometry, with error bars."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mdtraj
import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.units import ANGSTROM_PER_NM, BOLTZMANN
from openmm_mlffd.validation import analysis
from openmm_mlffd.validation.suite.static import bond_lengths_and_angles, proper_torsions
from openmm_mlffd.validation.suite.statistics import block_error, distance_with_noise
from openmm_mlffd.validation.suite.systems import System

N_BINS = 30
"""Bins of a distribution."""

MAP_BINS = 24
"""Bins of each angle of a Ramachandran map."""

SMALLEST_FRAMES = 20
"""Frames of a trajectory that is compared."""


@dataclass(frozen=True)
class Feature:
    """A quantity along two trajectories; the first is the student's, the second the teacher's."""

    name: str
    """What it is."""

    unit: str
    """Its unit."""

    student: NDArray[np.float64]
    """Shape (n_frames, n_values)."""

    teacher: NDArray[np.float64]
    """Shape (n_frames, n_values)."""

    periodic: bool = False
    """Whether values are angles from -180 to 180 degrees."""

    @property
    def edges(self) -> NDArray[np.float64]:
        """Of the bins, the same for all values."""
        if self.periodic:
            return np.linspace(-180.0, 180.0, N_BINS + 1)
        both = np.concatenate([self.student.ravel(), self.teacher.ravel()])
        low, high = float(both.min()), float(both.max())
        return np.linspace(low, max(high, low + 1e-9), N_BINS + 1)

    def numbers(self) -> dict[str, Any]:
        """Distance of the distributions, and difference of the means."""
        distance, error, noise = distance_with_noise(
            self.student, self.teacher, feature_histogram(self.edges)
        )
        found = {"unit": self.unit, "js": distance, "js_error": error, "js_noise": noise}
        if self.periodic:
            return found
        difference = self.student.mean(0) - self.teacher.mean(0)
        errors = [
            math.hypot(block_error(a), block_error(b))
            for a, b in zip(self.student.T, self.teacher.T, strict=True)
        ]
        mae_error = math.sqrt(float(np.square(errors).sum())) / len(errors)
        return found | {"mae": float(np.abs(difference).mean()), "mae_error": mae_error}


def feature_histogram(
    edges: NDArray[np.float64],
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """A function that counts values of shape (n_frames, n_values) in bins, each value by itself."""

    def count(values: NDArray[np.float64]) -> NDArray[np.float64]:
        places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
        n_values, n_bins = values.shape[1], len(edges) - 1
        flat = places + n_bins * np.arange(n_values)
        return np.bincount(flat.ravel(), minlength=n_values * n_bins).astype(float)

    return count


def geometry_features(
    system: System, student: NDArray[np.float32], teacher: NDArray[np.float32]
) -> list[Feature]:
    """Bonds, angles, torsions, radius of gyration and distance from the start.

    Parameters
    ----------
    system
        One molecule, whole in all frames.
    student, teacher
        Positions [Å], shape ``(n_frames, n_atoms, 3)``.
    """
    both = [x.astype(np.float64) for x in (student, teacher)]
    lengths, angles = zip(*(bond_lengths_and_angles(system, x) for x in both), strict=True)
    found = [
        Feature("bond lengths", "Å", *lengths),
        Feature("angles", "degrees", *angles),
    ]
    frames = [analysis.make_trajectory(x, system.topology) for x in both]
    torsions = proper_torsions(system)
    if len(torsions):
        values = [np.degrees(mdtraj.compute_dihedrals(f, torsions)).astype(float) for f in frames]
        found.append(Feature("torsions", "degrees", values[0], values[1], periodic=True))
    if len(system.numbers) > 2:
        radii = [mdtraj.compute_rg(f).astype(float)[:, None] * ANGSTROM_PER_NM for f in frames]
        found.append(Feature("radius of gyration", "Å", *radii))
        start = analysis.make_frame(system.nanometers, system.topology)
        heavy = np.flatnonzero(system.numbers > 1)
        if len(heavy) > 2:
            moved = [
                mdtraj.rmsd(f, start, atom_indices=heavy).astype(float)[:, None] * ANGSTROM_PER_NM
                for f in frames
            ]
            found.append(Feature("RMSD from the start, heavy atoms", "Å", *moved))
    return found


def ramachandran(system: System, positions: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """Phi and psi [degrees], shape ``(n_frames, 2)``; None if the molecule has none."""
    frames = analysis.make_trajectory(positions, system.topology)
    try:
        found = analysis.backbone_dihedrals(frames)
    except ValueError:
        return None
    return np.column_stack([found.phi[:, 0], found.psi[:, 0]])


def free_energy_map(dihedrals: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Free energy of phi and psi above its minimum [eV]; NaN where there is no frame."""
    edges = np.linspace(-180, 180, MAP_BINS + 1)
    counts, _, _ = np.histogram2d(dihedrals[:, 0], dihedrals[:, 1], bins=[edges, edges])
    free = np.full(counts.shape, np.nan)
    seen = counts > 0
    free[seen] = -BOLTZMANN * temperature * np.log(counts[seen] / counts.max())
    return free


def compare_maps(
    student: NDArray[np.float64], teacher: NDArray[np.float64], temperature: float
) -> dict[str, Any]:
    """Difference of two Ramachandran free energies where both have frames.

    Returns
    -------
    dict
        ``mae`` [meV], weighted by the teacher's population, of differences whose weighted mean
        is zero; ``mae_error`` from a jackknife over five blocks; ``shared``: the share of the
        teacher's frames that lie where the student has been; ``js`` with error and noise.
    """
    edges = np.linspace(-180, 180, MAP_BINS + 1)

    def histogram(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.histogram2d(values[:, 0], values[:, 1], bins=[edges, edges])[0]

    def difference(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
        both = (p > 0) & (q > 0)
        if not both.any():
            return math.nan
        free = -BOLTZMANN * temperature * (np.log(p[both]) - np.log(q[both]))
        weight = q[both] / q[both].sum()
        return 1e3 * float(weight @ np.abs(free - weight @ free))

    a = np.array([histogram(x) for x in np.array_split(student, 5)])
    b = np.array([histogram(x) for x in np.array_split(teacher, 5)])
    left_out = np.array([difference(a.sum(0) - a[i], b.sum(0) - b[i]) for i in range(5)])
    js, js_error, js_noise = distance_with_noise(student, teacher, histogram)
    shared = (b.sum(0) * (a.sum(0) > 0)).sum() / b.sum()
    return {
        "mae": difference(a.sum(0), b.sum(0)),
        "mae_error": math.sqrt(0.8 * float(((left_out - left_out.mean()) ** 2).sum())),
        "shared": float(shared), "js": js, "js_error": js_error, "js_noise": js_noise,
        "unit": "meV",
    }  # fmt: skip


def compare_radial(student: mdtraj.Trajectory, teacher: mdtraj.Trajectory) -> dict[str, Any]:
    """Differences of O–O and O–H radial distribution functions, with errors from blocks."""
    found: dict[str, Any] = {}
    # boxes differ: both up to what the smaller allows
    half = min(
        float(0.5 / np.linalg.norm(np.linalg.inv(t.unitcell_vectors.astype(float)), axis=1).max())
        for t in (student, teacher)
    )
    r_max = min(8.0, half * ANGSTROM_PER_NM * 0.999)
    for second in ("O", "H"):
        curves, errors = [], []
        for trajectory in (student, teacher):

            def rdf(part: mdtraj.Trajectory, second: str = second) -> Any:
                return analysis.radial_distribution(part, "O", second, r_max=r_max, bin_width=0.1)

            whole = rdf(trajectory)
            blocks = np.array_split(np.arange(len(trajectory)), 5)
            parts = np.array([rdf(trajectory[b]).g for b in blocks if len(b)])
            curves.append(whole)
            errors.append(parts.std(0, ddof=1) / math.sqrt(len(parts)))
        a, b = curves
        found[f"O–{second}"] = {
            "r": a.r, "student": a.g, "teacher": b.g,
            "mae": float(np.abs(a.g - b.g).mean()),
            "mae_error": float(np.hypot(*errors).mean()),
            "peak_student": a.peak, "peak_teacher": b.peak,
        }  # fmt: skip
    return found
