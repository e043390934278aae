"""Files with the layout of SPICE: one HDF5 group for each molecule, conformations stacked.

References
----------
P. Eastman et al., Sci. Data 10, 11 (2023); doi:10.1038/s41597-022-01882-6.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from openmm_mlffd.training.datasets.chemistry import name_and_charge
from openmm_mlffd.training.datasets.survey import blocks_of
from openmm_mlffd.training.hdf5 import Dataset, DatasetError, Structures, take
from openmm_mlffd.units import BOHR, HARTREE

_UNITS = {
    "conformations": "bohr",
    "dft_total_energy": "hartree",
    "dft_total_gradient": "hartree/bohr",
}
_BLOCK = 1024  # structures read at a time …
_BLOCKS_KEPT = 8  # … and how many such blocks are kept
_CHARGES = "mbis_charges"


def is_spice(path: Path) -> bool:
    """Whether a file has this layout."""
    try:
        with h5py.File(path, "r") as file:
            first = next(iter(file.values()), None)
            return isinstance(first, h5py.Group) and "conformations" in first
    except OSError:
        return False


def teacher_of(path: Path) -> str:
    """What made the labels, if the file says it."""
    with h5py.File(path, "r") as file:
        return str(file.attrs.get("teacher", ""))


def read_spice(path: Path, charge: int = 0) -> Iterator[tuple[Structures, str, str]]:
    """Conformations of each molecule, with its group and its subset.

    Parameters
    ----------
    path
        The file.
    charge
        Total charge [e] of molecules without SMILES and without an attribute `total_charge`.

    Raises
    ------
    DatasetError
        If a unit is another one, or arrays disagree in length.
    """
    with h5py.File(path, "r") as file:
        for name, molecule in file.items():
            where = f"{path}: {name}"
            missing = [k for k in ("atomic_numbers", "conformations") if k not in molecule]
            if missing:
                raise DatasetError(f"{where}: lacks {', '.join(missing)}")
            for key, unit in _UNITS.items():
                said = molecule[key].attrs.get("units", unit) if key in molecule else unit
                if said != unit:
                    raise DatasetError(f"{where}: {key} must be in {unit}, the file says {said!r}")
            smiles = _text(molecule, "smiles")
            group, formal = name_and_charge(smiles) if smiles else (name, None)
            group = str(molecule.attrs.get("group", group))  # of our own files, word by word
            said = molecule.attrs.get("total_charge", formal if formal is not None else charge)
            yield (
                _structures(molecule, int(said), where),
                group,
                _text(molecule, "subset") or path.stem,
            )


def _text(molecule: Any, key: str) -> str:
    if key not in molecule:
        return ""
    value = np.asarray(molecule[key]).ravel()[0]
    return value.decode() if isinstance(value, bytes) else str(value)


def _structures(molecule: Any, charge: int, where: str) -> Structures:
    numbers = np.asarray(molecule["atomic_numbers"], "u1").ravel()
    positions = np.asarray(molecule["conformations"], "f8") * BOHR
    n, n_atoms = len(positions), len(numbers)
    if positions.shape != (n, n_atoms, 3):
        raise DatasetError(f"{where}: conformations have shape {positions.shape}, {n_atoms} atoms")

    def optional(key: str, shape: tuple[int, ...], unit: float) -> np.ndarray:
        if key not in molecule:
            return np.full(shape, np.nan)
        values = np.asarray(molecule[key], "f8") * unit
        if values.size != np.prod(shape):
            raise DatasetError(f"{where}: {key} has shape {values.shape}, {shape} is needed")
        return values.reshape(shape)

    gradient = optional("dft_total_gradient", (n * n_atoms, 3), HARTREE / BOHR)
    return Structures(
        offsets=np.arange(n + 1) * n_atoms,
        atomic_numbers=np.tile(numbers, n),
        positions=positions.reshape(-1, 3).astype("f4"),
        forces=-gradient.astype("f4"),
        partial_charges=optional(_CHARGES, (n * n_atoms,), 1.0).astype("f4"),
        energy=optional("dft_total_energy", (n,), HARTREE),
        stress=np.full((n, 3, 3), np.nan, "f4"),
        cell=np.zeros((n, 3, 3)),
        pbc=np.zeros((n, 3), bool),
        total_charge=np.full(n, charge, "i2"),
        temperature=optional("temperature", (n,), 1.0).astype("f4"),
        group=np.zeros(n, "i4"),
        subset=np.zeros(n, "u1"),
        split=np.zeros(n, "u1"),
    )


def write_spice(dataset: Dataset, path: Path) -> tuple[int, int]:
    """Write the molecules of a dataset file; returns how many were written and left out.

    Structures of one group with the same atoms in the same order become one HDF5 group. This
    layout has no boxes: periodic structures are left out.
    """
    places: dict[tuple[str, int, bytes, int], list[int]] = {}
    groups = dataset.group_names()
    left_out = 0
    for start, block in blocks_of(dataset):
        for i in range(len(block.energy)):
            if block.pbc[i].any():
                left_out += 1
                continue
            key = (
                groups[int(block.group[i])],
                int(block.subset[i]),
                block.atomic_numbers[block.offsets[i] : block.offsets[i + 1]].tobytes(),
                int(block.total_charge[i]),
            )
            places.setdefault(key, []).append(start + i)

    @lru_cache(maxsize=_BLOCKS_KEPT)
    def block_of(number: int) -> Structures:
        stop = min((number + 1) * _BLOCK, len(dataset))
        return dataset.read(number * _BLOCK, stop)

    def read(index: int) -> Structures:
        return take(block_of(index // _BLOCK), np.array([index % _BLOCK]))

    with h5py.File(path, "x") as file:
        file.attrs["teacher"] = dataset.teacher
        for (group, subset, numbers, charge), indices in places.items():
            parts = [read(i) for i in indices]
            what = (group, dataset.subsets[subset], numbers, charge)
            _write_molecule(file, parts, what, labelled=dataset.labelled)
    return len(dataset) - left_out, left_out


def _write_molecule(
    file: h5py.File, parts: list[Structures], what: tuple[str, str, bytes, int], *, labelled: bool
) -> None:
    group, subset, numbers, charge = what
    name = stem = re.sub(r"[/.]", "_", group) or "molecule"
    k = 1
    while name in file:
        name, k = f"{stem} {k}", k + 1
    molecule = file.create_group(name)
    n_atoms = len(numbers)
    molecule.attrs["total_charge"] = charge
    molecule.attrs["group"] = group
    text = h5py.string_dtype()
    molecule.create_dataset("smiles", data=[group], dtype=text)
    molecule.create_dataset("subset", data=[subset], dtype=text)
    molecule["atomic_numbers"] = np.frombuffer(numbers, "u1").astype("i2")

    def put(key: str, values: np.ndarray) -> None:
        molecule[key] = values
        if key in _UNITS:
            molecule[key].attrs["units"] = _UNITS[key]

    positions = np.stack([p.positions.astype("f8") for p in parts])
    put("conformations", (positions / BOHR).astype("f4"))
    warm = np.array([p.temperature[0] for p in parts])
    if np.isfinite(warm).all():
        put("temperature", warm)
    if labelled:
        put("dft_total_energy", np.array([p.energy[0] for p in parts]) / HARTREE)
        forces = np.stack([p.forces.astype("f8") for p in parts])
        put("dft_total_gradient", (-forces * BOHR / HARTREE).astype("f4"))
        charges = np.stack([p.partial_charges for p in parts])
        if np.isfinite(charges).all():
            put(_CHARGES, charges.reshape(len(parts), n_atoms, 1))
