import time

import pytest
from openmm import app

from openmm_mlffd.interfaces.openmm_topology import check_hydrogens

HYDROGEN_FREE = {
    "carbon dioxide": ("O C O", "0-1 1-2"),
    "carbon disulfide": ("S C S", "0-1 1-2"),
    "tetrachloromethane": ("C Cl Cl Cl Cl", "0-1 0-2 0-3 0-4"),
    "trichlorofluoromethane": ("C Cl Cl Cl F", "0-1 0-2 0-3 0-4"),
    "phosgene": ("O C Cl Cl", "0-1 1-2 1-3"),
    "cyanogen": ("N C C N", "0-1 1-2 2-3"),
    "hexachloroethane": ("C C Cl Cl Cl Cl Cl Cl", "0-1 0-2 0-3 0-4 1-5 1-6 1-7"),
    "tetrachloroethene": ("C C Cl Cl Cl Cl", "0-1 0-2 0-3 1-4 1-5"),
    "hexafluorobenzene": (
        "C C C C C C F F F F F F",
        "0-1 1-2 2-3 3-4 4-5 5-0 0-6 1-7 2-8 3-9 4-10 5-11",
    ),
    "tetracyanoethene": (
        "C C C C C C N N N N",
        "0-1 0-2 0-3 1-4 1-5 2-6 3-7 4-8 5-9",
    ),
    "hexafluoroacetone": ("O C C C F F F F F F", "0-1 1-2 1-3 2-4 2-5 2-6 3-7 3-8 3-9"),
    "water": ("O", ""),
    "nitrogen": ("N N", "0-1"),
}
STRIPPED = {
    "methane": ("C", ""),
    "ethane": ("C C", "0-1"),
    "methanol": ("C O", "0-1"),
    "hydrogen cyanide": ("C N", "0-1"),
    "ethanol": ("C C O", "0-1 1-2"),
    "chloroform": ("C Cl Cl Cl", "0-1 0-2 0-3"),
    "urea": ("N C N O", "0-1 1-2 1-3"),
    "acetonitrile": ("C C N", "0-1 1-2"),
    "benzene": ("C C C C C C", "0-1 1-2 2-3 3-4 4-5 5-0"),
    "oxalic acid": ("O C O C O O", "0-1 1-2 1-3 3-4 3-5"),
    "glycine": ("N C C O O", "0-1 1-2 2-3 2-4"),
    "imidazole": ("N C N C C", "0-1 1-2 2-3 3-4 4-0"),
    "trifluoroacetic acid": ("F F F C C O O", "0-3 1-3 2-3 3-4 4-5 4-6"),
}


def make(symbols, bonds="", topology=None, residue=None):
    if topology is None:
        topology = app.Topology()
    if residue is None:
        residue = topology.addResidue("LIG", topology.addChain())
    atoms = [
        topology.addAtom(f"{symbol}{n}", app.Element.getBySymbol(symbol), residue)
        for n, symbol in enumerate(symbols.split())
    ]
    for pair in bonds.split():
        topology.addBond(*(atoms[int(i)] for i in pair.split("-")))
    return topology


def check(topology, atoms=None):
    check_hydrogens(topology, list(topology.atoms()) if atoms is None else atoms)


@pytest.mark.parametrize("name", HYDROGEN_FREE)
def test_molecules_that_have_no_hydrogens_pass(name):
    check(make(*HYDROGEN_FREE[name]))


@pytest.mark.parametrize("name", STRIPPED)
def test_molecules_that_lost_their_hydrogens_do_not(name):
    with pytest.raises(ValueError, match="has carbon but no hydrogens"):
        check(make(*STRIPPED[name]))


@pytest.mark.parametrize(
    "symbols", ["O C O", "C Cl Cl Cl Cl", "O C O " * 5, "O C Cl Cl", "N C C N", "C " * 60]
)
def test_without_bonds_the_composition_can_do(symbols):
    check(make(symbols))


@pytest.mark.parametrize(
    "symbols",
    ["C", "C C O", "C " * 6, "N C C O O", "N C N O", "C C C C C C C C C O O O O", "C C C C N N S"],
)
def test_without_bonds_the_composition_can_show_what_is_missing(symbols):
    with pytest.raises(ValueError, match="has carbon but no hydrogens"):
        check(make(symbols))


def test_buckminsterfullerene_passes():
    rdkit = pytest.importorskip("rdkit.Chem")
    c60 = rdkit.MolFromSmiles(
        "c12c3c4c5c1c1c6c7c2c2c8c3c3c9c4c4c%10c5c5c1c1c6c6c%11c7c2c2c7c8c3c3c8c9c4c4c9c%10c5c5c1"
        "c1c6c6c%11c2c2c7c3c3c8c4c4c9c5c1c1c6c2c3c41"
    )
    bonds = " ".join(f"{b.GetBeginAtomIdx()}-{b.GetEndAtomIdx()}" for b in c60.GetBonds())
    assert c60.GetNumAtoms() == 60
    check(make("C " * 60, bonds))


def test_one_hydrogen_anywhere_in_the_molecule_is_enough():
    check(make("C C O H", "0-1 1-2 2-3"))
    check(make("C C O H"))


def test_each_molecule_is_judged_by_itself():
    topology = make("O H H", "0-1 0-2")
    make("O C O", "0-1 1-2", topology)
    bare = topology.addResidue("BAD", topology.addChain())
    make("C C O", "0-1 1-2", topology, bare)
    with pytest.raises(ValueError, match=r"residue BAD 3 \(3 atoms, first: atom 6 \(C0 C of"):
        check(topology)
    check(topology, list(topology.atoms())[:6])  # not the student's business


def test_a_part_of_a_molecule_is_judged_by_the_whole():
    topology = make("C C O H H H H H H", "0-1 1-2 0-3 0-4 0-5 1-6 1-7 2-8")
    check(topology, list(topology.atoms())[:3])


def test_residues_that_are_bonded_are_one_molecule():
    topology = make("C O", "0-1")
    second = topology.addResidue("NEXT", topology.addChain())
    make("C H H H", "0-1 0-2 0-3", topology, second)
    atoms = list(topology.atoms())
    topology.addBond(atoms[0], atoms[2])
    check(topology, atoms[:2])


def test_large_topologies_take_no_time():
    topology = make("C H " * 20000)
    start = time.perf_counter()
    check(topology)
    assert time.perf_counter() - start < 2.0
