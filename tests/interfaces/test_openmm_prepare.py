"""Bad starts survive, or are refused in words."""

from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app, unit
from openmmml import MLPotential
from typer.testing import CliRunner

from openmm_mlffd import load_system
from openmm_mlffd.cli import app as command
from openmm_mlffd.interfaces.openmm_prepare import (
    CALM_FORCE,
    PreparationError,
    advised_timestep,
    prepare,
    repartition_hydrogen_mass,
)
from openmm_mlffd.interfaces.openmm_untangle import untangle
from openmm_mlffd.units import ANGSTROM_PER_NM
from openmm_mlffd.validation.suite.systems import load_system as find_system

STRUCTURES = Path(__file__).parents[2] / "examples" / "structures"
SHORT = {"picoseconds": 0.01, "platform": "Reference", "selfTest": False}


def coordinates(state):
    return state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM


def lengths(topology, positions):
    pairs = [(b.atom1.index, b.atom2.index) for b in topology.bonds()]
    return np.array([np.linalg.norm(positions[i] - positions[j]) for i, j in pairs])


@pytest.fixture
def topology(make_topology, ethanol):
    return make_topology(*ethanol)


def test_a_structure_is_brought_to_its_temperature_with_all_its_bonds(topology, ethanol):
    told = []
    found = prepare(topology, ethanol.positions / 10.0, progress=told.append, **SHORT)
    names = [s.name for s in found.stages]
    assert [n.split(" ")[0].rstrip(",") for n in names] == [
        "0", "minimised", "heated", "equilibrated",
    ]  # fmt: skip
    assert found.stages[1].energy < found.stages[0].energy
    assert found.stages[1].largest_force < 0.3
    assert 0.0 < found.stages[-1].temperature < 900.0
    assert (lengths(topology, coordinates(found.state)) < 1.8).all()
    assert found.timestep == 0.5
    assert found.advice[0].startswith("time step: 0.5 fs")
    assert "hydrogen_mass=3" in found.advice[1]
    assert "novelty" in found.advice[-1]
    assert told[:2] == ["pushing apart", "minimising"]
    assert sum(t.startswith("heating") for t in told) == 10
    context = openmm.Context(
        found.system, openmm.VerletIntegrator(0.0005), openmm.Platform.getPlatform("Reference")
    )
    context.setState(found.state)
    context.getIntegrator().step(2)


def test_a_molecule_squeezed_into_another_is_pushed_out(make_topology, ethanol):
    """Two molecules with atoms 0.6 Å from one another, with hundreds of eV/Å between them."""
    numbers = np.tile(ethanol.numbers, 2)
    away = np.array([0.35, -0.1, 2.2])
    positions = np.vstack([ethanol.positions, ethanol.positions[::-1] + away])
    numbers[9:] = ethanol.numbers[::-1]
    distances = np.linalg.norm(positions[:9, None] - positions[None, 9:], axis=-1)
    assert distances.min() < 0.8
    topology = make_topology(numbers)
    atoms = list(topology.atoms())
    single = [(b.atom1.index, b.atom2.index) for b in make_topology(*ethanol).bonds()]
    for i, j in single:
        topology.addBond(atoms[i], atoms[j])
        topology.addBond(atoms[17 - i], atoms[17 - j])
    found = prepare(topology, positions / 10.0, **SHORT)
    end = coordinates(found.state)
    assert np.linalg.norm(end[:9, None] - end[None, 9:], axis=-1).min() > 1.4
    assert (lengths(topology, end) < 1.8).all()


@pytest.mark.slow
def test_clashing_waters_in_a_small_box_survive_to_constant_pressure(make_topology):
    pdb = app.PDBFile(str(STRUCTURES / "water-64.pdb"))
    water = np.array(pdb.positions.value_in_unit(unit.angstrom))[:3]
    grid = np.stack(np.meshgrid(*[[0.0, 3.3]] * 3), -1).reshape(-1, 3)
    grid[1] = [0.0, 0.8, 0.1]  # oxygens 0.8 Å apart
    positions = (grid[:, None] + water - water[0]).reshape(-1, 3)
    topology = make_topology([8, 1, 1] * 8, cell=6.6 * np.eye(3))
    atoms = list(topology.atoms())
    for oxygen in range(0, 24, 3):
        topology.addBond(atoms[oxygen], atoms[oxygen + 1])
        topology.addBond(atoms[oxygen], atoms[oxygen + 2])
    assert (
        untangle(
            topology, MLPotential("mlffd", device="cpu").createSystem(topology), positions / 10.0
        )[1]
        > 3
    )
    found = prepare(topology, positions / 10.0, pressure=1.0, **SHORT | {"picoseconds": 0.005})
    box = found.state.getPeriodicBoxVectors(asNumpy=True)._value * ANGSTROM_PER_NM
    oxygens = coordinates(found.state)[::3]
    apart = oxygens[:, None] - oxygens[None]
    apart -= np.round(apart @ np.linalg.inv(box)) @ box
    distances = np.linalg.norm(apart, axis=-1) + 9.0 * np.eye(8)
    assert distances.min() > 2.2
    assert found.stages[0].largest_force < CALM_FORCE
    assert not any(isinstance(f, openmm.MonteCarloBarostat) for f in found.system.getForces())


def test_a_torn_molecule_is_refused(topology, ethanol):
    positions = ethanol.positions.copy()
    positions[3] += 12.0
    with pytest.raises(PreparationError, match=r"bond of atom 2 .* and atom 3 .*came apart"):
        prepare(topology, positions / 10.0, **SHORT)


def test_a_shape_like_nothing_known_is_refused_though_its_bonds_are_whole(topology, ethanol):
    """A spring holds C–C–O at 60°, with each bond as long as it was."""
    system = MLPotential("mlffd", device="cpu").createSystem(topology, selfTest=False)
    bend = openmm.HarmonicBondForce()
    bend.addBond(0, 2, 0.15, 2e6)
    system.addForce(bend)
    settings = {"picoseconds": 0.01, "platform": "Reference", "system": system}
    with pytest.raises(PreparationError, match=r"has novelty .* after minimisation.*a hole"):
        prepare(topology, ethanol.positions / 10.0, **settings)
    found = prepare(topology, ethanol.positions / 10.0, max_novelty=np.inf, **settings)
    assert (lengths(topology, coordinates(found.state)) < 2.2).all()


def test_the_minimiser_does_not_leap_into_a_hole_far_away(make_topology):
    """A bond near its minimum; a hole where the minimiser's first trial of 10 Å ends."""
    topology = make_topology([6, 6], np.array([[0.0, 0.0, 0.0], [1.6, 0.0, 0.0]]))
    system = openmm.System()
    for _ in range(2):
        system.addParticle(12.0)
    force = openmm.CustomBondForce(
        "400*(1-exp(-20*(r-0.15)))^2*step(0.5-r) + 400*step(r-0.5) - 2000*exp(-((r-1.25)/0.2)^2)"
    )
    force.addBond(0, 1)
    system.addForce(force)
    start = np.array([[0.0, 0.0, 0.0], [0.16, 0.0, 0.0]])
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
    )
    context.setPositions(start)
    openmm.LocalEnergyMinimizer.minimize(context)
    leapt = coordinates(context.getState(positions=True))
    assert np.linalg.norm(leapt[1] - leapt[0]) > 10.0
    found = prepare(topology, start, system=system, picoseconds=0.01, platform="Reference")
    kept = coordinates(found.state)
    assert np.linalg.norm(kept[1] - kept[0]) == pytest.approx(1.5, abs=0.2)


def test_a_perfectly_symmetric_molecule_is_not_squeezed_into_a_point():
    """The first trial of OpenMM's minimiser moves benzene along its breathing mode alone."""
    benzene = find_system("benzene")
    done = prepare(
        benzene.topology,
        benzene.positions / ANGSTROM_PER_NM,
        picoseconds=0.05,
        platform="Reference",
    )
    positions = done.state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    sides = np.linalg.norm(positions[:6] - np.roll(positions[:6], 1, axis=0), axis=1)
    assert abs(sides - 1.39).max() < 0.15


def test_the_minimiser_goes_as_far_as_it_must(make_topology):
    """An atom 1.9 Å from where it belongs, six times the length of a leash."""
    topology = make_topology([6], np.zeros((1, 3)))
    system = openmm.System()
    system.addParticle(12.0)
    force = openmm.CustomExternalForce("500*((x-0.15)^2+(y-0.1)^2+(z+0.05)^2)")
    force.addParticle(0)
    system.addForce(force)
    found = prepare(
        topology, np.zeros((1, 3)), system=system, picoseconds=0.0, temperature=0.01,
        platform="Reference",
    )  # fmt: skip
    np.testing.assert_allclose(coordinates(found.state)[0], [1.5, 1.0, -0.5], atol=0.1)


def test_missing_hydrogens_are_refused_with_the_line_that_adds_them(make_topology, ethanol):
    bare = make_topology(ethanol.numbers[:3], ethanol.positions[:3])
    with pytest.raises(ValueError, match=r"Modeller\(.*addHydrogens.*addMissingHydrogens"):
        prepare(bare, ethanol.positions[:3] / 10.0)


def test_what_does_not_clash_is_left_where_it_is(topology, ethanol):
    system = MLPotential("mlffd", device="cpu").createSystem(topology)
    found, n_clashes = untangle(topology, system, ethanol.positions / 10.0)
    assert n_clashes == 0
    np.testing.assert_array_equal(found, ethanol.positions / 10.0)
    for name in ("alanine-dipeptide.pdb", "water-64.pdb"):
        pdb = app.PDBFile(str(STRUCTURES / name))
        system = MLPotential("mlffd", device="cpu").createSystem(pdb.topology)
        assert untangle(pdb.topology, system, pdb.positions)[1] == 0
    with pytest.raises(ValueError, match="positions of 9 particles are needed, got 8"):
        untangle(topology, MLPotential("mlffd").createSystem(topology), ethanol.positions[:8])


def test_heavier_hydrogens_take_their_mass_from_their_neighbors(topology, ethanol):
    system = MLPotential("mlffd", device="cpu").createSystem(topology)
    before = [system.getParticleMass(i)._value for i in range(9)]
    assert advised_timestep(system) == 0.5
    repartition_hydrogen_mass(system, topology, 3.0)
    after = [system.getParticleMass(i)._value for i in range(9)]
    assert sum(after) == pytest.approx(sum(before), abs=1e-9)
    assert after[3:] == [3.0] * 6
    assert after[0] == pytest.approx(12.01078 - 3 * (3.0 - 1.007947), abs=1e-3)
    assert advised_timestep(system) == 1.0
    with pytest.raises(ValueError, match=r"leave .* amu to atom"):
        repartition_hydrogen_mass(system, topology, 8.0)
    found = prepare(topology, ethanol.positions / 10.0, hydrogen_mass=3.0, **SHORT)
    assert found.timestep == 1.0
    assert len(found.advice) == 2


def test_hydrogens_without_bonds_get_no_mass(make_topology, ethanol):
    topology = make_topology(ethanol.numbers)
    system = MLPotential("mlffd", device="cpu").createSystem(topology)
    with pytest.raises(ValueError, match="has no bond in the Topology"):
        repartition_hydrogen_mass(system, topology, 3.0)


def test_mixed_systems_with_constraints_are_prepared_too():
    pdb = app.PDBFile(str(STRUCTURES / "alanine-dipeptide.pdb"))
    mm_system = app.ForceField("amber14-all.xml").createSystem(pdb.topology, constraints=app.HBonds)
    atoms = [a.index for a in pdb.topology.atoms() if a.residue.name in ("ACE", "ALA")]
    info = MLPotential("mlffd", device="cpu").createMixedSystem(
        pdb.topology, mm_system, atoms, returnInfo=True, selfTest=False
    )
    system = info["system"]
    positions = [*pdb.positions, openmm.Vec3(0, 0, 0) * unit.nanometer]
    found = prepare(
        info["topology"], positions, system=system, picoseconds=0.01, platform="Reference"
    )
    assert system.getNumConstraints() > 0
    end = coordinates(found.state)
    for k in range(system.getNumConstraints()):
        i, j, length = system.getConstraintParameters(k)
        found_length = np.linalg.norm(end[i] - end[j]) / ANGSTROM_PER_NM
        assert found_length == pytest.approx(length._value, rel=1e-4)
    with pytest.raises(TypeError, match="no use for precision"):
        prepare(info["topology"], positions, system=system, precision="double")


def test_arguments_without_sense_are_refused(topology, ethanol):
    with pytest.raises(ValueError, match="needs a Topology with a box"):
        prepare(topology, ethanol.positions / 10.0, pressure=1.0)
    with pytest.raises(ValueError, match="positive temperature"):
        prepare(topology, ethanol.positions / 10.0, temperature=0.0)
    with pytest.raises(TypeError, match="did you mean 'precision'"):
        prepare(topology, ethanol.positions / 10.0, precison="double")


def test_the_command_writes_what_a_simulation_needs(tmp_path):
    output = tmp_path / "ready.pdb"
    result = CliRunner().invoke(
        command,
        ["prepare", str(STRUCTURES / "pramipexole.sdf"), "-o", str(output),
         "--picoseconds", "0.01", "--hydrogen-mass", "3"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "time step: 1 fs" in result.output
    assert "equilibrated at 300 K" in result.output
    pdb = app.PDBFile(str(output))
    system = load_system(tmp_path / "ready.system.xml")
    assert pdb.topology.getNumAtoms() == system.getNumParticles()
    state = openmm.XmlSerializer.deserialize((tmp_path / "ready.state.xml").read_text())
    context = openmm.Context(system, openmm.VerletIntegrator(0.001))
    context.setState(state)
    energy = context.getState(energy=True).getPotentialEnergy()
    assert energy._value == pytest.approx(state.getPotentialEnergy()._value, abs=0.1)
