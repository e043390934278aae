"""From a recipe to a list of systems: every random choice of molecules is made here, once."""

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from openmm_mlffd.training.generation.clusters import WATER
from openmm_mlffd.training.generation.molecules import (
    Filter,
    Molecule,
    SourceMissing,
    find_files,
    ionize,
    read_excluded,
    read_smiles,
)
from openmm_mlffd.training.generation.peptides import draw_peptides
from openmm_mlffd.training.generation.recipe import (
    BoxesConfig,
    ClustersConfig,
    FilesConfig,
    LoadedRecipe,
    MoleculesConfig,
)
from openmm_mlffd.training.generation.structure_files import count_structures


class Task(NamedTuple):
    """One system to be made and sampled; of plain values, to be stored and sent."""

    subset: str
    """Name of its subset."""

    number: int
    """Its place in the subset, which decides its random numbers."""

    group: str
    """Its group."""

    inputs: dict[str, Any]
    """SMILES, number of waters, file."""


def plan(loaded: LoadedRecipe) -> list[Task]:
    """All systems of a recipe, in the order of its subsets.

    Raises
    ------
    SourceMissing
        If a file or a package is not there, or sources have fewer molecules than are wanted.
    """
    excluded = read_excluded(loaded.folder / name for name in loaded.recipe.exclude)
    tasks: list[Task] = []
    for name, subset in loaded.subsets.items():
        rng = np.random.default_rng([loaded.recipe.seed, zlib.crc32(name.encode())])
        if isinstance(subset, FilesConfig):
            found = _files(loaded, subset, rng)
        else:
            keep = Filter(
                elements=frozenset(loaded.recipe.elements),
                min_atoms=subset.min_atoms,
                max_atoms=subset.max_atoms,
                excluded=excluded,
            )
            if isinstance(subset, ClustersConfig):
                found = _clusters(loaded, name, subset, keep, rng)
            elif isinstance(subset, BoxesConfig):
                found = _boxes(loaded, name, subset, keep, rng)
            else:
                found = (
                    (m.group, {"smiles": m.smiles})
                    for m in _molecules(loaded, name, subset, keep, rng, subset.count)
                )
        tasks += [Task(name, i, group, inputs) for i, (group, inputs) in enumerate(found)]
    return tasks


def _candidates(
    loaded: LoadedRecipe, subset: MoleculesConfig, rng: np.random.Generator
) -> Iterator[Molecule]:
    """Molecules of all sources, mixed; not yet filtered, some more than once."""
    found: list[str | Molecule] = []
    for source in subset.sources:
        if source.peptides is not None:
            found += draw_peptides(source.peptides, rng)
            continue
        for path in find_files(source, loaded.folder):
            found += read_smiles(path, source.column)
    for i in rng.permutation(len(found)):
        entry = found[i]
        yield Molecule(entry, "") if isinstance(entry, str) else entry


def _molecules(
    loaded: LoadedRecipe,
    name: str,
    subset: MoleculesConfig,
    keep: Filter,
    rng: np.random.Generator,
    count: int | None,
) -> Iterator[Molecule]:
    seen: set[str] = set()
    for entry in _candidates(loaded, subset, rng):
        if len(seen) == count:
            return
        smiles = keep(entry.smiles)
        if smiles is None or smiles in seen:
            continue
        seen.add(smiles)
        charged = ionize(smiles, rng) if rng.random() < subset.charged else None
        yield Molecule(charged or smiles, entry.group or smiles)
    if not seen or (count is not None and len(seen) < count):
        raise SourceMissing(
            f"subsets.{name}: its sources have {len(seen)} molecules that pass, "
            f"{count or 'at least one'} are wanted; add sources or lower the count"
        )


def _pool(
    loaded: LoadedRecipe,
    name: str,
    subset: MoleculesConfig,
    keep: Filter,
    rng: np.random.Generator,
    wanted: int,
) -> list[Molecule]:
    """Molecules to draw from with replacement; up to as many as are wanted."""
    pool: list[Molecule] = []
    try:
        pool.extend(_molecules(loaded, name, subset, keep, rng, wanted))
    except SourceMissing:
        if not pool:
            raise
    return pool


def _clusters(
    loaded: LoadedRecipe,
    name: str,
    subset: ClustersConfig,
    keep: Filter,
    rng: np.random.Generator,
) -> Iterator[tuple[str, dict[str, Any]]]:
    sizes = rng.choice(subset.molecules, subset.count)
    waters = rng.choice(subset.waters, subset.count)
    pool = []
    if subset.sources and sizes.max():
        pool = _pool(loaded, name, subset, keep, rng, int(sizes.sum()))
    for i, (size, n_waters) in enumerate(zip(sizes.tolist(), waters.tolist(), strict=True)):
        chosen = [pool[k] for k in rng.integers(len(pool), size=size)] if size else []
        # of a mixture all its molecules, of a solute in water the solute
        group = ".".join(sorted({m.group for m in chosen})) or f"water {name} #{i}"
        smiles = [m.smiles for m in chosen] + [WATER] * n_waters
        if len(smiles) < 2:
            raise SourceMissing(f"subsets.{name}: a cluster of {len(smiles)} molecules is none")
        yield group, {"smiles": smiles}


def _boxes(
    loaded: LoadedRecipe,
    name: str,
    subset: BoxesConfig,
    keep: Filter,
    rng: np.random.Generator,
) -> Iterator[tuple[str, dict[str, Any]]]:
    pool = []
    if subset.sources:
        pool = _pool(loaded, name, subset, keep, rng, subset.count)
    for i in range(subset.count):
        if pool:
            solute = pool[i % len(pool)]
            yield solute.group, {"smiles": solute.smiles}
        else:
            yield f"water {name} #{i}", {"smiles": None}


def _files(
    loaded: LoadedRecipe, subset: FilesConfig, rng: np.random.Generator
) -> Iterator[tuple[str, dict[str, Any]]]:
    entries = []
    for file in subset.files:
        path = loaded.folder / file
        n = count_structures(path, add_hydrogens=subset.hydrogens == "add", charge=subset.charge)
        entries += [(str(path.resolve()), i) for i in range(n)]
    order = np.arange(len(entries))
    if subset.count is not None:
        order = np.sort(rng.permutation(len(entries))[: subset.count])
    for k in order:
        file, i = entries[k]
        yield "", {"file": file, "index": i}
