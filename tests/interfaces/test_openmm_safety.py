"""Stored Systems of others: nothing in them is run unless it is openmm-mlffd's."""

import os
import pickle
import re
import subprocess
import sys

import numpy as np
import openmm
import pytest
from openmmml import MLPotential

from openmm_mlffd.interfaces.openmm_force import restore_computation
from openmm_mlffd.interfaces.openmm_mts import respa_system
from openmm_mlffd.interfaces.openmm_stored import (
    UnsafeSystemError,
    load_system,
    restore_function,
    save_system,
    student_functions,
)

READER = """
import sys
import numpy as np
import openmm
from openmm_mlffd import load_system
system = load_system(sys.argv[1])
context = openmm.Context(
    system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform(sys.argv[3])
)
context.setPositions(np.load(sys.argv[2]) / 10.0)
print(repr(context.getState(energy=True).getPotentialEnergy()._value))
"""


@pytest.fixture
def system(student_file, make_topology, ethanol):
    potential = MLPotential("mlffd", modelPath=student_file, device="cpu", precision="double")
    return potential.createSystem(make_topology(*ethanol))


@pytest.fixture
def stored(system, tmp_path):
    save_system(system, tmp_path / "system.xml")
    return tmp_path / "system.xml"


def with_function(xml, payload):
    return re.sub(r'function="[0-9a-f]+"', f'function="{payload.hex()}"', xml, count=1)


class Crafted:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def nested(folder):
    """The same within the plain values that our function is given."""
    return restore_computation({"version": 1, "name": Crafted(folder)})


def with_state(folder):
    """Our function, then a second call, hidden behind a memo."""
    return pickle.dumps([restore_computation({"version": 1}), Crafted(folder)])


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_what_was_written_is_read_by_another_process_on_another_platform(
    system, stored, make_context, ethanol, tmp_path, platform
):
    np.save(tmp_path / "positions.npy", ethanol.positions)
    run = subprocess.run(
        [sys.executable, "-c", READER, stored, tmp_path / "positions.npy", platform],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    expected = make_context(system, ethanol.positions).getState(energy=True).getPotentialEnergy()
    assert float(run.stdout) == pytest.approx(expected._value, abs=1e-6)


def test_openmm_itself_reads_what_was_written(stored, system):
    read = openmm.XmlSerializer.deserialize(stored.read_text())
    assert openmm.XmlSerializer.serialize(read) == openmm.XmlSerializer.serialize(system)
    read = load_system(stored)
    assert openmm.XmlSerializer.serialize(read) == openmm.XmlSerializer.serialize(system)


def test_the_danger_is_real_in_openmm_and_refused_here(stored, tmp_path):
    folder = tmp_path / "made by the pickle"
    stored.write_text(with_function(stored.read_text(), pickle.dumps(Crafted(folder))))
    stored.write_text(stored.read_text().rsplit("\n<!--", 1)[0])
    with pytest.raises(UnsafeSystemError, match=r"mkdir.*it was not run"):
        load_system(stored)
    assert not folder.exists()
    # in a process of its own, which it may end: OpenMM runs what it is given
    code = "import openmm, sys; openmm.XmlSerializer.deserialize(open(sys.argv[1]).read())"
    subprocess.run([sys.executable, "-c", code, stored], capture_output=True, check=False)
    assert folder.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("craft", [Crafted, nested, with_state])
def test_no_crafted_pickle_is_run(craft, protocol, tmp_path):
    folder = tmp_path / "made"
    crafted = craft(folder)
    payload = crafted if isinstance(crafted, bytes) else pickle.dumps(crafted, protocol)
    with pytest.raises(UnsafeSystemError):
        restore_function(payload)
    assert not folder.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"not a pickle",
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(V1+1\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x04Poid\n.",
        pickle.dumps({"version": 1}),
        pickle.dumps(restore_computation),
        pickle.dumps(restore_computation({"version": 1, "numbers": "many"})),
        pickle.dumps(restore_computation({"version": 1, "colour": "red"})),
        pickle.dumps(restore_computation([])),
    ],
)
def test_payloads_that_are_no_student_are_refused(payload):
    with pytest.raises(UnsafeSystemError):
        restore_function(payload)


def test_a_pickle_inside_another_force_is_found(stored, system, tmp_path):
    folder = tmp_path / "made"
    outer = openmm.CustomCVForce("x")
    outer.addCollectiveVariable("x", openmm.XmlSerializer.clone(system.getForce(0)))
    holder = openmm.System()
    for i in range(system.getNumParticles()):
        holder.addParticle(system.getParticleMass(i))
    holder.addForce(outer)
    save_system(holder, stored)
    assert load_system(stored).getNumForces() == 1
    xml = openmm.XmlSerializer.serialize(holder)
    stored.write_text(with_function(xml, pickle.dumps(Crafted(folder))))
    with pytest.raises(UnsafeSystemError, match="not run"):
        load_system(stored)
    assert not folder.exists()


def test_forces_of_plugins_are_refused(stored):
    xml = stored.read_text().rsplit("\n<!--", 1)[0]
    stored.write_text(xml.replace('type="CMMotionRemover"', 'type="PlumedForce"'))
    with pytest.raises(UnsafeSystemError, match="PlumedForce is not part of OpenMM"):
        load_system(stored)


def test_every_flipped_bit_is_noticed(stored):
    content = stored.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(content) - 1, 60):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        stored.write_bytes(damaged)
        try:
            system = load_system(stored)
        except UnsafeSystemError:
            continue
        # the only part that the hash is not of: what stands around it
        assert place >= content.rindex(b"<!--") - 1
        assert system.getNumParticles() == 9


def test_a_cut_file_is_refused(stored):
    content = stored.read_bytes()
    for length in np.linspace(0, len(content) - 100, 10).astype(int):
        stored.write_bytes(content[:length])
        with pytest.raises(UnsafeSystemError):
            load_system(stored)


def test_another_hash_than_the_one_asked_for_is_refused(system, tmp_path):
    digest = save_system(system, tmp_path / "a.xml")
    assert load_system(tmp_path / "a.xml", sha256=digest).getNumParticles() == 9
    system.setParticleMass(0, 13.0)
    save_system(system, tmp_path / "a.xml")
    with pytest.raises(UnsafeSystemError, match=f"{digest} was asked for"):
        load_system(tmp_path / "a.xml", sha256=digest)


def test_other_xml_is_refused(tmp_path):
    path = tmp_path / "x.xml"
    for text, message in [
        ("<Integrator type='VerletIntegrator'/>", "holds a Integrator"),
        ("<!DOCTYPE System [<!ENTITY a 'b'>]><System>&a;</System>", "document type"),
        ("<System", "not readable as XML"),
    ]:
        path.write_text(text)
        with pytest.raises(UnsafeSystemError, match=message):
            load_system(path)


def test_a_tampered_hash_of_the_student_is_refused_in_the_first_evaluation(
    stored, make_context, ethanol
):
    xml = stored.read_text().rsplit("\n<!--", 1)[0]
    settings = next(iter(student_functions(load_system(stored)).values())).settings
    tampered = restore_computation(dict(settings) | {"sha256": "0" * 64})
    stored.write_text(with_function(xml, pickle.dumps(tampered)))
    context = make_context(load_system(stored), ethanol.positions)
    with pytest.raises(openmm.OpenMMException, match=f"is another student .*{settings['sha256']}"):
        context.getState(energy=True)


def test_functions_of_others_are_left_out(system):
    system.addForce(openmm.PythonForce(print_nothing))
    assert list(student_functions(system)) == [0]


def print_nothing(state):
    return 0.0, np.zeros((9, 3))


def test_a_respa_system_is_stored_like_any_other(
    student_file, other_student_file, make_topology, make_context, ethanol, tmp_path
):
    topology = make_topology(*ethanol)
    system = respa_system(topology, other_student_file, modelPath=student_file, device="cpu")
    save_system(system, tmp_path / "system.xml")
    read = load_system(tmp_path / "system.xml")
    energies = [
        make_context(s, ethanol.positions).getState(energy=True).getPotentialEnergy()._value
        for s in (system, read)
    ]
    assert energies[0] == energies[1]


# Contexts


@pytest.fixture
def simulation(student_file, make_topology, make_context, reduced_box):
    """Function that makes a Context in a box, with a barostat and a thermostat."""
    potential = MLPotential("mlffd", modelPath=student_file, device="cpu", precision="double")
    system = potential.createSystem(make_topology(*reduced_box), allowMissingHydrogens=True)
    barostat = openmm.MonteCarloBarostat(1.0, 300.0, 5)
    barostat.setRandomNumberSeed(1)
    system.addForce(barostat)

    def make():
        integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.0002)
        integrator.setRandomNumberSeed(1)
        return make_context(system, reduced_box.positions, integrator=integrator)

    return make


def coordinates(context):
    state = context.getState(positions=True, velocities=True, energy=True)
    return (
        np.array(state.getPositions(asNumpy=True)._value),
        np.array(state.getVelocities(asNumpy=True)._value),
        np.array(state.getPeriodicBoxVectors(asNumpy=True)._value),
        state.getPotentialEnergy()._value,
    )


@pytest.mark.parametrize("way", ["checkpoint", "state"])
def test_a_run_goes_on_from_where_it_was_saved(simulation, way, tmp_path):
    context = simulation()
    context.getIntegrator().step(20)
    if way == "checkpoint":
        (tmp_path / "x").write_bytes(context.createCheckpoint())
    else:
        state = context.getState(
            positions=True, velocities=True, parameters=True, integratorParameters=True
        )
        (tmp_path / "x").write_text(openmm.XmlSerializer.serialize(state))
    saved = coordinates(context)
    context.getIntegrator().step(12)
    expected = coordinates(context)

    other = simulation()  # its box is another one
    if way == "checkpoint":
        other.loadCheckpoint((tmp_path / "x").read_bytes())
    else:
        other.setState(openmm.XmlSerializer.deserialize((tmp_path / "x").read_text()))
    for found, right in zip(coordinates(other), saved, strict=True):
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-7)
    other.getIntegrator().step(12)
    if way == "checkpoint":  # the random numbers go on, too
        for found, right in zip(coordinates(other), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=0, atol=1e-7)


@pytest.mark.parametrize("preserve", [True, False])
def test_a_reinitialised_context_computes_the_same(simulation, preserve, reduced_box):
    context = simulation()
    context.getIntegrator().step(8)
    before = coordinates(context)
    context.reinitialize(preserveState=preserve)
    if not preserve:
        context.setPeriodicBoxVectors(*before[2])
        context.setPositions(before[0])
    assert coordinates(context)[3] == pytest.approx(before[3], abs=1e-7)
    context.getIntegrator().step(2)
