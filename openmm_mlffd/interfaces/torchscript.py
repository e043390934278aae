"""Students as TorchScript modules for OpenMM's TorchForce and for hosts without Python.

A compiled student has the units of its hosts: nm, kJ/mol. See docs/performance.md.
"""

import json
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.graph import Graph, build_graph
from openmm_mlffd.modelfile import StudentHeader, load_student
from openmm_mlffd.painn import PaiNN
from openmm_mlffd.pairs import pairs_within
from openmm_mlffd.potential import Potential
from openmm_mlffd.units import (
    ANGSTROM_PER_NM,
    KJ_PER_MOL_NM_PER_EV_ANGSTROM,
    KJ_PER_MOL_PER_EV,
)

FLAVOURS = ("kernels", "torch")
"""With the fused kernels of this package, or with plain torch operations only."""

FORMAT = "mlffd-compiled"
VERSION = 1

# of a module to plain torch in float64: energy of an atom [eV], force [eV/Å], or share of the
# largest force where that is larger; random structures are denser than any data, which TF32 feels
_TOLERANCES = {"double": (1e-8, 1e-8), "single": (2e-5, 5e-5), "mixed": (5e-3, 3e-2)}
_APART = {"double": 1.5, "single": 2.0, "mixed": 2.0}  # over the sum of covalent radii
_METADATA = "mlffd.json"
_AT_A_TIME = 4_000_000  # distances in memory at once
_REMEMBERED = 4096  # as `engine`: beyond it, less memory is worth more than time


class CompileError(RuntimeError):
    """A compiled student that is not the student, or a file that is no compiled student."""


class _Plain(nn.Module):
    """Energy [eV] and forces [eV/Å] with plain torch operations."""

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential
        self.cutoff = potential.cutoff
        self.at_a_time = _AT_A_TIME

    def forward(
        self, positions: Tensor, species: Tensor, cell: Tensor, pbc: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of one system: positions and cell in Å, zero where not periodic."""
        edges, shifts = pairs_within(positions, cell, pbc, self.cutoff, self.at_a_time)
        graph = Graph(
            positions, species, torch.zeros_like(species), cell.unsqueeze(0), edges, shifts
        )
        with torch.no_grad():  # puts back in the end what the host had
            torch.set_grad_enabled(True)  # forces are a derivative
            found = self.potential(graph)
        return found.energy[0], found.forces


class _Student(nn.Module):
    """The border: units, elements, periodicity, and errors that say what is wrong."""

    species: Tensor

    def __init__(self, engine: nn.Module, numbers: Sequence[int]) -> None:
        super().__init__()
        self.engine = engine
        self.length, self.energy = ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV
        self.force = KJ_PER_MOL_NM_PER_EV_ANGSTROM
        species = torch.full((256,), -1, dtype=torch.int64)
        species[list(numbers)] = torch.arange(len(numbers))
        self.register_buffer("species", species)

    def forward(
        self,
        positions: Tensor,
        numbers: Tensor,
        box: Tensor | None = None,
        pbc: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Energy [kJ/mol], float64, and forces [kJ/mol/nm], with the dtype of the positions."""
        x = positions.detach().to(torch.float64) * self.length
        if x.dim() != 2 or x.shape[0] == 0 or x.shape[1] != 3:
            raise ValueError(f"positions must have the shape (n_atoms, 3), got {positions.shape}")
        if numbers.dim() != 1 or numbers.shape[0] != x.shape[0]:
            raise ValueError(f"{x.shape[0]} atoms need as many numbers, got {numbers.shape}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("positions are not finite")
        z = numbers.to(x.device, torch.int64)
        species = self.species[z.clamp(0, 255)]
        if bool((species < 0).any()):
            raise ValueError(f"the student does not know the atomic numbers {z[species < 0]}")
        cell = torch.zeros([3, 3], dtype=torch.float64, device=x.device)
        periodic = torch.zeros([3], dtype=torch.bool, device=x.device)
        if box is not None:
            periodic = torch.logical_not(periodic)
            if pbc is not None:
                periodic = pbc.to(x.device, torch.bool)
            given = box.detach().to(x.device, torch.float64) * self.length
            cell = torch.where(periodic.unsqueeze(1), given, cell)
            if bool(periodic.any()) and not float(torch.linalg.svdvals(cell[periodic]).prod()) > 0:
                raise ValueError(f"the periodic box has no volume: box vectors [nm] {box}")
        elif pbc is not None and bool(pbc.any()):
            raise ValueError("periodic directions need a box")
        energy, forces = self.engine(x, species, cell, periodic)
        energy, forces = energy * self.energy, forces * self.force
        if positions.requires_grad:  # for hosts that take the derivative: zero, with that slope
            moved = positions.to(torch.float64) - positions.detach().to(torch.float64)
            energy = energy - (forces * moved).sum()
        return energy, forces.to(positions.dtype)


class _OfAtoms(nn.Module):
    """A student with the atoms of one system, with the signature of OpenMM's TorchForce."""

    numbers: Tensor

    def __init__(self, student: nn.Module, numbers: Sequence[int]) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("numbers", torch.tensor(list(numbers), dtype=torch.int64))

    def forward(self, positions: Tensor, box: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As of the student."""
        return self.student(positions, self.numbers, box)


def compile_student(
    model: str | Path | None,
    output: str | Path,
    *,
    flavour: str = "kernels",
    precision: str = "single",
    numbers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write a student as a TorchScript module, if that agrees with the student.

    Parameters
    ----------
    model
        Name of a bundled student or path of a student file; None is the bundled default.
    output
        File to write; replaced as a whole or not at all.
    flavour
        "kernels" or "torch", see `FLAVOURS`.
    precision
        "single", "mixed" (kernels only) or "double".
    numbers
        Atomic numbers of the atoms it is for. With them the module takes
        ``(positions, box=None)``, else ``(positions, numbers, box=None, pbc=None)``: nm,
        box vectors as rows. It returns the energy [kJ/mol], a float64 scalar, and forces
        [kJ/mol/nm], ``(n_atoms, 3)``; the energy can be differentiated by the positions, once.

    Returns
    -------
    dict
        What the file says of itself, see `compiled_metadata`, and the largest differences found.

    Raises
    ------
    ValueError
        If a word is unknown, the precision is not one of the flavour's, the student cannot have
        fused kernels, or it does not know an element of ``numbers``.
    CompileError
        If the module differs from plain torch in float64. Nothing is written then.
    ImportError
        If the flavour is "kernels" and Warp is missing.
    """
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour must be one of {', '.join(FLAVOURS)}, got {flavour!r}")
    if precision not in _TOLERANCES:
        known = ", ".join(_TOLERANCES)
        raise ValueError(f"precision must be one of {known}, got {precision!r}")
    reference = load_student(model, precision="double")
    header: StudentHeader = reference.header
    if numbers is not None:
        reference.species(torch.tensor(list(numbers), dtype=torch.int64))
    few = numbers is None or len(numbers) <= _REMEMBERED
    with torch.inference_mode(False), torch.no_grad():
        engine = _engine(model, reference, flavour, precision, remember=few)
        module: nn.Module = _Student(engine, reference.numbers)
        if numbers is not None:
            module = _OfAtoms(module, numbers)
        scripted = torch.jit.script(module.eval())
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "flavour": flavour,
        "precision": precision,
        "student": header.name,
        "sha256": header.sha256,
        "cutoff": header.cutoff / ANGSTROM_PER_NM,
        "elements": header.elements,
        "units": {"length": "nm", "energy": "kJ/mol"},
        "numbers": None if numbers is None else [int(z) for z in numbers],
    }
    path = Path(output)
    temporary = path.with_name(path.name + ".tmp")
    try:
        text = json.dumps(metadata, ensure_ascii=False)
        torch.jit.save(scripted, str(temporary), _extra_files={_METADATA: text})
        found = _check(load_compiled(temporary), reference, precision, numbers is not None)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return metadata | {"differences": found}


def load_compiled(path: str | Path, device: str | torch.device = "cpu") -> torch.jit.ScriptModule:
    """Load a compiled student, and first what it needs.

    A compiled student is code of TorchScript, which runs: load only what you trust.

    Raises
    ------
    CompileError
        If the file is no compiled student.
    ImportError
        If it needs the fused kernels and Warp is missing.
    """
    if compiled_metadata(path)["flavour"] == "kernels":
        import openmm_mlffd.kernels.ops  # noqa: F401
    module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device)
    return module


def compiled_metadata(path: str | Path) -> dict[str, Any]:
    """What a compiled student says of itself, without running anything of it.

    Returns
    -------
    dict
        format, version, flavour, precision, student (name), sha256 (of the student), cutoff
        [nm], elements, units, and numbers (atomic numbers, or None where they are an input).

    Raises
    ------
    CompileError
        If the file is no compiled student, or of another version.
    """
    try:
        with zipfile.ZipFile(path) as file:
            name = next(n for n in file.namelist() if n.endswith(f"/extra/{_METADATA}"))
            metadata: dict[str, Any] = json.loads(file.read(name))
    except (OSError, StopIteration, zipfile.BadZipFile, ValueError) as error:
        raise CompileError(f"{path}: no student of `mlffd compile`, or damaged") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise CompileError(
            f"{path}: is {metadata.get('format')!r} version {metadata.get('version')!r}; "
            f"{FORMAT!r} version {VERSION} is needed: compile the student again"
        )
    return metadata


def _engine(
    model: str | Path | None, reference: Potential, flavour: str, precision: str, *, remember: bool
) -> nn.Module:
    if flavour == "torch":
        if precision == "mixed":
            raise ValueError("mixed precision needs the flavour 'kernels'")
        return _Plain(load_student(model, precision=precision, sha256=reference.header.sha256))
    if not isinstance(reference.network, PaiNN):
        raise ValueError(
            f"{reference.header.name} has an architecture that the fused kernels do not know; "
            "compile it with the flavour 'torch'"
        )
    from openmm_mlffd.interfaces.torchscript_kernels import FusedEngine

    return FusedEngine(reference, precision=precision, remember=remember)


@dataclass(frozen=True)
class _Structure:
    numbers: list[int]
    positions: Tensor  # Å
    cell: Tensor | None


def _structures(elements: list[int], apart: float) -> list[_Structure]:
    """Atoms of all elements, alone, free and in boxes.

    None at the length of a bond, but `apart` times the sum of the radii: what is dense at random is
    so far from any training data that rounding alone changes forces, by how much depending on the
    processor.
    """
    skewed = torch.tensor([[1.0, 0, 0], [0.4, 1.1, 0], [-0.3, 0.4, 0.9]], dtype=torch.float64)
    cube = torch.eye(3, dtype=torch.float64)
    n = len(elements)
    return [
        _Structure([elements[0]], torch.zeros((1, 3), dtype=torch.float64), None),
        _placed(elements, max(20, 2 * n), cube, False, apart),
        _placed(elements, max(9, n), skewed, True, apart),
        _placed(elements, max(60, 2 * n), skewed, True, apart),
        _placed(elements, 150, cube, True, apart),
    ]


def _placed(
    elements: list[int], n_atoms: int, shape: Tensor, periodic: bool, apart: float
) -> _Structure:
    rng = np.random.default_rng(n_atoms)
    numbers = [elements[i % len(elements)] for i in range(n_atoms)]
    radii = np.array([COVALENT_RADII[z] for z in numbers])
    images = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), -1).reshape(-1, 3)
    length = 3.8 * (n_atoms * np.mean(radii**3)) ** (1 / 3)
    while True:
        cell = length * shape.numpy()
        placed = np.zeros((0, 3))
        for _ in range(30 * n_atoms):
            new = rng.random(3) @ cell
            k = len(placed)
            distances = np.linalg.norm(placed[:, None] + images @ cell - new, axis=2)
            if k == 0 or (distances > apart * (radii[:k] + radii[k])[:, None]).all():
                placed = np.vstack([placed, new])
            if len(placed) == n_atoms:
                outside = placed + np.round(rng.normal(size=(n_atoms, 3))) @ cell * periodic
                box = torch.tensor(cell) if periodic else None
                return _Structure(numbers, torch.tensor(outside), box)
        length *= 1.05


def _check(module: Any, reference: Potential, precision: str, of_atoms: bool) -> dict[str, float]:
    """Largest differences to the reference; raises `CompileError` if they are too large."""
    largest, energy_limit, force_limit = {"energy": 0.0, "force": 0.0}, *_TOLERANCES[precision]
    whole = module.student if of_atoms else module
    for structure in _structures(reference.numbers, _APART[precision]):
        numbers = torch.tensor(structure.numbers)
        expected = reference(
            build_graph(
                structure.positions,
                reference.species(numbers),
                cutoff=reference.cutoff,
                cell=structure.cell,
            )
        )
        box = None if structure.cell is None else structure.cell / ANGSTROM_PER_NM
        energy, forces = whole(structure.positions / ANGSTROM_PER_NM, numbers, box)
        off = abs(float(energy) / KJ_PER_MOL_PER_EV - float(expected.energy)) / len(numbers)
        difference = (forces / KJ_PER_MOL_NM_PER_EV_ANGSTROM - expected.forces).abs().max()
        scale = max(1.0, float(expected.forces.abs().max()))
        largest["energy"] = _larger(largest["energy"], off / scale)
        largest["force"] = _larger(largest["force"], float(difference) / scale)
    if not (largest["energy"] <= energy_limit and largest["force"] <= force_limit):
        raise CompileError(
            f"the compiled student is not the student, nothing was written: energies differ by "
            f"{largest['energy']:.1e} eV/atom (at most {energy_limit:.0e}), forces by "
            f"{largest['force']:.1e} eV/Å (at most {force_limit:.0e})"
        )
    return largest


def _larger(a: float, b: float) -> float:
    """The larger of two, or not a number if one is not."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
