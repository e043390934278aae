"""Structures, alone or with the forces of teacher and student, as files for other programs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.elements import SYMBOLS
from openmm_mlffd.validation.suite.models import Structure
from openmm_mlffd.validation.suite.store import write_text
from openmm_mlffd.validation.suite.systems import System

ARROW = 0.5
"""Length of a force of 1 eV/Å as an arrow [Å]."""

TEACHER_COLOR, STUDENT_COLOR = (0.1, 0.1, 0.1), (0.84, 0.37, 0.0)

_HEADER = """# {title}
# Arrows are forces, {scale:g} Å for 1 eV/Å: dark the teacher's, orange the student's.
# In PyMOL: run this file; `disable student` hides the student's arrows.
load {xyz}, molecule
hide everything, molecule
show sticks, molecule
show spheres, molecule
set stick_radius, 0.08
set sphere_scale, 0.16
python
from pymol import cmd
from pymol.cgo import CONE, CYLINDER

"""

_ARROWS = """
def arrows(forces, color, name):
    shapes = []
    for start, end in forces:
        middle = [a + 0.75 * (b - a) for a, b in zip(start, end)]
        shapes += [CYLINDER, *start, *middle, 0.04, *color, *color]
        shapes += [CONE, *middle, *end, 0.10, 0.0, *color, *color, 1.0, 0.0]
    cmd.load_cgo(shapes, name)


"""


def write_extended_xyz(
    path: Path,
    structure: Structure,
    teacher: NDArray[np.float64],
    student: NDArray[np.float64],
    *,
    comment: str,
) -> None:
    """One structure with both forces [eV/Å] as extended XYZ, for ASE, OVITO and others."""
    try:
        from ase import Atoms
        from ase.io import write
    except ImportError as error:
        raise ImportError(f"ASE is needed ({error}): pip install openmm-mlffd[ase]") from error

    atoms = Atoms(structure.numbers, structure.positions)
    if structure.cell is not None:
        atoms.cell, atoms.pbc = structure.cell, True
    atoms.set_array("teacher_forces", teacher)
    atoms.set_array("student_forces", student)
    atoms.set_array("force_error", np.linalg.norm(student - teacher, axis=1))
    atoms.info["comment"] = comment
    write(path, atoms, format="extxyz")


def write_xyz(
    path: Path, system: System, frames: Sequence[tuple[float, NDArray[np.float64]]], title: str
) -> None:
    """Frames as XYZ, which needs no library."""
    lines = []
    for when, positions in frames:
        lines += [str(len(positions)), f"{title} after {when:g} ps"]
        lines += [
            f"{SYMBOLS[z]:2s} {x:12.5f} {y:12.5f} {w:12.5f}"
            for z, (x, y, w) in zip(system.numbers.tolist(), positions.tolist(), strict=True)
        ]
    write_text(path, "\n".join(lines) + "\n")


def read_xyz(path: Path) -> NDArray[np.float64]:
    """Positions of the last frame of such a file [Å], shape ``(n_atoms, 3)``."""
    lines = path.read_text("utf-8").splitlines()
    n = int(lines[0])
    return np.array([[float(v) for v in line.split()[1:]] for line in lines[-n:]])


def write_pymol(
    path: Path,
    xyz: str,
    structure: Structure,
    teacher: NDArray[np.float64],
    student: NDArray[np.float64],
    *,
    title: str,
) -> None:
    """A PyMOL script that loads a file and draws both forces on its atoms as arrows."""

    def segments(forces: NDArray[np.float64]) -> str:
        ends = structure.positions + ARROW * forces
        pairs = [
            f"    ({_list(start)}, {_list(end)}),\n"
            for start, end in zip(structure.positions, ends, strict=True)
        ]
        return "[\n" + "".join(pairs) + "]"

    one_line = title.replace("\n", " ")
    text = _HEADER.format(title=one_line, scale=ARROW, xyz=xyz) + _ARROWS.lstrip("\n")
    for name, forces, color in (
        ("teacher", teacher, TEACHER_COLOR),
        ("student", student, STUDENT_COLOR),
    ):
        text += f'arrows({segments(forces)}, {color}, "{name}")\n'
    path.write_text(text + "python end\nzoom molecule\n", encoding="utf-8")


def _list(vector: NDArray[np.float64]) -> str:
    return "[" + ", ".join(f"{x:.4f}" for x in vector) + "]"
