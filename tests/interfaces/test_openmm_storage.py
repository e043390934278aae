"""Systems that are stored, copied and read again, here and in other processes."""

import copy
import multiprocessing
import os
import pickle
import pickletools
import re
import shutil
import subprocess
import sys

import numpy as np
import openmm
import pytest
from openmmml import MLPotential

from openmm_mlffd.interfaces.openmm_force import restore_computation
from openmm_mlffd.modelfile import save_student

READER = """
import sys
import numpy as np
import openmm
system = openmm.XmlSerializer.deserialize(open(sys.argv[1]).read())
context = openmm.Context(
    system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
)
context.setPositions(np.load(sys.argv[2]) / 10.0)
state = context.getState(energy=True, forces=True)
np.save(sys.argv[3], state.getForces(asNumpy=True)._value)
print(repr(state.getPotentialEnergy()._value))
assert "openmmml" not in sys.modules
"""


@pytest.fixture
def path(make_student_file):
    return make_student_file()


@pytest.fixture
def make_system(path, make_topology):
    def make(structure, **keywords):
        potential = MLPotential("mlffd", modelPath=path, device="cpu", precision="double")
        return potential.createSystem(
            make_topology(*structure), allowMissingHydrogens=True, **keywords
        )

    return make


@pytest.fixture(params=["molecule", "box"])
def structure(request, ethanol, reduced_box):
    return ethanol if request.param == "molecule" else reduced_box


def stored_function(xml):
    return bytes.fromhex(re.search(r'function="([0-9a-f]+)"', xml).group(1))


def test_a_stored_system_gives_the_same_in_another_process(
    make_system, make_context, structure, tmp_path
):
    system = make_system(structure)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    np.save(tmp_path / "positions.npy", structure.positions)
    files = [tmp_path / name for name in ("system.xml", "positions.npy", "forces.npy")]
    run = subprocess.run(
        [sys.executable, "-c", READER, *map(str, files)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    state = make_context(system, structure.positions).getState(energy=True, forces=True)
    assert float(run.stdout) == state.getPotentialEnergy()._value
    np.testing.assert_array_equal(np.load(files[2]), state.getForces(asNumpy=True)._value)


def test_what_is_stored_is_one_known_function_and_plain_values(make_system, ethanol):
    payload = stored_function(openmm.XmlSerializer.serialize(make_system(ethanol)))
    names, strings = set(), []
    for opcode, argument, _ in pickletools.genops(payload):
        if opcode.name == "GLOBAL":
            names.add(tuple(argument.split(" ")))
        if opcode.name == "STACK_GLOBAL":
            names.add(tuple(strings[-2:]))
        if isinstance(argument, str):
            strings.append(argument)
        assert opcode.name not in {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1"}
    assert names == {("openmm_mlffd.interfaces.openmm_force", "restore_computation")}
    assert len(payload) < 1000  # no weights


def test_the_stored_values_are_those_of_the_system(make_system, reduced_box, path):
    xml = openmm.XmlSerializer.serialize(make_system(reduced_box, precision="single"))
    settings = pickle.loads(stored_function(xml)).settings
    assert settings["numbers"] == reduced_box.numbers.tolist()
    assert settings["path"] == str(path)
    assert len(settings["sha256"]) == 64
    assert (settings["name"], settings["atoms"], settings["device"]) == ("", None, "cpu")
    assert (settings["periodic"], settings["precision"]) == (True, "single")


def test_a_changed_student_is_refused(
    make_system, make_context, make_student, make_header, ethanol, path
):
    xml = openmm.XmlSerializer.serialize(make_system(ethanol))
    other = save_student(path, make_student(seed=5), make_header())
    system = openmm.XmlSerializer.deserialize(xml)  # says nothing yet
    with pytest.raises(openmm.OpenMMException, match="is another student") as error:
        make_context(system, ethanol.positions).getState(energy=True)
    assert other.sha256 in str(error.value)


def test_a_missing_student_is_looked_for_in_the_working_directory(
    make_system, make_context, ethanol, path, tmp_path, monkeypatch
):
    system = make_system(ethanol)
    expected = make_context(system, ethanol.positions).getState(energy=True).getPotentialEnergy()
    xml = openmm.XmlSerializer.serialize(system)
    shutil.move(path, tmp_path)
    context = make_context(openmm.XmlSerializer.deserialize(xml), ethanol.positions)
    with pytest.raises(openmm.OpenMMException, match="does not exist"):
        context.getState(energy=True)
    monkeypatch.chdir(tmp_path)
    assert context.getState(energy=True).getPotentialEnergy() == expected


def test_bundled_students_are_stored_by_name(make_topology, make_context, ethanol):
    system = MLPotential("mlffd", device="cpu").createSystem(make_topology(*ethanol))
    xml = openmm.XmlSerializer.serialize(system)
    settings = pickle.loads(stored_function(xml)).settings
    assert settings["name"] == "default"
    elsewhere = restore_computation(settings | {"path": "/no/such/place/default.safetensors"})
    assert elsewhere.start().potential.header.sha256 == settings["sha256"]


def test_the_force_settings_are_stored(make_system, reduced_box):
    system = make_system(reduced_box)
    force = system.getForce(0)
    force.setForceGroup(9)
    force.setParticles([3, 1, 2])
    read = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    again = read.getForce(0)
    assert again.getForceGroup() == 9
    assert list(again.getParticles()) == [3, 1, 2]
    assert again.usesPeriodicBoundaryConditions()


def test_copies_are_independent(make_system, make_context, ethanol):
    system = make_system(ethanol)
    contexts = [make_context(s, ethanol.positions) for s in (system, copy.deepcopy(system), system)]
    forces = [c.getState(forces=True).getForces(asNumpy=True)._value for c in contexts]
    assert np.abs(forces[0]).max() > 10.0
    np.testing.assert_array_equal(forces[1], forces[0])
    np.testing.assert_array_equal(forces[2], forces[0])


def test_reading_a_system_never_raises_since_openmm_would_crash(make_system, make_context, ethanol):
    payload = stored_function(openmm.XmlSerializer.serialize(make_system(ethanol)))
    settings = pickle.loads(payload).settings
    for broken, text in [
        ({"version": 99}, "version 99 of the format"),
        ({"precision": "half"}, "single, mixed, double"),
        ({"kernels": "best"}, "auto, fused, eager"),
        ({"device": "cuda:99"}, "there are cpu"),
        ({"numbers": [1]}, r"shape \(1, 3\) are needed"),
    ]:
        system = openmm.System()
        for _ in ethanol.numbers:
            system.addParticle(1.0)
        system.addForce(openmm.PythonForce(restore_computation(settings | broken)))
        system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
        with pytest.raises(openmm.OpenMMException, match=text):
            make_context(system, ethanol.positions).getState(energy=True)
    for empty in ({}, None, []):
        assert callable(pickle.loads(pickle.dumps(restore_computation(empty))))


def energy_in_child(xml, positions, queue):
    system = openmm.XmlSerializer.deserialize(xml)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
    )
    context.setPositions(positions)
    queue.put(context.getState(energy=True).getPotentialEnergy()._value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_can_evaluate(make_system, make_context, ethanol):
    system = make_system(ethanol)
    expected = make_context(system, ethanol.positions).getState(energy=True)
    start = multiprocessing.get_context("fork")
    queue = start.Queue()
    xml = openmm.XmlSerializer.serialize(system)
    process = start.Process(target=energy_in_child, args=(xml, ethanol.positions / 10.0, queue))
    process.start()
    try:
        assert queue.get(timeout=60) == expected.getPotentialEnergy()._value
    finally:
        process.kill()
        process.join()
