"""What is built from the checkout, and that it works wherever it is installed."""

import configparser
import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import openmm_mlffd

ROOT = Path(__file__).parents[1]
MAPPED = {"openmm_mlffd.kernels": "kernels", "openmm_mlffd.training": "training"}
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "runs")
IMPORT_ALL = (
    "import openmm_mlffd, openmm_mlffd.kernels.reference, openmm_mlffd.training.config\n"
    "print(openmm_mlffd.__file__, openmm_mlffd.kernels.__file__, openmm_mlffd.training.__file__)"
)


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def folder_of(package):
    for name, folder in MAPPED.items():  # and what lies within them
        if package == name or package.startswith(f"{name}."):
            return ROOT / folder / package.removeprefix(name).strip(".").replace(".", "/")
    return ROOT / package.replace(".", "/")


def python(*arguments, cwd, path="", site=True):
    """Run an interpreter; without site, what is installed as editable is not there."""
    libraries = "" if site else sysconfig.get_paths()["purelib"]
    result = subprocess.run(
        [sys.executable, *([] if site else ["-S"]), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(path), libraries]))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout that is not installed."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "openmm-mlffd", ignore=IGNORED)


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """Folder with an sdist made from the checkout, and a wheel made from the sdist."""
    pytest.importorskip("build", reason="needs the package build")
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", str(folder), str(checkout), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--target", str(folder)]
    python("-m", "pip", "install", *options, str(wheel), cwd=folder)
    return folder


# the list of packages


def test_every_package_folder_is_in_setup_cfg_and_the_other_way_round():
    listed = set(setup_cfg()["options"]["packages"].split())
    there = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for init in (ROOT / "openmm_mlffd").rglob("__init__.py")
    }
    for package, folder in MAPPED.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            rest = init.parent.relative_to(ROOT / folder).parts
            there.add(".".join([package, *rest]))
    assert listed == there


def test_every_folder_with_modules_is_a_package():
    for top in ("openmm_mlffd", *MAPPED.values()):
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


def test_folders_outside_the_package_are_mapped():
    lines = setup_cfg()["options"]["package_dir"].split("\n")
    assert dict(line.split(" = ") for line in lines if line) == MAPPED


def test_all_data_files_are_listed():
    data = setup_cfg()["options.package_data"]
    for package in setup_cfg()["options"]["packages"].split():
        patterns = data.get(package, "").replace(",", " ").split()
        listed = {file for p in patterns for file in folder_of(package).glob(p)}
        there = {
            file
            for file in folder_of(package).rglob("*")
            if file.is_file() and file.suffix not in (".py", ".pyc")
        }
        there = {f for f in there if nearest_package(f) == folder_of(package)}
        assert listed == there, package


def nearest_package(file):
    return next(p for p in file.parents if (p / "__init__.py").exists())


# what is built


def sources():
    """Path within a wheel of every file of the package."""
    for package in setup_cfg()["options"]["packages"].split():
        for file in folder_of(package).rglob("*"):
            if (
                file.is_file()
                and "__pycache__" not in file.parts
                and nearest_package(file) == folder_of(package)
            ):
                place = file.relative_to(folder_of(package)).as_posix()
                yield f"{package.replace('.', '/')}/{place}"


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = {n for n in names if ".dist-info/" not in n}
    assert inside == set(sources())
    assert len(inside) > 30
    for name in (
        "openmm_mlffd/py.typed",
        "openmm_mlffd/students/default.safetensors",
        "openmm_mlffd/kernels/reference.py",
        "openmm_mlffd/training/train.py",
        "openmm_mlffd/training/configs/default.yaml",
    ):
        assert name in inside


def test_wheel_has_one_top_level_name(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith("top_level.txt"))
    assert archive.read(name).decode().split() == ["openmm_mlffd"]


def test_sdist_holds_what_a_packager_needs(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    for folder in ("openmm_mlffd", "kernels", "training", "tests"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert file.relative_to(ROOT).as_posix() in names
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"} <= names
    assert not any("__pycache__" in n or n.endswith(".pyc") for n in names)


def test_wheel_says_who_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Name"] == "openmm-mlffd"
    assert metadata["Version"] == openmm_mlffd.__version__
    assert metadata["License-Expression"] == "MIT"
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    names = {r.split(">=")[0] for r in required}
    assert names == {"torch", "numpy", "safetensors", "typer", "warp-lang"}


def test_entry_points_lead_to_what_they_name(installed):
    info = importlib.metadata.Distribution.at(next(installed.glob("*.dist-info")))
    found = {(e.group, e.name): e.value for e in info.entry_points}
    assert set(found) == {("openmmml.potentials", "mlffd"), ("console_scripts", "mlffd")}
    for value in found.values():
        module, attribute = value.split(":")
        code = f"import {module} as m; print(callable(m.{attribute}))"
        assert python("-c", code, cwd=installed.parent, path=installed).strip() == "True"


# where it works


def test_wheel_works_elsewhere(installed, tmp_path):
    out = python("-c", IMPORT_ALL, cwd=tmp_path, path=installed, site=False)
    assert all(Path(file).is_relative_to(installed) for file in out.split())


def test_wheel_works_when_python_starts_in_the_checkout(installed, checkout):
    # the current folder comes first: package and mapped folders of the checkout, not a mixture
    out = python("-c", IMPORT_ALL, cwd=checkout, path=installed, site=False)
    assert all(Path(file).is_relative_to(checkout) for file in out.split())
    # with -P it does not
    out = python("-P", "-c", IMPORT_ALL, cwd=checkout, path=installed, site=False)
    assert all(Path(file).is_relative_to(installed) for file in out.split())


def test_wheel_finds_its_students(installed, tmp_path):
    code = "from openmm_mlffd.modelfile import load_student; print(load_student().header.name)"
    assert python("-c", code, cwd=tmp_path, path=installed, site=False).strip() == "default"


def test_checkout_works_uninstalled(checkout):
    out = python("-c", IMPORT_ALL, cwd=checkout, site=False)
    assert all(Path(file).is_relative_to(checkout) for file in out.split())
    version = python("-m", "openmm_mlffd.cli", "--version", cwd=checkout, site=False)
    assert version == f"openmm-mlffd {openmm_mlffd.__version__}\n"


def test_package_elsewhere_is_not_found_without_installing(tmp_path):
    # what the two tests above rely on
    code = "import importlib.util; print(importlib.util.find_spec('openmm_mlffd'))"
    assert python("-c", code, cwd=tmp_path, site=False).strip() == "None"
