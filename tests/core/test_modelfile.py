import hashlib
import json
import os
import pickle
import resource
import signal
import struct
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from openmm_mlffd import __version__
from openmm_mlffd.modelfile import (
    DEFAULT,
    ModelFileError,
    StudentHeader,
    bundled_students,
    find_student,
    load_student,
    make_potential,
    read_header,
    save_student,
)

REFERENCES = [-13.5, -1029.412712345678, -1485.1, -2043.7341234]


@pytest.fixture
def header(make_header):
    return make_header(
        references=REFERENCES, teacher="made up", metrics={"all": {"force_mae": 61.5}}
    )


@pytest.fixture
def student_file(tmp_path, make_student, header):
    """A student in single precision, as training writes it."""
    student = make_student(references=REFERENCES)
    student.network.float()
    save_student(tmp_path / "toy.safetensors", student, header)
    return tmp_path / "toy.safetensors"


def rewritten(path, change=None, **tensors):
    """A file like the one at path, but with a valid hash and other contents."""
    weights = load_file(path) | tensors
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    content = json.loads(metadata["mlffd"])
    (change or (lambda _: None))(content)
    rest = {k: v for k, v in content.items() if k not in ("format", "version", "units", "sha256")}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode())
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    content["sha256"] = digest.hexdigest()
    other = path.with_name("rewritten.safetensors")
    save_file(weights, other, {"mlffd": json.dumps(content, ensure_ascii=False)})
    return other


# round trip


@pytest.mark.parametrize("precision", ["single", "double"])
def test_student_comes_back_as_it_was(tmp_path, make_student, predict, header, box, precision):
    student = make_student(references=REFERENCES)
    student.network.to({"single": torch.float32, "double": torch.float64}[precision])
    save_student(tmp_path / "a.safetensors", student, header)
    loaded = load_student(tmp_path / "a.safetensors", precision=precision)
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    for ours, theirs in zip(predict(student, box), predict(loaded, box), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)  # memory lies otherwise
    assert loaded.references == REFERENCES
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_precision_is_that_of_the_network(student_file, predict, box):
    single, double = (load_student(student_file, precision=p) for p in ("single", "double"))
    assert single.network.embedding.weight.dtype == torch.float32
    assert double.network.embedding.weight.dtype == torch.float64
    difference = (predict(single, box).forces - predict(double, box).forces).abs().max()
    assert 0 < difference < 1e-4
    with pytest.raises(ValueError, match="precision must be one of single, double, got 'half'"):
        load_student(student_file, precision="half")


def test_header_comes_back_with_version_and_hash(student_file, header):
    found = read_header(student_file)
    assert asdict(found) | {"sha256": "", "created_with": ""} == asdict(header)
    assert found.created_with == f"openmm-mlffd {__version__}"
    assert len(found.sha256) == 64
    assert load_student(student_file).header == found


def test_hash_is_the_identity_of_the_student(student_file, tmp_path, make_student, header):
    sha256 = read_header(student_file).sha256
    assert load_student(student_file, sha256=sha256).header.sha256 == sha256
    student = make_student(references=REFERENCES)
    student.network.float()
    again = save_student(tmp_path / "again.safetensors", student, header)
    renamed = save_student(tmp_path / "b.safetensors", student, replace(header, name="other"))
    assert again.sha256 == sha256 != renamed.sha256
    with pytest.raises(ModelFileError, match=f"another student .*{sha256}.*{renamed.sha256}"):
        load_student(student_file, sha256=renamed.sha256)


def test_golden_file_of_version_1_gives_its_stored_numbers(data_folder, predict):
    stored = json.loads((data_folder / "golden_v1.json").read_text())
    potential = load_student(data_folder / "golden_v1.safetensors", precision="double")
    assert potential.header.sha256 == stored["sha256"]
    for system in stored["systems"]:
        found = predict(potential, tuple(system[k] for k in ("numbers", "positions", "cell")))
        assert found.energy.item() == pytest.approx(system["energy"], abs=1e-8)
        np.testing.assert_allclose(found.forces, system["forces"], atol=1e-8)
        np.testing.assert_allclose(found.virial[0], system["virial"], atol=1e-7)
        assert np.abs(system["forces"]).max() > 0.3


def test_softening_of_the_norms_is_in_the_file(tmp_path, make_student, make_header, predict, box):
    header, student, soft = (
        make_header(norm_softening=0.09),
        make_student(),
        make_student(norm_softening=0.09),
    )
    with pytest.raises(ValueError, match=r"norm_softening is 0.09, the potential's 0.01"):
        save_student(tmp_path / "a.safetensors", student, header)
    save_student(tmp_path / "a.safetensors", soft, header)
    found = predict(load_student(tmp_path / "a.safetensors", precision="double"), box).energy
    assert found.item() == pytest.approx(predict(soft, box).energy.item(), abs=1e-9)
    assert abs(found.item() - predict(student, box).energy.item()) > 1e-3


# damage


@pytest.mark.parametrize("part", np.linspace(0, 0.999, 10))
def test_truncated_file_is_refused_by_name(student_file, part):
    whole = student_file.read_bytes()
    student_file.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ModelFileError, match=r"toy\.safetensors: "):
        load_student(student_file)


@pytest.mark.parametrize("where", ["header", "weights"])
def test_flipped_bits_are_noticed(student_file, where):
    whole = student_file.read_bytes()
    first_weight = 8 + struct.unpack("<Q", whole[:8])[0]
    low, high = {"header": (0, first_weight), "weights": (first_weight, len(whole))}[where]
    for bit in np.random.default_rng(0).integers(8 * low, 8 * high, 20).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        student_file.write_bytes(damaged)
        with pytest.raises(ModelFileError, match=r"toy\.safetensors: "):
            load_student(student_file)


def test_altered_header_is_noticed(student_file):
    whole = student_file.read_bytes()
    assert whole.count(b"-1029.41") == 1
    student_file.write_bytes(whole.replace(b"-1029.41", b"-1029.42"))
    with pytest.raises(ModelFileError, match="damaged or altered; its SHA-256 is"):
        load_student(student_file)


def test_pickle_is_refused_and_does_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    file = tmp_path / "evil.safetensors"
    file.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ModelFileError, match=r"evil.safetensors: not a readable safetensors file"):
        load_student(file)
    torch.save(Payload(), file)
    with pytest.raises(ModelFileError, match=r"evil.safetensors: not a readable safetensors file"):
        load_student(file)
    assert not ran.exists()


def test_safetensors_of_another_program_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(ModelFileError, match="no mlffd-student header; not written by"):
        load_student(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, f"version 2; openmm-mlffd {__version__} reads 'mlffd-student' version 1"),
        ({"format": "other-student"}, "has format 'other-student' version 1"),
        ({"units": {"length": "nm", "energy": "eV"}}, "has units .*nm"),
        ({"surprise": 1}, r"missing or unknown: \['surprise'\]"),
        ({"cutoff": 500.0}, "cutoff must be between 0.5 and 50 Å, got 500.0"),
        ({"cutoff": "4"}, "must be finite numbers, got '4'"),
        ({"references": [0.0, 0.0, float("nan"), 0.0]}, "must be finite numbers, got nan"),
        ({"references": [0.0]}, "one reference energy is needed for each element, got 1 for 4"),
        ({"elements": ["H", "C", "N", "Xx"]}, "no chemical element has the symbol 'Xx'"),
        ({"elements": ["H", "C", "N", "H"]}, "an element is listed twice"),
        ({"energy_scale": float("inf")}, "must be finite numbers, got inf"),
        ({"energy_bound": 0.0}, "the energy bound must be positive, got 0.0"),
        ({"energy_bound": "3"}, "the energy bound must be positive, got '3'"),
        ({"coordination_limits": [4.0]}, r"limit is needed for each of 4 elements, got \[4.0\]"),
        ({"coordination_limits": [4.0, 4.0, -1.0, 4.0]}, "one positive coordination limit"),
    ],
)
def test_header_that_makes_no_sense_is_refused(student_file, change, message):
    file = rewritten(student_file, lambda content: content.update(change))
    with pytest.raises(ModelFileError, match=message):
        load_student(file)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_channels": 10**9}, "n_channels must be a whole number from 1 to 4096, got 1000000000"),
        ({"n_interactions": 0}, "n_interactions must be a whole number"),
        ({"n_basis": 2.5}, "n_basis must be a whole number from 1 to 512, got 2.5"),
        ({"n_channels": 4096, "n_interactions": 32}, "weights do not fit the architecture"),
        ({"n_channels": 17}, "weights do not fit the architecture"),
        ({"kind": "mace"}, "architecture .* is not known .* it knows kind 'painn'"),
        ({"n_heads": 2}, "architecture .* is not known"),
        ({"norm_softening": 0}, "norm_softening must be positive, got 0"),
        ({"norm_softening": "0.01"}, "norm_softening must be positive, got '0.01'"),
    ],
)
def test_architecture_that_does_not_fit_is_refused(student_file, sizes, message):
    file = rewritten(student_file, lambda content: content["architecture"].update(sizes))
    with pytest.raises(ModelFileError, match=message):
        load_student(file)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((1,), float("nan")), "readout.2.bias holds values that are not finite"),
        (torch.full((1,), float("inf")), "readout.2.bias holds values that are not finite"),
        (torch.zeros(2), "weights do not fit the architecture"),
        (torch.zeros(1, dtype=torch.int64), "weight readout.2.bias is torch.int64; float32 or"),
        (torch.zeros(1, dtype=torch.bfloat16), "weight readout.2.bias is torch.bfloat16"),
    ],
)
def test_weight_that_cannot_be_is_refused(student_file, weight, message):
    assert load_student(rewritten(student_file)).header.elements == ["H", "C", "N", "O"]
    with pytest.raises(ModelFileError, match=message):
        load_student(rewritten(student_file, **{"readout.2.bias": weight}))


# writing


def test_student_with_a_weight_that_is_not_finite_is_not_written(student_file, student, header):
    before = student_file.read_bytes()
    with torch.no_grad():
        student.network.readout[2].bias.fill_(float("nan"))
    with pytest.raises(ModelFileError, match=r"readout.2.bias holds values that are not finite"):
        save_student(student_file, student, replace(header, references=[0.0] * 4))
    assert student_file.read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [{"references": [1.0] * 4}, {"cutoff": 5.0}, {"elements": list("CHNO")}, {"energy_scale": 1.0}],
)
def test_header_of_another_potential_is_not_written(tmp_path, student, make_header, wrong):
    with pytest.raises(ValueError, match=f"must describe the potential: its {next(iter(wrong))}"):
        save_student(tmp_path / "a.safetensors", student, make_header(**wrong))
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_old_student(student_file, make_student, header):
    before = student_file.read_bytes()
    other = make_student(seed=1, references=REFERENCES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_student(student_file, other, header)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert student_file.read_bytes() == before
    assert list(student_file.parent.iterdir()) == [student_file]


def test_student_file_has_the_permissions_of_any_file(student_file):
    other = student_file.with_name("other")
    other.touch()
    assert student_file.stat().st_mode == other.stat().st_mode


# names


def test_student_that_is_not_there_lists_what_is():
    with pytest.raises(ModelFileError, match=r"defualt: neither a file nor a bundled.*default"):
        load_student("defualt")


def test_bundled_students_load_and_are_found_by_name():
    assert DEFAULT in bundled_students()
    assert find_student() == find_student(DEFAULT) == bundled_students()[DEFAULT]
    for name, path in bundled_students().items():
        potential = load_student(name)
        assert potential.header == read_header(path)
        assert potential.header.name == name
        assert Path(path).stat().st_size < 1e7


def test_loading_leaves_the_random_numbers_alone(student_file):
    before = torch.random.get_rng_state()
    load_student(student_file)
    assert torch.equal(before, torch.random.get_rng_state())


def test_untrained_potential_has_what_its_header_says(header):
    potential = make_potential(header)
    assert potential.numbers == [1, 6, 7, 8]
    assert potential.references == REFERENCES
    assert (potential.cutoff, potential.energy_scale) == (4.0, 20.0)
    assert isinstance(header, StudentHeader)
    assert len(potential.network.interactions) == 2
