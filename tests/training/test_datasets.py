import re

import numpy as np
import pytest
from typer.testing import CliRunner

from openmm_mlffd.cli import app
from openmm_mlffd.training.datasets.combine import merge, split_file
from openmm_mlffd.training.datasets.geometry import judge_geometry
from openmm_mlffd.training.datasets.survey import Bounds, blocks_of, survey
from openmm_mlffd.training.generation.exclusion import Exclusion
from openmm_mlffd.training.hdf5 import (
    SPLITS,
    Dataset,
    DatasetError,
    DatasetWriter,
    SplitRule,
    concatenate,
    take,
)
from openmm_mlffd.training.sources import Frame, pack


@pytest.fixture
def sample(data_folder):
    return data_folder / "sample.h5"


@pytest.fixture
def rewrite(sample, tmp_path):
    """Write the sample after a change of its structures; with the names of groups and subsets."""

    def write(change=lambda s: s, *, name="changed.h5", teacher=None, split=None):
        with Dataset(sample) as dataset:
            old, groups = dataset.read(0, len(dataset)), dataset.group_names()
            new = change(old)
            with DatasetWriter(
                tmp_path / name,
                teacher=teacher or dataset.teacher,
                subsets=dataset.subsets,
                split=split or SplitRule(),
            ) as writer:
                writer.append(new, [groups[g] for g in new.group])
        return tmp_path / name

    return write


def frame(text, *, charge=0, drop=(), moved=()):
    """A molecule from SMILES, without some of its atoms or with some of them moved."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles(text))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    AllChem.MMFFOptimizeMolecule(molecule)
    positions = molecule.GetConformer().GetPositions()
    for atom, to in moved:
        positions[atom] = positions[to[0]] + np.array(to[1])
    keep = [i for i in range(molecule.GetNumAtoms()) if i not in drop]
    numbers = np.array([a.GetAtomicNum() for a in molecule.GetAtoms()])
    return Frame(
        numbers=numbers[keep], positions=positions[keep], charge=charge, group=text, subset="x"
    )


def reasons(*frames):
    return judge_geometry(concatenate(pack(f, ["x"]) for f in frames))


# geometry


@pytest.mark.parametrize(
    "smiles",
    [
        "CCO", "c1ccccc1", "C#N", "C#CC", "C=C=C", "N#Cc1ccccc1Cl", "FC(F)(F)F", "O=C=O", "CS(C)=O",
        "CS(=O)(=O)N", "COP(=O)(OC)OC", "C[N+](=O)[O-]", "n1ccccc1", "O", "N", "[C-]#[N+]C",
        "CN=[N+]=[N-]",
    ],
)  # fmt: skip
def test_molecule_as_it_should_be_has_nothing_wrong(smiles):
    assert reasons(frame(smiles)) == [[]]


@pytest.mark.parametrize(
    ("smiles", "charge"),
    [("C[NH3+]", 1), ("CC(=O)[O-]", -1), ("NC(N)=[NH2+]", 1), ("c1cc[nH+]cc1", 1), ("[OH3+]", 1)],
)
def test_ions_have_nothing_wrong_at_their_charge_and_an_odd_electron_without(smiles, charge):
    assert reasons(frame(smiles, charge=charge)) == [[]]
    assert reasons(frame(smiles)) == [["odd number of electrons"]]


@pytest.mark.parametrize("smiles", ["CCO", "c1ccccc1", "CC(C)C(N)C(=O)O", "C1CCCCC1", "CC"])
def test_molecules_without_their_hydrogens_are_noticed(smiles):
    whole = frame(smiles)
    on_carbon = np.flatnonzero(whole.numbers == 1)
    (found,) = reasons(frame(smiles, drop=on_carbon.tolist()))
    assert any("C lacks hydrogens" in r for r in found)


def test_one_missing_hydrogen_is_noticed():
    n = len(frame("CC(=O)OC").numbers)
    (found,) = reasons(frame("CC(=O)OC", drop=[n - 1]))
    assert "1 × C lacks hydrogens" in found
    assert "odd number of electrons" in found


def test_clashing_detached_and_shared_hydrogens_are_noticed():
    clash = frame("CCO", moved=[(3, (4, (0.2, 0.0, 0.0)))])
    away = frame("CCO", moved=[(3, (4, (9.0, 0.0, 0.0)))])
    found = reasons(clash, frame("CCO"), away)
    assert any("clashes with another atom" in r for r in found[0])
    assert found[1] == []
    assert "1 × H without a bond" in found[2]
    bifluoride = Frame(
        numbers=np.array([9, 1, 9]),
        positions=np.array([[0, 0, -1.0], [0, 0, 0], [0, 0, 1.0]]),
        charge=-1,
        group="FHF",
        subset="x",
    )
    assert reasons(bifluoride) == [["1 × H with more than one bond"]]


def test_stretched_bond_to_hydrogen_is_a_bond_still():
    whole = frame("CCO")
    bond = whole.positions[3] - whole.positions[0]
    far = [(3, (0, bond * 1.45 / np.linalg.norm(bond)))]
    assert reasons(frame("CCO", moved=far)) == [[]]
    farther = [(3, (0, bond * 2.2 / np.linalg.norm(bond)))]
    (found,) = reasons(frame("CCO", moved=farther))
    assert found == ["1 × H without a bond", "1 × C lacks hydrogens"]


def test_bonds_are_seen_through_the_walls_of_a_box():
    water = frame("O")
    box = Frame(
        numbers=water.numbers,
        positions=(water.positions - water.positions[0]) % 8.0,
        charge=0,
        group="O",
        subset="x",
        cell=8.0 * np.eye(3),
        pbc=(True, True, True),
    )
    assert np.ptp(box.positions) > 4.0
    assert reasons(box) == [[]]


# surveys


def test_sample_has_nothing_wrong(sample):
    found = survey([sample])
    assert found.findings == []
    assert len(found) == 104
    assert found.n_atoms.sum() == 2029
    assert found.force_counts.sum() == 2029
    with Dataset(sample) as dataset:
        every = dataset.read(0, 104)
    assert found.squared_forces == pytest.approx((every.forces.astype("f8") ** 2).sum(), rel=1e-9)
    assert dict(zip(found.elements, found.composition.sum(0).tolist(), strict=True)) == dict(
        zip(*[a.tolist() for a in np.unique(every.atomic_numbers, return_counts=True)], strict=True)
    )


def test_blocks_are_all_structures_in_order(sample):
    with Dataset(sample) as dataset:
        starts = [(start, len(block.energy)) for start, block in blocks_of(dataset)]
    assert sum(n for _, n in starts) == 104
    assert [start for start, _ in starts] == np.cumsum([0, *[n for _, n in starts]])[:-1].tolist()


def test_what_is_wrong_is_found_where_it_is(rewrite):
    def change(s):
        forces, energy, positions = s.forces.copy(), s.energy.copy(), s.positions.copy()
        forces[s.offsets[5]] += 200.0
        forces[s.offsets[7]] += 0.5
        positions[s.offsets[9]] = positions[s.offsets[9] + 1] + 0.1
        s = s._replace(forces=forces, energy=energy, positions=positions)
        return take(s, np.array([*range(104), 20]))

    found = survey([rewrite(change)], Bounds(max_force=100.0))
    kinds = {(f.index, f.kind) for f in found.findings}
    assert kinds == {
        (5, "force"),
        (5, "net force"),
        (7, "net force"),
        (9, "geometry"),
        (104, "duplicate"),
    }
    texts = {f.kind: f.text for f in found.findings if f.index != 7}
    assert texts["duplicate"].startswith("the same as 20 of ")
    assert "above 100" in texts["force"]


def test_energy_far_from_those_of_the_same_composition_is_found(rewrite):
    rng = np.random.default_rng(0)

    def change(s):
        s = take(s, np.zeros(30, int))
        noise = rng.normal(scale=0.05, size=s.positions.shape)
        energy = s.energy + rng.normal(scale=0.2, size=30)
        energy[17] += 27.2
        return s._replace(positions=(s.positions + noise).astype("f4"), energy=energy)

    found = [f for f in survey([rewrite(change)]).findings if f.kind == "energy"]
    assert [f.index for f in found] == [17]
    assert "of 30 structures of its composition" in found[0].text


def test_page_holds_histograms_and_findings(rewrite, tmp_path):
    doubled = rewrite(lambda s: take(s, np.array([0, 1, 2, 0])))
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["data", "validate", str(doubled), "-o", str(page)])
    assert done.exit_code == 1
    assert "1 of 4 structures have something wrong" in done.stdout
    text = page.read_text()
    for caption in ("Atoms of each element", "number of atoms", "Forces on the atoms",
                    "Energy per atom", "Temperature of the sampler"):  # fmt: skip
        assert caption in text
    assert text.count("<svg") == 6
    assert "the same as 0 of" in text
    assert not re.search(r"(src|href)=.https?:", text)


def test_page_of_structures_without_labels_leaves_out_what_is_not_known(tmp_path):
    with DatasetWriter(tmp_path / "a.h5", teacher=None, subsets=["x"], split=SplitRule()) as writer:
        writer.append(pack(frame("CCO"), ["x"]), ["CCO"])
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["data", "validate", str(tmp_path / "a.h5"), "-o", str(page)])
    assert done.exit_code == 0, done.stdout
    assert page.read_text().count("<svg") == 2
    assert (
        "1 structures, 9 atoms"
        in CliRunner().invoke(app, ["data", "stats", str(tmp_path / "a.h5")]).stdout
    )


# merging and splitting


def test_merged_file_has_each_structure_once_with_its_group_and_subset(rewrite, tmp_path):
    first = rewrite(lambda s: take(s, np.arange(0, 60)), name="first.h5")
    second = rewrite(lambda s: take(s, np.arange(50, 104)), name="second.h5")
    assert merge([first, second], tmp_path / "out.h5") == (104, 10, 0)
    whole = rewrite(name="whole.h5")
    with Dataset(tmp_path / "out.h5") as ours, Dataset(whole) as theirs:
        a, b = ours.read(0, 104), theirs.read(0, 104)
        assert [ours.subsets[s] for s in a.subset] == [theirs.subsets[s] for s in b.subset]
        assert ours.group_names() == theirs.group_names()
    for name in ("positions", "forces", "energy", "stress", "cell", "split", "group"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_labels_of_different_teachers_or_splits_are_not_mixed(sample, rewrite, tmp_path):
    other = rewrite(teacher="another", name="other.h5")
    with pytest.raises(DatasetError, match="labels of different teachers: 'SO3LR"):
        merge([sample, other], tmp_path / "out.h5")
    differently = rewrite(split=SplitRule(seed=5), name="split.h5")
    with pytest.raises(DatasetError, match="split in different ways"):
        merge([sample, differently], tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()
    assert merge([sample, differently], tmp_path / "out.h5", split=SplitRule()) == (104, 104, 0)


def test_files_of_the_splits_hold_every_structure_once(rewrite, tmp_path):
    whole = rewrite(split=SplitRule(val=0.2, test=0.2))
    counts = split_file(whole, tmp_path / "parts")
    assert sum(counts.values()) == 104
    assert min(counts.values()) > 5
    groups = {}
    energies = []
    for name in SPLITS:
        with Dataset(tmp_path / "parts" / f"{name}.h5") as part:
            assert len(part.in_split(name)) == len(part) == counts[name]
            groups[name] = set(part.group_names())
            energies += part.read(0, len(part)).energy.tolist()
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["val"]
    with Dataset(whole) as dataset:
        assert sorted(energies) == sorted(dataset.read(0, 104).energy.tolist())
    with pytest.raises(FileExistsError, match=r"train\.h5 exists"):
        split_file(whole, tmp_path / "parts")


def test_structures_of_molecules_to_exclude_are_left_out(rewrite, tmp_path):
    (tmp_path / "not.smi").write_text("OCC(=O)O\nNCCS  also as its salt\n")
    whole, out = rewrite(), tmp_path / "out.h5"
    options = ["--exclude", str(tmp_path / "not.smi"), "-o", str(out)]
    done = CliRunner().invoke(app, ["data", "merge", str(whole), *options])
    with Dataset(whole) as before, Dataset(out) as after:
        groups = before.group_names()
        bad = [i for i, name in enumerate(groups) if "NCCS" in name.split(".")]
        n_bad = int(np.isin(before.read(0, len(before)).group, bad).sum())
        assert n_bad > 0
        assert len(after) == len(before) - n_bad
        assert set(after.group_names()) == set(groups) - {groups[i] for i in bad}
    said = f"{104 - n_bad} structures, 0 duplicates, {n_bad} of molecules to exclude"
    assert f"{said} left out" in done.stdout


def test_molecules_that_another_dataset_holds_out_are_left_out(tmp_path):
    # a dimer is not a held-out molecule's if its molecules are held out only together
    def grouped(name, groups, **split):
        with DatasetWriter(
            tmp_path / name, teacher=None, subsets=["x"], split=SplitRule(**split)
        ) as writer:
            for group in groups:
                writer.append(pack(frame("CO"), ["x"]), [group])
        return tmp_path / name

    held = [
        grouped("test.h5", ["NCCc1ccccc1", "water #4"], val=0.0, test=1.0 - 1e-9),
        grouped("val.h5", ["CCO.CCS", "CO.CO"], val=1.0 - 1e-9, test=0.0),
        grouped("train.h5", ["CCN"], val=0.0, test=0.0),
    ]
    unwanted = Exclusion(held_out=held)
    for group, expected in (
        ("C[C@H]([NH3+])c1ccccc1", False),
        ("[NH3+]CCc1ccccc1", True),
        ("O.NCCc1ccccc1", True),
        ("CC[S-].CCO", True),
        ("CCO.CCN", False),
        ("CO.CO", True),
        ("CO", False),
        ("CO.CCN", False),
        ("CCN", False),
        ("water #4", True),
        ("water #5", False),
    ):
        assert (group in unwanted) == expected, group
    new = grouped("new.h5", ["CCN"])
    with DatasetWriter(tmp_path / "b.h5", teacher=None, subsets=["x"], split=SplitRule()) as writer:
        writer.append(pack(frame("CCO"), ["x"]), ["NCCc1ccccc1"])
    out = tmp_path / "out.h5"
    options = ["--exclude-held-out", str(held[0]), "-o", str(out), "--val", "0", "--test", "0"]
    done = CliRunner().invoke(
        app, ["data", "merge", str(new), str(tmp_path / "b.h5"), *options], catch_exceptions=False
    )
    assert "1 structures, 0 duplicates, 1 of molecules to exclude left out" in done.stdout
    with Dataset(out, unlabelled=True) as dataset:
        assert dataset.group_names() == ["CCN"]


def test_commands_say_what_they_wrote(rewrite, tmp_path):
    whole = rewrite()
    run = CliRunner().invoke
    done = run(app, ["data", "merge", str(whole), str(whole), "-o", str(tmp_path / "m.h5")])
    assert done.stdout.endswith("m.h5: 104 structures, 104 duplicates left out\n")
    done = run(app, ["data", "split", str(whole), "-o", str(tmp_path / "s"), "--val", "0.5"])
    assert "val.h5: " in done.stdout
    done = run(app, ["data", "convert", str(whole), str(tmp_path / "a.hdf5"), "--to", "spice"])
    assert done.stdout.endswith("a.hdf5: 100 structures, 4 periodic ones left out\n")
    assert "elements: H 1013, C 412" in run(app, ["data", "stats", str(whole)]).stdout
