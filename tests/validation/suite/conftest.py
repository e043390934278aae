"""Jobs and models that the tests of the validation suite share."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from openmm_mlffd.modelfile import save_student
from openmm_mlffd.training.hdf5 import Dataset, DatasetWriter, SplitRule
from openmm_mlffd.training.teacher_worker import unknown_labels
from openmm_mlffd.validation.suite.job import Job
from openmm_mlffd.validation.suite.models import PotentialModel, python_system
from openmm_mlffd.validation.suite.plan import make_plan
from openmm_mlffd.validation.suite.store import Clock, Store

ELEMENTS = ["H", "C", "N", "O", "F", "P", "S", "Cl"]


class Springs:
    """A model of harmonic bonds between all atoms, at the distances that they have at first.

    Parameters
    ----------
    positions
        Where nothing pulls [Å].
    stiffness
        [eV/Å^2].
    """

    name, identity = "springs", "springs"

    def __init__(self, positions, stiffness=20.0):
        self.rest = np.linalg.norm(positions[:, None] - positions, axis=-1)
        self.stiffness = stiffness

    def label(self, batch, *, precision="single"):
        labels = unknown_labels(batch)
        for i, (a, b) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
            x = batch.positions[a:b]
            vectors = x[:, None] - x
            r = np.linalg.norm(vectors, axis=-1)
            stretch = r - self.rest
            labels.energy[i] = 0.25 * self.stiffness * (stretch**2).sum()
            pull = np.divide(stretch, r, out=np.zeros_like(r), where=r > 0)
            labels.forces[a:b] = -self.stiffness * (pull[:, :, None] * vectors).sum(1)
        return labels

    def system(self, topology, *, precision="single", charge=0):
        return python_system(self, topology, precision, charge)


@pytest.fixture
def make_springs() -> type[Springs]:
    return Springs


@pytest.fixture
def toy(make_student) -> PotentialModel:
    """An untrained student of eight elements, in double precision."""
    potential = make_student(elements=ELEMENTS, references=[0.0] * 8)
    return PotentialModel(potential, "toy", "toy")


@pytest.fixture
def toy_file(tmp_path, make_student, make_header):
    settings = {"elements": ELEMENTS, "references": [0.0] * 8}
    path = tmp_path / "toy.safetensors"
    save_student(path, make_student(**settings), make_header(**settings))
    return path


@pytest.fixture
def make_job(tmp_path) -> Callable[..., Job]:
    """Jobs of the tiny level; keywords replace fields of the job, or parts of the plan."""

    def make(model, *, clock=None, folder="report", **changes) -> Job:
        plan = make_plan("tiny")
        parts = {k: changes.pop(k) for k in list(changes) if hasattr(plan, k) and k != "teacher"}
        output = tmp_path / folder
        output.mkdir(exist_ok=True)
        return Job(
            model=model,
            plan=replace(plan, **parts),
            store=Store(output / "pieces", clock=clock or Clock()),
            output=output,
            **changes,
        )

    return make


@pytest.fixture(scope="session")
def small_data(data_folder, tmp_path_factory):
    """Twenty structures of sample.h5, two of them periodic; half of them to train on."""
    path = tmp_path_factory.mktemp("small") / "small.h5"
    with Dataset(data_folder / "sample.h5") as everything:
        by_size = np.argsort(everything.n_atoms, kind="stable")
        boxes = [i for i in by_size if everything.subsets[everything.subset[i]] == "box_water"][:2]
        chosen = sorted({*by_size[:40:2].tolist(), *boxes})
        names = everything.group_names()
        with DatasetWriter(
            path,
            teacher=everything.teacher,
            subsets=everything.subsets,
            split=SplitRule(val=0.0, test=0.5),
        ) as writer:
            for i in chosen:
                block = everything.read(int(i), int(i) + 1)
                writer.append(block, [names[block.group[0]]])
    return path
