from collections import Counter

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("warp")

from openmm_mlffd.blocks import Chain
from openmm_mlffd.fast import FastPotential, Rows
from openmm_mlffd.modelfile import load_student
from openmm_mlffd.potential import Prediction
from openmm_mlffd.rows import VerletRows
from openmm_mlffd.validation.suite.systems import load_system

# energy of an atom [eV], force [eV/Å], virial of an atom [eV]
TOLERANCE = {
    "double": (1e-10, 1e-9, 1e-9),
    "single": (1e-5, 2e-5, 2e-5),
    "mixed": (5e-3, 2e-2, 2e-2),
}


def rows_of(potential, *systems, skin=1.0, capacity=None):
    numbers, positions, cells = zip(*systems, strict=True)
    counts = torch.tensor([len(n) for n in numbers])
    lists = VerletRows(
        potential.species(torch.tensor(np.concatenate(numbers))),
        potential.cutoff,
        skin,
        periodic=torch.tensor([[c is not None] * 3 for c in cells]),
        system=torch.repeat_interleave(torch.arange(len(systems)), counts),
        capacity=capacity,
    )
    lists.rows.positions.copy_(torch.tensor(np.concatenate(positions)))
    lists.rows.cell.copy_(
        torch.tensor(np.stack([np.zeros((3, 3)) if c is None else c for c in cells]))
    )
    lists.build()
    return lists.rows


def check(fast, expected, n_atoms, precision):
    energy, force, virial = TOLERANCE[precision]
    assert all(t.dtype == torch.float64 for t in fast)
    assert (fast.energy - expected.energy).abs().max() < energy * n_atoms
    assert (fast.atom_energies - expected.atom_energies).abs().max() < 5 * energy
    assert (fast.forces - expected.forces).abs().max() < force
    assert (fast.virial - expected.virial).abs().max() < virial * n_atoms
    assert expected.forces.abs().max() > 0.1


@pytest.fixture(scope="module")
def default_student():
    return load_student(precision="double")


@pytest.fixture(scope="module")
def water(ethanol):
    """A box of liquid water, each atom moved by some hundredths of an Å."""
    box = load_system("water box")
    noise = np.random.default_rng(2).normal(size=box.positions.shape)
    return ethanol._replace(
        numbers=box.numbers, positions=box.positions + 0.03 * noise, cell=box.cell
    )


@pytest.mark.parametrize("precision", ["double", "single", "mixed"])
def test_bundled_student_is_the_same(default_student, predict, ethanol, water, precision):
    fast = FastPotential(default_student, precision=precision)
    for system in (ethanol, water):
        found = fast(rows_of(default_student, system))
        check(found, predict(default_student, system), len(system.numbers), precision)


STUDENTS = [
    {},
    {"n_interactions": 1},
    {"n_interactions": 3, "n_channels": 32},
    {"n_channels": 5, "n_basis": 30},
    {"energy_bound": 0.05},
    {"coordination_limits": [0.9, 3.1, 2.4, 1.3]},
    {"cutoff": 2.0},
    {"norm_softening": 0.3},
    {"references": [-13.0, -1000.0, -1400.0, -2000.0]},
]


@pytest.mark.parametrize("changes", STUDENTS, ids=str)
@pytest.mark.parametrize("precision", ["double", "single"])
def test_every_student_is_the_same(make_student, predict, ethanol, box, changes, precision):
    student = make_student(**changes)
    fast = FastPotential(student, precision=precision)
    for system in (ethanol, box):
        check(fast(rows_of(student, system)), predict(student, system), 9, precision)


def test_batch_is_the_systems_one_by_one(student, predict, ethanol, make_box):
    systems = [make_box(9, 5.0, 1), ethanol, make_box(30, 7.0, 2), ethanol]
    found = FastPotential(student, precision="double")(rows_of(student, *systems))
    check(found, predict(student, *systems), 57, "double")


def test_clashing_atoms_are_the_same(student, predict, ethanol):
    # compressed distances, the repulsion, and coincident atoms
    for scale in (0.6, 0.3, 0.0):
        squeezed = ethanol._replace(positions=scale * ethanol.positions)
        found = FastPotential(student, precision="double")(rows_of(student, squeezed))
        expected = predict(student, squeezed)
        size = max(1.0, float(expected.energy.abs()))
        assert (found.energy - expected.energy).abs() < 1e-12 * size
        assert (found.forces - expected.forces).abs().max() < 1e-10 * size


def test_single_atom_has_its_energy_and_no_force(student, predict, ethanol):
    atom = ethanol._replace(numbers=ethanol.numbers[:1], positions=ethanol.positions[:1])
    found = FastPotential(student, precision="double")(rows_of(student, atom))
    assert found.forces.tolist() == [[0.0, 0.0, 0.0]]
    assert abs(found.energy - predict(student, atom).energy) < 1e-12


@pytest.mark.parametrize("precision", ["double", "single"])
def test_forces_are_minus_the_derivative_of_the_energy(student, box, precision):
    fast = FastPotential(student, precision=precision)
    rows = rows_of(student, box)
    forces = fast(rows).forces
    step = 1e-4 if precision == "double" else 1e-2
    tolerance = 1e-7 if precision == "double" else 2e-3
    for atom, axis in [(0, 0), (3, 1), (8, 2)]:
        energies = []
        for shift in (-2, -1, 1, 2):
            moved = rows.positions.clone()
            moved[atom, axis] += shift * step
            energies.append(float(fast(rows._replace(positions=moved)).energy))
        slope = np.dot([1.0, -8.0, 8.0, -1.0], energies) / (12 * step)
        assert abs(forces[atom, axis] + slope) < tolerance


def test_nothing_depends_on_skin_room_memory_or_the_run(student, make_box):
    system = make_box(40, 8.0)
    fast = FastPotential(student, precision="single")
    first = fast(rows_of(student, system))
    for again in (
        fast(rows_of(student, system)),
        fast(rows_of(student, system, capacity=400)),
        FastPotential(student, precision="single", remember=False)(rows_of(student, system)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    other = fast(rows_of(student, system, skin=0.0))
    assert (other.forces - first.forces).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["double", "mixed"])
def test_chunks_of_atoms_are_as_all_at_once(make_student, make_box, precision):
    student = make_student(n_interactions=4)
    rows = rows_of(student, make_box(31, 8.0))
    at_once = FastPotential(student, precision=precision)(rows)
    for chunk in (31, 12, 3):
        fast = FastPotential(student, precision=precision, remember=False)
        fast.chunk = chunk
        for found, expected in zip(fast(rows), at_once, strict=True):
            # matrix products of other sizes may be summed in another order
            assert (found - expected).abs().max() < (1e-11 if precision == "double" else 2e-3)


def test_mixed_precision_is_good_for_forces(default_student, predict, water):
    expected = predict(default_student, water).forces
    size = expected.square().mean().sqrt()
    found = FastPotential(default_student, precision="mixed")(rows_of(default_student, water))
    error = (found.forces - expected).square().mean().sqrt()
    assert error < 2e-3 * max(1.0, float(size))
    assert error > 1e-5


@pytest.mark.parametrize("precision", ["single", "mixed"])
def test_one_kernel_between_messages_does_what_many_do(default_student, ethanol, precision):
    rows = rows_of(default_student, ethanol)
    fast = FastPotential(default_student, precision=precision)
    expected = fast(rows)
    for module in fast.modules():
        if isinstance(module, Chain):
            module.on_cpu = True
    counted = n_launches(lambda: fast(rows))
    chained = {"chain_forward_": 2, "chain_last_": 1, "chain_backward_": 2}
    assert {name: counted[name] for name in chained} == chained
    assert counted.total() == 5 + 6 + 3 + (3 if precision == "mixed" else 0)
    energy, force, _ = TOLERANCE[precision]
    found = fast(rows)
    assert (found.energy - expected.energy).abs().max() < energy
    assert (found.forces - expected.forces).abs().max() < force
    for a, b in zip(torch.jit.script(fast)(rows), found, strict=True):
        assert torch.equal(a, b)


def test_virial_can_be_left_out(student, box):
    fast = FastPotential(student)
    rows = rows_of(student, box)
    with_it, without = fast(rows), fast(rows, False)
    assert torch.equal(with_it.forces, without.forces)
    assert torch.equal(with_it.energy, without.energy)
    assert without.virial.eq(0).all()
    assert with_it.virial.abs().max() > 0.1


def test_scripted_module_is_the_same(student, box, ethanol):
    for remember in (True, False):
        fast = FastPotential(student, precision="double", remember=remember)
        scripted = torch.jit.script(fast)
        for systems in ([box], [box, ethanol]):
            rows = rows_of(student, *systems)
            for found, expected in zip(scripted(rows), fast(rows), strict=True):
                assert (found - expected).abs().max() < 1e-11
            assert isinstance(fast(rows), Prediction)


def test_unknown_precision_is_refused(student):
    with pytest.raises(ValueError, match="must be one of single, mixed, double, got 'half'"):
        FastPotential(student, precision="half")


def n_launches(function):
    """How many operators run on the device: all but views and allocations."""
    free = {"empty", "empty_like", "new_empty", "detach"}
    counted = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if not func.is_view and name not in free:
                counted[name] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        function()
    return counted


@pytest.mark.parametrize("precision", ["single", "mixed"])
def test_few_kernels_are_launched(default_student, make_box, precision):
    rows = rows_of(default_student, make_box(9, 5.0))
    n_atoms = len(rows.counts)
    for remember, n_again in [(True, 0), (False, 2)]:
        fast = FastPotential(default_student, precision=precision, remember=remember)
        counted = n_launches(lambda fast=fast: fast(rows))
        products = counted["product_"] + counted["mm"] + counted["addmm_"]
        messages = counted["message_"] + counted["message_backward_"]
        edges = counted["edge_geometry"] + counted["edge_forces"]
        assert (products, messages, edges) == (28 + 5 * n_again, 6, 2)
        small = counted.total() - products - messages - edges
        assert small == 27 + 5 * n_again + 1 + (3 if precision == "mixed" else 0)
        assert n_atoms < 8192


def test_memory_is_less_than_twenty_five_kilobytes_an_atom(default_student):
    # atoms at the density of water; chunks as many as in a large system
    n_atoms = 1296
    length = (n_atoms / 0.1) ** (1 / 3)
    grid = np.stack(np.meshgrid(*[np.arange(11)] * 3), -1).reshape(-1, 3)[:n_atoms] * (length / 11)
    positions = grid + np.random.default_rng(0).uniform(-0.2, 0.2, grid.shape)
    numbers = np.where(np.arange(n_atoms) % 3, 1, 8)
    rows = rows_of(default_student, (numbers, positions, length * np.eye(3)))
    assert rows.neighbors.shape[1] == 128
    of_rows = sum(t.numel() * t.element_size() for t in rows)
    for precision in ("single", "mixed"):
        for n_chunks in (2, 12):
            fast = FastPotential(default_student, precision=precision, remember=False)
            fast.chunk = n_atoms // n_chunks
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
                fast(rows)
            sizes = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
            in_use = np.cumsum([e.nbytes() for e in sorted(sizes, key=lambda e: e.start_ns())])
            of_atom = (of_rows + in_use.max()) / n_atoms
            print(f"{precision}, {n_chunks} chunks: {of_atom / 1e3:.1f} KB for each atom")
            assert 15e3 < of_atom < 25e3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["double", "single", "mixed"])
@pytest.mark.parametrize("n_atoms", [3, 40, 600])
def test_gpu_gives_what_the_cpu_gives(default_student, make_box, precision, n_atoms):
    system = make_box(n_atoms, (n_atoms / 0.07) ** (1 / 3))
    rows = rows_of(default_student, system)
    there = Rows(*(t.to("cuda") for t in rows))
    expected = FastPotential(default_student, precision=precision)(rows)
    # random atoms, far from any that the student knows: forces of hundreds of eV/Å
    size = 3 * max(1.0, float(expected.forces.abs().max()))
    energy, force, virial = (size * t for t in TOLERANCE[precision])
    for remember, chunk in [(True, 0), (False, 0), (False, n_atoms // 3), (False, 50)]:
        fast = FastPotential(default_student, precision=precision, remember=remember).cuda()
        fast.chunk = chunk
        for enough_rows in (1, 4096):  # rows that are split among groups of lanes, or not
            fast.enough_rows = enough_rows
            found = fast(there)
            again = fast(there)
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
            assert (found.energy.cpu() - expected.energy).abs().max() < energy * n_atoms
            assert (found.forces.cpu() - expected.forces).abs().max() < force
            assert (found.virial.cpu() - expected.virial).abs().max() < virial * n_atoms
