"""`mlffd data stats` and `mlffd data validate`: what dataset files hold, and what is wrong."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.elements import symbol
from openmm_mlffd.training.datasets.geometry import judge_geometry
from openmm_mlffd.training.hdf5 import Dataset, Structures

FORCE_BINS = np.logspace(-3, 3, 61)
"""Edges of the histogram of the forces on the atoms [eV/Å]."""

_BLOCK_ATOMS = 20000
_TOLERANCE = 1e-3  # positions that differ by less are the same [Å]
_ROBUST = 1.4826  # standard deviation of normal numbers by their median absolute deviation


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What is taken for physical."""

    max_force: float = 100.0
    """Force on an atom [eV/Å]."""

    max_net_force: float = 0.1
    """Sum of the forces of a structure [eV/Å]."""

    outlier: float = 12.0
    """Energies further from those of the same composition than so many robust standard
    deviations are outliers …"""

    least_outlier: float = 0.1
    """… if they are further than this, too [eV/atom]."""

    least_structures: int = 8
    """Compositions with fewer structures have no outliers of their own."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong with a structure."""

    file: str
    """Name of its file."""

    index: int
    """Its place there."""

    kind: str
    """What kind of thing: "duplicate", "geometry", "force", "net force", "energy", "label"."""

    text: str
    """What it is."""


@dataclass
class Survey:
    """What files hold, structure by structure."""

    files: list[str] = field(default_factory=list)
    teachers: list[str] = field(default_factory=list)
    subset_names: list[str] = field(default_factory=list)
    n_atoms: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, int))
    largest_force: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    energy: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    temperature: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    charge: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, int))
    periodic: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    subset: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, int))
    composition: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), int))
    """Atoms of each element, shape (n, n_elements)."""

    elements: list[int] = field(default_factory=list)
    """Atomic numbers of those elements."""

    force_counts: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(len(FORCE_BINS) - 1, int)
    )
    squared_forces: float = 0.0
    """Sum of the squared components [eV²/Å²]."""

    findings: list[Finding] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.n_atoms)

    @property
    def excess_energy(self) -> NDArray[np.float64]:
        """Energy per atom beyond what the elements explain, by least squares [eV], NaN without."""
        known = np.isfinite(self.energy)
        excess = np.full(len(self), np.nan)
        if known.any():
            fractions = self.composition[known] / self.n_atoms[known, None]
            per_atom = self.energy[known] / self.n_atoms[known]
            found = np.linalg.lstsq(fractions, per_atom, rcond=1e-10)[0]
            excess[known] = per_atom - fractions @ found
        return excess


def blocks_of(dataset: Dataset) -> Iterator[tuple[int, Structures]]:
    """Structures of a file in blocks of bounded size, with the place of their first."""
    start = 0
    while start < len(dataset):
        limit = dataset.offsets[start] + _BLOCK_ATOMS
        stop = int(np.searchsorted(dataset.offsets, limit, side="right")) - 1
        stop = min(max(stop, start + 1), len(dataset))
        yield start, dataset.read(start, stop)
        start = stop


def fingerprints(structures: Structures) -> list[bytes]:
    """A hash of elements, positions and box of each structure, positions rounded to 0.001 Å."""
    rounded = np.round(structures.positions.astype("f8") / _TOLERANCE).astype("i8")
    cells = np.round(structures.cell / _TOLERANCE).astype("i8")
    found = []
    for i, (first, last) in enumerate(
        zip(structures.offsets[:-1], structures.offsets[1:], strict=True)
    ):
        digest = hashlib.blake2b(digest_size=16)
        for array in (structures.atomic_numbers[first:last], rounded[first:last], cells[i]):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(int(structures.total_charge[i]).to_bytes(8, "little", signed=True))
        found.append(digest.digest())
    return found


def survey(
    paths: Sequence[str | Path], bounds: Bounds | None = None, *, judge: bool = True
) -> Survey:
    """Read files once, a block at a time, and note what they hold and what is wrong.

    Parameters
    ----------
    paths
        Dataset files, labelled or not; their schema and units are checked when they are opened.
    bounds
        What is taken for physical.
    judge
        Look for what is wrong; without it, only count.

    Raises
    ------
    DatasetError
        If a file is no dataset, of another unit, or damaged.
    """
    bounds = bounds or Bounds()
    result = Survey()
    rows: list[dict[str, NDArray]] = []
    places: list[tuple[str, int]] = []
    seen: dict[bytes, tuple[str, int]] = {}
    for path in paths:
        with Dataset(path, unlabelled=True) as dataset:
            result.files.append(str(path))
            result.teachers.append(dataset.teacher)
            new = [s for s in dataset.subsets if s not in result.subset_names]
            result.subset_names += new
            names = np.array([result.subset_names.index(s) for s in dataset.subsets], int)
            for start, block in blocks_of(dataset):
                rows.append(_row(result, block, names))
                own = [(str(path), start + i) for i in range(len(block.energy))]
                places += own
                if judge:
                    _judge(result, block, own, bounds, labelled=dataset.labelled)
                    _find_duplicates(result, block, own, seen)
    if rows:
        _assemble(result, rows)
        if judge:
            _find_outliers(result, places, bounds)
    return result


def _row(result: Survey, block: Structures, names: NDArray[np.int64]) -> dict[str, NDArray]:
    norms = np.linalg.norm(block.forces.astype("f8"), axis=1)
    finite = norms[np.isfinite(norms)]
    result.force_counts += np.histogram(np.clip(finite, *FORCE_BINS[[0, -1]]), FORCE_BINS)[0]
    result.squared_forces += float((finite**2).sum())
    system = np.repeat(np.arange(len(block.energy)), np.diff(block.offsets))
    composition = np.zeros((len(block.energy), 256), "i4")
    np.add.at(composition, (system, block.atomic_numbers), 1)
    largest = np.maximum.reduceat(norms, block.offsets[:-1])
    return {
        "n_atoms": np.diff(block.offsets),
        "largest_force": largest,
        "energy": block.energy,
        "temperature": block.temperature.astype("f8"),
        "charge": block.total_charge.astype(int),
        "periodic": np.any(block.pbc, axis=1, keepdims=True)[:, 0],
        "subset": names[block.subset],
        "composition": composition,
    }


def _assemble(result: Survey, rows: list[dict[str, NDArray]]) -> None:
    for name in rows[0]:
        setattr(result, name, np.concatenate([row[name] for row in rows]))
    present = np.flatnonzero(result.composition.any(0))
    result.elements = present.tolist()
    result.composition = result.composition[:, present].astype(int)


def _judge(
    result: Survey,
    block: Structures,
    places: list[tuple[str, int]],
    bounds: Bounds,
    *,
    labelled: bool,
) -> None:
    def note(i: int, kind: str, text: str) -> None:
        file, index = places[i]
        result.findings.append(Finding(file=file, index=index, kind=kind, text=text))

    for i, reasons in enumerate(judge_geometry(block)):
        if reasons:
            note(i, "geometry", "; ".join(reasons))
    if not labelled:
        return
    forces = block.forces.astype("f8")
    for i, (first, last) in enumerate(zip(block.offsets[:-1], block.offsets[1:], strict=True)):
        own = forces[first:last]
        if not (np.isfinite(own).all() and np.isfinite(block.energy[i])):
            note(i, "label", "energy or a force is not finite")
            continue
        largest = float(np.linalg.norm(own, axis=1).max())
        net = float(np.linalg.norm(own.sum(0)))
        if largest > bounds.max_force:
            note(i, "force", f"force of {largest:.1f} eV/Å, above {bounds.max_force:g}")
        if net > bounds.max_net_force:
            note(i, "net force", f"net force of {net:.3f} eV/Å, above {bounds.max_net_force:g}")


def _find_duplicates(
    result: Survey,
    block: Structures,
    places: list[tuple[str, int]],
    seen: dict[bytes, tuple[str, int]],
) -> None:
    for place, key in zip(places, fingerprints(block), strict=True):
        if key in seen:
            file, index = seen[key]
            text = f"the same as {index} of {file}"
            result.findings.append(
                Finding(file=place[0], index=place[1], kind="duplicate", text=text)
            )
        else:
            seen[key] = place


def _find_outliers(result: Survey, places: list[tuple[str, int]], bounds: Bounds) -> None:
    """Energies far from the median of the same composition, charge and periodicity."""
    known = np.flatnonzero(np.isfinite(result.energy))
    if not len(known):
        return
    key = np.column_stack([result.composition, result.charge, result.periodic])[known]
    _, group = np.unique(key, axis=0, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    for part in np.split(known[order], np.flatnonzero(np.diff(group.ravel()[order])) + 1):
        if len(part) < bounds.least_structures:
            continue
        per_atom = result.energy[part] / result.n_atoms[part]
        away = per_atom - np.median(per_atom)
        spread = _ROBUST * float(np.median(np.abs(away)))
        for i in np.flatnonzero(np.abs(away) > max(bounds.outlier * spread, bounds.least_outlier)):
            file, index = places[part[i]]
            text = (
                f"energy {away[i]:+.3f} eV/atom from the median of {len(part)} structures of its "
                f"composition, whose spread is {spread:.3f}"
            )
            result.findings.append(Finding(file=file, index=index, kind="energy", text=text))


def format_stats(found: Survey) -> str:
    """A survey as text: by subset, and by element."""
    lines = [f"{len(found)} structures, {int(found.n_atoms.sum())} atoms"]
    lines += [
        f"  {f}: {t or 'without labels'}" for f, t in zip(found.files, found.teachers, strict=True)
    ]
    head = f"  {'subset':16s} {'structures':>10s} {'atoms':>9s} {'sizes':>11s} {'max force':>10s}"
    lines.append(head + f" {'temperatures':>14s} {'charged':>8s} {'periodic':>8s}")
    for index, name in enumerate([*found.subset_names, "all"]):
        mine = found.subset == index if index < len(found.subset_names) else found.n_atoms > 0
        if not mine.any():
            continue
        sizes, force = found.n_atoms[mine], found.largest_force[mine]
        warm = found.temperature[mine][np.isfinite(found.temperature[mine])]
        largest = f"{force.max():.1f}" if np.isfinite(force).all() else "-"
        range_ = f"{warm.min():.0f}-{warm.max():.0f}" if len(warm) else "-"
        lines.append(
            f"  {name:16s} {mine.sum():10d} {sizes.sum():9d} {f'{sizes.min()}-{sizes.max()}':>11s} "
            f"{largest:>10s} {range_:>14s} {(found.charge[mine] != 0).sum():8d} "
            f"{found.periodic[mine].sum():8d}"
        )
    totals = found.composition.sum(0)
    lines.append(
        "  elements: "
        + ", ".join(f"{symbol(z)} {n}" for z, n in zip(found.elements, totals, strict=True))
    )
    if found.force_counts.any():
        rms = np.sqrt(found.squared_forces / (3 * found.force_counts.sum()))
        lines.append(f"  forces: {rms:.3f} eV/Å root mean square of the components")
    return "\n".join(lines)


def format_findings(found: Survey, *, examples: int = 3) -> str:
    """What is wrong, as text: how often each kind, and some examples."""
    if not found.findings:
        return f"{len(found)} structures, nothing found"
    structures = len({(f.file, f.index) for f in found.findings})
    lines = [f"{structures} of {len(found)} structures have something wrong:"]
    for kind, n in Counter(f.kind for f in found.findings).most_common():
        lines.append(f"  {kind}: {n}")
        mine = [f for f in found.findings if f.kind == kind][:examples]
        lines += [f"    {f.file} #{f.index}: {f.text}" for f in mine]
    return "\n".join(lines)
