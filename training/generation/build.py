"""From a planned system to its configurations."""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem

from openmm_mlffd.training.generation import boxes, clusters, openmm_mmff, structure_files
from openmm_mlffd.training.generation.mmff import RdkitForces, choose_field
from openmm_mlffd.training.generation.molecules import embed, masses_of, numbers_of, silence
from openmm_mlffd.training.generation.plan import Task
from openmm_mlffd.training.generation.recipe import (
    BoxesConfig,
    ClustersConfig,
    FilesConfig,
    LoadedRecipe,
    SamplingConfig,
    parse_recipe,
)
from openmm_mlffd.training.generation.sampling import (
    Forces,
    Sample,
    SamplingError,
    rattle,
    sample,
)
from openmm_mlffd.training.generation.student import StudentForces
from openmm_mlffd.training.sources import Frame

RDKIT_ATOMS = 150
"""Larger systems are moved by OpenMM, whose Context takes a tenth of a second to make."""

_RELAX_STEPS = 40  # of clusters, whose molecules were put together blindly
_LARGEST_SEED = 2**31 - 1


class Order(NamedTuple):
    """A shard to be made: what is sent to a worker."""

    name: str
    """File name of the shard."""

    settings: dict[str, Any]
    """Of the recipe."""

    folder: str
    """Of the recipe."""

    first: int
    """Place of its first task in the plan."""

    tasks: list[Task]
    """Its systems."""


class Made(NamedTuple):
    """What came of an order."""

    frames: list[Frame]
    """Configurations, in the order of the tasks."""

    failures: list[tuple[int, str]]
    """Place in the plan of systems without configurations, and why."""


def make_shard(order: Order) -> Made:
    """Configurations of all systems of a shard; a system that fails is listed."""
    silence()
    loaded = parse_recipe(order.settings, Path(order.folder))
    frames: list[Frame] = []
    failures: list[tuple[int, str]] = []
    for place, task in enumerate(order.tasks, order.first):
        try:
            found = build(loaded, task)
            reason = "" if found else "every configuration had a force above max_force"
        except (SamplingError, ValueError, RuntimeError) as error:
            found, reason = [], f"{type(error).__name__}: {str(error).splitlines()[0]}"
        frames += found
        if reason:
            failures.append((place, f"{task.subset} #{task.number} ({_what(task)}): {reason}"))
    return Made(frames, failures)


def _what(task: Task) -> str:
    smiles = task.inputs.get("smiles")
    if isinstance(smiles, list):
        waters = smiles.count(clusters.WATER)
        smiles = ".".join(s for s in smiles if s != clusters.WATER) or "water"
        smiles += f" with {waters} waters" if waters else ""
    return smiles or task.inputs.get("file") or "water"


def build(loaded: LoadedRecipe, task: Task) -> list[Frame]:
    """Configurations of one system; the same for the same recipe and task, wherever it runs.

    Raises
    ------
    SamplingError
        If it cannot be made or sampled.
    """
    subset = loaded.subsets[task.subset]
    key = [loaded.recipe.seed, zlib.crc32(task.subset.encode()), task.number]
    rng = np.random.default_rng(key)
    if isinstance(subset, FilesConfig):
        return _from_file(loaded, subset, task, rng)
    frames = []
    for _ in range(subset.sampling.conformers):
        if isinstance(subset, BoxesConfig):
            frames += _box(subset, task, rng)
            continue
        if isinstance(subset, ClustersConfig):
            molecule, start = _cluster(subset, task, rng)
        else:
            molecule = embed(task.inputs["smiles"], _seed(rng), subset.sampling.force_field)
            start = np.array(molecule.GetConformer().GetPositions())
        frames += _sample_molecule(subset.sampling, task, molecule, start, rng)
    return frames


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(1, _LARGEST_SEED))


def _forces(molecule: Any, sampling: SamplingConfig) -> Any:
    if sampling.method == "student":
        return StudentForces(numbers_of(molecule), sampling.student)
    small = molecule.GetNumAtoms() <= RDKIT_ATOMS
    if small or choose_field(molecule, sampling.force_field) == "uff":
        return RdkitForces(molecule, sampling.force_field)
    parts, order = _kinds(molecule)
    return openmm_mmff.OpenmmForces(openmm_mmff.build_system(parts, order))


def _kinds(molecule: Any) -> tuple[list[Any], list[int]]:
    """The different molecules of a cluster, and which is where."""
    parts: dict[str, Any] = {}
    order = []
    for part in Chem.GetMolFrags(molecule, asMols=True):
        # the order of the atoms counts, too
        key = Chem.MolToSmiles(part, canonical=False, allHsExplicit=True) + str(numbers_of(part))
        parts.setdefault(key, part)
        order.append(list(parts).index(key))
    return list(parts.values()), order


def _sample_molecule(
    sampling: SamplingConfig,
    task: Task,
    molecule: Any,
    start: NDArray[np.float64],
    rng: np.random.Generator,
) -> list[Frame]:
    charge, numbers = Chem.GetFormalCharge(molecule), numbers_of(molecule)
    forces = _no_forces if sampling.method == "torn" else _forces(molecule, sampling)
    found = sample(forces, start, numbers, masses_of(molecule), sampling, rng)
    return [
        Frame(
            numbers=numbers,
            positions=rattle(one.positions, sampling.rattle, rng),
            charge=charge,
            group=task.group,
            subset=task.subset,
            temperature=one.temperature,
        )
        for one in found
    ]


def _cluster(
    subset: ClustersConfig, task: Task, rng: np.random.Generator
) -> tuple[Any, NDArray[np.float64]]:
    field = subset.sampling.force_field
    kinds = {s: embed(s, _seed(rng), field) for s in dict.fromkeys(task.inputs["smiles"])}
    molecules = [kinds[s] for s in task.inputs["smiles"]]
    start = clusters.assemble(molecules, subset.gap, rng)
    whole = clusters.combine(molecules, start)
    forces = _forces(whole, SamplingConfig(method="md", force_field=field))
    return whole, forces.minimize(start, _RELAX_STEPS)


def _box(subset: BoxesConfig, task: Task, rng: np.random.Generator) -> list[Frame]:
    smiles = task.inputs["smiles"]
    solute = None if smiles is None else embed(smiles, _seed(rng))
    size = 0.0
    if solute is not None:
        positions = solute.GetConformer().GetPositions()
        size = 2.0 * (
            subset.padding + float(np.linalg.norm(positions - positions.mean(0), axis=1).max())
        )
    cell = boxes.random_cell(subset, size, rng)
    positions = boxes.solvate(solute, cell, rng)
    n_solute = 0 if solute is None else solute.GetNumAtoms()
    density = float(rng.uniform(subset.densities[0], subset.densities[1]))
    positions, cell = boxes.scale_density(positions, cell, n_solute, density)
    n_waters = (len(positions) - n_solute) // 3
    water = embed(clusters.WATER, 1)
    kinds = [water] if solute is None else [solute, water]
    order = [*range(len(kinds) - 1), *[len(kinds) - 1] * n_waters]
    system = openmm_mmff.build_system(kinds, order, cell=cell)
    temperature = float(rng.choice(subset.sampling.temperatures))
    found = openmm_mmff.sample_box(system, positions, subset.sampling, temperature, _seed(rng))
    return [
        Frame(
            numbers=boxes.numbers_in_box(solute, n_waters),
            positions=rattle(one.positions, subset.sampling.rattle, rng),
            charge=0 if solute is None else Chem.GetFormalCharge(solute),
            group=task.group,
            subset=task.subset,
            cell=cell,
            pbc=(True, True, True),
            temperature=one.temperature,
        )
        for one in found
    ]


def _from_file(
    loaded: LoadedRecipe, subset: FilesConfig, task: Task, rng: np.random.Generator
) -> list[Frame]:
    path = Path(task.inputs["file"])
    starts = structure_files.read_starts(path, subset.hydrogens == "add", subset.charge)
    start = starts[task.inputs["index"]]
    frame, sampling = start.frame, subset.sampling
    known = {Chem.GetPeriodicTable().GetAtomicNumber(e) for e in loaded.recipe.elements}
    strange = sorted(set(frame.numbers.tolist()) - known)
    if strange:
        symbols = [Chem.GetPeriodicTable().GetElementSymbol(z) for z in strange]
        raise SamplingError(f"has {', '.join(symbols)}, which the recipe's elements leave out")
    return [
        Frame(
            numbers=frame.numbers,
            positions=rattle(one.positions, sampling.rattle, rng),
            charge=frame.charge,
            group=frame.group,
            subset=task.subset,
            cell=frame.cell,
            pbc=frame.pbc,
            temperature=one.temperature,
        )
        for one in _sample_start(start, sampling, rng)
    ]


def _no_forces(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.zeros_like(positions)


def _sample_start(
    start: structure_files.Start, sampling: SamplingConfig, rng: np.random.Generator
) -> list[Sample]:
    frame = start.frame
    table = Chem.GetPeriodicTable()
    masses = np.array([table.GetAtomicWeight(int(z)) for z in frame.numbers])
    forces: Forces
    if sampling.method in ("modes", "torn") and frame.cell is not None:
        raise SamplingError(f"it has a box, which sampling.method: {sampling.method} does not know")
    if sampling.method in ("none", "rattle", "torn"):
        forces = _no_forces
    elif sampling.method == "student":
        forces = StudentForces(frame.numbers, sampling.student, frame.cell, frame.pbc)
    elif start.system is not None and frame.cell is not None:
        temperature = float(rng.choice(sampling.temperatures))
        return openmm_mmff.sample_box(
            start.system, frame.positions, sampling, temperature, _seed(rng)
        )
    elif start.system is not None:
        forces = openmm_mmff.OpenmmForces(start.system)
    elif start.molecule is not None:
        forces = RdkitForces(start.molecule, sampling.force_field)
    else:
        raise SamplingError(
            "there are no bonds in the file, which force fields need; sample it with "
            "method: rattle, student or none"
        )
    return list(sample(forces, frame.positions, frame.numbers, masses, sampling, rng))
