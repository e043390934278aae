"""Import of the SO3LR starter sets (schema "so3lr-starter/2") into our dataset format."""

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from openmm_mlffd.training.hdf5 import DatasetError, DatasetWriter, SplitRule, Structures

SCHEMA = "so3lr-starter/2"


def import_starter(
    sources: Sequence[str | Path], target: str | Path, *, split: SplitRule | None = None
) -> int:
    """Write starter sets as one dataset file.

    The group of a structure is the SMILES of its solute, so that a molecule and its solvated
    forms stay together; pure water has no solute, and each of its structures is a group.

    Parameters
    ----------
    sources
        Files with the schema "so3lr-starter/2".
    target
        File to write.
    split
        How groups are split; None for the defaults of `SplitRule`.

    Returns
    -------
    int
        Number of structures written.

    Raises
    ------
    DatasetError
        If a source has another schema, or the sources have different teachers.
    """
    files = [h5py.File(source, "r") for source in sources]
    teachers = set()
    for file, source in zip(files, sources, strict=True):
        if file.attrs.get("schema") != SCHEMA:
            raise DatasetError(
                f"{source}: has schema {file.attrs.get('schema')!r}, {SCHEMA!r} is needed"
            )
        teachers.add(str(file.attrs["teacher"]))
    if len(teachers) != 1:
        raise DatasetError(f"the sources have different teachers: {sorted(teachers)}")
    subsets = sorted({str(s) for file in files for s in file["subset"].attrs["names"]})
    written = 0
    with DatasetWriter(
        target, teacher=teachers.pop(), subsets=subsets, split=split or SplitRule()
    ) as writer:
        for file in files:
            for start in range(0, len(file["energy"]), 4096):
                stop = min(start + 4096, len(file["energy"]))
                structures, groups = _read(file, start, stop, subsets, written)
                writer.append(structures, groups)
                written += stop - start
    for file in files:
        file.close()
    return written


def _read(
    file: h5py.File, start: int, stop: int, subsets: list[str], written: int
) -> tuple[Structures, list[str]]:
    n = stop - start
    offsets = file["offsets"][start : stop + 1]
    atoms = slice(int(offsets[0]), int(offsets[-1]))
    names = [subsets.index(str(s)) for s in file["subset"].attrs["names"]]
    smiles = file["smiles"][:]
    groups = []
    for i, molecule in enumerate(file["molecule"][start:stop]):
        solute = smiles[molecule].decode().split("|")[0]
        groups.append(f"water #{written + i}" if solute in ("", "water") else solute)
    structures = Structures(
        offsets=offsets - offsets[0],
        atomic_numbers=file["atomic_numbers"][atoms],
        positions=file["positions"][atoms],
        forces=file["forces"][atoms],
        partial_charges=file["partial_charges"][atoms],
        energy=file["energy"][start:stop],
        stress=file["stress"][start:stop],
        cell=file["cell"][start:stop],
        pbc=np.repeat(file["pbc"][start:stop][:, None], 3, axis=1),
        total_charge=file["total_charge"][start:stop].astype("i2"),
        temperature=file["sampling_temperature"][start:stop].astype("f4"),
        group=np.zeros(n, "i4"),
        subset=np.array(names, "u1")[file["subset"][start:stop]],
        split=np.zeros(n, "u1"),
    )
    return structures, groups
