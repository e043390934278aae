from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from openmm_mlffd.engines import open_evaluator
from openmm_mlffd.evaluator import StudentSource
from openmm_mlffd.graph import build_graph
from openmm_mlffd.modelfile import ModelFileError, load_student, make_potential, save_student
from openmm_mlffd.potential import edge_vectors
from openmm_mlffd.variants import SplineBasis


class System(NamedTuple):
    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray | None = None


CHOICES = {
    "spline": {"filters": "spline"},
    "tail": {"charges": True, "tail": True},
    "all": {"filters": "spline", "pair_filters": True, "charges": True, "tail": True},
}


@pytest.fixture(params=CHOICES)
def header(request, make_header):
    choices = CHOICES[request.param]
    architecture = {
        "kind": "painn-variant",
        "n_channels": 16,
        "n_interactions": 2,
        "n_basis": 10,
        "filters": "sine",
        "pair_filters": False,
        "charges": False,
        "tail": False,
        "message_cutoff": 4.0,
    } | choices
    cutoff = 6.5 if architecture["tail"] else 4.0
    return replace(make_header(), architecture=architecture, cutoff=cutoff)


@pytest.fixture
def variant(header):
    """A student with weights that make all of its parts matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        potential = make_potential(header).double().eval()
        for module in potential.network.modules():
            if hasattr(module, "pair_scale"):
                torch.nn.init.normal_(module.pair_scale.weight, mean=1.0, std=0.5)
    return potential


# the basis


def test_splines_vanish_at_the_cutoff_with_two_derivatives():
    basis = SplineBasis(12, 5.0)
    r = torch.tensor([5.0 - 1e-5, 4.0], dtype=torch.float64, requires_grad=True)
    total = basis(r).square().sum(1)
    value = basis(r)[:, -1]
    slope = torch.autograd.grad(value.sum(), r, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), r)[0]
    assert abs(value[0]) < 1e-12
    assert abs(slope[0]) < 1e-8
    assert abs(curvature[0]) < 1e-3
    assert total[1] > 0.1
    assert basis(torch.tensor([5.0, 5.5, 80.0])).eq(0).all()


def test_splines_are_two_times_continuously_differentiable_at_the_knots():
    basis = SplineBasis(9, 5.0)
    knots = torch.arange(1, 10, dtype=torch.float64) * basis.spacing
    found = []
    for side in (-1e-7, 1e-7):
        r = (knots + side).requires_grad_()
        value = (basis(r) * torch.arange(1.0, 10.0)).sum(1)
        slope = torch.autograd.grad(value.sum(), r, create_graph=True)[0]
        curvature = torch.autograd.grad(slope.sum(), r)[0]
        found.append(torch.stack([value.detach(), slope.detach(), curvature]))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert found[0][2].abs().max() > 0.1


def test_splines_sum_to_one_where_all_are_there():
    basis = SplineBasis(12, 5.0)
    r = torch.linspace(float(basis.spacing), 5.0 - 3 * float(basis.spacing), 50)
    np.testing.assert_allclose(basis(r).sum(1), 1.0, atol=1e-6)
    assert (basis(r) > 1e-9).sum(1).max() <= 4


# the potential


def test_forces_are_the_derivative_of_the_energy(variant, ethanol, box, predict):
    for system in (ethanol, box):
        forces = predict(variant, system).forces.numpy()
        assert np.abs(forces).max() > 0.1
        step = 1e-4
        rng = np.random.default_rng(0)
        for atom, axis in zip(rng.integers(0, len(system.numbers), 4), (0, 1, 2, 0), strict=True):
            energies = []
            for sign in (1, -1):
                moved = system.positions.copy()
                moved[atom, axis] += sign * step
                energies.append(predict(variant, system._replace(positions=moved)).energy.item())
            slope = (energies[0] - energies[1]) / (2 * step)
            assert forces[atom, axis] == pytest.approx(-slope, abs=2e-6)


def test_virial_is_the_derivative_by_strain(variant, box, predict):
    virial = predict(variant, box).virial[0].numpy()
    step = 1e-5
    for a, b in ((0, 0), (0, 2)):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += sign * step / 2
            strain[b, a] += sign * step / 2
            moved = box._replace(positions=box.positions @ strain, cell=box.cell @ strain)
            energies.append(predict(variant, moved).energy.item())
        assert virial[a, b] == pytest.approx((energies[0] - energies[1]) / (2 * step), abs=1e-5)


def test_energy_does_not_depend_on_place_orientation_and_order(variant, ethanol, predict):
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    order = rng.permutation(len(ethanol.numbers))
    first = predict(variant, ethanol)
    moved = ethanol._replace(
        numbers=ethanol.numbers[order],
        positions=ethanol.positions[order] @ rotation.T + [3.0, -20.0, 7.0],
    )
    other = predict(variant, moved)
    assert other.energy.item() == pytest.approx(first.energy.item(), abs=1e-9)
    rotated = first.forces.numpy()[order] @ rotation.T
    np.testing.assert_allclose(other.forces.numpy(), rotated, atol=1e-9)


def test_batch_is_its_systems(variant, ethanol, box, predict):
    together = predict(variant, ethanol, box)
    alone = [predict(variant, system) for system in (ethanol, box)]
    np.testing.assert_allclose(together.energy, torch.cat([p.energy for p in alone]), atol=1e-9)
    np.testing.assert_allclose(together.forces, torch.cat([p.forces for p in alone]), atol=1e-9)


def test_periodic_energy_does_not_depend_on_the_choice_of_the_cell(variant, box, predict):
    first = predict(variant, box)
    doubled = box._replace(
        numbers=np.tile(box.numbers, 2),
        positions=np.concatenate([box.positions, box.positions + box.cell[1]]),
        cell=box.cell * [[1.0], [2.0], [1.0]],
    )
    assert predict(variant, doubled).energy.item() == pytest.approx(
        2 * first.energy.item(), abs=1e-8
    )


def test_atom_that_leaves_changes_the_forces_smoothly(variant, make_header, predict):
    """Across both cutoffs, neither the energy nor the force jumps."""
    for reach in {variant.cutoff, variant.network.cutoff}:
        found = []
        for r in (reach - 1e-5, reach + 1e-5):
            positions = np.array([[0.0, 0.0, 0.0], [1.1, 0.0, 0.0], [0.0, r, 0.0]])
            found.append(predict(variant, System(np.array([6, 1, 8]), positions)))
        assert found[0].energy.item() == pytest.approx(found[1].energy.item(), abs=1e-6)
        np.testing.assert_allclose(found[0].forces, found[1].forces, atol=3e-6)


def test_scripted_variant_gives_the_same(variant, ethanol, predict):
    expected = predict(variant, ethanol)
    graph = build_graph(
        torch.tensor(ethanol.positions),
        variant.species(torch.tensor(ethanol.numbers)),
        cutoff=variant.cutoff,
    )
    found = torch.jit.script(variant)(graph)
    assert found[0].item() == pytest.approx(expected.energy.item(), abs=1e-10)
    np.testing.assert_allclose(found[1], expected.forces, atol=1e-10)


def test_charges_are_those_of_the_surroundings(variant, ethanol):
    graph = build_graph(
        torch.tensor(ethanol.positions),
        variant.species(torch.tensor(ethanol.numbers)),
        cutoff=variant.cutoff,
    )
    _, charges = variant.network.energies_and_charges(
        graph.species, edge_vectors(graph), graph.edge_index
    )
    assert charges.shape == (9,)
    assert (charges.detach().std() > 1e-3) == variant.network.has_charges


# the file


def test_variant_comes_back_from_its_file(variant, header, ethanol, predict, tmp_path):
    path = tmp_path / "variant.safetensors"
    save_student(path, variant, header)
    again = load_student(path, precision="double")
    assert again.header.architecture == header.architecture
    energies = [predict(p, ethanol).energy.item() for p in (again, variant)]
    assert abs(energies[0] - energies[1]) < 1e-12  # where tensors lie decides on the last bits


def test_variant_is_evaluated_in_plain_torch(variant, header, ethanol, predict, tmp_path):
    path = tmp_path / "variant.safetensors"
    save_student(path, variant, header)
    options = {"numbers": ethanol.numbers, "precision": "double", "device": "cpu"}
    source = StudentSource.find(path)
    found = open_evaluator(source, **options).predict(ethanol.positions)
    assert abs(found.energy.item() - predict(variant, ethanol).energy.item()) < 1e-10
    with pytest.raises(ValueError, match="this student is a variant of it"):
        open_evaluator(source, kernels="fused", **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": "wavelet"}, "filters must be one of sine, spline, got 'wavelet'"),
        ({"charges": 1}, "charges must be true or false, got 1"),
        ({"charges": False, "tail": True}, "a tail needs charges"),
        ({"message_cutoff": 9.0}, r"message_cutoff must be between 0.5 Å and .* 4.0 Å, got 9.0"),
        ({"message_cutoff": 3.0}, "without a tail the neighbor cutoff must be the message_cutoff"),
        ({"n_channels": 0}, "n_channels must be a whole number"),
        ({"new": True}, "is not known to openmm-mlffd"),
    ],
)
def test_header_that_cannot_be_is_refused(make_header, changes, message):
    architecture = {
        "kind": "painn-variant",
        "n_channels": 16,
        "n_interactions": 2,
        "n_basis": 10,
        "filters": "sine",
        "pair_filters": False,
        "charges": False,
        "tail": False,
        "message_cutoff": 4.0,
    }
    with pytest.raises(ModelFileError, match=message):
        make_potential(replace(make_header(), architecture=architecture | changes))
