"""MMFF94, by RDKit for small systems and by OpenMM for large and periodic ones; UFF by RDKit.

References
----------
T. A. Halgren, J. Comput. Chem. 17, 490 (1996). P. Tosco, N. Stiefl, G. Landrum,
J. Cheminform. 6, 37 (2014).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import rdForceFieldHelpers

from openmm_mlffd.training.generation.sampling import SamplingError
from openmm_mlffd.units import ANGSTROM_PER_NM, AVOGADRO, KJ_PER_KCAL, KJ_PER_MOL_PER_EV

_EV = KJ_PER_KCAL / KJ_PER_MOL_PER_EV
_BOND = AVOGADRO * 1e-18 / 1000.0  # of 1 mdyn/Å, the unit of MMFF's force constants [kJ/mol/Å^2]
_DEGREE = math.pi / 180.0
COULOMB = 332.0716 * KJ_PER_KCAL / ANGSTROM_PER_NM  # as MMFF94 has it [kJ nm/mol/e^2]
_LINEAR_TYPES = frozenset({4, 53, 61})
SCALE_14 = 0.75
NO_PARAMETERS = "MMFF94 has no parameters for it"
_ALL = 1e6  # beyond any distance [Å]: RDKit leaves out pairs further apart than 100 Å


def properties(molecule: Any) -> Any:
    """MMFF94's types and charges of a molecule.

    Raises
    ------
    SamplingError
        If it has no parameters for it.
    """
    found = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
    if found is None:
        raise SamplingError(NO_PARAMETERS)
    return found


def choose_field(molecule: Any, force_field: str) -> str:
    """Which force field a molecule gets: "mmff94" or "uff".

    Parameters
    ----------
    molecule
        With its hydrogens.
    force_field
        "mmff94"; or "auto", which is UFF where MMFF94 has no parameters.

    Raises
    ------
    SamplingError
        If there are no parameters for it.

    References
    ----------
    A. K. Rappé et al., J. Am. Chem. Soc. 114, 10024 (1992), for UFF.
    """
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
        return "mmff94"
    if force_field == "mmff94":
        raise SamplingError(NO_PARAMETERS)
    if not rdForceFieldHelpers.UFFHasAllMoleculeParams(molecule):
        raise SamplingError("neither MMFF94 nor UFF has parameters for it")
    return "uff"


class RdkitForces:
    """MMFF94, or UFF, of molecules in vacuum, by RDKit.

    Parameters
    ----------
    molecule
        One or several molecules with hydrogens and a conformer.
    force_field
        See `choose_field`.

    Raises
    ------
    SamplingError
        If there are no parameters for a molecule.
    """

    def __init__(self, molecule: Any, force_field: str = "mmff94") -> None:
        # without ignoreInterfragInteractions molecules do not see each other
        if choose_field(molecule, force_field) == "uff":
            self._field = rdForceFieldHelpers.UFFGetMoleculeForceField(
                molecule, vdwThresh=_ALL, ignoreInterfragInteractions=False
            )
        else:
            self._field = rdForceFieldHelpers.MMFFGetMoleculeForceField(
                molecule,
                properties(molecule),
                nonBondedThresh=_ALL,
                ignoreInterfragInteractions=False,
            )
        if self._field is None:
            raise SamplingError("RDKit makes no force field of it")
        self._molecule = molecule

    def energy(self, positions: NDArray[np.float64]) -> float:
        """Energy [eV]."""
        return self._field.CalcEnergy(positions.ravel().tolist()) * _EV

    def __call__(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Forces [eV/Å]."""
        flat = positions.ravel().tolist()
        self._field.CalcEnergy(flat)  # without this CalcGrad uses the distances of another call
        return -_EV * np.array(self._field.CalcGrad(flat)).reshape(-1, 3)

    def minimize(self, positions: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
        """Positions [Å] after so many steps of minimisation."""
        from rdkit.Geometry import Point3D

        conformer = self._molecule.GetConformer()
        for i, (x, y, z) in enumerate(positions.tolist()):
            conformer.SetAtomPosition(i, Point3D(x, y, z))
        self._field.Initialize()
        self._field.Minimize(maxIts=steps)
        return np.array(conformer.GetPositions())


@dataclass
class Terms:
    """Terms of one molecule in OpenMM's units: atoms, then the parameters of the forces."""

    charges: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    bonds: list[tuple[list[int], list[float]]] = field(default_factory=list)
    angles: list[tuple[list[int], list[float]]] = field(default_factory=list)
    linear: list[tuple[list[int], list[float]]] = field(default_factory=list)
    stretch_bends: list[tuple[list[int], list[float]]] = field(default_factory=list)
    out_of_plane: list[tuple[list[int], list[float]]] = field(default_factory=list)
    torsions: list[tuple[list[int], list[float]]] = field(default_factory=list)
    pairs: list[tuple[list[int], list[float]]] = field(default_factory=list)
    exclusions: list[tuple[int, int]] = field(default_factory=list)


def terms_of(molecule: Any) -> Terms:
    """All terms of a molecule.

    Raises
    ------
    SamplingError
        If MMFF94 has no parameters for it.
    """
    found = properties(molecule)
    n = molecule.GetNumAtoms()
    terms = Terms(
        charges=[found.GetMMFFPartialCharge(i) for i in range(n)],
        types=[found.GetMMFFAtomType(i) for i in range(n)],
    )
    _add_bonded(molecule, found, terms)
    _add_torsions(molecule, found, terms)
    separation = Chem.GetDistanceMatrix(molecule)
    for i, j in zip(*np.nonzero(np.triu((separation > 0) & (separation <= 3))), strict=True):
        i, j = int(i), int(j)
        terms.exclusions.append((i, j))
        if separation[i, j] == 3:
            _, _, size, depth = found.GetMMFFVdWParams(i, j)
            product = SCALE_14 * terms.charges[i] * terms.charges[j]
            terms.pairs.append(([i, j], [size / ANGSTROM_PER_NM, depth * KJ_PER_KCAL, product]))
    return terms


def _add_bonded(molecule: Any, found: Any, terms: Terms) -> None:
    stiff = _BOND * ANGSTROM_PER_NM**2
    length = {}
    for bond in molecule.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        _, k, r = found.GetMMFFBondStretchParams(molecule, i, j)
        length[i, j] = length[j, i] = r / ANGSTROM_PER_NM
        terms.bonds.append(([i, j], [k * stiff, r / ANGSTROM_PER_NM]))
    for center in molecule.GetAtoms():
        j = center.GetIdx()
        around = [a.GetIdx() for a in center.GetNeighbors()]
        straight = terms.types[j] in _LINEAR_TYPES
        for i, k in combinations(around, 2):
            _, stiffness, angle = found.GetMMFFAngleBendParams(molecule, i, j, k)
            (terms.linear if straight else terms.angles).append(
                ([i, j, k], [stiffness * _BOND, angle * _DEGREE])
            )
            mixed = found.GetMMFFStretchBendParams(molecule, i, j, k)
            if mixed and not straight:
                first, second = (m * _BOND * ANGSTROM_PER_NM for m in mixed[1:])
                values = [first, second, length[i, j], length[k, j], angle * _DEGREE]
                terms.stretch_bends.append(([i, j, k], values))
        if len(around) == 3:
            a, b, c = around
            for i, k, out in ((a, b, c), (a, c, b), (b, c, a)):
                stiffness = found.GetMMFFOopBendParams(molecule, i, j, k, out)
                if stiffness:
                    terms.out_of_plane.append(([i, j, k, out], [stiffness * _BOND]))


def _add_torsions(molecule: Any, found: Any, terms: Terms) -> None:
    for bond in molecule.GetBonds():
        j, k = bond.GetBeginAtom(), bond.GetEndAtom()
        for first in j.GetNeighbors():
            for last in k.GetNeighbors():
                atoms = [first.GetIdx(), j.GetIdx(), k.GetIdx(), last.GetIdx()]
                if len(set(atoms)) < 4:
                    continue
                values = found.GetMMFFTorsionParams(molecule, *atoms)
                if values and any(values[1:]):
                    terms.torsions.append((atoms, [v * KJ_PER_KCAL for v in values[1:]]))


def type_tables(
    molecules: Sequence[Any],
) -> tuple[dict[int, int], NDArray[np.float64], NDArray[np.float64]]:
    """Index of each atom type, and sizes [nm] and depths [kJ/mol] of pairs of types.

    Parameters
    ----------
    molecules
        One of each kind, with hydrogens.
    """
    everything = Chem.Mol()
    for molecule in (*molecules, *molecules):  # twice: a type meets itself in another atom
        everything = Chem.CombineMols(everything, molecule)
    Chem.SanitizeMol(everything)
    found = properties(everything)
    n = everything.GetNumAtoms() // 2
    example: dict[int, int] = {}
    for i in range(n):
        example.setdefault(found.GetMMFFAtomType(i), i)
    size, depth = np.zeros((len(example),) * 2), np.zeros((len(example),) * 2)
    for a, i in enumerate(example.values()):
        for b, j in enumerate(example.values()):
            values = found.GetMMFFVdWParams(i, n + j)
            size[a, b], depth[a, b] = values[2] / ANGSTROM_PER_NM, values[3] * KJ_PER_KCAL
    return {kind: place for place, kind in enumerate(example)}, size, depth
