"""`mlffd data convert`: between dataset files, extended XYZ, ASE databases and SPICE's layout."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openmm_mlffd.training.datasets.spice import is_spice, read_spice, teacher_of, write_spice
from openmm_mlffd.training.datasets.survey import blocks_of
from openmm_mlffd.training.hdf5 import (
    Dataset,
    DatasetError,
    DatasetWriter,
    SplitRule,
    Structures,
    concatenate,
)
from openmm_mlffd.training.sources import frame_of, iterate_ase, pack

FORMATS = ("dataset", "extxyz", "db", "spice")
_BLOCK = 500


class Converted(NamedTuple):
    """What a conversion came to."""

    structures: int
    """Written."""

    left_out: int
    """Periodic ones, where the layout has no boxes."""


def format_of(path: Path, chosen: str | None = None) -> str:
    """Format of a file, by its content where it is there, else by its name.

    Raises
    ------
    ValueError
        If the name says nothing, or the format that was chosen is none.
    """
    if chosen is not None:
        if chosen not in FORMATS:
            raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {chosen!r}")
        return chosen
    suffix = path.suffix.lower()
    if suffix in (".h5", ".hdf5"):
        return "spice" if is_spice(path) else "dataset"
    if suffix in (".xyz", ".extxyz"):
        return "extxyz"
    if suffix == ".db":
        return "db"
    raise ValueError(f"{path}: say the format, one of {', '.join(FORMATS)}")


def convert(
    source: str | Path,
    output: str | Path,
    *,
    source_format: str | None = None,
    output_format: str | None = None,
    charge: int = 0,
    split: SplitRule | None = None,
) -> Converted:
    """Write the structures of a file in another format, with all labels that both have.

    Parameters
    ----------
    source, output
        Files.
    source_format, output_format
        "dataset", "extxyz", "db" or "spice"; None for what the file is, or its name says.
    charge
        Total charge [e] of structures of which the source does not say it.
    split
        How the groups of a dataset file are split; None for that of the source, or the default.

    Raises
    ------
    FileExistsError
        If the output is there already.
    DatasetError, ValueError
        If the source cannot be used.
    """
    source, output = Path(source), Path(output)
    if not source.is_file():
        raise DatasetError(f"{source}: there is no such file")
    if output.exists():
        raise FileExistsError(f"{output} exists; remove it or choose another name")
    old, new = format_of(source, source_format), format_of(output, output_format)
    if new == "dataset":
        return _to_dataset(source, output, old, charge, split)
    if old != "dataset":
        # by way of a dataset file, which checks everything
        between = output.with_name(f".{output.name}.h5")
        try:
            _to_dataset(source, between, old, charge, split)
            return _from_dataset(between, output, new)
        finally:
            between.unlink(missing_ok=True)
    return _from_dataset(source, output, new)


Piece = tuple[Structures, list[str], list[str]]
"""Structures with the names of their groups and subsets."""


def _to_dataset(
    source: Path, output: Path, old: str, charge: int, split: SplitRule | None
) -> Converted:
    if old == "dataset":
        raise DatasetError(f"{source}: is a dataset file already; `mlffd data merge` copies it")
    reader = _read_spice if old == "spice" else _read_ase
    subsets: list[str] = []
    labelled = None
    teacher = ""
    for structures, _, names, said in reader(source, charge):  # once for what the head must say
        subsets += [s for s in dict.fromkeys(names) if s not in subsets]
        known = np.isfinite(structures.energy)
        labelled = bool(known.all()) if labelled is None else labelled
        if known.any() != known.all() or labelled != bool(known.all()):
            raise DatasetError(f"{source}: some structures have an energy and some have none")
        teacher = teacher or said
    if labelled is None:
        raise DatasetError(f"{source}: holds no structures")
    count = 0
    with DatasetWriter(
        output,
        teacher=(teacher or f"not known; from {source.name}") if labelled else None,
        subsets=subsets,
        split=split or SplitRule(),
        origin=f"converted from {source.name}",
    ) as writer:
        for structures, groups, names, _ in reader(source, charge):
            index = np.array([subsets.index(s) for s in names], "u1")
            writer.append(structures._replace(subset=index), groups)
            count += len(groups)
    return Converted(count, 0)


Read = Iterator[tuple[Structures, list[str], list[str], str]]


def _read_spice(source: Path, charge: int) -> Read:
    teacher = teacher_of(source)
    for structures, group, subset in read_spice(source, charge):
        n = len(structures.energy)
        yield structures, [group] * n, [subset] * n, teacher


def _read_ase(source: Path, charge: int) -> Read:
    pieces: list[Any] = []
    index = 0
    try:
        for index, atoms in enumerate(iterate_ase(source)):
            pieces.append(_piece(atoms, f"{source}: frame {index}", source.stem, charge))
            if len(pieces) == _BLOCK:
                yield _joined(pieces)
                pieces = []
    except DatasetError:
        raise
    except ValueError as error:
        raise DatasetError(f"{source}: frame {index}: {error}") from error
    if pieces:
        yield _joined(pieces)


def _joined(pieces: list[Any]) -> tuple[Structures, list[str], list[str], str]:
    structures, groups, subsets, teachers = zip(*pieces, strict=True)
    return concatenate(structures), list(groups), list(subsets), next(filter(None, teachers), "")


def _piece(atoms: Any, where: str, stem: str, charge: int) -> tuple[Structures, str, str, str]:
    frame = frame_of(atoms, where, stem, charge)
    one = pack(frame, [frame.subset])
    results = atoms.calc.results if atoms.calc is not None else {}
    fields: dict[str, Any] = {}
    if "energy" in results and "forces" in results:
        fields["energy"] = np.array([results["energy"]], "f8")
        fields["forces"] = np.asarray(results["forces"], "f4")
        if "stress" in results and all(frame.pbc):
            fields["stress"] = np.asarray(atoms.get_stress(voigt=False), "f4").reshape(1, 3, 3)
        if "charges" in results:
            fields["partial_charges"] = np.asarray(results["charges"], "f4")
    return one._replace(**fields), frame.group, frame.subset, _teacher(atoms)


def _teacher(atoms: Any) -> str:
    return str((atoms.info | atoms.info.get("data", {})).get("teacher", ""))


def _from_dataset(source: Path, output: Path, new: str) -> Converted:
    temporary = output.with_name(f".{output.name}.tmp{output.suffix}")
    temporary.unlink(missing_ok=True)
    writers: dict[str, Callable[[Dataset, Path], None]] = {"extxyz": _write_xyz, "db": _write_db}
    try:
        with Dataset(source, unlabelled=True) as dataset:
            if new == "spice":
                written, left_out = write_spice(dataset, temporary)
            else:
                writers[new](dataset, temporary)
                written, left_out = len(dataset), 0
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return Converted(written, left_out)


def _atoms(dataset: Dataset) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Structures as ASE has them, with labels as results, and what else is known of them."""
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.stress import full_3x3_to_voigt_6_stress

    groups, teacher = dataset.group_names(), dataset.teacher
    for _, block in blocks_of(dataset):
        for i in range(len(block.energy)):
            own = slice(block.offsets[i], block.offsets[i + 1])
            atoms = Atoms(
                numbers=block.atomic_numbers[own],
                positions=block.positions[own].astype("f8"),
                cell=block.cell[i],
                pbc=block.pbc[i],
            )
            info = {
                "charge": int(block.total_charge[i]),
                "group": groups[block.group[i]],
                "subset": dataset.subsets[block.subset[i]],
            }
            if np.isfinite(block.temperature[i]):
                info["temperature"] = float(block.temperature[i])
            if dataset.labelled:
                info["teacher"] = teacher
                results: dict[str, Any] = {
                    "energy": float(block.energy[i]),
                    "forces": block.forces[own].astype("f8"),
                }
                if np.isfinite(block.stress[i]).all():
                    results["stress"] = full_3x3_to_voigt_6_stress(block.stress[i].astype("f8"))
                if np.isfinite(block.partial_charges[own]).all():
                    results["charges"] = block.partial_charges[own].astype("f8")
                atoms.calc = SinglePointCalculator(atoms, **results)
            yield atoms, info


def _write_xyz(dataset: Dataset, path: Path) -> None:
    from ase.io import write

    with path.open("w", encoding="utf-8") as file:
        for atoms, info in _atoms(dataset):
            atoms.info |= info
            write(file, atoms, format="extxyz")


def _write_db(dataset: Dataset, path: Path) -> None:
    from ase.db import connect

    with connect(path, type="db") as database:
        for atoms, info in _atoms(dataset):
            database.write(atoms, data=info)
