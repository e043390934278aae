"""Molecules of recipes: lists, filters, ions, peptides."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem

from openmm_mlffd.training.generation.molecules import (
    Filter,
    SourceMissing,
    embed,
    find_files,
    ionize,
    numbers_of,
    read_excluded,
    read_smiles,
    skeletons,
)
from openmm_mlffd.training.generation.peptides import (
    RESIDUES,
    VARIANTS,
    draw_peptides,
    peptide_smiles,
    smiles_of_group,
)
from openmm_mlffd.training.generation.recipe import (
    AMINO_ACIDS,
    PeptideConfig,
    SourceConfig,
    load_recipe,
)
from openmm_mlffd.training.generation.sampling import SamplingError

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
CHNO = frozenset({"H", "C", "N", "O"})


def charge_of(smiles):
    return Chem.GetFormalCharge(Chem.MolFromSmiles(smiles))


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        ("OCC", "CCO"),
        ("[Na+].CC(=O)[O-]", "CC(=O)[O-]"),  # the largest component
        ("[CH3]", None),  # a radical
        ("C[CH]C", None),
        ("[13CH3]O", None),
        ("CCBr", None),
        ("[Zn+2]", None),
        ("c1ccc2c(c1)[Fe]2", None),  # a metal complex
        ("C", None),  # too small
        ("C" * 30, None),  # too large
        ("not a molecule", None),
        ("[NH3+]CC[NH2+]CC[NH2+]CC[NH3+]", None),  # too many charges
    ],
)
def test_filter_takes_what_can_be_labelled(smiles, expected):
    keep = Filter(elements=CHNO, min_atoms=6, max_atoms=40)
    assert keep(smiles) == expected


def test_excluded_molecule_is_left_out_in_every_protonation_state(tmp_path):
    (tmp_path / "some.txt").write_text("# a comment\nNCCc1ccccc1  phenethylamine\n\n")
    excluded = read_excluded([tmp_path / "some.txt"])
    keep = Filter(elements=CHNO, min_atoms=1, max_atoms=99, excluded=excluded)
    assert keep("NCCc1ccccc1") is None
    assert keep("[NH3+]CCc1ccccc1") is None
    assert keep("CNCc1ccccc1") is not None


def test_benchmarks_are_excluded_by_the_recipe_that_comes_with_the_package():
    lists = load_recipe(CONFIGS / "broad.yaml").recipe.exclude
    excluded = read_excluded(CONFIGS / name for name in lists)
    assert len(excluded) > 1100
    keep = Filter(elements=CHNO | {"Cl", "S", "F"}, min_atoms=1, max_atoms=99, excluded=excluded)
    tyk2 = "O=C(Nc1ccnc(NC(=O)C2CC2)c1)c1c(Cl)cccc1Cl"  # ligand ejm_31's family of JACS
    assert keep(tyk2) is None
    flurazepam = "CCN(CC)CCN1C(=O)CN=C(c2ccccc2F)c2cc(Cl)ccc21"
    assert keep(flurazepam) is None
    assert keep(peptide_smiles("NVWAN")) is None
    assert keep("CCO") == "CCO"


def test_group_is_excluded_if_one_of_its_molecules_is():
    lists = [CONFIGS / "spice_test.inchikeys"]
    excluded = read_excluded(lists)
    flurazepam = "CCN(CC)CCN1C(=O)CN=C(c2ccccc2F)c2cc(Cl)ccc21"
    for group, expected in (
        (f"O.{flurazepam}", True),
        ("O.CCO", False),
        ("peptide NVWAN ace-nme", True),
        ("peptide NVWAN zwitterion", False),
        ("water #104177", False),
    ):
        found = not excluded.isdisjoint(skeletons(smiles_of_group(group)))
        assert found == expected, group


def test_line_that_is_no_molecule_to_exclude_is_named(tmp_path):
    (tmp_path / "some.txt").write_text("CCO\n%%%\n")
    with pytest.raises(SourceMissing, match=r"some\.txt: line 2 is neither InChIKey nor SMILES"):
        read_excluded([tmp_path / "some.txt"])
    with pytest.raises(SourceMissing, match="there is no such file"):
        read_excluded([tmp_path / "no.txt"])


def test_lists_and_tables_are_read_packed_or_not(tmp_path):
    (tmp_path / "a.smi").write_text("# head\nCCO ethanol\n\nCC#N\n")
    assert list(read_smiles(tmp_path / "a.smi", "smiles")) == ["CCO", "CC#N"]
    (tmp_path / "a.csv").write_text("name,SMILES\nx,CCO\ny,CC\n")
    assert list(read_smiles(tmp_path / "a.csv", "smiles")) == ["CCO", "CC"]
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"smiles\nCCN\n"))
    assert list(read_smiles(tmp_path / "a.csv.gz", "smiles")) == ["CCN"]
    with pytest.raises(SourceMissing, match="has no column 'mol'; it has name, SMILES"):
        list(read_smiles(tmp_path / "a.csv", "mol"))
    (tmp_path / "a.xls").touch()
    with pytest.raises(SourceMissing, match="molecules are read from"):
        list(read_smiles(tmp_path / "a.xls", "smiles"))


def test_source_that_is_not_there_says_what_to_do(tmp_path):
    with pytest.raises(SourceMissing, match="pip install --no-deps no_such_package"):
        find_files(SourceConfig(package="no_such_package", file="*.csv"), tmp_path)
    with pytest.raises(SourceMissing, match=r"holds no nothing\*"):
        find_files(SourceConfig(package="rdkit", file="nothing*"), tmp_path)
    assert find_files(SourceConfig(package="rdkit", file="Data/NCI/first_5K.smi"), tmp_path)


@pytest.mark.parametrize(
    ("smiles", "charges"),
    [
        ("CCN", {1}),
        ("CC(=O)O", {-1}),
        ("COP(=O)(O)O", {-1}),
        ("NCC(=O)O", {-1, 1}),
        ("CC(=O)N", None),  # an amide is no base
        ("Nc1ccccc1", None),  # nor is aniline
        ("CCO", None),
    ],
)
def test_ions_are_those_of_amines_and_acids(smiles, charges):
    found = [ionize(smiles, np.random.default_rng(seed)) for seed in range(8)]
    if charges is None:
        assert set(found) == {None}
        return
    assert {charge_of(s) for s in found} == charges
    for ion in found:
        assert not any(a.GetNumRadicalElectrons() for a in Chem.MolFromSmiles(ion).GetAtoms())


def test_conformer_has_all_hydrogens_and_depends_on_the_seed_alone():
    first, same, other = embed("CCCCO", 1), embed("CCCCO", 1), embed("CCCCO", 2)
    assert np.bincount(numbers_of(first)).tolist()[1] == 10
    positions = [m.GetConformer().GetPositions() for m in (first, same, other)]
    np.testing.assert_array_equal(positions[0], positions[1])
    assert abs(positions[0] - positions[2]).max() > 0.1
    with pytest.raises(SamplingError, match="MMFF94 has no parameters"):
        embed("[BH4-]", 1)


# peptides


@pytest.mark.parametrize("letter", sorted(RESIDUES))
def test_residue_is_an_l_amino_acid_at_ph_7(letter):
    molecule = Chem.MolFromSmiles(peptide_smiles(letter))
    assert molecule is not None
    assert Chem.GetFormalCharge(molecule) == {"K": 1, "R": 1, "D": -1, "E": -1}.get(letter, 0)
    centers = dict(Chem.FindMolChiralCenters(molecule, useLegacyImplementation=False))
    alpha = molecule.GetSubstructMatch(Chem.MolFromSmarts("CC(=O)N[CX4]C(=O)NC"))[4]
    if letter == "G":
        assert not centers
    else:  # sulfur changes the order of priorities in cysteine
        assert centers[alpha] == ("R" if letter == "C" else "S")


def test_variants_are_other_protonation_states():
    for letter, states in VARIANTS.items():
        usual = Chem.AddHs(Chem.MolFromSmiles(peptide_smiles(letter)))
        for state in states:
            varied = Chem.AddHs(Chem.MolFromSmiles(peptide_smiles(letter, states={0: state})))
            assert usual.GetNumHeavyAtoms() == varied.GetNumHeavyAtoms()
            protons = varied.GetNumAtoms() - usual.GetNumAtoms()
            charge = Chem.GetFormalCharge(varied) - Chem.GetFormalCharge(usual)
            assert charge == protons
            assert Chem.MolToSmiles(usual) != Chem.MolToSmiles(varied)


@pytest.mark.parametrize(
    ("caps", "atoms"), [("ace-nme", 22), ("ace-nh2", 19), ("zwitterion", 13), ("neutral", 13)]
)
def test_ends_of_alanine(caps, atoms):
    molecule = Chem.AddHs(Chem.MolFromSmiles(peptide_smiles("A", caps)))
    assert molecule.GetNumAtoms() == atoms
    assert Chem.GetFormalCharge(molecule) == 0
    charges = [a.GetFormalCharge() for a in molecule.GetAtoms()]
    assert (min(charges), max(charges)) == ((-1, 1) if caps == "zwitterion" else (0, 0))


def test_ends_of_proline_and_glycine_are_charged_too():
    for letter in "PGA":
        molecule = Chem.MolFromSmiles(peptide_smiles(letter + "A", "zwitterion"))
        nitrogen = [a.GetFormalCharge() for a in molecule.GetAtoms() if a.GetSymbol() == "N"]
        assert sorted(nitrogen) == [0, 1]


def test_peptides_that_are_none_are_refused():
    with pytest.raises(ValueError, match="holds X, no amino acid"):
        peptide_smiles("AXA")
    with pytest.raises(ValueError, match="the ends of a peptide are of"):
        peptide_smiles("A", "none")


def test_drawn_peptides_have_one_of_the_letters_asked_for():
    def draw(**settings):
        config = PeptideConfig(lengths=[1, 2, 3], count=40, **settings)
        return [m.group.split()[1] for m in draw_peptides(config, np.random.default_rng(0))]

    assert set(AMINO_ACIDS) == set(RESIDUES)
    assert not all(set("DE") & set(sequence) for sequence in draw())
    chosen = draw(with_any="DE")
    assert len(chosen) == 40
    assert all(set("DE") & set(sequence) for sequence in chosen)
    assert {len(sequence) for sequence in chosen} == {1, 2, 3}


def test_drawn_peptides_have_the_lengths_asked_for():
    config = PeptideConfig(lengths=[2, 3], count=40)
    drawn = list(draw_peptides(config, np.random.default_rng(0)))
    lengths = [len(m.group.split()[1]) for m in drawn]
    assert set(lengths) == {2, 3}
    assert len(drawn) == 40
    assert drawn == list(draw_peptides(config, np.random.default_rng(0)))
    given = PeptideConfig(sequences=["AG"], caps=["neutral"], variants=0.0)
    (one,) = draw_peptides(given, np.random.default_rng(0))
    assert one == (peptide_smiles("AG", "neutral"), "peptide AG neutral")
