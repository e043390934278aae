"""`mlffd generate`: recipes, files of structures, and runs that are ended and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from rdkit import Chem
from rdkit.Chem import AllChem

from openmm_mlffd.training.config import ConfigError
from openmm_mlffd.training.generation.molecules import SourceMissing, read_excluded, skeletons
from openmm_mlffd.training.generation.peptides import peptide_smiles
from openmm_mlffd.training.generation.recipe import load_recipe, parse_recipe
from openmm_mlffd.training.generation.run import FolderError, format_summary, generate
from openmm_mlffd.training.hdf5 import Dataset, Structures
from openmm_mlffd.training.parallel import Workers
from openmm_mlffd.training.sources import SourceError

BROAD = Path(__file__).parents[2] / "training" / "configs" / "broad.yaml"
QUICK = {"frames": 2, "equilibration": 5, "interval": 5}
HERE = Workers(count=0)
RECIPE = """
name: small
seed: 3
shard_size: 2
subsets:
  alcohols:
    kind: molecules
    sources: [{file: some.smi}]
    sampling: {conformers: 2, frames: 2, equilibration: 5, interval: 5}
  pairs:
    kind: clusters
    sources: [{file: some.smi}]
    count: 4
    waters: [0, 1]
    sampling: {frames: 2, equilibration: 5, interval: 5}
  water:
    kind: boxes
    count: 1
    edges: [9.0, 9.5]
    sampling: {frames: 2, equilibration: 5, interval: 5}
"""
MOLECULES = "CCO\nOCC(O)CO\nCC#N\nCNC=O\nCCOC(C)=O\n[CH3]\nCCBr\n"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "some.smi").write_text(MOLECULES)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def contents(path):
    with Dataset(path, unlabelled=True) as dataset:
        return dataset.read(0, len(dataset)), dataset.group_names(), dataset.subsets


def assert_same(first, second):
    (ours, groups, subsets), (theirs, their_groups, their_subsets) = map(contents, (first, second))
    assert (groups, subsets) == (their_groups, their_subsets)
    for name in Structures._fields:
        assert getattr(ours, name).tobytes() == getattr(theirs, name).tobytes(), name


def from_files(folder, *files, **settings):
    """Structures of files, by a recipe of one subset."""
    loaded = parse_recipe(
        {"subsets": {"mine": {"kind": "files", "files": [f.name for f in files]} | settings}},
        folder,
    )
    return generate(loaded, folder / "out", workers=HERE, progress=False)


def molecule(smiles, *, hydrogens=True):
    made = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(made, randomSeed=1)
    return made if hydrogens else Chem.RemoveHs(made)


@pytest.fixture
def write_sdf(tmp_path):
    def write_(*molecules, name="some.sdf"):
        with Chem.SDWriter(str(tmp_path / name)) as writer:
            for each in molecules:
                writer.write(each)
        return tmp_path / name

    return write_


# recipes


def test_recipe_makes_what_it_says(recipe, tmp_path):
    summary = generate(load_recipe(recipe), tmp_path / "out", workers=HERE, progress=False)
    assert summary.failures == []
    found, groups, subsets = contents(summary.dataset)
    assert subsets == ["alcohols", "pairs", "water"]
    # radical and bromide are left out
    assert np.bincount(found.subset).tolist() == [5 * 2 * 2, 4 * 2, 2]
    alcohols = {groups[g] for g in found.group[found.subset == 0]}
    assert alcohols == {"CCO", "OCC(O)CO", "CC#N", "CNC=O", "CCOC(C)=O"}
    for i in range(20):
        own = found.atomic_numbers[found.offsets[i] : found.offsets[i + 1]]
        whole = Chem.AddHs(Chem.MolFromSmiles(groups[found.group[i]]))
        assert sorted(own.tolist()) == sorted(a.GetAtomicNum() for a in whole.GetAtoms())
    assert found.pbc.all(1).tolist() == [False] * 28 + [True] * 2
    assert np.isin(found.temperature[:20], [300, 500, 700, 1000]).all()
    assert "30 structures with" in format_summary(summary)
    from openmm_mlffd.training.datasets.survey import survey

    assert survey([summary.dataset]).findings == []


def test_another_seed_gives_other_structures(recipe, tmp_path):
    runs = {
        "one": generate(load_recipe(recipe), tmp_path / "one", workers=HERE, progress=False),
        "seed": generate(
            load_recipe(recipe, ["seed=4"]), tmp_path / "seed", workers=HERE, progress=False
        ),
    }
    first, other = contents(runs["one"].dataset)[0], contents(runs["seed"].dataset)[0]
    assert not set(first.positions[:, 0].tolist()) & set(other.positions[:, 0].tolist())


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers", [Workers(count=2), Workers(cluster="local:2")], ids=["processes", "dask"]
)
def test_structures_do_not_depend_on_who_makes_them(recipe, tmp_path, workers):
    here = generate(load_recipe(recipe), tmp_path / "here", workers=HERE, progress=False)
    there = generate(load_recipe(recipe), tmp_path / "there", workers=workers, progress=False)
    assert_same(here.dataset, there.dataset)


def test_fraction_is_a_part_that_a_later_run_completes(recipe, tmp_path):
    loaded = load_recipe(recipe)
    part = generate(loaded, tmp_path / "out", workers=HERE, fraction=0.4, progress=False)
    n = len(contents(part.dataset)[0].energy)
    assert 0 < n < 30
    assert "extrapolated by subset, the whole recipe" in format_summary(part)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("shard-*")}
    whole = generate(loaded, tmp_path / "out", workers=HERE, progress=False)
    assert {f: f.stat().st_mtime_ns for f in before} == before
    other = generate(loaded, tmp_path / "other", workers=HERE, progress=False)
    assert_same(whole.dataset, other.dataset)


def kill_and_resume(recipe, folder, kills, rng):
    """End a run by SIGKILL at so many random moments, then let it finish."""
    command = [sys.executable, "-m", "openmm_mlffd.cli", "generate", str(recipe), "-o", str(folder)]
    for _ in range(kills):
        process = subprocess.Popen(
            [*command, "--workers", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before, deadline = len(list(folder.glob("shard-*"))), time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if len(list(folder.glob("shard-*"))) > before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, "--workers", "0"], check=True, capture_output=True)


@pytest.mark.parametrize(
    "kills", [1, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_run_killed_at_any_moment_goes_on_to_the_same_structures(recipe, tmp_path, kills):
    kill_and_resume(recipe, tmp_path / "killed", kills, np.random.default_rng(kills))
    expected = generate(load_recipe(recipe), tmp_path / "whole", workers=HERE, progress=False)
    assert_same(tmp_path / "killed" / "structures.h5", expected.dataset)
    assert not list((tmp_path / "killed").glob(".*.tmp"))


def test_folder_of_another_recipe_is_refused(recipe, tmp_path):
    generate(load_recipe(recipe), tmp_path / "out", workers=HERE, fraction=0.1, progress=False)
    with pytest.raises(FolderError, match="was generated with recipe"):
        generate(load_recipe(recipe, ["seed=9"]), tmp_path / "out", workers=HERE, progress=False)


def test_systems_that_fail_are_listed_and_the_others_made(recipe, tmp_path):
    (tmp_path / "some.smi").write_text("CCO\n[BH3-]C\nCO\n")
    summary = generate(
        load_recipe(recipe, ["elements=[H,B,C,O]", "subsets.pairs.sources=[{file: some.smi}]"]),
        tmp_path / "out",
        workers=HERE,
        progress=False,
    )
    failed = [text for _, text in summary.failures if text.startswith("alcohols")]
    assert len(failed) == 1
    assert "MMFF94 has no parameters for it" in failed[0]
    assert "C[BH3-]" in failed[0] or "[BH3-]C" in failed[0]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert failed[0] in json.dumps(manifest, ensure_ascii=False)
    assert "systems failed (manifest.json lists them)" in format_summary(summary)


def test_excluded_molecules_are_in_no_structure(recipe, tmp_path):
    (tmp_path / "not.smi").write_text("CCO\n")
    summary = generate(
        load_recipe(recipe, ["exclude=[not.smi]"]), tmp_path / "o", workers=HERE, progress=False
    )
    _, groups, _ = contents(summary.dataset)
    assert not any("CCO" in g.split(".") for g in groups)
    assert "CC#N" in groups


def test_torn_molecules_are_made_by_a_recipe_of_the_package(recipe, tmp_path):
    torn = load_recipe(BROAD.with_name("torn.yaml"))
    assert torn.recipe.exclude == load_recipe(BROAD).recipe.exclude
    assert {s.sampling.method for s in torn.subsets.values()} == {"torn"}
    settings = {"method": "torn", "torn": "[0]", "scale": "[0.6, 0.7]"}
    overrides = [f"subsets.pairs.sampling.{k}={v}" for k, v in settings.items()]
    summary = generate(
        load_recipe(recipe, overrides), tmp_path / "out", workers=HERE, progress=False
    )
    found, _, names = contents(summary.dataset)
    shortest = {}
    for i, subset in enumerate(found.subset):
        x = found.positions[found.offsets[i] : found.offsets[i + 1]].astype(float)
        distance = np.linalg.norm(x[:, None] - x, axis=-1) + 9 * np.eye(len(x))
        shortest.setdefault(int(subset), []).append(distance.min())
    assert max(shortest[names.index("pairs")]) < 0.75  # 0.7 of a bond of 0.96 Å
    assert min(shortest[names.index("alcohols")]) > 0.75


@pytest.mark.parametrize(("field", "failures"), [("mmff94", 1), ("auto", 0)])
def test_recipe_may_ask_for_uff_where_mmff94_has_no_parameters(recipe, tmp_path, field, failures):
    (tmp_path / "some.smi").write_text("CCO\nCC(=O)O[O-]\nCO\n")
    names = ("alcohols", "pairs")
    settings = [f"subsets.{name}.sampling.force_field={field}" for name in names]
    loaded = load_recipe(recipe, [*settings, "subsets.pairs.sources=[{file: some.smi}]"])
    summary = generate(loaded, tmp_path / "out", workers=HERE, progress=False)
    without = [text for _, text in summary.failures if "MMFF94 has no parameters for it" in text]
    for name in names:
        failed = [text for text in without if text.startswith(name)]
        assert bool(failed) == bool(failures)


@pytest.mark.parametrize(
    ("name", "subsets"),
    [
        ("broad", {"drugs", "peptides", "dimers", "water", "box_drugs"}),
        ("anions", {"anions"}),
        ("torn", {"torn_small", "scaled_dimers", "turned_drugs", "apart"}),
        ("ions", {"inorganic", "inorganic_torn", "inorganic_water", "drug_ions", "ion_pairs"}),
        ("pairs", {"pairs"}),
    ],
)
def test_recipe_that_comes_with_the_package_is_valid(name, subsets):
    loaded = load_recipe(BROAD.with_name(f"{name}.yaml"))
    excluded = {"benchmarks.inchikeys", "spice_test.inchikeys", "stability.inchikeys"}
    assert excluded <= set(loaded.recipe.exclude)
    assert subsets <= set(loaded.subsets)


def test_molecules_of_the_stability_test_are_left_out():
    excluded = read_excluded([BROAD.with_name("stability.inchikeys")])
    for sequence in ("EWLHC", "WGSD", "AAAAAA"):
        assert set(skeletons(peptide_smiles(sequence))) <= set(excluded)
    listed = BROAD.with_name("pairs.smi").read_text().splitlines()
    for smiles in [line.split()[0] for line in listed] + ["Cn1c(=O)c2c(ncn2C)n(C)c1=O"]:
        seen = set(skeletons(smiles)) & set(excluded)
        assert bool(seen) == smiles.startswith("Cn1c(=O)c2c"), smiles


def test_inorganic_molecules_are_readable_and_those_of_the_recipe():
    recipe = load_recipe(BROAD.with_name("ions.yaml"))
    listed = [
        line.strip()
        for line in BROAD.with_name("inorganic.smi").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    elements = {
        atom.GetSymbol()
        for text in listed
        for atom in Chem.AddHs(Chem.MolFromSmiles(text)).GetAtoms()
    }
    assert elements == set(recipe.recipe.elements)
    assert len({Chem.CanonSmiles(text) for text in listed}) == len(listed)  # none twice
    held_out = {
        Chem.CanonSmiles(s) for s in ("[O-]S([O-])(=O)=O", "ClP1(Cl)=NP(Cl)(Cl)=NP(Cl)(Cl)=N1")
    }
    assert not held_out & {Chem.CanonSmiles(text) for text in listed}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds=1", "unknown setting 'seeds'; did you mean 'seed'"),
        ("subsets.pairs.molecule=[2]", "unknown setting 'molecule'; did you mean 'molecules'"),
        ("subsets.pairs.kind=cluster", "needs a `kind`, one of molecules, clusters, boxes, files"),
        ("subsets.pairs.sampling.method=mc", "sampling.method must be one of md, modes, rattle"),
        ("subsets.pairs.sampling.temperatures=[0]", "temperatures must be positive"),
        ("subsets.water.sampling.method=modes", "boxes are sampled by md, not by .* modes"),
        ("subsets.pairs.sampling.force_field=uff", "force_field must be one of mmff94, auto, got"),
        ("subsets.water.sampling.force_field=auto", "boxes are sampled with .* mmff94"),
        ("subsets.pairs.sampling.lengths=[0.5]", "sampling.lengths must be two positive numbers"),
        ("subsets.pairs.sampling.torn=[-1]", "sampling.torn must be numbers from 0"),
        ("subsets.water.edges=[9,8]", "edges must be two positive numbers, the smaller first"),
        ("subsets.alcohols.sources=[]", "needs sources of molecules"),
        ("subsets.alcohols.sources=[{}]", "a source has either a file or peptides"),
        ("subsets.alcohols.sources=[{peptides: {with_any: DX}}]", "with_any must be letters of"),
        (
            "subsets.alcohols.sources=[{peptides: {with_any: D, sequences: [AD]}}]",
            "with_any is for random peptides, but sequences are given",
        ),
        ("subsets={}", None),
    ],
)
def test_setting_without_sense_is_refused(recipe, change, message):
    if message is None:
        loaded = load_recipe(recipe, [change])  # nothing is taken away by an empty override
        assert set(loaded.subsets) == {"alcohols", "pairs", "water"}
        return
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, [change])


def test_more_molecules_than_there_are_is_an_error(recipe, tmp_path):
    loaded = load_recipe(recipe, ["subsets.alcohols.count=6"])
    with pytest.raises(SourceMissing, match="have 5 molecules that pass, 6 are wanted"):
        generate(loaded, tmp_path / "out", workers=HERE, progress=False)


def test_student_samples_its_own_configurations(recipe, tmp_path):
    loaded = load_recipe(recipe, ["subsets.alcohols.sampling.method=student"])
    summary = generate(loaded, tmp_path / "out", workers=HERE, fraction=0.1, progress=False)
    found, _, _ = contents(summary.dataset)
    own = [found.positions[found.offsets[i] : found.offsets[i + 1]] for i in range(2)]
    assert abs(own[0] - own[1]).max() > 1e-3
    assert summary.failures == []


# hydrogens of files


def test_explicit_hydrogens_of_an_sdf_are_kept_where_they_are(write_sdf, tmp_path):
    made = molecule("CC(=O)[O-]")
    summary = from_files(tmp_path, write_sdf(made))
    found, _, _ = contents(summary.dataset)
    np.testing.assert_allclose(found.positions, made.GetConformer().GetPositions(), atol=1e-4)
    assert found.atomic_numbers.tolist() == [6, 6, 8, 8, 1, 1, 1]
    assert found.total_charge.tolist() == [-1]


def test_implicit_hydrogens_are_refused_or_added_and_heavy_atoms_never_move(write_sdf, tmp_path):
    bare = molecule("CC(=O)NC", hydrogens=False)
    file = write_sdf(bare)
    with pytest.raises(SourceError, match="entry 0 has 7 implicit hydrogens"):
        from_files(tmp_path, file)
    summary = from_files(tmp_path, file, hydrogens="add")
    found, _, _ = contents(summary.dataset)
    assert np.bincount(found.atomic_numbers).tolist() == [0, 7, 0, 0, 0, 0, 3, 1, 1]
    heavy = found.positions[found.atomic_numbers > 1]
    np.testing.assert_allclose(heavy, bare.GetConformer().GetPositions(), atol=1e-4)
    hydrogens = found.positions[found.atomic_numbers == 1]
    nearest = np.linalg.norm(hydrogens[:, None] - heavy, axis=2).min(1)
    assert nearest.min() > 0.9
    assert nearest.max() < 1.2


def test_radical_is_taken_as_it_is(write_sdf, tmp_path):
    summary = from_files(tmp_path, write_sdf(molecule("[CH3]")))
    assert sorted(contents(summary.dataset)[0].atomic_numbers.tolist()) == [1, 1, 1, 6]


def test_metal_complex_fails_alone_and_says_why(write_sdf, tmp_path):
    complex_ = molecule("N[Zn]N")
    summary = from_files(tmp_path, write_sdf(molecule("CCO"), complex_))
    assert len(contents(summary.dataset)[0].energy) == 1
    assert [text.split(": ", 2)[-1] for _, text in summary.failures] == [
        "has Zn, which the recipe's elements leave out"
    ]


@pytest.mark.parametrize("name", ["empty.sdf", "empty.xyz", "empty.pdb"])
def test_empty_file_is_an_error(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(SourceError, match=name):
        from_files(tmp_path, tmp_path / name)


def test_wrong_element_is_an_error(write_sdf, tmp_path):
    path = write_sdf(molecule("CC"))
    path.write_text(path.read_text().replace(" C  ", " Qx ", 1))
    with pytest.raises(SourceError, match="entry 0 is not a molecule"):
        from_files(tmp_path, path)
    write(tmp_path / "x.xyz", Atoms("CX", np.eye(3)[:2]), format="extxyz")
    with pytest.raises(SourceError, match="unknown element"):
        from_files(tmp_path, tmp_path / "x.xyz")


def test_hydrogens_of_a_pdb_are_refused_or_added_and_heavy_atoms_never_move(tmp_path):
    whole = Path(__file__).parents[2] / "examples" / "structures" / "alanine-dipeptide.pdb"
    lines = whole.read_text().splitlines()
    bare = [x for x in lines if not (x.startswith(("ATOM", "HETATM")) and x[76:78].strip() == "H")]
    bare = [x for x in bare if not x.startswith("CONECT")]
    (tmp_path / "bare.pdb").write_text("\n".join(bare) + "\n")
    (tmp_path / "whole.pdb").write_text(whole.read_text())
    with pytest.raises(SourceError, match="12 hydrogens are missing"):
        from_files(tmp_path, tmp_path / "bare.pdb")
    summary = from_files(tmp_path, tmp_path / "bare.pdb", tmp_path / "whole.pdb", hydrogens="add")
    found, _, _ = contents(summary.dataset)
    assert np.diff(found.offsets).tolist() == [22, 22]
    heavy = found.atomic_numbers > 1
    first, second = found.positions[:22][heavy[:22]], found.positions[22:][heavy[22:]]
    np.testing.assert_allclose(first, second, atol=1e-3)


def test_pdb_is_sampled_by_its_force_field(tmp_path):
    whole = Path(__file__).parents[2] / "examples" / "structures" / "alanine-dipeptide.pdb"
    (tmp_path / "whole.pdb").write_text(whole.read_text())
    summary = from_files(tmp_path, tmp_path / "whole.pdb", sampling={"method": "md"} | QUICK)
    assert len(contents(summary.dataset)[0].energy) == 2


def test_frames_and_databases_of_ase_are_taken_with_what_they_say(tmp_path):
    from ase.db import connect

    water = Atoms("OHH", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]], info={"charge": 2})
    write(tmp_path / "a.xyz", [water], format="extxyz")
    with connect(tmp_path / "a.db") as database:
        database.write(Atoms("OH", [[0, 0, 0], [0.97, 0, 0]]), data={"charge": -1, "group": "OH-"})
    summary = from_files(tmp_path, tmp_path / "a.xyz", tmp_path / "a.db")
    found, groups, _ = contents(summary.dataset)
    assert found.total_charge.tolist() == [2, -1]
    assert groups == ["H2 O1", "OH-"]


@pytest.mark.skipif(os.name != "posix", reason="limits of the size of files are POSIX")
def test_full_disk_loses_nothing(recipe, tmp_path):
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000,) * 2)\n"
        "from openmm_mlffd.cli import main\nmain()"
    )
    arguments = ["generate", str(recipe), "-o", str(tmp_path / "out"), "--workers", "0"]
    failed = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "cannot be written" in failed.stderr.splitlines()[-1]
    summary = generate(load_recipe(recipe), tmp_path / "out", workers=HERE, progress=False)
    other = generate(load_recipe(recipe), tmp_path / "other", workers=HERE, progress=False)
    assert_same(summary.dataset, other.dataset)
