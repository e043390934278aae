"""Errors of a model on labelled structures: measurement."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.elements import symbol
from openmm_mlffd.training.evaluate import ANGLE_THRESHOLD
from openmm_mlffd.training.hdf5 import Dataset, Structures, concatenate, take
from openmm_mlffd.training.sources import sha256
from openmm_mlffd.training.teacher_worker import Batch
from openmm_mlffd.validation.conservation import Check
from openmm_mlffd.validation.suite.job import Job
from openmm_mlffd.validation.suite.models import Structure
from openmm_mlffd.validation.suite.statistics import bootstrap_ratio, rank_correlation
from openmm_mlffd.validation.suite.store import write_arrays
from openmm_mlffd.validation.suite.surroundings import describe_surroundings, distances_to

LARGEST = {
    "force MAE": (100.0, "meV/Å"),
    "force RMSE": (150.0, "meV/Å"),
    "mean angle between forces": (15.0, "degrees"),
    "energy MAE": (50.0, "meV/atom"),
    "stress error": (5.0, "%"),
}
"""What passes. The stress counts where there are boxes."""

SMALLEST_R2 = 0.95
"""Coefficient of determination of force components that passes."""

_READ = 4096


@dataclass(frozen=True)
class Evaluated:
    """Structures with the labels of their teacher and the answers of a model."""

    structures: Structures
    """The structures with their labels."""

    energy: NDArray[np.float64]
    """Of the model [eV], shape (n,)."""

    forces: NDArray[np.float64]
    """Of the model [eV/Å], shape (n_atoms, 3)."""

    stress: NDArray[np.float64]
    """Of the model [eV/Å^3], NaN where not periodic, shape (n, 3, 3)."""

    index: NDArray[np.int64]
    """Place of each structure in the file, shape (n,)."""

    subsets: list[str]
    """Names of the subsets."""

    distance: NDArray[np.float64]
    """Of each atom to the training set, see `distances_to`; NaN if there is none, (n_atoms,)."""

    @property
    def count(self) -> NDArray[np.int64]:
        """Atoms of each structure, shape ``(n,)``."""
        return np.diff(self.structures.offsets)

    @property
    def owner(self) -> NDArray[np.int64]:
        """Structure of each atom, shape ``(n_atoms,)``."""
        return np.repeat(np.arange(len(self.count)), self.count)

    @property
    def labels(self) -> NDArray[np.float64]:
        """Forces of the teacher [eV/Å], shape ``(n_atoms, 3)``."""
        return self.structures.forces.astype(np.float64)

    @property
    def error(self) -> NDArray[np.float64]:
        """Length of the difference of forces [eV/Å], shape ``(n_atoms,)``."""
        return np.asarray(np.linalg.norm(self.forces - self.labels, axis=1))

    @property
    def rmse(self) -> NDArray[np.float64]:
        """Of the force components of each structure [eV/Å], shape ``(n,)``."""
        square = np.bincount(self.owner, self.error**2, len(self.count))
        return np.sqrt(square / (3 * self.count))

    def angles(self) -> NDArray[np.float64]:
        """Between forces [degrees]; NaN where the label is short, shape ``(n_atoms,)``."""
        cross = np.linalg.norm(np.cross(self.forces, self.labels), axis=1)
        angle = np.degrees(np.arctan2(cross, (self.forces * self.labels).sum(1)))
        return np.where(np.linalg.norm(self.labels, axis=1) > ANGLE_THRESHOLD, angle, np.nan)

    def composition_energy(self) -> NDArray[np.float64]:
        """Part of the labels' energy [eV] that the numbers of atoms explain, shape ``(n,)``."""
        numbers = self.structures.atomic_numbers
        elements = np.unique(numbers)
        counts = np.array(
            [np.bincount(self.owner, numbers == z, len(self.count)) for z in elements]
        ).T
        weights = 1 / self.count
        solution = np.linalg.lstsq(
            counts * weights[:, None], self.structures.energy * weights, rcond=1e-10
        )[0]
        return np.asarray(counts @ solution)

    def structure(self, i: int) -> tuple[Structure, slice]:
        """One structure, and the rows of its atoms."""
        s = self.structures
        rows = slice(int(s.offsets[i]), int(s.offsets[i + 1]))
        cell = s.cell[i] if s.pbc[i].all() else None
        numbers = s.atomic_numbers[rows].astype(np.int64)
        positions = s.positions[rows].astype(np.float64)
        return Structure(numbers, positions, cell, int(s.total_charge[i])), rows


def measure_forces(job: Job, data: Path) -> tuple[Evaluated, dict[str, Any]]:
    """Evaluate the model on a data set; the numbers are those of `force_numbers`."""
    plan = job.plan.forces
    with Dataset(data) as dataset:
        index = choose(dataset.in_split(job.split), plan.max_structures)
        if not len(index):
            raise ValueError(f"{data}: no structure is in the split {job.split!r}")
        structures = read_rows(dataset, index)
        settings = {
            "model": job.model.identity, "data": sha256(data), "split": job.split,
            "structures": plan.max_structures,
        }  # fmt: skip
        piece = job.store.piece(
            "forces", settings, lambda folder: _evaluate(job, structures, folder)
        )
        distance = _measure_distances(job, data, structures, settings)
        found = piece.arrays()
        evaluated = Evaluated(
            structures, found["energy"], found["forces"], found["stress"], index,
            dataset.subsets, distance,
        )  # fmt: skip
        teacher = dataset.teacher
    numbers = {"data": data.name, "split": job.split, "labels": teacher}
    return evaluated, numbers | force_numbers(evaluated)


def _evaluate(job: Job, structures: Structures, folder: Path) -> dict[str, Any]:
    labels = job.model.label(as_batch(structures))
    failed = np.flatnonzero(labels.failure != "")
    if len(failed):
        raise ValueError(
            f"{job.model.name} has no answer for {len(failed)} structures, "
            f"the first because: {labels.failure[failed[0]]}"
        )
    write_arrays(
        folder / "arrays.npz", energy=labels.energy, forces=labels.forces, stress=labels.stress
    )
    return {"structures": len(structures.energy), "atoms": int(structures.offsets[-1])}


def _measure_distances(
    job: Job, data: Path, structures: Structures, settings: Mapping[str, Any]
) -> NDArray[np.float64]:
    """Distances to the training set, or NaN if there is none besides what is evaluated."""
    path = job.training or data
    with Dataset(path) as dataset:
        index = choose(dataset.in_split("train"), job.plan.forces.max_reference)
        if not len(index) or (job.training is None and job.split in ("train", "all")):
            return np.full(int(structures.offsets[-1]), np.nan)
        reference = as_batch(read_rows(dataset, index))

    def measure(folder: Path) -> dict[str, Any]:
        batch = as_batch(structures)
        elements = np.unique(np.concatenate([batch.atomic_numbers, reference.atomic_numbers]))
        write_arrays(
            folder / "arrays.npz",
            distance=distances_to(
                batch.atomic_numbers,
                describe_surroundings(batch, elements),
                reference.atomic_numbers,
                describe_surroundings(reference, elements),
            ),
        )
        return {"reference_structures": len(index), "reference": path.name}

    own = {k: v for k, v in settings.items() if k != "model"}
    own |= {"training": sha256(path), "reference": job.plan.forces.max_reference}
    return job.store.piece("distance to training", own, measure).arrays()["distance"]


def choose(index: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """A random part of up to so many, in order; always the same one."""
    if limit is None or len(index) <= limit:
        return index
    return np.sort(np.random.default_rng(0).choice(index, limit, replace=False))


def read_rows(dataset: Dataset, index: NDArray[np.int64]) -> Structures:
    """Structures with these indices, which must rise."""
    parts = []
    for start in range(0, len(dataset), _READ):
        mine = index[(index >= start) & (index < start + _READ)]
        if len(mine):
            block = dataset.read(start, min(start + _READ, len(dataset)))
            parts.append(take(block, mine - start))
    return concatenate(parts)


def as_batch(structures: Structures) -> Batch:
    """Structures of a data set as models take them."""
    return Batch(
        offsets=structures.offsets,
        atomic_numbers=structures.atomic_numbers.astype(np.int64),
        positions=structures.positions.astype(np.float64),
        cell=structures.cell,
        pbc=structures.pbc,
        total_charge=structures.total_charge.astype(np.int64),
    )


def force_numbers(e: Evaluated) -> dict[str, Any]:
    """All numbers of the force analysis: of everything, by subset and by element."""
    everything = np.arange(len(e.count))
    subset = e.structures.subset
    names = {name: np.flatnonzero(subset == k) for k, name in enumerate(e.subsets)}
    return {
        "all": _summary(e, everything),
        "subsets": {name: _summary(e, mine) for name, mine in names.items() if len(mine)},
        "elements": _elements(e),
        "worst": _worst(e, 50),
        "distance_correlation": _distance_correlation(e),
    }


def _summary(e: Evaluated, chosen: NDArray[np.int64]) -> dict[str, Any]:
    """Errors of some structures, each with its confidence interval."""
    n, owner = len(e.count), e.owner
    keep = np.zeros(n, bool)
    keep[chosen] = True
    difference = e.forces - e.labels
    angle = e.angles()
    known = np.isfinite(angle)
    stress, label = e.stress, e.structures.stress.astype(np.float64)
    periodic = np.isfinite(label).all((1, 2)) & np.isfinite(stress).all((1, 2))
    conformer, conformers = conformer_errors(e)

    def per_structure(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(owner, values, n).astype(np.float64)

    def interval(top: Any, bottom: Any, scale: float = 1.0, root: bool = False) -> dict[str, Any]:
        value, low, high = bootstrap_ratio(
            top[keep], bottom[keep], e.structures.group[keep],
            finish=(lambda x: scale * np.sqrt(x)) if root else (lambda x: scale * x),
        )  # fmt: skip
        return {"value": value, "low": low, "high": high}

    components = 3.0 * e.count
    square = per_structure((difference**2).sum(1))
    zero = np.zeros(n)
    return {
        "structures": len(chosen),
        "atoms": int(e.count[chosen].sum()),
        "force_mae": interval(per_structure(np.abs(difference).sum(1)), components, 1e3),
        "force_rmse": interval(square, components, 1e3, root=True),
        "force_r2": _r2(e, keep[owner]),
        "angle": interval(per_structure(np.nan_to_num(angle)), per_structure(known * 1.0)),
        "energy_mae": interval(np.abs(e.energy - e.structures.energy) / e.count, zero + 1, 1e3),
        "conformer_mae": interval(conformer, conformers, 1e3),
        "stress_relative": interval(
            np.where(periodic, np.nan_to_num((stress - label) ** 2).sum((1, 2)), 0.0),
            np.where(periodic, np.nan_to_num(label**2).sum((1, 2)), 0.0),
            100,
            root=True,
        ),
    }


def conformer_errors(e: Evaluated) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Error of relative energies [eV] of each structure, and 1 where it has one.

    Relative to the mean over the structures of the same group and composition: what is left of
    the error when references of the elements cannot hide or cause it.
    """
    numbers = e.structures.atomic_numbers
    keys = [
        (int(group), numbers[a:b].astype("u1").tobytes())
        for group, a, b in zip(
            e.structures.group, e.structures.offsets, e.structures.offsets[1:], strict=False
        )
    ]
    places: dict[tuple[int, bytes], list[int]] = {}
    for i, (group, composition) in enumerate(keys):
        places.setdefault((group, bytes(sorted(composition))), []).append(i)
    error, known = np.zeros(len(keys)), np.zeros(len(keys))
    difference = e.energy - e.structures.energy
    for mine in places.values():
        if len(mine) > 1:
            error[mine] = np.abs(difference[mine] - difference[mine].mean())
            known[mine] = 1.0
    return error, known


def _r2(e: Evaluated, atoms: NDArray[np.bool_]) -> float:
    label, found = e.labels[atoms], e.forces[atoms]
    spread = ((label - label.mean(0)) ** 2).sum()
    return float(1 - ((found - label) ** 2).sum() / spread) if spread > 0 else math.nan


def _elements(e: Evaluated) -> dict[str, Any]:
    numbers, owner, n = e.structures.atomic_numbers, e.owner, len(e.count)
    absolute = np.abs(e.forces - e.labels).sum(1)
    angle = e.angles()
    table = {}
    for z in np.unique(numbers).tolist():
        mine = numbers == z
        atoms = np.bincount(owner, mine, n)
        value, low, high = bootstrap_ratio(
            np.bincount(owner, absolute * mine, n).astype(np.float64),
            3.0 * atoms.astype(np.float64),
            e.structures.group,
        )
        label = e.labels[mine]
        table[symbol(z)] = {
            "atoms": int(mine.sum()),
            "force_mae": {"value": 1e3 * value, "low": 1e3 * low, "high": 1e3 * high},
            "force_rmse": 1e3 * float(np.sqrt((e.error[mine] ** 2).mean() / 3)),
            "rms_label": float(np.sqrt((label**2).mean())),
            "angle": float(np.nanmean(angle[mine])) if np.isfinite(angle[mine]).any() else None,
            "largest": float(e.error[mine].max()),
        }
    return table


def worst_structures(e: Evaluated, n: int) -> NDArray[np.int64]:
    """Indices of the structures with the largest errors, the worst of each molecule alone."""
    order = np.argsort(-e.rmse, kind="stable")
    _, first = np.unique(e.structures.group[order], return_index=True)
    return np.asarray(order[np.sort(first)[:n]], np.int64)


def _worst(e: Evaluated, n: int) -> list[dict[str, Any]]:
    return [
        {
            "place": int(e.index[i]),
            "subset": e.subsets[e.structures.subset[i]],
            "atoms": int(e.count[i]),
            "force_rmse": 1e3 * float(e.rmse[i]),
            "largest": float(e.error[e.owner == i].max()),
        }
        for i in worst_structures(e, n).tolist()
    ]


def _distance_correlation(e: Evaluated) -> float:
    known = np.isfinite(e.distance)
    return rank_correlation(e.distance[known], e.error[known]) if known.any() else math.nan


def force_checks(numbers: Mapping[str, Any]) -> list[Check]:
    """What errors of all structures together have to be."""
    found = numbers["all"]
    values = {
        "force MAE": found["force_mae"]["value"],
        "force RMSE": found["force_rmse"]["value"],
        "mean angle between forces": found["angle"]["value"],
        "energy MAE": found["energy_mae"]["value"],
        "stress error": found["stress_relative"]["value"],
    }
    checks = [
        Check(name=name, value=_number(values[name]), unit=unit, high=high)
        for name, (high, unit) in LARGEST.items()
        if name != "stress error" or not math.isnan(_number(values[name]))
    ]
    r2 = _number(found["force_r2"])
    return [
        *checks,
        Check(name="R² of force components", value=r2, unit="", low=SMALLEST_R2, high=1.0),
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
