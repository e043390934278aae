import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from openmm_mlffd.training import teacher_worker
from openmm_mlffd.training.hdf5 import Dataset
from openmm_mlffd.training.teacher_worker import (
    Batch,
    insert,
    receive,
    select,
    send,
    unknown_labels,
)
from openmm_mlffd.training.teachers import TeacherError, WorkerTeacher, parse_options
from openmm_mlffd.units import KJ_PER_KCAL, KJ_PER_MOL_PER_EV

CRASH, HANG, RAISE, NAN = 2, 10, 18, 36  # elements that toy_calculator.py cannot stand


def make_batch(*structures, charges=None, cell=None):
    """Batch of structures given as (atomic numbers, positions)."""
    count = [len(numbers) for numbers, _ in structures]
    n = len(count)
    return Batch(
        offsets=np.concatenate([[0], np.cumsum(count)]).astype("i8"),
        atomic_numbers=np.concatenate([numbers for numbers, _ in structures]).astype("u1"),
        positions=np.concatenate([positions for _, positions in structures]).astype("f8"),
        cell=np.zeros((n, 3, 3)) if cell is None else np.stack([cell] * n),
        pbc=np.full((n, 3), cell is not None),
        total_charge=np.zeros(n, "i2") if charges is None else np.array(charges, "i2"),
    )


def dimers(*elements):
    """A batch of dimers, one for each element."""
    rng = np.random.default_rng(0)
    return make_batch(*[([1, z], rng.normal(size=(2, 3))) for z in elements])


def from_dataset(path, indices):
    """Some structures of a dataset file as a batch, and with their labels."""
    with Dataset(path) as dataset:
        s = dataset.read(0, len(dataset))
    batch = Batch(
        s.offsets, s.atomic_numbers, s.positions.astype("f8"), s.cell, s.pbc, s.total_charge
    )
    return select(batch, np.array(indices)), s


# messages


def test_message_arrives_as_it_was_sent():
    stream = io.BytesIO()
    send(stream, numbers=np.arange(5, dtype="u1"), reason=np.array(["", "ä"], object))
    send(stream, error="it broke")
    stream.seek(0)
    first, second = receive(stream), receive(stream)
    assert first["numbers"].dtype == np.uint8
    assert first["reason"].tolist() == ["", "ä"]
    assert str(second["error"]) == "it broke"
    assert receive(stream) is None


def test_message_that_is_cut_off_is_none():
    stream = io.BytesIO()
    send(stream, numbers=np.arange(5))
    assert receive(io.BytesIO(stream.getvalue()[:-1])) is None


def test_message_with_a_pickle_is_refused():
    buffer = io.BytesIO()
    np.savez(buffer, numbers=np.array([{}], object))
    message = len(buffer.getvalue()).to_bytes(8, "little") + buffer.getvalue()
    with pytest.raises(ValueError, match="allow_pickle"):
        receive(io.BytesIO(message))


def test_labels_of_a_selection_go_back_to_their_place():
    batch = dimers(1, 6, 8)
    chosen = np.array([2, 0])
    part = select(batch, chosen)
    np.testing.assert_array_equal(part.atomic_numbers, [1, 8, 1, 1])
    own = unknown_labels(part)._replace(energy=np.array([3.0, 1.0]), forces=part.positions)
    labels = unknown_labels(batch)
    insert(labels, own, batch, chosen)
    np.testing.assert_array_equal(labels.energy, [1.0, np.nan, 3.0])
    np.testing.assert_array_equal(labels.forces[[0, 1, 4, 5]], batch.positions[[0, 1, 4, 5]])


# any calculator


def test_calculator_in_a_process_gives_its_labels(toy_path):
    batch = dimers(1, 6)
    with WorkerTeacher(toy_path, {"stiffness": 2.0}) as teacher:
        labels = teacher.label(batch)
        assert teacher.describe().startswith("ASE calculator toy_calculator:Toy(stiffness=2.0), ")
    assert labels.failure.tolist() == ["", ""]
    bond = batch.positions[0::2] - batch.positions[1::2]
    np.testing.assert_allclose(labels.energy, (bond**2).sum(1), atol=1e-12)
    np.testing.assert_allclose(labels.forces[0::2], -2.0 * bond, atol=1e-12)
    assert np.isnan(labels.stress).all()


def test_periodic_structure_has_a_stress(toy_path):
    batch = make_batch(([1, 1], np.eye(3)[:2]), cell=4.0 * np.eye(3))
    with WorkerTeacher(toy_path) as teacher:
        stress = teacher.label(batch).stress[0]
    np.testing.assert_allclose(stress, 1e-3 * np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]]))


def test_charged_structure_is_refused_unless_the_calculator_is_told(toy_path):
    batch = make_batch(([1, 6], np.eye(3)[:2]), ([1, 6], np.eye(3)[:2]), charges=[0, -1])
    with WorkerTeacher(toy_path) as teacher:
        failure = teacher.label(batch).failure
    assert failure[0] == ""
    assert failure[1].startswith("total charge -1, of which the calculator is not told")
    with WorkerTeacher(toy_path, {"charge_key": "charge"}) as teacher:
        labels = teacher.label(batch)
    assert labels.failure.tolist() == ["", ""]
    assert labels.energy[1] - labels.energy[0] == pytest.approx(-10.0)
    np.testing.assert_allclose(labels.partial_charges, [0, 0, -0.5, -0.5])


def test_calculators_of_ase_need_no_module_of_ours():
    with WorkerTeacher("ase:ase.calculators.lj:LennardJones", {"rc": 50.0}) as teacher:
        labels = teacher.label(make_batch(([18, 18], [[0, 0, 0], [0, 0, 2 ** (1 / 6)]])))
    assert labels.energy[0] == pytest.approx(-1.0, abs=1e-6)
    assert abs(labels.forces).max() < 1e-6


# what can go wrong


def test_structures_that_kill_the_process_fail_alone(toy_path):
    elements = [CRASH if i % 7 == 3 else 6 for i in range(23)]
    batch = dimers(*elements)
    with WorkerTeacher(toy_path) as teacher:
        labels = teacher.label(batch)
    for i, z in enumerate(elements):
        expected = "the teacher's process was ended by SIGSEGV: a teacher that talks"
        assert labels.failure[i] == (expected if z == CRASH else "")
        assert np.isfinite(labels.energy[i]) == (z != CRASH)


def test_structure_of_which_the_calculator_despairs_fails_alone(toy_path):
    with WorkerTeacher(toy_path) as teacher:
        labels = teacher.label(dimers(6, RAISE, 8))
    assert labels.failure.tolist() == ["", "ArithmeticError: no convergence", ""]


def test_structure_that_takes_for_ever_fails_alone(toy_path):
    with WorkerTeacher(toy_path, timeout=4.0) as teacher:
        labels = teacher.label(dimers(HANG, 6))
    assert labels.failure.tolist() == ["no answer within 4 s", ""]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mace", {}, "no teacher is called 'mace'; there are so3lr, so3lr-stock, gfn2-xtb, fennix"),
        ("ase:toy_calculator", {}, "an ASE calculator is named ase:package.module:factory"),
        ("ase:no_such_module:Toy", {}, "No module named 'no_such_module'"),
        ("ase:toy_calculator:Toy", {"stifness": 1.0}, "unexpected keyword argument 'stifness'"),
        ("ase:toy_calculator:wrong", {}, "RuntimeError: weights are missing"),
    ],
)
def test_teacher_that_cannot_be_loaded_says_why(toy_path, name, options, message):
    with pytest.raises(TeacherError, match=message):
        WorkerTeacher(name, options)


def test_python_that_is_not_there_is_named():
    with pytest.raises(TeacherError, match=r"/no/python: cannot be started"):
        WorkerTeacher("so3lr", python="/no/python")
    with pytest.raises(TeacherError, match=r"run by .*: the teacher's process ended with exit"):
        WorkerTeacher("so3lr", python=Path("/bin/false"))


def test_process_ends_when_its_owner_does(toy_path):
    code = (
        "from openmm_mlffd.training.teachers import WorkerTeacher\n"
        f"import os; t = WorkerTeacher({toy_path!r}); print(t._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    # the worker holds no pipe of ours, so this returns
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(run.stdout)
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        subprocess.run(["sleep", "0.1"], check=True)
    pytest.fail("the teacher's process outlived its owner")


def test_options_are_json_where_they_can_be():
    options = parse_options(["a=1", "b=text", "c=true", "d=0.5", "e=x=y", "f=[1, 2]"])
    assert options == {"a": 1, "b": "text", "c": True, "d": 0.5, "e": "x=y", "f": [1, 2]}
    with pytest.raises(ValueError, match="key=value"):
        parse_options(["dtype"])


# SO3LR and GFN2-xTB


_COMPARE_PAIRS = """
import sys; sys.path.insert(0, sys.argv[1])
import numpy as np, so3lr, torch
rng = np.random.default_rng(0)
upright, skewed = np.diag([9.0, 11.0, 13.0]), np.array([[8.0, 0, 0], [3, 9, 0], [-2, 1, 7]])
for n, cell in ((60, upright), (40, skewed), (3, 3 * upright)):
    x = torch.tensor(rng.uniform(-1, 2, size=(n, 3)) @ cell)  # some outside of the box
    lists = so3lr.pairs(x, cell, True, 4.5)
    tried = so3lr.pairs_by_trying_all(x, cell, 4.5)
    for each_once, mine, other in zip((False, True), lists, tried):
        def as_set(edges):
            i, j, s = edges
            rows = {tuple(r) for r in torch.column_stack([i, j, s.round().long()]).tolist()}
            return {min(r, (r[1], r[0], -r[2], -r[3], -r[4])) if each_once else r for r in rows}
        assert len(mine[0]) == len(other[0]) == len(as_set(mine)) and as_set(mine) == as_set(other)
print("alike")
"""


def test_pairs_of_a_box_are_those_of_the_cell_list_when_all_are_tried(teacher_python):
    folder = Path(teacher_worker.__file__).parent
    said = subprocess.run(
        [teacher_python, "-c", _COMPARE_PAIRS, folder],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout == "alike\n"


def test_so3lr_gives_the_labels_of_the_sample(teacher_python, data_folder):
    with Dataset(data_folder / "sample.h5") as dataset:
        subset = np.array(dataset.subsets)[dataset.subset]
        parts = [np.flatnonzero(subset == s)[:3] for s in np.unique(subset)]
        charged = np.flatnonzero(dataset.read(0, len(dataset)).total_charge)[:3]
        chosen = np.concatenate([*parts, charged])
        said = dataset.teacher
    batch, stored = from_dataset(data_folder / "sample.h5", chosen)
    assert batch.pbc.any()
    assert batch.total_charge.any()
    with WorkerTeacher("so3lr", python=teacher_python) as teacher:
        labels = teacher.label(batch)
        assert teacher.describe() == said
    assert set(labels.failure) == {""}
    atoms = np.concatenate([np.arange(*stored.offsets[i : i + 2]) for i in chosen])
    np.testing.assert_allclose(labels.energy, stored.energy[chosen], rtol=0, atol=1e-4)
    np.testing.assert_allclose(labels.forces, stored.forces[atoms], rtol=0, atol=1e-3)
    np.testing.assert_allclose(
        labels.partial_charges, stored.partial_charges[atoms], rtol=0, atol=1e-3
    )
    np.testing.assert_allclose(labels.stress, stored.stress[chosen], rtol=0, atol=1e-6)


ASE_OF_SO3LR = """
import sys, numpy as np
from ase import Atoms
from so3krates_torch.calculator.so3 import SO3LRCalculator
calculator = SO3LRCalculator(device="cpu", r_max_lr=12.0, dispersion_energy_cutoff_lr_damping=2.0,
                             default_dtype="float64")
data = np.load(sys.argv[1])
energy, forces = [], []
for i in range(len(data["total_charge"])):
    rows = slice(data["offsets"][i], data["offsets"][i + 1])
    atoms = Atoms(data["atomic_numbers"][rows], data["positions"][rows], cell=data["cell"][i],
                  pbc=data["pbc"][i])
    atoms.info["charge"] = int(data["total_charge"][i])
    if not atoms.pbc.any():
        atoms.positions -= atoms.positions.mean(0)
    atoms.calc = calculator
    forces.append(atoms.get_forces())
    energy.append(atoms.get_potential_energy())
np.savez(sys.argv[2], energy=energy, forces=np.concatenate(forces))
"""


def test_stock_so3lr_is_its_own_calculator_but_for_a_constant(
    teacher_python, data_folder, tmp_path
):
    batch, _ = from_dataset(data_folder / "sample.h5", [0, 10, 40, 64, 70, 80, 96, 103])
    np.savez(tmp_path / "in.npz", **batch._asdict())
    command = [teacher_python, "-c", ASE_OF_SO3LR, tmp_path / "in.npz", tmp_path / "out.npz"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    with WorkerTeacher("so3lr-stock", python=teacher_python) as teacher:
        labels = teacher.label(batch)
    shift = -163.6181182861328  # eV per atom, whatever the element
    with np.load(tmp_path / "out.npz") as own:
        ours = labels.energy + shift * np.diff(batch.offsets)
        np.testing.assert_allclose(ours, own["energy"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(labels.forces, own["forces"], rtol=0, atol=1e-6)


# at its minimum in SO3LR
WATER_DIMER = [
    [-1.5245, -0.1168, 0.0],
    [-1.9251, 0.7521, 0.0],
    [-0.5721, 0.0476, 0.0],
    [1.3461, 0.1208, 0.0],
    [1.6510, -0.3755, -0.7614],
    [1.6510, -0.3755, 0.7614],
]
WATER = [[-1.5210, -0.1176, 0.0], [-1.9228, 0.7518, 0.0], [-0.5778, 0.0486, 0.0]]


def test_so3lr_binds_the_water_dimer_as_with_all_pairs(teacher_python):
    batch = make_batch(([8, 1, 1, 8, 1, 1], WATER_DIMER), ([8, 1, 1], WATER))
    kcal = KJ_PER_MOL_PER_EV / KJ_PER_KCAL
    for name, binding in (("so3lr", 5.56), ("so3lr-stock", 7.29)):
        with WorkerTeacher(name, python=teacher_python) as teacher:
            labels = teacher.label(batch)
        found = (2 * labels.energy[1] - labels.energy[0]) * kcal
        assert found == pytest.approx(binding, abs=0.05), name
        if name == "so3lr":
            assert abs(labels.forces).max() < 5e-3


def test_so3lr_in_single_precision_is_near(teacher_python, data_folder):
    batch, stored = from_dataset(data_folder / "sample.h5", range(20))
    with WorkerTeacher("so3lr", {"dtype": "float32"}, python=teacher_python) as teacher:
        labels = teacher.label(batch)
        assert ", float32, " in teacher.describe()
    np.testing.assert_allclose(labels.energy, stored.energy[:20], rtol=0, atol=1e-3)
    np.testing.assert_allclose(
        labels.forces, stored.forces[: stored.offsets[20]], rtol=0, atol=2e-3
    )


@pytest.mark.parametrize(
    ("teacher", "numbers", "charge", "reason"),
    [
        ("so3lr", [35, 1], 0, "the teacher does not know atomic number 35"),
        ("so3lr", [8, 1], 0, "9 electrons, an odd number, at total charge 0"),
        ("gfn2-xtb", [8, 1], 0, "9 electrons, an odd number, at total charge 0"),
        ("gfn2-xtb", [92, 92], 0, "the teacher does not know atomic number 92"),
    ],
)
def test_what_a_teacher_does_not_know_fails(teacher_python, teacher, numbers, charge, reason):
    good = ([8, 1], [[0, 0, 0], [0.0, 0.0, 0.97]])
    bad = (numbers, [[0, 0, 0], [0.0, 0.0, 1.4]])
    with WorkerTeacher(teacher, python=teacher_python) as worker:
        labels = worker.label(make_batch(good, bad, charges=[-1, charge]))
    assert labels.failure.tolist() == ["", reason]
    assert np.isfinite(labels.energy).tolist() == [True, False]
    assert labels.partial_charges[:2].sum() == pytest.approx(-1.0, abs=1e-3)


def test_gfn2_knows_the_charge_and_refuses_boxes(teacher_python):
    geometry = ([8, 1, 1], WATER)
    with WorkerTeacher("gfn2-xtb", python=teacher_python) as teacher:
        labels = teacher.label(make_batch(geometry, geometry, charges=[0, 2]))
        assert teacher.describe().startswith("GFN2-xTB (tblite ")
        boxed = teacher.label(make_batch(geometry, cell=9.0 * np.eye(3)))
    assert labels.energy[0] == pytest.approx(-137.97, abs=0.1)  # -5.07 Eh, as published
    assert labels.energy[1] - labels.energy[0] > 20.0
    assert boxed.failure.tolist() == ["periodic, and GFN2-xTB is for molecules"]


def test_so3lr_leaves_torch_as_it_was(teacher_python):
    file = Path(teacher_worker.__file__).with_name("so3lr.py")
    code = (
        "import torch, runpy, numpy as np; from types import SimpleNamespace as N\n"
        "state = lambda: (torch.get_default_dtype(), str(torch._tensor_str.PRINT_OPTS))\n"
        f"before = state(); teacher = runpy.run_path({str(file)!r})['So3lr']()\n"
        "assert state() == before\n"
        "teacher.label(N(offsets=np.array([0, 2]), atomic_numbers=np.array([9, 1]),\n"
        "  positions=np.eye(3)[:2], cell=np.zeros((1, 3, 3)), pbc=np.zeros((1, 3), bool),\n"
        "  total_charge=np.zeros(1)))\n"
        "assert state() == before\n"
    )
    run = subprocess.run([teacher_python, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
