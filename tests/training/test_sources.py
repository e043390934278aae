import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from rdkit import Chem
from rdkit.Chem import AllChem

from openmm_mlffd.training.sources import SourceError, open_source


def molecule(smiles, *, hydrogens=True, seed=1):
    made = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(made, randomSeed=seed)
    return made if hydrogens else Chem.RemoveHs(made)


@pytest.fixture
def write_sdf(tmp_path):
    def write_(*molecules):
        with Chem.SDWriter(str(tmp_path / "some.sdf")) as writer:
            for each in molecules:
                writer.write(each)
        return tmp_path / "some.sdf"

    return write_


def test_molecules_of_an_sdf_keep_their_hydrogens_charge_and_name(write_sdf):
    made = [molecule("CC(=O)[O-]"), molecule("C[NH3+]"), molecule("CC(=O)[O-]", seed=2)]
    structures, groups = open_source(write_sdf(*made)).read(0, 3)
    assert groups == ["CC(=O)[O-]", "C[NH3+]", "CC(=O)[O-]"]
    assert structures.total_charge.tolist() == [-1, 1, -1]
    assert np.diff(structures.offsets).tolist() == [7, 8, 7]
    np.testing.assert_allclose(
        structures.positions[:7], made[0].GetConformer().GetPositions(), atol=1e-3
    )
    assert np.isnan(structures.energy).all()
    assert not structures.pbc.any()


def test_radical_is_what_the_file_says(write_sdf):
    structures, _ = open_source(write_sdf(molecule("[CH3]"))).read(0, 1)
    assert sorted(structures.atomic_numbers.tolist()) == [1, 1, 1, 6]


def test_implicit_hydrogens_are_refused(write_sdf):
    path = write_sdf(molecule("CC"), molecule("CO", hydrogens=False))
    with pytest.raises(SourceError, match="entry 1 has 4 implicit hydrogens; write them out"):
        open_source(path)


def test_flat_and_unreadable_entries_are_refused(write_sdf):
    flat = Chem.AddHs(Chem.MolFromSmiles("CC"))
    AllChem.Compute2DCoords(flat)
    with pytest.raises(SourceError, match="entry 0 has no three-dimensional coordinates"):
        open_source(write_sdf(flat))
    path = write_sdf(molecule("CC"))
    path.write_text(path.read_text().replace(" C  ", " Qx ", 1))
    with pytest.raises(SourceError, match="entry 0 is not a molecule"):
        open_source(path)


@pytest.mark.parametrize("name", ["empty.sdf", "empty.xyz", "empty.h5"])
def test_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=name):
        open_source(tmp_path / name)


def test_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SourceError, match="there is no such file"):
        open_source(tmp_path / "no.xyz")


def test_frames_say_what_they_know(tmp_path):
    rng = np.random.default_rng(0)
    info = {"charge": -1, "smiles": "CO", "subset": "alcohols", "temperature": 350.0}
    frames = [
        Atoms("CO", rng.normal(size=(2, 3)), info=info),
        Atoms("OHH", rng.normal(size=(3, 3)), cell=[5, 6, 7], pbc=True),
    ]
    write(tmp_path / "some.xyz", frames, format="extxyz")
    source = open_source(tmp_path / "some.xyz", charge=2)
    structures, groups = source.read(0, 2)
    assert groups == ["CO", "H2 O1"]
    assert [source.subsets[s] for s in structures.subset] == ["alcohols", "some"]
    assert structures.total_charge.tolist() == [-1, 2]
    assert structures.temperature[0] == 350.0
    assert structures.pbc.all(1).tolist() == [False, True]
    np.testing.assert_allclose(structures.cell[1], np.diag([5.0, 6.0, 7.0]))
    np.testing.assert_allclose(structures.cell[0], 0.0)


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (Atoms("CO", np.eye(3)[:2], charges=[0.3, 0.2]), r"charge of 0\.5 e, which is not whole"),
        (Atoms("CX", np.eye(3)[:2]), "frame 0 has an unknown element"),
        (Atoms("CO", [[0, 0, 0], [0, 0, np.nan]]), "a position that is not finite"),
    ],
)
def test_frame_that_makes_no_sense_is_refused(tmp_path, atoms, message):
    write(tmp_path / "bad.xyz", atoms, format="extxyz")
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / "bad.xyz")


def test_text_that_is_no_structure_is_refused(tmp_path):
    (tmp_path / "notes.xyz").write_text("hello\nthere\n")
    with pytest.raises(SourceError, match="ASE cannot read it"):
        open_source(tmp_path / "notes.xyz")
