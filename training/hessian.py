"""Rows of the teacher's Hessian: its product with random directions, by differences of forces."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.training.batches import StructureSource
from openmm_mlffd.training.config import ConfigError, DataConfig
from openmm_mlffd.training.hdf5 import Dataset, DatasetError, SplitRule, Structures, take
from openmm_mlffd.training.label import Limits, TeacherChoice, label
from openmm_mlffd.training.sources import sha256, without_labels

FORMAT = "mlffd-hessian"
VERSION = 1


class DisplacedSource:
    """Structures of a dataset, each moved a little forth and back along a random direction.

    A `Source` for `label`: structure 2k is x + h u, structure 2k + 1 is x - h u, u normally
    distributed in each component.

    Parameters
    ----------
    path
        Dataset file.
    count
        How many of its training structures, chosen at random.
    displacement
        h [Å].
    seed
        Seed of the choice and of the directions.
    """

    def __init__(self, path: Path, count: int, *, displacement: float, seed: int) -> None:
        if displacement <= 0 or count < 1:
            raise ValueError(
                "a positive displacement and at least one structure are needed, "
                f"got {displacement} Å and {count}"
            )
        self.dataset = Dataset(path)
        rng = np.random.default_rng([seed, 0])
        train = self.dataset.in_split("train")
        self.chosen = np.sort(rng.permutation(train)[:count])
        self.displacement = displacement
        self._seed = seed
        self.name = path.name
        self.subsets = ["displaced"]
        self.origin = f"{path.name}, displaced by {displacement} Å along random directions"
        self.split = SplitRule(val=0.0, test=0.0)
        self.identity = {
            "sha256": sha256(path),
            "displaced": [count, displacement, seed],
        }

    def __len__(self) -> int:
        return 2 * len(self.chosen)

    def probe(self, place: int) -> NDArray[np.float64]:
        """Direction u of one of the chosen structures [Å], shape ``(n_atoms, 3)``."""
        structure = int(self.chosen[place])
        rng = np.random.default_rng([self._seed, 1, structure])
        return rng.normal(size=(int(self.dataset.n_atoms[structure]), 3))

    def read(self, start: int, stop: int) -> tuple[Structures, list[str]]:
        """Structures start … stop - 1, and the names of their groups, which say what they are."""
        first, last = start // 2, (stop - 1) // 2
        lowest = int(self.chosen[first])
        block = self.dataset.read(lowest, int(self.chosen[last]) + 1)
        places = np.arange(start, stop) // 2
        structures = without_labels(take(block, self.chosen[places] - lowest))
        positions = structures.positions.astype("f8")
        groups = []
        for i, (place, number) in enumerate(zip(places, range(start, stop), strict=True)):
            atoms = slice(structures.offsets[i], structures.offsets[i + 1])
            sign = 1 if number % 2 == 0 else -1
            positions[atoms] += sign * self.displacement * self.probe(int(place))
            groups.append(f"{place} {sign:+d}")
        subset = np.zeros(len(structures.energy), "u1")
        return structures._replace(positions=positions, subset=subset), groups


def label_hessians(
    path: str | Path,
    output: str | Path,
    choice: TeacherChoice,
    *,
    count: int = 2000,
    displacement: float = 0.005,
    seed: int = 0,
    limits: Limits | None = None,
    progress: bool = True,
) -> int:
    """Write a row of the teacher's Hessian for some training structures of a dataset.

    H u = -[F(x + h u) - F(x - h u)] / 2h. What is labelled lies in a folder beside the output, so
    that an interrupted run goes on.

    Parameters
    ----------
    path
        Dataset file.
    output
        File to write.
    choice
        The teacher; should be the one that labelled the dataset.
    count, displacement, seed
        See `DisplacedSource`.
    limits
        Beyond which labels are failures.
    progress
        Show a progress bar.

    Returns
    -------
    int
        Structures with a row.

    Raises
    ------
    LabelError, TeacherError
        As `label`.
    """
    source = DisplacedSource(Path(path), count, displacement=displacement, seed=seed)
    output = Path(output)
    folder = output.with_name(output.name + ".labels")
    found = label(source, folder, choice, limits=limits, progress=progress)
    rows: dict[int, dict[int, NDArray[np.float64]]] = {}
    teacher = ""
    if found.dataset is not None:
        with Dataset(found.dataset) as labelled:
            names, teacher = labelled.group_names(), labelled.teacher
            structures = labelled.read(0, len(labelled))
        for i, group in enumerate(structures.group):
            place, sign = (int(part) for part in names[group].split())
            atoms = slice(structures.offsets[i], structures.offsets[i + 1])
            rows.setdefault(place, {})[sign] = structures.forces[atoms].astype("f8")
    whole = sorted(place for place, forces in rows.items() if len(forces) == 2)
    curvature = [-(rows[p][1] - rows[p][-1]) / (2 * displacement) for p in whole]
    _write(output, source, whole, curvature, teacher)
    return len(whole)


def _write(
    output: Path,
    source: DisplacedSource,
    places: list[int],
    curvature: list[NDArray[np.float64]],
    teacher: str,
) -> None:
    temporary = output.with_name(output.name + ".tmp")
    empty = np.zeros((0, 3))
    with h5py.File(temporary, "w") as file:
        file.attrs.update(
            {
                "format": FORMAT,
                "version": VERSION,
                "dataset_sha256": source.identity["sha256"],
                "teacher": teacher,
                "displacement": source.displacement,
            }
        )
        file["structure"] = source.chosen[places].astype("i8")
        file["probe"] = np.concatenate([empty, *(source.probe(p) for p in places)])
        file["curvature"] = np.concatenate([empty, *curvature])
        file["curvature"].attrs["units"] = "eV/Å"
    temporary.replace(output)


def load_hessians(
    config: DataConfig, datasets: Sequence[Dataset], source: StructureSource
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Directions and rows for each atom of a source, NaN where there are none.

    Returns
    -------
    tuple or None
        Directions [Å] and Hessian times direction [eV/Å], shape ``(n_atoms, 3)`` each; None
        where the configuration names no files.

    Raises
    ------
    ConfigError
        If a file is not one of Hessian rows, or of none of the datasets.
    """
    if not config.hessians:
        return None
    known = {sha256(d.path): number for number, d in enumerate(datasets)}
    rows: dict[tuple[int, int], tuple[Any, Any]] = {}
    for path in config.hessians:
        try:
            with h5py.File(path, "r") as file:
                attrs = dict(file.attrs)
                values = {k: file[k][:] for k in ("structure", "probe", "curvature")}
        except (OSError, KeyError) as error:
            raise ConfigError(f"data.hessians: {path}: cannot be read ({error})") from error
        if (attrs.get("format"), attrs.get("version")) != (FORMAT, VERSION):
            raise ConfigError(f"data.hessians: {path}: is not of {FORMAT} version {VERSION}")
        if attrs["dataset_sha256"] not in known:
            raise ConfigError(
                f"data.hessians: {path}: belongs to another dataset than "
                f"{', '.join(str(d.path) for d in datasets)}"
            )
        number = known[attrs["dataset_sha256"]]
        counts = datasets[number].n_atoms[values["structure"]]
        if counts.sum() != len(values["probe"]):
            raise DatasetError(f"{path}: its rows do not fit the dataset")
        ends = np.cumsum(counts)
        for i, structure in enumerate(values["structure"].tolist()):
            atoms = slice(int(ends[i] - counts[i]), int(ends[i]))
            rows[number, structure] = values["probe"][atoms], values["curvature"][atoms]
    total = int(source.n_atoms.sum())
    probe, curvature = np.full((total, 3), np.nan), np.full((total, 3), np.nan)
    start = 0
    for number, part in source.rows:
        for structure in part.tolist():
            stop = start + int(datasets[number].n_atoms[structure])
            if (number, structure) in rows:
                probe[start:stop], curvature[start:stop] = rows[number, structure]
            start = stop
    return probe, curvature
