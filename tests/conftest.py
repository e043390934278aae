"""Small students and structures that the tests share."""

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from openmm_mlffd.graph import build_graph
from openmm_mlffd.modelfile import StudentHeader, make_potential
from openmm_mlffd.potential import Potential, Prediction

DATA = Path(__file__).parent / "data"

# the systems are small: several threads would only wait for one another
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skip what needs Warp's compiler for the CPU where Warp came without it."""
    try:
        return (yield)
    except Exception as error:
        if "'NoneType' object has no attribute 'wp_compile_cpp'" in str(error):
            pytest.skip("Warp has no compiler for the CPU here (no warp-clang)")
        raise


class System(NamedTuple):
    """Atomic numbers (n,), positions [Å] (n, 3), and box vectors as rows [Å] or None."""

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray | None = None


@pytest.fixture(scope="session")
def data_folder() -> Path:
    return DATA


@pytest.fixture(scope="session")
def make_header() -> Callable[..., StudentHeader]:
    """Headers of small students; keywords replace single fields or sizes."""

    def make(**changes) -> StudentHeader:
        sizes = {k: changes.pop(k, v) for k, v in _SIZES.items()}
        values = {
            "name": "toy",
            "architecture": {"kind": "painn", **sizes},
            "elements": ["H", "C", "N", "O"],
            "references": [0.0, 0.0, 0.0, 0.0],
            "cutoff": 4.0,
            "energy_scale": 20.0,
        }
        return StudentHeader(**values | changes)

    return make


_SIZES = {"n_channels": 16, "n_interactions": 2, "n_basis": 8, "norm_softening": 0.01}


@pytest.fixture(scope="session")
def make_student(make_header) -> Callable[..., Potential]:
    """Untrained students in double precision, whose learned forces are of the order of 1 eV/Å."""

    def make(*, seed: int = 0, **changes) -> Potential:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return make_potential(make_header(**changes)).double().eval()

    return make


@pytest.fixture
def student(make_student) -> Potential:
    return make_student()


@pytest.fixture(scope="session")
def predict() -> Callable[..., Prediction]:
    """Evaluate a potential on one system, or on several as one batch."""

    def evaluate(potential: Potential, *systems: System) -> Prediction:
        numbers, positions, cells = zip(*systems, strict=True)
        counts = torch.tensor([len(n) for n in numbers])
        device = next(potential.parameters()).device
        graph = build_graph(
            torch.tensor(np.concatenate(positions), device=device),
            potential.species(torch.tensor(np.concatenate(numbers), device=device)),
            cutoff=potential.cutoff,
            cell=torch.tensor(
                np.stack([np.zeros((3, 3)) if c is None else c for c in cells]), device=device
            ),
            pbc=torch.tensor([[c is not None] * 3 for c in cells], device=device),
            system=torch.repeat_interleave(torch.arange(len(systems)), counts).to(device),
        )
        return potential(graph)

    return evaluate


@pytest.fixture(scope="session")
def ethanol() -> System:
    """Ethanol, bent away from its symmetric geometry."""
    positions = np.array(
        [
            [1.168, -0.402, 0.031],
            [-0.012, 0.560, -0.044],
            [-1.190, -0.214, 0.052],
            [-1.956, 0.341, 0.038],
            [2.119, 0.151, -0.012],
            [1.109, -1.098, 0.881],
            [1.151, -1.026, -0.883],
            [0.035, 1.158, 0.866],
            [0.051, 1.221, -0.891],
        ]
    )
    return System(np.array([6, 6, 8, 1, 1, 1, 1, 1, 1]), positions)


@pytest.fixture(scope="session")
def make_box() -> Callable[..., System]:
    """Random atoms, none closer than 1.1 Å, in a strongly skewed box of so many Å."""

    def make(n_atoms: int = 9, length: float = 5.0, seed: int = 0) -> System:
        rng = np.random.default_rng(seed)
        cell = length * np.array([[1.0, 0.0, 0.0], [0.45, 1.1, 0.0], [-0.35, 0.4, 0.95]])
        images = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), -1).reshape(-1, 3) @ cell
        positions = np.zeros((0, 3))
        while len(positions) < n_atoms:
            new = rng.random(3) @ cell
            distances = np.linalg.norm((positions[:, None] + images) - new, axis=-1)
            if not len(positions) or distances.min() > 1.1:
                positions = np.vstack([positions, new])
        return System(rng.choice([1, 6, 7, 8], n_atoms), positions, cell)

    return make


@pytest.fixture(scope="session")
def box(make_box) -> System:
    """Nine atoms in a skewed box much smaller than twice the cutoff."""
    return make_box()
