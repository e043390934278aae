"""The alarm in a simulation: it warns, stops, and leaves the frame."""

import csv
import io
import logging
from pathlib import Path

import numpy as np
import openmm
import pytest
from ase.io import read
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlffd import ExtrapolationError, NoveltyProbe, NoveltyReporter
from openmm_mlffd.interfaces.openmm_mts import respa_system
from openmm_mlffd.novelty import NoveltyMeter
from openmm_mlffd.units import ANGSTROM_PER_NM
from openmm_mlffd.validation.structures import read_structure

STRUCTURES = Path(__file__).parents[2] / "examples" / "structures"


@pytest.fixture
def simulate(make_topology):
    """Simulation of a molecule with the bundled student."""

    def make(structure, *, temperature=300.0, step=0.0005):
        topology = make_topology(*structure)
        system = MLPotential("mlffd", device="cpu").createSystem(topology, selfTest=False)
        integrator = openmm.LangevinMiddleIntegrator(temperature, 10.0, step)
        integrator.setRandomNumberSeed(1)
        platform = openmm.Platform.getPlatform("Reference")
        simulation = app.Simulation(topology, system, integrator, platform)
        simulation.context.setPositions(structure.positions / ANGSTROM_PER_NM)
        return simulation

    return make


def test_a_calm_run_goes_on_and_is_recorded(simulate, ethanol, tmp_path, caplog):
    simulation = simulate(ethanol)
    simulation.minimizeEnergy(maxIterations=20)
    text = io.StringIO()
    reporters = [
        NoveltyReporter(5, text, frames=tmp_path / "novel.extxyz"),
        NoveltyReporter(10, tmp_path / "novelty.csv", frames=tmp_path / "novel.extxyz"),
    ]
    simulation.reporters.extend(reporters)
    simulation.step(20)
    assert [s.step for s in reporters[0].samples] == [5, 10, 15, 20]
    rows = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert [int(r["step"]) for r in rows] == [5, 10, 15, 20]
    assert float(rows[1]["novelty"]) == pytest.approx(reporters[0].samples[1].novelty, abs=1e-3)
    assert len((tmp_path / "novelty.csv").read_text().splitlines()) == 3
    assert not (tmp_path / "novel.extxyz").exists()
    assert not caplog.records

    state = simulation.context.getState(positions=True)
    positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    expected = NoveltyMeter(ethanol.numbers).measure(positions)
    last = reporters[0].samples[-1]
    assert last.novelty == pytest.approx(expected.max(), abs=1e-5)
    assert last.atom == expected.argmax()


def test_a_molecule_heated_to_destruction_stops_and_leaves_its_frame(simulate, ethanol, tmp_path):
    simulation = simulate(ethanol, step=0.00025)
    simulation.minimizeEnergy(maxIterations=20)
    frames = tmp_path / "novel.extxyz"
    reporter = NoveltyReporter(4, frames=frames)
    simulation.reporters.append(reporter)

    def heat():
        for temperature in range(300, 40_000, 100):
            simulation.integrator.setTemperature(temperature)
            simulation.step(4)

    with pytest.raises(ExtrapolationError, match=r"step \d+: atom \d has novelty") as error:
        heat()
    stop = reporter._probe.novelty.header.stop
    sample = reporter.samples[-1]
    assert sample.novelty > stop
    assert all(s.novelty <= stop for s in reporter.samples[:-1])
    assert str(frames) in str(error.value)

    atoms = read(frames)
    state = simulation.context.getState(positions=True)
    positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    np.testing.assert_allclose(atoms.positions, positions, atol=1e-7)
    assert atoms.numbers.tolist() == ethanol.numbers.tolist()
    assert not atoms.pbc.any()
    assert atoms.info["step"] == sample.step == simulation.currentStep
    assert atoms.arrays["novelty"].max() == pytest.approx(sample.novelty, abs=1e-3)

    # a larger threshold goes on from there, and a second frame is appended
    reporter._stop = 0.5
    with pytest.raises(ExtrapolationError):
        simulation.step(4)
    assert len(read(frames, ":")) == 2


def test_below_the_threshold_it_only_warns(simulate, ethanol, tmp_path, caplog):
    simulation = simulate(ethanol)
    frames = tmp_path / "novel.extxyz"
    simulation.reporters.append(NoveltyReporter(2, frames=frames, warn=0.01, stop=float("inf")))
    with caplog.at_level(logging.WARNING, logger="openmm_mlffd.interfaces.openmm_alarm"):
        simulation.step(4)
    assert [m.split(":")[0] for m in caplog.messages] == ["step 2", "step 4"]
    assert "force errors below" in caplog.messages[0]
    assert not frames.exists()


def test_in_a_mixed_system_the_students_atoms_and_caps_are_watched():
    pdb = app.PDBFile(str(STRUCTURES / "alanine-dipeptide.pdb"))
    mm_system = app.ForceField("amber14-all.xml").createSystem(pdb.topology)
    residue = [a.index for a in pdb.topology.atoms() if a.residue.name == "ALA"][::-1]
    system = MLPotential("mlffd", device="cpu").createMixedSystem(pdb.topology, mm_system, residue)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
    )
    context.setPositions([*pdb.positions, *[openmm.Vec3(0, 0, 0)] * 2 * unit.nanometer])
    context.computeVirtualSites()
    state = context.getState(positions=True)
    probe = NoveltyProbe(system)
    n_atoms = pdb.topology.getNumAtoms()
    assert probe.atoms.tolist() == [*residue, n_atoms, n_atoms + 1]
    assert probe.numbers[-2:].tolist() == [1, 1]
    novelty = probe.measure(state)
    assert len(novelty) == len(residue) + 2
    sample = probe.sample(state, step=7)
    assert sample.atom == probe.atoms[novelty.argmax()]
    assert sample.step == 7


def test_a_box_is_part_of_the_surroundings(make_topology):
    topology, positions = read_structure(STRUCTURES / "water-64.pdb")
    system = MLPotential("mlffd", device="cpu").createSystem(topology, selfTest=False)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
    )
    context.setPositions(positions)
    probe = NoveltyProbe(system)
    calm = probe.measure(context.getState(positions=True))
    assert calm.max() < probe.novelty.header.warn
    box = context.getState().getPeriodicBoxVectors(asNumpy=True)._value
    context.setPeriodicBoxVectors(*(0.93 * box))  # molecules overlap across the faces
    state = context.getState(positions=True)
    assert probe.measure(state).max() > probe.novelty.header.stop
    assert probe.coordinates(state)[1] == pytest.approx(0.93 * box * ANGSTROM_PER_NM)


def test_systems_without_a_student_are_refused(make_topology, ethanol, student_file):
    with pytest.raises(ValueError, match="must hold one student among its forces, but has 0"):
        NoveltyProbe(openmm.System())
    with pytest.raises(ValueError, match=r"no novelty statistics.*mlffd novelty"):
        NoveltyProbe(
            MLPotential("mlffd", modelPath=student_file).createSystem(make_topology(*ethanol))
        )
    with pytest.raises(ValueError, match="reportInterval must be positive, got 0"):
        NoveltyReporter(0)


def test_with_multiple_time_steps_the_fast_student_is_watched(
    make_topology, ethanol, other_student_file
):
    system = respa_system(make_topology(*ethanol), other_student_file, device="cpu")
    assert NoveltyProbe(system).numbers.tolist() == ethanol.numbers.tolist()
