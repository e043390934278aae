"""Electrostatic embedding: a student's charges among classical ones."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlffd import Barometer, NoveltyProbe, load_system, save_system
from openmm_mlffd.interfaces.openmm_coulomb import Surroundings
from openmm_mlffd.interfaces.openmm_embedding import ElectrostaticEmbedding
from openmm_mlffd.interfaces.openmm_stored import package_functions, student_functions
from openmm_mlffd.modelfile import make_potential, save_student
from openmm_mlffd.units import ANGSTROM_PER_NM

PEPTIDE = Path(__file__).parents[2] / "examples" / "structures" / "alanine-dipeptide.pdb"
GROUP = 3
VARIANT = {
    "kind": "painn-variant", "n_channels": 16, "n_interactions": 2, "n_basis": 8,
    "norm_softening": 0.01, "filters": "sine", "pair_filters": False, "charges": True,
    "tail": False, "message_cutoff": 4.0,
}  # fmt: skip
LONG_RANGE = {"nonbondedMethod": app.PME, "nonbondedCutoff": 0.7, "ewaldErrorTolerance": 1e-6}
METHODS = [
    pytest.param({"nonbondedMethod": app.NoCutoff}, id="exact"),
    pytest.param({"nonbondedMethod": app.CutoffNonPeriodic, "nonbondedCutoff": 0.7}, id="cutoff"),
    pytest.param(
        {"nonbondedMethod": app.CutoffPeriodic, "nonbondedCutoff": 0.7}, id="periodic cutoff"
    ),
    pytest.param(LONG_RANGE, id="pme"),
]


@pytest.fixture(scope="module")
def make_charged_file(tmp_path_factory, make_header):
    """Untrained students with charges; rigid ones have one charge for each element."""

    def make(*, rigid=False, **changes):
        header = make_header(
            architecture=VARIANT | changes, references=[-13.6, -1029.4, -1485.6, -2043.7],
            cutoff=6.0 if changes.get("tail") else 4.0,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(3)
            student = make_potential(header).double().eval()
        for block in student.network.interactions if rigid else ():
            torch.nn.init.zeros_(block.filter.weight)
        path = tmp_path_factory.mktemp("charged") / "charged.safetensors"
        save_student(path, student, header)
        return str(path)

    return make


@pytest.fixture(scope="module")
def charged_file(make_charged_file):
    return make_charged_file()


@pytest.fixture(scope="module")
def potential(charged_file):
    return MLPotential("mlffd", modelPath=charged_file, precision="double", device="cpu")


@pytest.fixture(scope="module")
def force_field():
    return app.ForceField("amber14-all.xml", "amber14/tip3p.xml")


@pytest.fixture(scope="module")
def model(force_field):
    """Topology, positions [Å] and box [Å] of the peptide in a skewed box of water."""
    pdb = app.PDBFile(str(PEPTIDE))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    box = 16.0 * np.array([[1.0, 0.0, 0.0], [0.3, 1.1, 0.0], [-0.4, 0.2, 1.05]])
    modeller.addSolvent(force_field, boxVectors=box / ANGSTROM_PER_NM * unit.nanometer)
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.angstrom)), box


@pytest.fixture(scope="module")
def make_mm(model, force_field):
    def make(**keywords):
        return force_field.createSystem(model[0], rigidWater=False, **(LONG_RANGE | keywords))

    return make


def peptide_of(topology):
    return [a.index for a in topology.atoms() if a.residue.name in ("ACE", "ALA", "NME")]


def waters_of(topology, *numbers):
    waters = [r for r in topology.residues() if r.name == "HOH"]
    return [a.index for n in numbers for a in waters[n].atoms()]


def nonbonded_of(system):
    return next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))


def embedding_of(system):
    functions = package_functions(system).values()
    return next(f for f in functions if isinstance(f, ElectrostaticEmbedding))


def electrostatic(potential, topology, system, atoms, **keywords):
    return potential.createMixedSystem(
        topology, system, atoms, embedding="electrostatic", forceGroup=GROUP, **keywords
    )


# against OpenMM's own sums


@pytest.mark.parametrize("keywords", METHODS)
@pytest.mark.parametrize("part", ["peptide", "ions of water"])
def test_fixed_charges_give_what_mechanical_embedding_gives(
    model, make_mm, make_charged_file, make_context, energy_and_forces, keywords, part
):
    topology, positions, cell = model
    potential = MLPotential("mlffd", modelPath=make_charged_file(rigid=True), precision="double")
    classical = make_mm(**keywords)
    force = nonbonded_of(classical)
    atoms = peptide_of(topology) if part == "peptide" else waters_of(topology, 3, 50)
    if part != "peptide":
        for i, charge in zip(atoms, [2 / 3, 2 / 3, -1 / 3, 0.0, 0.0, -2.0], strict=True):
            force.setParticleParameters(i, charge, *force.getParticleParameters(i)[1:])
    mixed = electrostatic(potential, topology, classical, atoms)
    # the student's charges depend on nothing: give them to the classical atoms
    charges = embedding_of(mixed).charges(positions[atoms])
    assert np.ptp(charges) > 0.05
    for i, charge in zip(atoms, charges, strict=True):
        force.setParticleParameters(i, charge, *force.getParticleParameters(i)[1:])
    mechanical = potential.createMixedSystem(topology, classical, atoms)
    energy, forces = energy_and_forces(make_context(mixed, positions, cell))
    expected, expected_forces = energy_and_forces(make_context(mechanical, positions, cell))
    tolerance = 3e-4 if keywords is LONG_RANGE else 1e-7
    assert energy == pytest.approx(expected, abs=tolerance)
    np.testing.assert_allclose(forces, expected_forces, atol=tolerance)
    without = energy_and_forces(make_context(mixed, positions, cell), groups={0})[0]
    assert abs(energy - without) > 0.1


def test_the_ewald_sum_leaves_out_less_than_one_part_in_100_000(monkeypatch):
    rng = np.random.default_rng(0)
    box = torch.tensor([[14.0, 0, 0], [3.0, 13.0, 0], [-4.0, 2.0, 17.0]], dtype=torch.float64)
    places = torch.tensor(rng.random((80, 3))) @ box
    charges = torch.tensor(0.4 * rng.normal(size=80))
    found = []
    for width in (None, 5.5):
        if width:
            monkeypatch.setattr("openmm_mlffd.interfaces.openmm_coulomb.WIDTH", width)
        surroundings = Surroundings(charges[6:], "ewald")
        found.append(surroundings.interact(charges[:6], places[:6], places[6:], box))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


# derivatives and symmetries


@pytest.mark.parametrize("keywords", METHODS)
def test_forces_on_either_side_are_derivatives_of_the_energy(
    model, make_mm, potential, make_context, energy_and_forces, derivative, keywords
):
    topology, positions, cell = model
    atoms = peptide_of(topology)
    mixed = electrostatic(potential, topology, make_mm(**keywords), atoms)
    context = make_context(mixed, positions, cell)
    forces = energy_and_forces(context, groups={GROUP})[1]
    near = positions[waters_of(topology, *range(60))] - positions[atoms].mean(0)
    chosen = [atoms[1], atoms[12], waters_of(topology, 0)[0] + int(np.argmin((near**2).sum(1)))]
    assert np.abs(forces[chosen[2]]).max() > 0.01
    # a pair at the edge of the cutoff of a reaction field has a kink
    tolerance = 2e-4 if "Cutoff" in str(keywords["nonbondedMethod"]) else 5e-6
    np.testing.assert_allclose(
        derivative(context, chosen, groups={GROUP}), forces[chosen], atol=tolerance
    )
    np.testing.assert_allclose(forces.sum(0), 0.0, atol=1e-6)  # Ewald's sum is cut off, too


def test_the_charges_change_with_the_positions_and_always_add_up(
    model, make_mm, make_charged_file, potential
):
    topology, positions, _ = model
    classical = make_mm()
    force = nonbonded_of(classical)
    atoms = waters_of(topology, 3, 50)
    force.setParticleParameters(atoms[0], -0.834 + 1.0, 0.1, 0.0)  # an ion
    mixed = electrostatic(potential, topology, classical, atoms)
    embedding = embedding_of(mixed)
    assert embedding.settings["totals"] == [1, 0]
    moved = positions[atoms] + np.random.default_rng(0).normal(0.0, 0.1, (6, 3))
    before, after = embedding.charges(positions[atoms]), embedding.charges(moved)
    assert np.abs(before - after).max() > 1e-4
    for charges in (before, after):
        np.testing.assert_allclose(charges.reshape(2, 3).sum(1), [1.0, 0.0], atol=1e-12)
    assert not any(
        nonbonded_of(mixed).getParticleParameters(i)[0]._value for i in atoms
    )  # no charge acts twice
    tail = MLPotential("mlffd", modelPath=make_charged_file(tail=True), precision="double")
    system = electrostatic(tail, topology, classical, atoms)
    assert embedding_of(system).charges(positions[atoms]).sum() == pytest.approx(1.0)


def test_the_energy_knows_no_direction_no_origin_and_no_image(
    model, make_mm, potential, make_context, energy_and_forces
):
    topology, positions, cell = model
    atoms = peptide_of(topology)
    topology = copy.deepcopy(topology)
    periodic = electrostatic(potential, topology, make_mm(), atoms)
    topology.setPeriodicBoxVectors(None)
    alone = electrostatic(potential, topology, make_mm(nonbondedMethod=app.NoCutoff), atoms)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    shifts = np.random.default_rng(2).integers(-2, 3, (len(positions), 3)) @ cell
    for system, box, others in (
        (alone, None, [positions @ turn.T, positions + 50.0]),
        (periodic, cell, [positions + 50.0, positions + shifts]),
    ):
        expected = energy_and_forces(make_context(system, positions, box), groups={GROUP})[0]
        for other in others:
            found = energy_and_forces(make_context(system, other, box), groups={GROUP})[0]
            assert found == pytest.approx(expected, abs=1e-6)


def test_energy_is_conserved(model, make_mm, potential, make_context, energy_and_forces):
    topology, positions, cell = model
    system = electrostatic(potential, topology, make_mm(), waters_of(topology, 3))
    integrator = openmm.VerletIntegrator(0.0001)
    context = make_context(system, positions, cell, platform="CPU", integrator=integrator)
    openmm.LocalEnergyMinimizer.minimize(context, 100.0, 20)
    totals = []
    for _ in range(10):
        integrator.step(2)
        state = context.getState(energy=True)
        totals.append((state.getPotentialEnergy() + state.getKineticEnergy())._value)
    assert state.getKineticEnergy()._value > 10 * np.ptp(totals)


# Systems


def test_interpolation_is_linear_between_classical_and_embedded(
    model, make_mm, potential, make_context, energy_and_forces
):
    topology, positions, cell = model
    atoms = waters_of(topology, 3, 50)
    classical = make_mm()
    systems = [classical, electrostatic(potential, topology, classical, atoms)]
    ends = [energy_and_forces(make_context(s, positions, cell)) for s in systems]
    both = electrostatic(potential, topology, classical, atoms, interpolate=True)
    context = make_context(both, positions, cell)
    for scale in (0.0, 0.4, 1.0):
        context.setParameter("lambda_interpolate", scale)
        energy, forces = energy_and_forces(context)
        assert energy == pytest.approx(scale * ends[1][0] + (1 - scale) * ends[0][0], abs=2e-3)
        expected = scale * ends[1][1] + (1 - scale) * ends[0][1]
        np.testing.assert_allclose(forces, expected, atol=5e-3)


def test_a_stored_system_is_the_same_in_another_process(
    model, make_mm, potential, make_context, energy_and_forces, tmp_path
):
    topology, positions, cell = model
    system = electrostatic(potential, topology, make_mm(), peptide_of(topology))
    expected = energy_and_forces(make_context(system, positions, cell))[0]
    save_system(system, tmp_path / "system.xml")
    np.save(tmp_path / "positions.npy", positions / ANGSTROM_PER_NM)
    script = f"""
import numpy as np, openmm, openmm_mlffd
system = openmm_mlffd.load_system({str(tmp_path / "system.xml")!r})
context = openmm.Context(system, openmm.VerletIntegrator(0.001),
                         openmm.Platform.getPlatform("Reference"))
context.setPositions(np.load({str(tmp_path / "positions.npy")!r}))
print(context.getState(energy=True).getPotentialEnergy()._value)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) / 96.48533212331 == pytest.approx(expected, abs=1e-7)
    again = load_system(tmp_path / "system.xml")
    assert embedding_of(again).settings == embedding_of(system).settings
    energy = energy_and_forces(make_context(copy.deepcopy(system), positions, cell))[0]
    assert energy == pytest.approx(expected, abs=1e-9)


def test_the_student_is_the_only_one_to_be_watched_and_the_pressure_has_both(
    model, make_mm, potential, make_context, energy_and_forces
):
    topology, positions, cell = model
    classical = make_mm()
    force = nonbonded_of(classical)
    for i in range(len(positions)):  # the cutoff of the dispersion is a step
        force.setParticleParameters(i, *force.getParticleParameters(i)[:2], 0.0)
    system = electrostatic(potential, topology, classical, waters_of(topology, 3))
    assert len(student_functions(system)) == 1
    assert len(package_functions(system)) == 2
    with pytest.raises(ValueError, match="there are no novelty statistics"):
        NoveltyProbe(system)
    context = make_context(system, positions, cell)
    found = Barometer(system).measure(context)
    step = 1e-4
    energies = []
    for scale in (1 - step, 1 + step):
        context.setPeriodicBoxVectors(*scale * cell / ANGSTROM_PER_NM)
        context.setPositions(scale * positions / ANGSTROM_PER_NM)
        energies.append(energy_and_forces(context)[0])
    assert np.trace(found.virial) == pytest.approx(
        (energies[1] - energies[0]) / (2 * step), rel=1e-3
    )


def test_a_barostat_works_and_a_box_below_the_cutoff_is_an_error(
    model, make_mm, potential, make_context
):
    topology, positions, cell = model
    classical = make_mm(nonbondedMethod=app.CutoffPeriodic)
    system = electrostatic(potential, topology, classical, waters_of(topology, 3))
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0, 1))
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.0005)
    context = make_context(system, positions, cell, platform="CPU", integrator=integrator)
    openmm.LocalEnergyMinimizer.minimize(context, 100.0, 10)
    integrator.step(5)
    assert math.isfinite(context.getState(energy=True).getPotentialEnergy()._value)
    n = torch.ones(1, dtype=torch.float64)
    place, box = torch.zeros((1, 3), dtype=torch.float64), 13.0 * torch.eye(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="more than half of the box"):
        Surroundings(n, "periodic cutoff", 7.0).interact(n, place, place + 1.0, box)


# what is refused


def test_what_cannot_be_embedded_is_refused_in_words(model, make_mm, potential, student_file):
    topology = model[0]
    classical = make_mm()
    water = waters_of(topology, 3)
    plain = MLPotential("mlffd", modelPath=student_file)
    with pytest.raises(ValueError, match="needs a student with partial charges"):
        electrostatic(plain, topology, classical, water)
    with pytest.raises(ValueError, match="is cut: add the rest of the molecule"):
        electrostatic(potential, topology, classical, peptide_of(topology)[:-1])
    with pytest.raises(ValueError, match="mlLongRange"):
        electrostatic(potential, topology, classical, water, mlLongRange=True)
    with pytest.raises(ValueError, match="linkAtomDistances"):
        electrostatic(potential, topology, classical, water, linkAtomDistances=[(0, 1, 0.1)])
    with pytest.raises(TypeError, match="no keyword 'chargess'"):
        electrostatic(potential, topology, classical, water, chargess=0)
    with pytest.raises(ValueError, match="more than once"):
        electrostatic(potential, topology, classical, [*water, water[0]])


def test_systems_with_charges_of_other_kinds_are_refused(model, make_mm, potential):
    topology = model[0]
    water = waters_of(topology, 3)

    def refused(change, match):
        classical = make_mm(nonbondedMethod=app.CutoffPeriodic)
        change(classical, nonbonded_of(classical))
        with pytest.raises(ValueError, match=match):
            electrostatic(potential, topology, classical, water)

    def offset(_, force):
        force.addGlobalParameter("scale", 1.0)
        force.addParticleParameterOffset("scale", 0, 0.1, 0.0, 0.0)

    def custom(system, _):
        force = openmm.CustomNonbondedForce("q1*q2/r")
        force.addPerParticleParameter("q")
        system.addForce(force)

    refused(lambda system, _: system.addForce(openmm.GBSAOBCForce()), "implicit solvent")
    refused(custom, "has charges of its own")
    refused(offset, "parameter offsets")
    refused(lambda _, force: force.addException(water[0], 0, 0.0, 1.0, 0.0), "strangers")
    refused(lambda system, _: system.addForce(openmm.NonbondedForce()), "this one has 2")
    refused(lambda _, force: force.setParticleParameters(water[0], 0.9, 1.0, 0.0), "add up to")
