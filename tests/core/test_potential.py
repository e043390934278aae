import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import cumulative_simpson

from openmm_mlffd.graph import build_graph
from openmm_mlffd.modelfile import make_potential
from openmm_mlffd.potential import Potential, edge_vectors, soft_bound

# absolute tolerances, per atom and per force component
ENERGY = {"double": 1e-9, "single": 1e-6}  # eV/atom
FORCE = {"double": 1e-8, "single": 1e-5}  # eV/Å
REFERENCES = [-13.587, -1029.41271, -1485.6021, -2043.7341234]  # like those of a real teacher


@pytest.fixture(params=["double", "single"])
def precision(request):
    return request.param


@pytest.fixture
def potential(make_student, precision) -> Potential:
    student = make_student(references=REFERENCES)
    student.network.to({"double": torch.float64, "single": torch.float32}[precision])
    return student


@pytest.fixture(params=["molecule", "box"])
def system(request, ethanol, box):
    return ethanol if request.param == "molecule" else box


def random_rotation(seed, determinant):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    return q * np.sign(np.linalg.det(q)) * determinant


def atoms(numbers, positions):
    """A system without a box."""
    return np.array(numbers), np.array(positions, dtype=float), None


def moved(system, positions):
    return system._replace(positions=positions)


def central_difference(energies, step):
    """Fourth-order derivative from energies at -2, -1, 1, 2 steps, shape (4, n)."""
    return (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * step)


def force_size(prediction):
    return prediction.forces.norm(dim=1).mean().item()


# derivatives


def test_forces_are_minus_the_derivative_of_the_energy(student, predict, system):
    step = 1e-3
    displaced = []
    for steps in (-2, -1, 1, 2):
        for atom, axis in np.ndindex(system.positions.shape):
            positions = system.positions.copy()
            positions[atom, axis] += steps * step
            displaced.append(moved(system, positions))
    energies = predict(student, *displaced).energy.reshape(4, -1).numpy()
    forces = predict(student, system).forces
    np.testing.assert_allclose(
        forces.numpy().ravel(), -central_difference(energies, step), atol=1e-6, rtol=0
    )
    assert forces.norm(dim=1).min() > 0.01


def test_virial_is_the_derivative_of_the_energy_by_strain(student, predict, box):
    step = 1e-4
    strained = []
    for steps in (-2, -1, 1, 2):
        for a, b in itertools.product(range(3), repeat=2):
            strain = np.eye(3)
            strain[a, b] += 0.5 * steps * step
            strain[b, a] += 0.5 * steps * step
            strained.append(box._replace(positions=box.positions @ strain, cell=box.cell @ strain))
    energies = predict(student, *strained).energy.reshape(4, -1).numpy()
    virial = predict(student, box).virial[0].numpy()
    np.testing.assert_allclose(
        virial.ravel(), central_difference(energies, step), atol=1e-5, rtol=0
    )
    np.testing.assert_array_equal(virial, virial.T)
    assert np.abs(virial[np.triu_indices(3)]).min() > 0.01


def test_virial_of_a_molecule_is_minus_positions_times_forces(student, predict, ethanol):
    found = predict(student, ethanol)
    expected = -torch.tensor(ethanol.positions).T @ found.forces
    torch.testing.assert_close(found.virial[0], expected, atol=1e-10, rtol=0)


def test_net_force_and_torque_are_zero(potential, precision, predict, ethanol):
    forces = predict(potential, ethanol).forces
    torque = torch.linalg.cross(torch.tensor(ethanol.positions), forces).sum(0)
    assert forces.sum(0).abs().max() < 1e-11  # summed in double, edge by edge
    assert torque.abs().max() < 10 * FORCE[precision]


def test_in_training_mode_forces_have_derivatives_by_the_weights(make_student, box):
    student = make_student(n_channels=4, n_basis=4).train()
    graph = build_graph(
        torch.tensor(box.positions),
        student.species(torch.tensor(box.numbers)),
        cell=torch.tensor(box.cell),
        cutoff=4.0,
    )
    target = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss():
        found = student(graph)
        squares = (found.forces - target).square().sum() + found.virial.square().sum()
        return squares + found.energy.sum()

    parameters = dict(student.named_parameters())
    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    checked = 0
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        index = gradient.abs().flatten().argmax()
        values, energies = parameter.data.view(-1), []
        before = values[index].item()
        for steps in (-2, -1, 1, 2):
            values[index] = before + steps * 1e-4
            energies.append(loss().item())
        values[index] = before
        slope = central_difference(energies, 1e-4)
        assert gradient.flatten()[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-5), name
        checked += abs(slope) > 1e-2
    assert checked >= len(parameters) - 1  # the last bias moves the energy only


def test_in_evaluation_mode_nothing_is_kept_for_a_second_derivative(student, predict, ethanol):
    assert not any(tensor.requires_grad for tensor in predict(student, ethanol))


# symmetries


@pytest.mark.parametrize("determinant", [1, -1])
def test_rotation_and_reflection_turn_forces_and_virial(
    potential, precision, predict, system, determinant
):
    turn = random_rotation(2, determinant)
    before = predict(potential, system)
    after = predict(
        potential,
        system._replace(
            positions=system.positions @ turn,
            cell=None if system.cell is None else system.cell @ turn,
        ),
    )
    n = len(system.numbers)
    assert abs(after.energy - before.energy).item() < n * ENERGY[precision]
    turned = before.forces.numpy() @ turn
    np.testing.assert_allclose(after.forces.numpy(), turned, atol=FORCE[precision], rtol=0)
    virial = turn.T @ before.virial[0].numpy() @ turn
    np.testing.assert_allclose(after.virial[0].numpy(), virial, atol=10 * FORCE[precision], rtol=0)
    assert force_size(before) > 0.5


@pytest.mark.parametrize("distance", [1.0, 1000.0])
def test_shift_of_everything_changes_nothing(potential, precision, predict, system, distance):
    shift = distance * np.array([0.6, -0.8, 1.0])
    before = predict(potential, system)
    after = predict(potential, moved(system, system.positions + shift))
    n = len(system.numbers)
    assert abs(after.energy - before.energy).item() < n * ENERGY[precision]
    torch.testing.assert_close(after.forces, before.forces, atol=FORCE[precision], rtol=0)


def test_order_of_the_atoms_orders_the_forces(potential, precision, predict, system):
    order = np.random.default_rng(0).permutation(len(system.numbers))
    before = predict(potential, system)
    after = predict(
        potential,
        system._replace(numbers=system.numbers[order], positions=system.positions[order]),
    )
    n = len(system.numbers)
    assert abs(after.energy - before.energy).item() < n * ENERGY[precision]
    torch.testing.assert_close(after.forces, before.forces[order], atol=FORCE[precision], rtol=0)
    torch.testing.assert_close(
        after.atom_energies, before.atom_energies[order], atol=5 * ENERGY[precision], rtol=0
    )


def test_moving_single_atoms_by_box_vectors_changes_nothing(potential, predict, precision, box):
    moves = np.random.default_rng(4).integers(-4, 5, (9, 3))
    before = predict(potential, box)
    after = predict(potential, moved(box, box.positions + moves @ box.cell))
    assert abs(after.energy - before.energy).item() < 9 * ENERGY[precision]
    torch.testing.assert_close(after.forces, before.forces, atol=FORCE[precision], rtol=0)


def test_another_choice_of_box_vectors_changes_nothing(student, predict, box):
    skewed = np.array([[1, 1, 0], [0, 1, -1], [0, 0, 1]]) @ box.cell
    before, after = predict(student, box), predict(student, box._replace(cell=skewed))
    torch.testing.assert_close(after.energy, before.energy, atol=1e-9, rtol=0)
    torch.testing.assert_close(after.forces, before.forces, atol=1e-8, rtol=0)
    torch.testing.assert_close(after.virial, before.virial, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("n_atoms", "length"), [(3, 3.1), (9, 5.0), (12, 7.5)])
def test_small_box_is_its_supercell(student, predict, make_box, n_atoms, length):
    # cutoff 4 Å: the edge is shorter than the cutoff, than twice the cutoff, and about that
    small = make_box(n_atoms=n_atoms, length=length)
    images = np.array(list(itertools.product(range(2), range(3), range(2))))
    n = len(images)
    large = small._replace(
        numbers=np.tile(small.numbers, n),
        positions=np.concatenate([small.positions + i @ small.cell for i in images]),
        cell=np.array([2, 3, 2])[:, None] * small.cell,
    )
    one, many = predict(student, small), predict(student, large)
    torch.testing.assert_close(many.energy, n * one.energy, atol=1e-6, rtol=0)
    torch.testing.assert_close(many.forces, one.forces.repeat(n, 1), atol=1e-7, rtol=0)
    torch.testing.assert_close(many.virial, n * one.virial, atol=1e-6, rtol=0)
    assert force_size(one) > 0.5


def test_element_decides_the_energy(student, predict, ethanol):
    swapped = ethanol.numbers.copy()
    swapped[[0, 2]] = swapped[[2, 0]]
    a, b = predict(student, ethanol), predict(student, ethanol._replace(numbers=swapped))
    assert abs(a.energy - b.energy) > 0.1


# smoothness


@pytest.mark.parametrize("place", [np.array([4.0, 0, 0]), np.array([2.4, 3.2, 0])])
def test_force_does_not_jump_where_an_atom_leaves_the_cutoff(student, predict, place):
    # the middle atom has another neighbor, so that pairs and triples are cut
    direction = place / np.linalg.norm(place)

    def at(distance):
        positions = [[0, 0, 0], [0, -1.2, 0.4], direction * distance]
        return predict(student, atoms([6, 8, 1], positions))

    inside, outside = at(4.0 - 0.00025), at(4.0 + 0.00025)
    assert abs(inside.energy - outside.energy) < 1e-6
    assert (inside.forces - outside.forces).abs().max() < 5e-4
    assert at(3.5).forces[2].norm() > 0.02  # there is something to cut
    assert (at(3.4).energy - outside.energy).abs() > 0.01


def test_force_has_no_kink_where_an_atom_leaves_the_cutoff(student, predict):
    step = 1e-3

    def force(distance):
        dimer = atoms([6, 8], [[0, 0, 0], [distance, 0, 0]])
        return predict(student, dimer).forces[1, 0].item()

    slope_inside = (force(4.0 - step) - force(4.0 - 2 * step)) / step
    slope_outside = (force(4.0 + 2 * step) - force(4.0 + step)) / step
    assert slope_outside == 0
    assert abs(slope_inside) < 0.05
    assert abs(force(3.6) - force(3.5)) / 0.1 > 0.01


def test_energy_and_forces_follow_a_stretched_bond_without_steps(student, predict, ethanol):
    # the hydroxyl hydrogen from 0.6 to 6 Å; the integral of the force is the energy
    direction = ethanol.positions[3] - ethanol.positions[2]
    direction /= np.linalg.norm(direction)
    r = np.linspace(0.6, 6.0, 1081)
    energies, forces = [], []
    for part in np.array_split(r, 10):
        frames = []
        for distance in part:
            positions = ethanol.positions.copy()
            positions[3] = positions[2] + distance * direction
            frames.append(moved(ethanol, positions))
        found = predict(student, *frames)
        energies.append(found.energy.numpy())
        forces.append(found.forces.reshape(len(part), -1, 3)[:, 3].numpy() @ direction)
    energy, force = np.concatenate(energies), np.concatenate(forces)
    work = cumulative_simpson(force, x=r)
    np.testing.assert_allclose(energy[1:] - energy[0], -work, atol=1e-5, rtol=0)
    assert np.ptp(energy) > 0.5


def test_small_moves_change_the_energy_smoothly_next_to_huge_references(
    make_student, precision, predict, make_box
):
    student = make_student(references=[-13.6, -1e5, -2e5, -3e5])
    student.network.to({"double": torch.float64, "single": torch.float32}[precision])
    box = make_box(n_atoms=40, length=8.0)
    x = np.linspace(0, 0.002, 21)
    energies = []
    for shift in x:
        positions = box.positions.copy()
        positions[0, 0] += shift
        energies.append(predict(student, moved(box, positions)).energy.item())
    energies = np.array(energies) - energies[0]
    smooth = np.polynomial.Polynomial.fit(x, energies, 2)(x)
    assert np.abs(energies - smooth).max() < 2e-5
    assert np.ptp(energies) > 1e-4
    assert abs(predict(student, box).energy) > 1e6


# sizes


def test_batch_is_its_systems_one_by_one(potential, precision, predict, ethanol, make_box):
    lone = atoms([8], [[3, 2, 1]])
    systems = [ethanol, make_box(seed=1), lone, make_box(n_atoms=2, length=2.5), ethanol]
    batch = predict(potential, *systems)
    singles = [predict(potential, s) for s in systems]
    for name in ("energy", "forces", "virial", "atom_energies"):
        together = getattr(batch, name)
        one_by_one = torch.cat([getattr(s, name) for s in singles])
        torch.testing.assert_close(together, one_by_one, atol=FORCE[precision], rtol=0)
    assert batch.energy.shape == (5,)


def test_energy_is_the_sum_over_atoms(potential, predict, ethanol, box):
    found = predict(potential, ethanol, box)
    expected = torch.stack([found.atom_energies[:9].sum(), found.atom_energies[9:].sum()])
    torch.testing.assert_close(found.energy, expected, atol=1e-9, rtol=0)


def test_two_far_copies_have_twice_the_energy(potential, precision, predict, ethanol):
    far = ethanol.positions + np.array([0, 200.0, 0])
    one = predict(potential, ethanol)
    two = predict(
        potential,
        atoms(np.tile(ethanol.numbers, 2), np.vstack([ethanol.positions, far])),
    )
    assert abs(two.energy - 2 * one.energy).item() < 18 * ENERGY[precision]
    torch.testing.assert_close(two.forces, one.forces.repeat(2, 1), atol=FORCE[precision], rtol=0)


@pytest.mark.parametrize("number", [1, 6, 7, 8])
def test_lone_atom_has_its_energy_and_no_force(student, predict, number):
    lone = atoms([number], [[1, 2, 3]])
    found = predict(student, lone)
    assert found.energy.isfinite().all()
    assert found.forces.eq(0).all()
    assert found.virial.eq(0).all()
    pair = atoms([number] * 2, [[0, 0, 0], [50, 0, 0]])
    torch.testing.assert_close(predict(student, pair).energy, 2 * found.energy)
    assert predict(student, pair).forces.eq(0).all()


# clashes


def test_coincident_atoms_have_finite_energy_and_forces(potential, predict, ethanol):
    positions = ethanol.positions.copy()
    positions[5] = positions[0]
    found = predict(potential, moved(ethanol, positions))
    assert all(tensor.isfinite().all() for tensor in found)
    assert (found.energy - predict(potential, ethanol).energy) > 100


@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement([1, 6, 7, 8], 2)))
def test_every_pair_is_pushed_apart_within_half_an_angstrom(potential, predict, pair):
    for distance in (0.05, 0.2, 0.35, 0.5):
        dimer = atoms(pair, [[0, 0, 0], [0, 0, distance]])
        forces = predict(potential, dimer).forces
        assert forces[1, 2] > 1
        assert forces[0, 2] < -1


# precision


def test_single_precision_is_close_to_double(make_student, predict, system):
    double = make_student(references=REFERENCES)
    single = copy.deepcopy(double)
    single.network.float()
    a, b = predict(double, system), predict(single, system)
    assert abs(a.energy - b.energy).item() < 1e-6 * len(system.numbers)
    assert (a.forces - b.forces).abs().max() < 1e-4
    assert (a.forces - b.forces).abs().max() > 0  # it was another precision
    assert {t.dtype for t in b} == {torch.float64}


@pytest.mark.parametrize(
    "cast", [torch.nn.Module.float, torch.nn.Module.half, lambda module: module.to("cpu")]
)
def test_no_cast_rounds_the_reference_energies(make_student, predict, cast):
    student = make_student(references=REFERENCES)
    with torch.no_grad():
        for parameter in student.network.readout.parameters():
            parameter.zero_()  # leaves the references alone
    lone = atoms([8], [[0, 0, 0]])
    assert cast(student).references == REFERENCES
    assert predict(student, lone).energy.item() == REFERENCES[3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_what_the_cpu_gives(potential, precision, predict, ethanol, box):
    on_cpu = predict(potential, ethanol, box)
    on_gpu = predict(copy.deepcopy(potential).to("cuda"), ethanol, box)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs, atol=10 * FORCE[precision], rtol=0)


def test_evaluation_leaves_its_inputs_and_torch_as_they_were(student, ethanol):
    graph = build_graph(
        torch.tensor(ethanol.positions), student.species(torch.tensor(ethanol.numbers)), cutoff=4.0
    )
    before = [tensor.clone() for tensor in graph]
    random_state = torch.random.get_rng_state()
    student(graph)
    assert all(torch.equal(a, b) for a, b in zip(before, graph, strict=True))
    assert not any(tensor.requires_grad for tensor in graph)
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


# TorchScript


def test_script_gives_what_the_potential_gives(
    potential, precision, predict, ethanol, make_box, tmp_path
):
    torch.jit.script(potential).save(str(tmp_path / "student.pt"))
    scripted = torch.jit.load(str(tmp_path / "student.pt"))
    scripted.species, scripted.cutoff = potential.species, potential.cutoff
    lone = atoms([8], [[0, 0, 0]])
    for systems in ([ethanol, make_box()], [lone], [ethanol], [ethanol]):
        eager, script = predict(potential, *systems), predict(scripted, *systems)
        for ours, theirs in zip(eager, script, strict=True):
            torch.testing.assert_close(ours, theirs, atol=FORCE[precision], rtol=0)


# elements


def test_without_references_atoms_have_none(make_header):
    potential = Potential(make_potential(make_header()).network, [1, 6, 7, 8], 4.0)
    assert potential.references == [0.0] * 4
    assert potential.energy_scale == 1.0


def test_unknown_element_is_named_with_its_atom_and_what_is_known(student):
    with pytest.raises(ValueError, match=r"does not know Na, U \(first at atom 2\).*H, C, N, O"):
        student.species(torch.tensor([6, 1, 92, 11]))


def test_species_are_places_in_the_list_of_elements(make_student):
    student = make_student(elements=["O", "H"], references=[0.0, 0.0])
    assert student.species(torch.tensor([1, 8, 8], dtype=torch.int32)).tolist() == [1, 0, 0]


@pytest.mark.parametrize("number", [-1, 0, 300])
def test_number_of_no_element_is_refused(student, number):
    with pytest.raises(ValueError, match="does not know"):
        student.species(torch.tensor([1, number]))


def test_bound_leaves_energies_within_and_limits_those_beyond():
    energies = torch.linspace(-40.0, 40.0, 8001, dtype=torch.float64, requires_grad=True)
    found = soft_bound(energies, 4.0)
    (slope,) = torch.autograd.grad(found.sum(), energies, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), energies)
    inside = energies.detach().abs() < 4.0
    assert torch.equal(found[inside], energies[inside])
    assert found.abs().max() <= 6.0
    assert found[-1] > 5.999
    assert slope.detach().diff().abs().max() < 0.01
    assert curvature.diff().abs().max() < 0.02


def test_bound_keeps_dense_structures_from_collapsing(student, ethanol):
    potential = copy.deepcopy(student)
    potential.energy_scale = 1e6  # a network that is far out of its depth
    positions = torch.tensor(ethanol.positions)
    graph = build_graph(
        positions, potential.species(torch.tensor(ethanol.numbers)), cutoff=potential.cutoff
    )
    repulsion = potential.repulsion_energies(graph, edge_vectors(graph)).sum()
    references = torch.tensor(potential.references)[graph.species].sum()
    free = potential(graph).energy - repulsion - references
    potential.energy_bound = 4.0
    bounded = potential(graph).energy - repulsion - references
    assert free.abs() > 100.0
    assert bounded.abs() <= 6.0 * len(positions)
