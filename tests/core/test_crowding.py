import numpy as np
import pytest
import torch

from openmm_mlffd.crowding import NO_LIMIT, SOFTNESS, STRENGTH, Crowding
from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.graph import build_graph
from openmm_mlffd.potential import edge_vectors
from openmm_mlffd.radial import softened_distances

NUMBERS = [1, 6]
LIMITS = [1.5, 4.5]


def star(n, distance):
    """A carbon with n hydrogens around it."""
    rng = np.random.default_rng(n)
    directions = rng.normal(size=(n, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    for _ in range(500):  # apart from one another
        gaps = directions[:, None] - directions
        push = gaps / ((gaps**2).sum(-1, keepdims=True) ** 1.5 + np.eye(n)[..., None])
        directions += 0.05 * push.sum(1)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    positions = np.vstack([np.zeros((1, 3)), distance * directions])
    return torch.tensor(positions), torch.tensor([1] + [0] * n)


def edges(positions, species):
    graph = build_graph(positions, species, cutoff=3.0)
    return graph, softened_distances(edge_vectors(graph))


def coordination(positions, species):
    graph, distances = edges(positions, species)
    return Crowding(NUMBERS, LIMITS).coordination(distances, *graph.edge_index, species)


def energies(positions, species, limits=LIMITS):
    graph, distances = edges(positions, species)
    return Crowding(NUMBERS, limits)(distances, *graph.edge_index, species)


def test_coordination_of_methane_is_four_and_one():
    positions, species = star(4, 1.05)
    np.testing.assert_allclose(coordination(positions, species), [4, 1, 1, 1, 1], atol=1e-12)


def test_half_way_between_bonded_and_free_an_atom_counts_as_a_half():
    bond = COVALENT_RADII[1] + COVALENT_RADII[6]
    positions = torch.tensor([[0.0, 0.0, 0.0], [1.3 * bond, 0.0, 0.0]], dtype=torch.float64)
    found = coordination(positions, torch.tensor([0, 1]))
    np.testing.assert_allclose(found, [0.5, 0.5], atol=1e-3)  # distances are softened


def test_excess_is_what_costs_energy():
    positions, species = star(6, 1.05)
    found = energies(positions, species)
    x = 1.5
    assert found[0].item() == pytest.approx(STRENGTH * x**3 / (x**2 + SOFTNESS**2))
    assert not found[1:].any()


def test_atoms_within_the_limits_cost_exactly_nothing():
    assert not energies(*star(4, 0.9)).any()
    assert not energies(*star(6, 1.05), limits=[NO_LIMIT, NO_LIMIT]).any()


def test_crowded_atoms_are_pushed_away():
    positions, species = star(6, 1.2)
    positions.requires_grad_(True)
    graph = build_graph(positions.detach(), species, cutoff=3.0)
    vectors = positions[graph.edge_index[1]] - positions[graph.edge_index[0]]
    distances = softened_distances(vectors)
    energy = Crowding(NUMBERS, LIMITS)(distances, *graph.edge_index, species).sum()
    (gradient,) = torch.autograd.grad(energy, positions)
    outward = -(gradient[1:] * positions[1:].detach()).sum(1)
    assert (outward > 1.0).all()


def test_energy_force_and_curvature_are_continuous_where_an_atom_becomes_one_too_many():
    # the fifth hydrogen comes nearer, through the limit of 4.5 and both ends of the switch
    bond = COVALENT_RADII[1] + COVALENT_RADII[6]
    away = torch.linspace(0.9 * bond, 1.7 * bond, 20001, dtype=torch.float64, requires_grad=True)
    near = torch.full((4, len(away)), bond, dtype=torch.float64)
    receiver = torch.arange(len(away)).repeat(5)
    sender = torch.full_like(receiver, len(away))  # one hydrogen for all of them
    species = torch.tensor([1] * len(away) + [0])
    found = Crowding(NUMBERS, LIMITS)(torch.cat([near.flatten(), away]), receiver, sender, species)
    (slope,) = torch.autograd.grad(found.sum(), away, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), away)
    assert found[0] > 10.0
    assert found[-1] == 0.0
    for curve in (found.detach(), slope.detach(), curvature):
        assert curve.diff().abs().max() < 0.005 * curve.abs().max()


@pytest.mark.parametrize("limits", [[1.5], [1.5, 0.0], [1.5, -4.0], [1.5, float("nan")]])
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(ValueError, match=r"one positive coordination limit .* of 2 elements"):
        Crowding(NUMBERS, limits)


def test_forces_and_virial_of_a_crowded_box_are_the_derivatives_of_its_energy(make_student):
    student = make_student(
        elements=["H", "C"], references=[0.0, 0.0], coordination_limits=[0.4, 1.3]
    )
    rng = np.random.default_rng(1)
    cell = torch.tensor([[4.0, 0.0, 0.0], [0.7, 4.2, 0.0], [-0.4, 0.3, 4.4]], dtype=torch.float64)
    positions = torch.tensor(rng.uniform(0, 4, size=(12, 3)))
    species = torch.tensor(rng.integers(0, 2, size=12))
    pbc = torch.ones(1, 3, dtype=torch.bool)

    def found(x, box):
        graph = build_graph(x, species, cutoff=student.cutoff, cell=box[None], pbc=pbc)
        return student(graph)

    direction = torch.tensor(rng.normal(size=(12, 3)))
    strain = torch.tensor(rng.normal(size=(3, 3)))
    strain = 0.5 * (strain + strain.T)
    at = found(positions, cell)
    bare = make_student(elements=["H", "C"], references=[0.0, 0.0])
    graph = build_graph(positions, species, cutoff=student.cutoff, cell=cell[None], pbc=pbc)
    assert (at.energy - bare(graph).energy).item() > 1.0  # the term is at work
    h = 1e-5
    moved = [found(positions + s * h * direction, cell).energy for s in (1, -1)]
    expected = -((moved[0] - moved[1]) / (2 * h)).item()
    assert (at.forces * direction).sum().item() == pytest.approx(expected, abs=1e-5)
    one = torch.eye(3, dtype=torch.float64)
    bent = [
        found(positions @ (one + s * h * strain), cell @ (one + s * h * strain)).energy
        for s in (1, -1)
    ]
    expected = ((bent[0] - bent[1]) / (2 * h)).item()
    assert (at.virial[0] * strain).sum().item() == pytest.approx(expected, abs=1e-4)


def test_scripted_student_has_the_term_too(make_student):
    student = make_student(elements=["H", "C"], references=[0.0, 0.0], coordination_limits=LIMITS)
    graph, _ = edges(*star(6, 1.05))
    expected, found = student(graph), torch.jit.script(student)(graph)
    bare = make_student(elements=["H", "C"], references=[0.0, 0.0])(graph)
    assert (expected.energy - bare.energy).item() > 10.0
    torch.testing.assert_close(found.energy, expected.energy)
    torch.testing.assert_close(found.forces, expected.forces)


def test_cutoff_too_short_to_count_neighbors_is_refused(make_student):
    with pytest.raises(ValueError, match=r"need a cutoff of 2\.43 Å.* it is 2\.0 Å"):
        make_student(
            elements=["H", "C"], references=[0.0] * 2, coordination_limits=LIMITS, cutoff=2.0
        )
