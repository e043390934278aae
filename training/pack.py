"""Dataset files packed for transport: rounded decimals as whole numbers, at their entropy.

    python -m openmm_mlffd.training.pack pack data/so3lr.h5 so3lr.mlffdpack
    python -m openmm_mlffd.training.pack unpack so3lr.mlffdpack data/so3lr.h5

Half the size of the dataset file, where positions and labels are rounded as those of the starter
sets are: positions to 1e-4 Å, forces and charges to 1e-3.
"""

import argparse
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.training.hdf5 import DatasetError

DECIMALS = {"positions": 4, "forces": 3, "partial_charges": 3}
"""Decimals of what is rounded."""

_MAGIC = b"mlffd-pack 1\n"
_TOLERANCE = 1e-5  # float32 of a rounded number is no farther from it
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 1}]


def pack(source: Path, target: Path) -> None:
    """Pack a dataset file.

    Raises
    ------
    DatasetError
        If it is no dataset file, or its numbers are not rounded to `DECIMALS`.
    FileExistsError
        If the target is there already.
    """
    entries: list[dict[str, Any]] = []
    blocks: list[bytes] = []
    with h5py.File(source, "r") as file:
        attributes = {k: _plain(v) for k, v in file.attrs.items()}
        if attributes.get("format") != "mlffd-dataset":
            raise DatasetError(f"{source}: not a dataset file of openmm-mlffd")
        for name, dataset in file.items():
            parts, entry = _encode(name, dataset, source)
            entry["sizes"] = [len(p) for p in parts]
            entry["attributes"] = {k: _plain(v) for k, v in dataset.attrs.items()}
            entries.append({"name": name} | entry)
            blocks += parts
    head = json.dumps({"attributes": attributes, "datasets": entries}).encode()
    with target.open("xb") as out:
        out.write(_MAGIC + len(head).to_bytes(8, "little") + head)
        for block in blocks:
            out.write(block)


def unpack(source: Path, target: Path) -> None:
    """Make the dataset file again: the same, but for the last bits of rounded numbers.

    Raises
    ------
    DatasetError
        If it is no packed dataset, or not all of it.
    FileExistsError
        If the target is there already.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or choose another name")
    with source.open("rb") as packed:
        if packed.read(len(_MAGIC)) != _MAGIC:
            raise DatasetError(f"{source}: not a packed dataset")
        head = json.loads(packed.read(int.from_bytes(packed.read(8), "little")))
        temporary = target.with_name(target.name + ".tmp")
        try:
            with h5py.File(temporary, "w") as file:
                file.attrs.update(head["attributes"])
                for entry in head["datasets"]:
                    parts = [packed.read(size) for size in entry["sizes"]]
                    if [len(p) for p in parts] != entry["sizes"]:
                        raise DatasetError(f"{source}: the file ends within {entry['name']}")
                    dataset = file.create_dataset(entry["name"], data=_decode(entry, parts))
                    dataset.attrs.update(entry["attributes"])
            temporary.rename(target)
        finally:
            temporary.unlink(missing_ok=True)


def _encode(name: str, dataset: h5py.Dataset, source: Path) -> tuple[list[bytes], dict[str, Any]]:
    if h5py.check_string_dtype(dataset.dtype) is not None:
        text = "\n".join(dataset.asstr()[:])
        return [_compressed(text.encode())], {"kind": "text"}
    values = dataset[:]
    entry = {"kind": "array", "dtype": dataset.dtype.str, "shape": list(values.shape)}
    if name in DECIMALS:
        entry["decimals"] = DECIMALS[name]
        values = _whole(name, values, source)
    content = np.ascontiguousarray(values).reshape(-1).view("u1")
    planes = content.reshape(-1, values.dtype.itemsize).T
    return [_compressed(p.tobytes()) for p in planes], entry


def _whole(name: str, values: NDArray[Any], source: Path) -> NDArray[np.int32]:
    scale = 10.0 ** DECIMALS[name]
    whole = np.rint(values * np.float64(scale))
    whole = np.where(np.isnan(values), np.iinfo("i4").min, whole)
    known = ~np.isnan(values)
    if np.abs(whole[known] / scale - values[known]).max(initial=0.0) > _TOLERANCE:
        raise DatasetError(
            f"{source}: {name} are not rounded to {DECIMALS[name]} decimals, so that packing "
            "would change them"
        )
    numbers: NDArray[np.int32] = whole.astype("<i4")
    if name == "positions":  # differences of neighbors in the file are shorter
        numbers = np.diff(numbers, axis=0, prepend=np.zeros_like(numbers[:1]))
    # zigzag, so that bytes of small numbers of either sign are alike
    return (numbers << 1) ^ (numbers >> 31)


def _decode(entry: dict[str, Any], parts: Sequence[bytes]) -> Any:
    if entry["kind"] == "text":
        text = _decompressed(parts[0]).decode()
        return np.array(text.split("\n"), dtype=h5py.string_dtype())
    dtype = np.dtype("<i4" if "decimals" in entry else entry["dtype"])
    planes = np.stack([np.frombuffer(_decompressed(p), "u1") for p in parts], axis=1)
    values = np.ascontiguousarray(planes).reshape(-1).view(dtype).reshape(entry["shape"])
    if "decimals" not in entry:
        return values
    numbers = (values >> 1) & 0x7FFFFFFF
    numbers = numbers ^ -(values & 1)
    if entry["name"] == "positions":
        numbers = np.cumsum(numbers, axis=0, dtype="i4")
    real = numbers / 10.0 ** entry["decimals"]
    return np.where(numbers == np.iinfo("i4").min, np.nan, real).astype(entry["dtype"])


def _compressed(content: bytes) -> bytes:
    return lzma.compress(content, lzma.FORMAT_XZ, filters=_FILTERS)


def _decompressed(content: bytes) -> bytes:
    return lzma.decompress(content)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def main() -> None:
    """Entry point of ``python -m openmm_mlffd.training.pack``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    (pack if given.what == "pack" else unpack)(given.source, given.target)


if __name__ == "__main__":
    main()
