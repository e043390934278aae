import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("warp")

from openmm_mlffd.engine import FastEvaluator
from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.faults import NotFinite
from openmm_mlffd.kernels.neighbor_ops import NeighborOverflow


def assert_same(found, expected, tolerance=1e-9):
    assert abs(found.energy - expected.energy) < tolerance
    assert np.abs(found.forces - expected.forces).max() < tolerance
    assert np.abs(found.virial - expected.virial).max() < tolerance
    assert np.abs(found.atom_energies - expected.atom_energies).max() < tolerance
    assert np.abs(expected.forces).max() > 0.1


@pytest.fixture
def walk(make_box):
    """Atoms that wander through a box, in 40 steps, over several skins."""
    system = make_box(30, 7.0)
    steps = np.random.default_rng(0).normal(0, 0.04, (40, 30, 3))
    return system, system.positions + np.cumsum(steps, axis=0)


def test_moving_atoms_have_the_energies_of_the_reference(student, walk):
    system, positions = walk
    fast = FastEvaluator(student, system.numbers, precision="double", skin=0.5)
    slow = Evaluator(student, system.numbers)
    for x in positions:
        assert_same(fast.compute(x, system.cell), slow.compute(x, system.cell))
    assert 2 < fast.n_builds < 20


def test_stale_list_is_noticed_after_the_evaluation_too(student, walk, monkeypatch):
    # as on a GPU, where the device says afterwards whether the neighbors were complete
    from openmm_mlffd.captured import CapturedStep

    system, positions = walk
    fast = FastEvaluator(student, system.numbers, precision="double", skin=0.5)
    fast.compute(positions[0], system.cell)
    monkeypatch.setattr(CapturedStep, "_looks_valid", lambda step: True)
    slow = Evaluator(student, system.numbers)
    for x in positions[::5]:
        assert_same(fast.compute(x, system.cell), slow.compute(x, system.cell))
    assert fast.n_builds > 2


def test_boxes_that_change_and_boxes_of_all_kinds(student, make_box):
    system = make_box(12, 6.0)
    fast = FastEvaluator(student, system.numbers, precision="double")
    slow = Evaluator(student, system.numbers)
    for cell, pbc in [
        (system.cell, None),
        (1.02 * system.cell, None),
        (None, None),
        (0.4 * system.cell, None),  # far more images: longer rows
        (system.cell, [True, False, True]),
        (system.cell, [False, False, False]),
        (system.cell, None),
    ]:
        found = fast.compute(system.positions, cell, pbc)
        expected = slow.compute(system.positions, cell, pbc)
        assert_same(found, expected, 1e-9 * max(1.0, abs(expected.energy)))


def test_results_are_the_callers_to_keep(student, walk):
    system, positions = walk
    fast = FastEvaluator(student, system.numbers)
    first = fast.predict(positions[0], system.cell)
    forces = first.forces.clone()
    fast.predict(positions[5], system.cell)
    assert torch.equal(first.forces, forces)


def test_virial_is_left_out_on_demand(student, walk):
    system, positions = walk
    fast = FastEvaluator(student, system.numbers)
    with_it = fast.predict(positions[0], system.cell)
    without = fast.predict(positions[0], system.cell, virial=False)
    assert torch.equal(with_it.forces, without.forces)
    assert without.virial.eq(0).all()
    assert with_it.virial.ne(0).all()


@pytest.mark.parametrize(("precision", "tolerance"), [("single", 2e-5), ("mixed", 1e-2)])
def test_precisions(student, walk, precision, tolerance):
    system, positions = walk
    fast = FastEvaluator(student, system.numbers, precision=precision)
    expected = Evaluator(student, system.numbers).compute(positions[3], system.cell)
    found = fast.compute(positions[3], system.cell)
    error = np.abs(found.forces - expected.forces).max()
    assert 1e-9 < error < tolerance


def test_same_positions_give_the_same_bits(student, walk):
    system, positions = walk
    runs = [FastEvaluator(student, system.numbers).compute(positions[1], system.cell)] * 2
    fast = FastEvaluator(student, system.numbers)
    runs += [fast.compute(positions[1], system.cell) for _ in range(2)]
    assert all(np.array_equal(run.forces, runs[0].forces) for run in runs)
    assert len({run.energy for run in runs}) == 1


def test_overflow_is_an_error_and_the_next_step_works(student, walk):
    system, positions = walk
    fast = FastEvaluator(student, system.numbers, precision="double", capacity=60)
    with pytest.raises(NeighborOverflow, match="the list has room for 60"):
        fast.compute(positions[0], 0.5 * system.cell)
    expected = Evaluator(student, system.numbers).compute(positions[0], 2.0 * system.cell)
    assert_same(fast.compute(positions[0], 2.0 * system.cell), expected)


def test_positions_that_are_not_finite_are_refused_by_atom(student, walk):
    system, positions = walk
    fast = FastEvaluator(student, system.numbers, labels=range(100, 130))
    broken = positions[0].copy()
    broken[4, 1] = np.nan
    with pytest.raises(ValueError, match="not those of atom 104"):
        fast.compute(broken, system.cell)
    assert np.isfinite(fast.compute(positions[0], system.cell).energy)


@pytest.mark.parametrize("kind", [FastEvaluator, Evaluator])
def test_short_way_of_a_step_gives_the_same_in_other_units(student, walk, kind):
    system, positions = walk
    evaluator = kind(student, system.numbers)
    for cell in (system.cell, None, 1.1 * system.cell):
        expected = Evaluator(student, system.numbers).compute(positions[2], cell)
        box = None if cell is None else cell / 10
        energy, forces = evaluator.energy_and_forces(
            positions[2] / 10, box, length=10.0, energy=2.0, force=3.0
        )
        assert abs(energy - 2 * expected.energy) < 1e-4
        assert np.abs(forces - 3 * expected.forces).max() < 1e-4
        first = forces.copy()
        evaluator.energy_and_forces(positions[9], cell)
        assert np.array_equal(forces, first)
    with pytest.raises(ValueError, match=r"of shape \(30, 3\) are needed"):
        evaluator.energy_and_forces(positions[2][:4])


@pytest.mark.parametrize("kind", [FastEvaluator, Evaluator])
def test_energies_and_forces_that_are_not_finite_are_an_error(make_student, walk, kind):
    system, positions = walk
    student = make_student()
    student.references = [float("nan")] * 4
    evaluator = kind(student, system.numbers)
    with pytest.raises(NotFinite, match=r"energy \(30 atoms\) are not finite"):
        evaluator.energy_and_forces(positions[0], system.cell)
    student = make_student()
    with torch.no_grad():
        student.network.embedding.weight.fill_(float("nan"))
    evaluator = kind(student, system.numbers, labels=range(100, 130))
    with pytest.raises(NotFinite, match="forces on atom 100"):
        evaluator.energy_and_forces(positions[0], system.cell)


def test_memory_that_cannot_be_had_is_an_error_that_says_so(tmp_path):
    script = tmp_path / "small.py"
    script.write_text(_SMALL_MEMORY)
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "64 atoms do not fit into the memory of cpu" in result.stdout
    assert "then it works" in result.stdout


_SMALL_MEMORY = """
import resource

import numpy as np
import torch

from openmm_mlffd.engine import FastEvaluator
from openmm_mlffd.faults import OutOfMemory
from openmm_mlffd.modelfile import load_student

torch.set_num_threads(1)
student = load_student(precision="double")
grid = np.stack(np.meshgrid(*[np.arange(4.0)] * 3), -1).reshape(-1, 3)
fast = FastEvaluator(student, [1] * 64)
fast.energy_and_forces(3.0 * grid, 12.0 * np.eye(3))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, used + 200_000_000))
try:
    # half a million images in every row
    fast.energy_and_forces(0.1 * grid, 0.5 * np.eye(3))
except OutOfMemory as error:
    print(error)
fast.energy_and_forces(3.0 * grid, 12.0 * np.eye(3))
print("then it works")
"""


def test_flat_box_and_missing_cell_are_refused(student, walk):
    system, positions = walk
    fast = FastEvaluator(student, system.numbers)
    flat = system.cell.copy()
    flat[2] = flat[0] + flat[1]
    with pytest.raises(ValueError, match="no volume"):
        fast.compute(positions[0], flat)
    with pytest.raises(ValueError, match="periodic directions need a cell"):
        fast.compute(positions[0], None, [True, True, True])
    assert np.isfinite(fast.compute(positions[0], system.cell).energy)


def test_threads_may_share_an_instance(student, walk):
    system, positions = walk
    fast = FastEvaluator(student, system.numbers, precision="double")
    expected = [fast.compute(x, system.cell).energy for x in positions[:8]]
    found = [0.0] * 8

    def work(k):
        for _ in range(3):
            found[k] = fast.compute(positions[k], system.cell).energy

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.abs(np.array(found) - expected).max() < 1e-10


def test_inference_mode_of_the_caller_does_not_matter(student, walk):
    system, positions = walk
    fast = FastEvaluator(student, system.numbers)
    with torch.inference_mode():
        first = fast.compute(positions[0], system.cell)
    assert fast.compute(positions[0], system.cell).energy == first.energy


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["double", "single", "mixed"])
def test_captured_graph_gives_the_energies_of_the_reference(student, walk, precision):
    system, positions = walk
    fast = FastEvaluator(student.to("cuda"), system.numbers, precision=precision, skin=0.5)
    slow = Evaluator(student, system.numbers)
    tolerance = {"double": 1e-9, "single": 2e-5, "mixed": 1e-2}[precision]
    for x in positions:
        found, expected = fast.compute(x, system.cell), slow.compute(x, system.cell)
        assert np.abs(found.forces - expected.forces).max() < tolerance
    assert fast.n_builds > 2


@pytest.mark.gpu
def test_short_ways_on_a_gpu_give_the_energies_of_the_reference(student, walk):
    system, positions = walk
    slow = Evaluator(student, system.numbers)
    expected = [slow.compute(x, system.cell) for x in positions]
    fast = FastEvaluator(student.to("cuda"), system.numbers, precision="double", skin=0.5)
    for x, right in zip(positions, expected, strict=True):
        energy, forces = fast.energy_and_forces(x, system.cell)
        there, forces_there = fast.energy_and_forces_there(
            torch.tensor(x / 10, device="cuda"), system.cell / 10, length=10.0
        )
        assert forces_there.is_cuda
        assert abs(energy - right.energy) < 1e-9
        assert abs(there - right.energy) < 1e-9
        assert np.abs(forces - right.forces).max() < 1e-9
        assert np.abs(forces_there.cpu().numpy() - right.forces).max() < 1e-9
    assert fast.n_builds > 4
    assert all(step.copies_inside for step in fast._steps.values())
