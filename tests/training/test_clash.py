import pytest
import torch

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.modelfile import load_student, save_student
from openmm_mlffd.training.clash import DISTANCES, N_DISTANCES, PUSH, clashing_pairs, lack_of_push
from openmm_mlffd.training.config import LossConfig
from openmm_mlffd.training.step import predict
from openmm_mlffd.training.train import Trainer


def lack(potential):
    found = predict(potential.network, clashing_pairs(potential), potential.energy_scale)
    return lack_of_push(found.forces.detach()).item()


def test_all_pairs_of_elements_are_there_at_all_distances(make_student):
    student = make_student(elements=["H", "C", "O"], references=[0.0] * 3)
    pairs = clashing_pairs(student)
    assert len(pairs.energy) == 6 * N_DISTANCES
    assert len(pairs.vectors) == 2 * len(pairs.energy)  # one edge in each direction
    species = pairs.species.view(-1, 2)
    radii = torch.tensor([COVALENT_RADII[z] for z in student.numbers], dtype=torch.float64)
    share = pairs.vectors.double()[0::2].norm(dim=1) / radii[species].sum(1)
    assert share.min() == pytest.approx(DISTANCES[0], abs=1e-6)
    assert share.max() == pytest.approx(DISTANCES[1], abs=1e-6)


def test_only_what_pushes_too_little_counts():
    apart = torch.tensor([2 * PUSH, PUSH, 0.0, -PUSH])
    forces = torch.zeros(8, 3)
    forces[0::2, 0], forces[1::2, 0] = -apart, apart
    expected = (torch.tensor([0.0, 0.0, PUSH, 2 * PUSH]) + 1).log().mean()
    assert lack_of_push(forces).item() == pytest.approx(expected.item())
    forces[:, 1:] = 7.0  # across does not matter
    assert lack_of_push(forces).item() == pytest.approx(expected.item())


def test_training_fills_the_wells_of_a_student(morse_config, tmp_path):
    trainer = Trainer(morse_config(output=str(tmp_path / "first")))
    last = trainer.average.network.readout[-1].weight
    start = last.detach().clone()
    for factor in (-1e3, 1e3, -1e4, 1e4):  # the untrained network pulls with one sign or the other
        with torch.no_grad():
            last.copy_(factor * start)
        if lack(trainer.average) > 0.05:
            break
    path = tmp_path / "wells.safetensors"
    save_student(path, trainer.average, trainer.header)
    before = lack(load_student(path))
    assert before > 0.05
    config = morse_config(
        initial=str(path),
        output=str(tmp_path / "second"),
        loss=LossConfig(energy=0.0, forces=0.0, stress=0.0, angle=0.0, clash=1.0),
    )
    second = Trainer(config)
    second.run()
    assert lack(second.average) < before / 3
