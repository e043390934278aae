import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("warp")

import openmm_mlffd
from openmm_mlffd import cli
from openmm_mlffd.graph import build_graph
from openmm_mlffd.interfaces import torchscript
from openmm_mlffd.interfaces.torchscript import (
    CompileError,
    compile_student,
    compiled_metadata,
    load_compiled,
)
from openmm_mlffd.modelfile import load_student, save_student
from openmm_mlffd.pairs import pairs_within
from openmm_mlffd.units import (
    ANGSTROM_PER_NM,
    KJ_PER_MOL_NM_PER_EV_ANGSTROM,
    KJ_PER_MOL_PER_EV,
)

KINDS = [("kernels", "single"), ("kernels", "mixed"), ("torch", "single"), ("torch", "double")]
# energy [eV/atom], force [eV/Å]
TOLERANCE = {"double": (1e-10, 1e-9), "single": (1e-5, 2e-5), "mixed": (5e-3, 2e-2)}


@pytest.fixture(scope="module")
def file(make_student, make_header, tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "toy.safetensors"
    save_student(path, make_student(), make_header())
    return path


@pytest.fixture(scope="module")
def compiled(file):
    """Path of the compiled student of each kind; made once."""

    def make(flavour, precision="single"):
        path = file.with_name(f"{flavour}-{precision}.pt")
        if not path.exists():
            compile_student(file, path, flavour=flavour, precision=precision)
        return path

    return make


def inputs(system):
    box = None if system.cell is None else torch.tensor(system.cell) / ANGSTROM_PER_NM
    return torch.tensor(system.positions) / ANGSTROM_PER_NM, torch.tensor(system.numbers), box


@pytest.mark.parametrize(("flavour", "precision"), KINDS)
def test_compiled_student_is_the_student(
    file, compiled, predict, ethanol, box, make_box, flavour, precision
):
    module = openmm_mlffd.load_compiled(compiled(flavour, precision))
    student = load_student(file, precision="double")
    per_atom, per_length = TOLERANCE[precision]
    alone = ethanol._replace(numbers=ethanol.numbers[:1], positions=ethanol.positions[:1])
    for system in (ethanol, box, make_box(150, 12.0, 1), alone):
        expected = predict(student, system)
        energy, forces = module(*inputs(system))
        off = float(energy) / KJ_PER_MOL_PER_EV - float(expected.energy)
        assert abs(off) < per_atom * len(system.numbers)
        off = forces / KJ_PER_MOL_NM_PER_EV_ANGSTROM - expected.forces
        assert off.abs().max() < per_length
        assert energy.dtype == torch.float64
    assert predict(student, box).forces.abs().max() > 0.1


def test_more_neighbors_than_expected_are_all_found(compiled, file, predict, box):
    dense = box._replace(positions=0.6 * box.positions, cell=0.6 * box.cell)
    student = load_student(file, precision="double")
    rows = dense.numbers.shape[0] * (4 / 3 * np.pi * 4.0**3) / np.linalg.det(dense.cell)
    assert rows > 80  # there is room for 48 at first
    expected = predict(student, dense).forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM
    found = load_compiled(compiled("kernels"))(*inputs(dense))[1]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_variants_are_compiled_with_plain_torch_alone(make_header, make_student, tmp_path):
    sizes = {"n_channels": 8, "n_interactions": 2, "n_basis": 8, "norm_softening": 0.01}
    choices = {"filters": "spline", "pair_filters": True, "charges": True, "tail": True}
    kind = {"kind": "painn-variant", "message_cutoff": 3.0}
    changes = {"architecture": {**kind, **sizes, **choices}}
    path = tmp_path / "variant.safetensors"
    save_student(path, make_student(**changes), make_header(**changes))
    found = compile_student(path, tmp_path / "x.pt", flavour="torch", precision="double")
    assert found["differences"]["force"] < 1e-10
    with pytest.raises(ValueError, match="compile it with the flavour 'torch'"):
        compile_student(path, tmp_path / "x.pt")


@pytest.mark.parametrize("flavour", ["kernels", "torch"])
def test_module_works_frozen_in_float32_and_without_gradients(compiled, box, flavour):
    module = load_compiled(compiled(flavour))
    positions, numbers, cell = inputs(box)
    energy, forces = module(positions, numbers, cell)
    with torch.no_grad():
        frozen = torch.jit.freeze(module.eval())
        again, single = frozen(positions.float(), numbers.int(), cell.float())
        assert not torch.is_grad_enabled()
    assert single.dtype == torch.float32
    assert abs(float(again - energy)) < 1e-2
    assert (single - forces).abs().max() < 1e-3 * forces.abs().max()


@pytest.mark.parametrize("flavour", ["kernels", "torch"])
def test_energy_can_be_differentiated_by_the_positions(compiled, box, flavour):
    module = load_compiled(compiled(flavour))
    positions, numbers, cell = inputs(box)
    energy, forces = module(positions.requires_grad_(True), numbers, cell)
    energy.backward()
    assert (positions.grad + forces).abs().max() < 1e-9
    with torch.no_grad():
        assert float(module(positions, numbers, cell)[0]) == float(energy)


@pytest.mark.parametrize("flavour", ["kernels", "torch"])
def test_periodicity_of_single_directions_counts(file, compiled, box, flavour):
    module = load_compiled(compiled(flavour))
    student = load_student(file, precision="double")
    positions, numbers, cell = inputs(box)
    seen = []
    for pbc in ([True, True, False], [False, True, False], [False] * 3):
        graph = build_graph(
            torch.tensor(box.positions),
            student.species(numbers),
            cutoff=student.cutoff,
            cell=torch.tensor(box.cell),
            pbc=torch.tensor(pbc),
        )
        expected = float(student(graph).energy) * KJ_PER_MOL_PER_EV
        assert abs(float(module(positions, numbers, cell, torch.tensor(pbc))[0]) - expected) < 1e-2
        seen.append(expected)
    assert np.ptp(seen) > 1.0


def test_pairs_are_those_of_the_reference_whatever_the_memory(make_box):
    system = make_box(30, 4.0 * 1.5)
    positions, cell = torch.tensor(system.positions), torch.tensor(system.cell)
    positions[::3] += cell[1] - 2 * cell[0]
    pbc = torch.ones(3, dtype=torch.bool)
    graph = build_graph(positions, torch.zeros(30), cutoff=5.0, cell=cell)

    def rows(index, shift):
        return torch.unique(torch.cat([index.T.double(), shift], dim=1), dim=0)

    expected = rows(graph.edge_index, graph.edge_shift)
    for at_a_time in (1, 4_000_000):
        index, shift = pairs_within(positions, cell, pbc, 5.0, at_a_time)
        assert torch.equal(rows(index, shift), expected)
        assert index.shape[1] == len(expected) > 1000
        assert (index[0].diff() >= 0).all()


def test_atoms_can_be_part_of_the_module(file, ethanol, compiled, tmp_path):
    path = tmp_path / "ethanol.pt"
    found = compile_student(file, path, numbers=ethanol.numbers)
    positions, numbers, _ = inputs(ethanol)
    expected = load_compiled(compiled("kernels"))(positions, numbers)
    module = load_compiled(path)
    assert torch.equal(module(positions)[1], expected[1])
    assert found["numbers"] == compiled_metadata(path)["numbers"] == ethanol.numbers.tolist()
    with pytest.raises(torch.jit.Error, match="8 atoms need as many numbers"):
        module(positions[:8])
    with pytest.raises(ValueError, match="does not know Cl"):
        compile_student(file, path, numbers=[17])


def alone(code, *arguments):
    """Run code in a process that has not imported this package."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_plain_flavour_needs_nothing_but_torch(compiled, ethanol, tmp_path):
    path = compiled("torch", "double")
    code = (
        "import sys, torch\n"
        "module = torch.jit.load(sys.argv[1])\n"
        "x = torch.tensor(eval(sys.argv[2]), dtype=torch.float64)\n"
        "print(float(module(x, torch.tensor(eval(sys.argv[3])))[0]))\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('openmm_mlffd', 'warp')]"
    )
    positions, numbers, _ = inputs(ethanol)
    done = alone(code, path, positions.tolist(), numbers.tolist())
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - float(load_compiled(path)(positions, numbers)[0])) < 1e-9


def test_flavour_with_kernels_says_what_has_to_be_imported(compiled):
    path = compiled("kernels")
    done = alone("import sys, torch; torch.jit.load(sys.argv[1])", path)
    assert done.returncode != 0
    assert "Unknown builtin op: mlffd::import_openmm_mlffd_kernels_ops_first" in done.stderr
    code = "import sys, torch, openmm_mlffd.kernels.ops; torch.jit.load(sys.argv[1])"
    assert alone(code, path).returncode == 0


def test_file_says_which_student_it_is(file, compiled):
    header = load_student(file).header
    found = compiled_metadata(compiled("torch", "double"))
    assert found == {
        "format": "mlffd-compiled",
        "version": 1,
        "flavour": "torch",
        "precision": "double",
        "student": "toy",
        "sha256": header.sha256,
        "cutoff": 0.4,
        "elements": ["H", "C", "N", "O"],
        "units": {"length": "nm", "energy": "kJ/mol"},
        "numbers": None,
    }
    with pytest.raises(CompileError, match="no student of `mlffd compile`"):
        load_compiled(file)


def test_module_that_is_not_the_student_is_not_written(file, tmp_path, monkeypatch):
    path = tmp_path / "wrong.pt"
    path.write_text("before")
    original = torchscript._Student.__init__
    for name in ("length", "energy", "force"):

        def init(self, engine, numbers, name=name):
            original(self, engine, numbers)
            setattr(self, name, 1.0001 * getattr(self, name))

        with monkeypatch.context() as patch:
            patch.setattr(torchscript._Student, "__init__", init)
            with pytest.raises(CompileError, match="is not the student, nothing was written"):
                compile_student(file, path, flavour="torch")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("flavour", ["kernels", "torch"])
def test_input_that_makes_no_sense_is_refused(compiled, box, flavour):
    module = load_compiled(compiled(flavour))
    positions, numbers, cell = inputs(box)
    broken = positions.clone()
    broken[3, 1] = torch.nan
    for bad, words in [
        ((broken, numbers, cell), "positions are not finite"),
        ((positions[:, :2], numbers), "must have the shape"),
        ((positions, numbers[:4]), "9 atoms need as many numbers"),
        ((positions, numbers + 60), "does not know the atomic numbers"),
        ((positions, numbers, 0.0 * cell), "periodic box has no volume"),
        ((positions, numbers, None, torch.ones(3).bool()), "periodic directions need a box"),
    ]:
        with pytest.raises(torch.jit.Error, match=words):
            module(*bad)


def test_unknown_words_are_refused(file, tmp_path):
    for words, message in [
        ({"flavour": "jax"}, "flavour must be one of kernels, torch, got 'jax'"),
        ({"precision": "half"}, "precision must be one of double, single, mixed, got 'half'"),
        ({"flavour": "torch", "precision": "mixed"}, "mixed precision needs the flavour 'kernels'"),
    ]:
        with pytest.raises(ValueError, match=message):
            compile_student(file, tmp_path / "x.pt", **words)


def test_command_writes_a_module_for_the_atoms_of_a_file(tmp_path, monkeypatch, capsys):
    structure = tmp_path / "water.pdb"
    structure.write_text(
        "HETATM    1  O   HOH A   1       0.000   0.000   0.000  1.00  0.00           O\n"
        "HETATM    2  H1  HOH A   1       0.960   0.000   0.000  1.00  0.00           H\n"
        "HETATM    3  H2  HOH A   1      -0.240   0.930   0.000  1.00  0.00           H\nEND\n"
    )
    output = tmp_path / "water.pt"
    words = ["mlffd", "compile", "default", "-o", output, "--precision", "mixed"]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--structure", str(structure)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    assert "differs from float64 by" in capsys.readouterr().out
    assert compiled_metadata(output)["numbers"] == [8, 1, 1]
    assert load_compiled(output)(torch.rand(3, 3))[1].shape == (3, 3)
