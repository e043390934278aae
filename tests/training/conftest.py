"""Small data sets with labels of known origin."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from openmm_mlffd.training.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from openmm_mlffd.training.hdf5 import DatasetWriter, SplitRule, Structures

OFFSETS = {1: -13.6, 6: -1029.4, 8: -2043.7}  # energies of the free atoms in the toy [eV]


def empty_labels(count: np.ndarray) -> dict:
    """All fields of structures with so many atoms, with labels that are not known."""
    n, n_atoms = len(count), int(count.sum())
    return {
        "offsets": np.concatenate([[0], np.cumsum(count)]).astype("i8"),
        "atomic_numbers": np.ones(n_atoms, "u1"),
        "positions": np.zeros((n_atoms, 3), "f4"),
        "forces": np.zeros((n_atoms, 3), "f4"),
        "partial_charges": np.full(n_atoms, np.nan, "f4"),
        "energy": np.zeros(n, "f8"),
        "stress": np.full((n, 3, 3), np.nan, "f4"),
        "cell": np.zeros((n, 3, 3)),
        "pbc": np.zeros((n, 3), bool),
        "total_charge": np.zeros(n, "i2"),
        "temperature": np.full(n, np.nan, "f4"),
        "group": np.zeros(n, "i4"),
        "subset": np.zeros(n, "u1"),
        "split": np.zeros(n, "u1"),
    }


@pytest.fixture(scope="session")
def make_structures() -> Callable[..., Structures]:
    """Random structures, a third of them periodic, with random labels."""

    def make(n: int = 12, seed: int = 0, n_subsets: int = 2) -> Structures:
        rng = np.random.default_rng(seed)
        count = rng.integers(1, 9, n)
        values = empty_labels(count)
        n_atoms = count.sum()
        values["atomic_numbers"] = rng.choice([1, 6, 8], n_atoms).astype("u1")
        values["positions"] = rng.uniform(0, 6, (n_atoms, 3)).astype("f4")
        values["forces"] = rng.normal(size=(n_atoms, 3)).astype("f4")
        values["partial_charges"] = rng.normal(size=n_atoms).astype("f4")
        values["energy"] = rng.normal(-1e4, 10, n)
        values["temperature"] = rng.uniform(200, 600, n).astype("f4")
        values["total_charge"] = rng.integers(-2, 3, n).astype("i2")
        values["subset"] = rng.integers(0, n_subsets, n).astype("u1")
        periodic = np.arange(n) % 3 == 0
        values["pbc"][periodic] = True
        values["cell"][periodic] = 6 * np.eye(3) + rng.uniform(-1, 1, (periodic.sum(), 3, 3))
        values["stress"][periodic] = rng.normal(size=(periodic.sum(), 3, 3))
        return Structures(**values)

    return make


@pytest.fixture
def write_dataset(tmp_path) -> Callable[..., Path]:
    """Write structures as one dataset file; without groups, each is its own."""

    def write(
        structures: Structures,
        groups: list[str] | None = None,
        *,
        name: str = "data.h5",
        subsets: tuple[str, ...] = ("a", "b"),
        split: SplitRule | None = None,
    ) -> Path:
        groups = groups or [f"molecule {i}" for i in range(len(structures.energy))]
        with DatasetWriter(
            tmp_path / name, teacher="toy", subsets=subsets, split=split or SplitRule()
        ) as writer:
            writer.append(structures, groups)
        return tmp_path / name

    return write


def morse(numbers: np.ndarray, positions: np.ndarray) -> tuple[float, np.ndarray]:
    """Energy [eV] and forces [eV/Å] of Morse bonds between all atoms."""
    depth = 0.4 * np.sqrt(np.log(numbers[:, None] + 1) * np.log(numbers + 1))
    rest = 0.5 * (numbers[:, None] ** (1 / 3) + numbers ** (1 / 3))
    vectors = positions[:, None] - positions
    r = np.linalg.norm(vectors, axis=-1) + np.eye(len(numbers))
    e = np.exp(-1.5 * (r - rest)) * (1 - np.eye(len(numbers)))
    energy = 0.5 * (depth * (e**2 - 2 * e)).sum() + sum(OFFSETS[z] for z in numbers.tolist())
    slope = depth * -3.0 * (e**2 - e)
    return energy, -((slope / r)[:, :, None] * vectors).sum(1)


@pytest.fixture(scope="session")
def morse_file(tmp_path_factory) -> Path:
    """A data set of 160 clusters of three to six atoms that are held together by Morse bonds."""
    rng = np.random.default_rng(0)
    systems = []
    while len(systems) < 160:
        n = int(rng.integers(3, 7))
        positions = rng.normal(scale=1.3, size=(n, 3)).astype("f4").astype("f8")
        if min(np.linalg.norm(a - b) for a, b in itertools.combinations(positions, 2)) > 0.9:
            numbers = rng.choice(list(OFFSETS), n)
            systems.append((numbers, positions, *morse(numbers, positions)))
    values = empty_labels(np.array([len(numbers) for numbers, *_ in systems]))
    values["atomic_numbers"] = np.concatenate([s[0] for s in systems]).astype("u1")
    values["positions"] = np.concatenate([s[1] for s in systems]).astype("f4")
    values["energy"] = np.array([s[2] for s in systems])
    values["forces"] = np.concatenate([s[3] for s in systems]).astype("f4")
    path = tmp_path_factory.mktemp("morse") / "morse.h5"
    with DatasetWriter(
        path, teacher="Morse", subsets=["cluster"], split=SplitRule(val=0.2, test=0.1)
    ) as writer:
        writer.append(Structures(**values), [f"cluster {i}" for i in range(160)])
    return path


@pytest.fixture
def morse_config(morse_file, tmp_path) -> Callable[..., TrainConfig]:
    """Configurations of short runs on the Morse clusters; keywords replace settings."""

    def make(**changes) -> TrainConfig:
        optimizer = {"learning_rate": 5e-3, "warmup_steps": 10, "ema_decay": 0.95}
        settings = {
            "output": str(tmp_path / "run"),
            "data": DataConfig(files=[str(morse_file)]),
            "model": ModelConfig(
                elements=["H", "C", "O"], n_channels=16, n_interactions=1, n_basis=8, cutoff=4.5
            ),
            "optimizer": OptimizerConfig(**optimizer | changes.pop("optimizer", {})),
            "epochs": 3,
            "batch_atoms": 60,
            "device": "cpu",
        }
        return TrainConfig(**settings | changes)

    return make


@pytest.fixture
def toy_path(monkeypatch) -> str:
    """Name of the teacher in toy_calculator.py, which the processes of teachers now find."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return "ase:toy_calculator:Toy"


@pytest.fixture(scope="session")
def teacher_python() -> str:
    """Python that has So3krates-torch and tblite."""
    path = os.environ.get("MLFFD_TEACHER_PYTHON")
    if not path:
        pytest.skip("MLFFD_TEACHER_PYTHON names no Python with So3krates-torch and tblite")
    return path
