"""Read a structure as an OpenMM Topology with positions; refuse what a student cannot simulate."""

from pathlib import Path
from typing import Any

from openmm import app, unit


class StructureError(ValueError):
    """A structure that cannot be simulated; the message names the file and the cause."""


def read_structure(path: str | Path) -> tuple[app.Topology, Any]:
    """Topology and positions of a PDB or SDF file.

    Parameters
    ----------
    path
        `.pdb`, `.cif` or `.sdf`; of an SDF the first molecule.

    Returns
    -------
    topology
        With bonds, and with a box if the file has one.
    positions
        As OpenMM has them, a Quantity.

    Raises
    ------
    StructureError
        If the file cannot be read, or an SDF has hydrogens that are not written out.
    """
    path = Path(path)
    if not path.is_file():
        raise StructureError(f"{path}: there is no such file")
    readers = {".pdb": app.PDBFile, ".cif": app.PDBxFile}
    if path.suffix == ".sdf":
        return read_sdf(path)
    if path.suffix not in readers:
        raise StructureError(f"{path}: must end in .pdb, .cif or .sdf")
    structure = readers[path.suffix](str(path))
    return structure.topology, structure.positions


def formal_charge(topology: app.Topology) -> int | None:
    """Sum of the formal charges of the atoms [e]; None if no atom has one, not even zero.

    Those of PDB and SDF files are in the Topology; OpenMM does not read those of a CIF file.
    """
    known = [a.formalCharge for a in topology.atoms() if a.formalCharge is not None]
    return sum(known) if known else None


def atomic_numbers(path: str | Path) -> list[int]:
    """Atomic numbers of a structure's atoms; arguments and errors as of `read_structure`.

    Raises
    ------
    StructureError
        Also if a site is no atom.
    """
    atoms = list(read_structure(path)[0].atoms())
    sites = [a.index for a in atoms if a.element is None]
    if sites:
        raise StructureError(f"{path}: site {sites[0]} is no atom; a student needs elements")
    return [a.element.atomic_number for a in atoms]


def read_sdf(path: str | Path) -> tuple[app.Topology, Any]:
    """Topology and positions of the first molecule of an SDF file.

    Parameters
    ----------
    path
        The file. Hydrogens must be written out, since their number and place are chemistry that
        a potential cannot guess.

    Returns
    -------
    topology
        One residue, atoms named by element and number, with bonds.
    positions
        As OpenMM has them, a Quantity.

    Raises
    ------
    StructureError
        If there is no molecule with 3-D coordinates, or hydrogens are implicit.
    """
    try:
        from rdkit import Chem
    except ImportError as error:
        raise ImportError(
            "RDKit is needed to read SDF files: pip install openmm-mlffd[analysis]"
        ) from error

    # by default the supplier removes even the hydrogens that are in the file
    with Chem.SDMolSupplier(str(path), removeHs=False) as supplier:
        molecule = next(iter(supplier), None)
    if molecule is None:
        raise StructureError(f"{path}: the first entry is not a molecule that RDKit can read")
    return topology_of(molecule, path)


def topology_of(molecule: Any, path: str | Path) -> tuple[app.Topology, Any]:
    """Topology and positions of an RDKit molecule; arguments and errors as `read_sdf`."""
    missing = sum(atom.GetTotalNumHs() for atom in molecule.GetAtoms())
    if missing:
        raise StructureError(
            f"{path}: {missing} hydrogens are implicit; write them out, with coordinates "
            "(RDKit: Chem.AddHs(molecule, addCoords=True))"
        )
    if not molecule.GetConformer().Is3D():
        raise StructureError(f"{path}: the coordinates are not three-dimensional")
    topology = app.Topology()
    name = molecule.GetProp("_Name") if molecule.HasProp("_Name") else ""
    residue = topology.addResidue(name[:3].upper() or "LIG", topology.addChain())
    atoms = [
        topology.addAtom(
            f"{atom.GetSymbol()}{atom.GetIdx() + 1}",
            app.Element.getByAtomicNumber(atom.GetAtomicNum()),
            residue,
            formalCharge=atom.GetFormalCharge(),
        )
        for atom in molecule.GetAtoms()
    ]
    for bond in molecule.GetBonds():
        topology.addBond(atoms[bond.GetBeginAtomIdx()], atoms[bond.GetEndAtomIdx()])
    return topology, molecule.GetConformer().GetPositions() * unit.angstrom
