import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from openmm_mlffd.evaluator import Evaluator, StudentSource, resolve_device
from openmm_mlffd.modelfile import ModelFileError, save_student


@pytest.fixture
def evaluator(student, ethanol):
    return Evaluator(student, ethanol.numbers)


@pytest.fixture
def student_file(tmp_path, make_header, make_student):
    path = tmp_path / "toy.safetensors"
    save_student(path, make_student(), make_header())
    return path


def global_state():
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "benchmark": torch.backends.cudnn.benchmark,
        "random": torch.get_rng_state().tolist(),
        "numpy random": np.random.get_state()[1].tolist(),  # noqa: NPY002 (others may use it)
        "numpy errors": np.geterr(),
    }


# evaluation


def test_it_gives_what_the_potential_gives_on_a_fresh_graph(student, predict, ethanol, box):
    for system in (ethanol, box):
        found = Evaluator(student, system.numbers).compute(system.positions, system.cell)
        expected = predict(student, system)
        assert np.abs(found.forces).max() > 0.1
        assert found.energy == expected.energy.item()
        np.testing.assert_array_equal(found.forces, expected.forces)
        np.testing.assert_array_equal(found.virial, expected.virial[0])
        np.testing.assert_array_equal(found.atom_energies, expected.atom_energies)


def test_hot_steps_agree_with_fresh_lists_wrapped_or_not(student, predict, box):
    evaluator, wrapped = Evaluator(student, box.numbers), Evaluator(student, box.numbers)
    bare = Evaluator(student, box.numbers, skin=0.0)
    rng = np.random.default_rng(0)
    positions = box.positions
    velocities = rng.normal(scale=0.02, size=positions.shape)
    for step in range(250):
        positions = positions + velocities
        inside = positions - np.floor(positions @ np.linalg.inv(box.cell)) @ box.cell
        results = [evaluator.compute(positions, box.cell), wrapped.compute(inside, box.cell)]
        if step % 25 == 0:
            expected = predict(student, box._replace(positions=positions))
            results.append(bare.compute(positions, box.cell))
            np.testing.assert_allclose(results[0].forces, expected.forces, atol=1e-9, rtol=1e-11)
        for result in results[1:]:
            np.testing.assert_allclose(result.forces, results[0].forces, atol=1e-8, rtol=1e-10)
    assert evaluator.neighbors.n_builds < 125


def test_the_arrays_of_two_calls_are_not_the_same_memory(evaluator, ethanol):
    first = evaluator.compute(ethanol.positions)
    kept = first.forces.copy()
    evaluator.compute(ethanol.positions * 1.1)
    np.testing.assert_array_equal(first.forces, kept)
    first.forces[:] = 0.0
    np.testing.assert_array_equal(evaluator.compute(ethanol.positions).forces, kept)


def test_the_callers_positions_may_change_later(evaluator, ethanol):
    positions = ethanol.positions.copy()
    evaluator.compute(positions)
    positions *= 1.5
    expected = Evaluator(evaluator.potential, ethanol.numbers).compute(positions)
    np.testing.assert_array_equal(evaluator.compute(positions).forces, expected.forces)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes_of_the_caller_do_not_matter(student, ethanol, mode):
    expected = Evaluator(student, ethanol.numbers).compute(ethanol.positions)
    with mode():
        evaluator = Evaluator(student, ethanol.numbers)
        np.testing.assert_array_equal(evaluator.compute(ethanol.positions).forces, expected.forces)
    np.testing.assert_array_equal(evaluator.compute(ethanol.positions).forces, expected.forces)


def test_integers_lists_and_read_only_arrays_are_positions(student):
    evaluator = Evaluator(student, [1, 1])
    positions = np.array([[0, 0, 0], [0, 0, 1]])
    expected = evaluator.compute(positions)
    positions.setflags(write=False)
    for same in (positions, positions.tolist(), np.asfortranarray(positions, dtype=np.float32)):
        assert evaluator.compute(same).energy == expected.energy


def test_a_single_atom_and_two_far_atoms_have_an_energy_and_no_forces(student):
    single = Evaluator(student, [6]).compute([[1.0, 2.0, 3.0]])
    pair = Evaluator(student, [6, 6]).compute([[0.0, 0.0, 0.0], [90.0, 0.0, 0.0]])
    assert np.isfinite(single.energy)
    assert pair.energy == pytest.approx(2 * single.energy, abs=1e-12)
    assert not single.forces.any()
    assert not pair.forces.any()


def test_threads_may_share_an_evaluator(evaluator, ethanol):
    structures = [ethanol.positions * s for s in np.linspace(0.9, 1.3, 24)]
    expected = [evaluator.compute(p) for p in structures]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(evaluator.compute, structures))
    for a, b in zip(found, expected, strict=True):
        assert a.energy == b.energy
        np.testing.assert_array_equal(a.forces, b.forces)


def test_nothing_global_changes(student_file, ethanol):
    before = global_state()
    potential = StudentSource.find(student_file).load(precision="double")
    Evaluator(potential, ethanol.numbers).compute(ethanol.positions)
    assert global_state() == before


def test_the_callers_default_dtype_does_not_matter(student_file, ethanol):
    def energy():
        potential = StudentSource.find(student_file).load(precision="single")
        return Evaluator(potential, ethanol.numbers).compute(ethanol.positions).energy

    expected = energy()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert energy() == expected
        finally:
            torch.set_default_dtype(torch.float32)


# refusals


def test_positions_that_are_not_finite_are_named_and_do_no_lasting_harm(evaluator, ethanol):
    expected = evaluator.compute(ethanol.positions)
    for value in (np.nan, np.inf, -np.inf):
        positions = ethanol.positions.copy()
        positions[[2, 5], 1] = value
        with pytest.raises(ValueError, match=r"must be finite.* atom 2, 5 \(first"):
            evaluator.compute(positions)
    np.testing.assert_array_equal(evaluator.compute(ethanol.positions).forces, expected.forces)


def test_atoms_are_named_as_the_caller_calls_them(student, ethanol):
    evaluator = Evaluator(student, ethanol.numbers, labels=range(100, 109))
    with pytest.raises(ValueError, match="100, 101, 102, 103, 104 and 4 more"):
        evaluator.compute(np.full((9, 3), np.nan))


def test_positions_of_another_shape_are_refused(evaluator):
    for shape in [(8, 3), (9, 2), (27,), (0, 3)]:
        with pytest.raises(ValueError, match=r"shape \(9, 3\) are needed"):
            evaluator.compute(np.zeros(shape))


def test_unknown_elements_are_refused(student):
    with pytest.raises(ValueError, match=r"Fe \(first at atom 1\).*H, C, N, O"):
        Evaluator(student, [6, 26])


def test_no_atoms_are_refused(student):
    with pytest.raises(ValueError, match="no atoms"):
        Evaluator(student, [])


# where students are


def test_a_student_is_found_where_it_was(student_file):
    source = StudentSource.find(student_file)
    assert source.locate() == student_file
    assert source.name == ""
    assert source.load().header.sha256 == source.sha256


def test_a_student_is_found_in_the_working_directory(student_file, tmp_path, monkeypatch):
    source = StudentSource.find(student_file)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(student_file, elsewhere)
    with pytest.raises(ModelFileError, match="does not exist"):
        source.locate()
    monkeypatch.chdir(elsewhere)
    assert source.locate() == elsewhere / "toy.safetensors"


def test_another_student_is_refused(student_file, make_header, make_student):
    source = StudentSource.find(student_file)
    other = save_student(student_file, make_student(seed=1), make_header())
    with pytest.raises(ModelFileError) as error:
        source.load()
    assert source.sha256 in str(error.value)
    assert other.sha256 in str(error.value)


def test_a_damaged_student_is_refused(student_file):
    source = StudentSource.find(student_file)
    content = bytearray(student_file.read_bytes())
    content[-3] ^= 1
    student_file.write_bytes(content)
    with pytest.raises(ModelFileError, match="damaged or altered"):
        source.load()
    student_file.write_bytes(content[:20])
    with pytest.raises(ModelFileError, match="not a readable safetensors file"):
        source.load()


def test_devices_that_are_not_there_are_refused_and_the_others_named():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("cuda:99", "gpu", "meta", 3.5):
        with pytest.raises(ValueError, match="there are cpu"):
            resolve_device(device)
