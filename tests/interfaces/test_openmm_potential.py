import gc
import resource
import threading

import numpy as np
import openmm
import pytest
import torch
from ase import Atoms
from openmm import unit
from openmmml import MLPotential

from openmm_mlffd import MLFFDCalculator
from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.modelfile import bundled_students
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV


@pytest.fixture
def potential(student_file):
    return MLPotential("mlffd", modelPath=student_file, device="cpu")


@pytest.fixture
def make_system(potential, make_topology):
    def make(structure, **keywords):
        keywords = {"precision": "double", "allowMissingHydrogens": True} | keywords
        return potential.createSystem(make_topology(*structure), **keywords)

    return make


@pytest.fixture
def from_ase(student_file):
    """Energy [eV] and forces [eV/Å] by ASE."""

    def compute(structure, precision="double"):
        numbers, positions, cell = structure
        atoms = Atoms(numbers, positions, cell=cell, pbc=cell is not None)
        atoms.calc = MLFFDCalculator(student_file, device="cpu", precision=precision)
        return atoms.get_potential_energy(), atoms.get_forces()

    return compute


@pytest.fixture(params=["molecule", "box"])
def structure(request, ethanol, reduced_box):
    return ethanol if request.param == "molecule" else reduced_box


# numbers


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_openmm_and_ase_agree(
    make_system, make_context, energy_and_forces, from_ase, structure, platform
):
    context = make_context(make_system(structure), structure.positions, platform=platform)
    energy, forces = energy_and_forces(context)
    expected_energy, expected_forces = from_ase(structure)
    assert np.abs(expected_forces).max() > 0.5
    assert energy == pytest.approx(expected_energy, abs=1e-8)
    np.testing.assert_allclose(forces, expected_forces, atol=1e-8)


def test_forces_are_minus_the_derivative_of_the_energy(
    make_system, make_context, energy_and_forces, derivative, structure
):
    context = make_context(make_system(structure), structure.positions)
    forces = energy_and_forces(context)[1]
    np.testing.assert_allclose(derivative(context, [0, 4, 8]), forces[[0, 4, 8]], atol=1e-5)


def test_single_precision_is_near_double(make_system, make_context, energy_and_forces, structure):
    results = [
        energy_and_forces(make_context(make_system(structure, precision=p), structure.positions))
        for p in ("single", "double")
    ]
    n_atoms = len(structure.numbers)
    assert 0.0 < abs(results[0][0] - results[1][0]) < 1e-6 * n_atoms
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-4)


def test_precision_is_single_unless_asked_for_otherwise(
    potential, make_topology, make_context, energy_and_forces, ethanol, from_ase
):
    system = potential.createSystem(make_topology(*ethanol))
    found = energy_and_forces(make_context(system, ethanol.positions))[0]
    assert found == pytest.approx(from_ase(ethanol, "single")[0], rel=1e-10)
    assert found != from_ase(ethanol, "double")[0]


# periodic boxes


def test_a_small_triclinic_box_is_its_supercell(
    make_system, make_context, energy_and_forces, reduced_box
):
    numbers, positions, cell = reduced_box
    shifts = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) @ cell
    large = (np.tile(numbers, 8), (positions + shifts[:, None]).reshape(-1, 3), 2 * cell)
    energy, forces = energy_and_forces(make_context(make_system(reduced_box), positions))
    energy8, forces8 = energy_and_forces(make_context(make_system(large), large[1]))
    assert energy8 / 8 == pytest.approx(energy, abs=1e-6)
    np.testing.assert_allclose(forces8, np.tile(forces, (8, 1)), atol=1e-6)


def test_the_skew_of_the_box_matters(make_system, make_context, energy_and_forces, reduced_box):
    upright = np.diag(np.diag(reduced_box.cell))
    energies = [
        energy_and_forces(make_context(make_system(s), reduced_box.positions))[0]
        for s in (reduced_box, reduced_box._replace(cell=upright))
    ]
    assert abs(energies[0] - energies[1]) > 0.01


def test_the_box_is_that_of_the_context_not_of_the_topology(
    make_system, make_context, energy_and_forces, from_ase, reduced_box
):
    larger = reduced_box._replace(
        cell=1.1 * reduced_box.cell, positions=1.1 * reduced_box.positions
    )
    context = make_context(make_system(reduced_box), larger.positions, larger.cell)
    energy = energy_and_forces(context)[0]
    assert energy == pytest.approx(from_ase(larger)[0], abs=1e-8)
    assert abs(energy - from_ase(reduced_box)[0]) > 0.1


def test_atoms_may_be_in_any_image(make_system, make_context, energy_and_forces, reduced_box):
    numbers, positions, cell = reduced_box
    context = make_context(make_system(reduced_box), positions)
    energy, forces = energy_and_forces(context)
    rng = np.random.default_rng(0)
    for _ in range(4):
        images = rng.integers(-5, 6, (len(numbers), 3)) @ cell
        context.setPositions((positions + images) / ANGSTROM_PER_NM)
        shifted_energy, shifted_forces = energy_and_forces(context)
        assert shifted_energy == pytest.approx(energy, abs=1e-8)
        np.testing.assert_allclose(shifted_forces, forces, atol=1e-8)


def test_without_a_box_in_the_topology_nothing_is_periodic(
    make_system, make_context, energy_and_forces, reduced_box
):
    alone = reduced_box._replace(cell=None)
    system = make_system(alone)
    assert not system.usesPeriodicBoundaryConditions()
    assert make_system(reduced_box).usesPeriodicBoundaryConditions()
    energies = [
        energy_and_forces(make_context(system, alone.positions, cell))[0]
        for cell in (None, reduced_box.cell)
    ]
    assert energies[0] == energies[1]


def test_the_energy_after_barostat_moves_is_that_of_the_new_box(
    make_system, make_context, from_ase, reduced_box
):
    system = make_system(reduced_box)
    barostat = openmm.MonteCarloBarostat(1.0, 300.0, 1)
    barostat.setRandomNumberSeed(1)
    system.addForce(barostat)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.0002)
    integrator.setRandomNumberSeed(1)
    context = make_context(system, reduced_box.positions, integrator=integrator)
    volumes, energies = set(), []
    for _ in range(12):
        integrator.step(2)
        state = context.getState(positions=True, energy=True)
        volumes.add(round(state.getPeriodicBoxVolume()._value, 12))
        now = reduced_box._replace(
            positions=state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM,
            cell=state.getPeriodicBoxVectors(asNumpy=True)._value * ANGSTROM_PER_NM,
        )
        energies.append(from_ase(now)[0])
        found = state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV
        assert found == pytest.approx(energies[-1], abs=1e-6)
    assert len(volumes) > 1
    assert np.ptp(energies) > 1e-3


# dynamics


def test_energy_is_conserved_to_second_order_in_the_time_step(make_system, make_context, ethanol):
    def fluctuation(step):
        integrator = openmm.VerletIntegrator(step)
        context = make_context(make_system(ethanol), ethanol.positions, integrator=integrator)
        openmm.LocalEnergyMinimizer.minimize(context, 1.0, 200)
        context.setVelocitiesToTemperature(300.0, 7)
        totals = []
        for _ in range(int(0.04 / step)):
            integrator.step(1)
            state = context.getState(energy=True)
            totals.append((state.getPotentialEnergy() + state.getKineticEnergy())._value)
        return np.std(totals)

    coarse, fine = fluctuation(0.0004), fluctuation(0.0002)
    assert coarse > 0.0
    assert 2.5 < coarse / fine < 6.0


# faults during a simulation


def test_positions_that_are_not_finite_raise_and_the_context_recovers(
    make_system, make_context, energy_and_forces, ethanol
):
    context = make_context(make_system(ethanol), ethanol.positions)
    expected = energy_and_forces(context)
    for value in (np.nan, np.inf):
        positions = ethanol.positions / ANGSTROM_PER_NM
        positions[4] = value
        context.setPositions(positions)
        with pytest.raises(
            openmm.OpenMMException, match=r"ValueError in the mlffd.*finite.*atom 4"
        ):
            energy_and_forces(context)
    context.setPositions(ethanol.positions / ANGSTROM_PER_NM)
    energy, forces = energy_and_forces(context)
    assert energy == expected[0]
    np.testing.assert_array_equal(forces, expected[1])


def test_ctrl_c_during_an_evaluation_has_a_text(make_system, make_context, ethanol, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    context = make_context(make_system(ethanol), ethanol.positions)
    monkeypatch.setattr(Evaluator, "_check", interrupted)
    with pytest.raises(openmm.OpenMMException, match="stopped from the keyboard"):
        context.getState(energy=True)


# many at a time


def test_two_contexts_with_two_students_do_not_disturb_each_other(
    student_file, other_student_file, make_topology, make_context, energy_and_forces, ethanol
):
    topology = make_topology(*ethanol)
    contexts = [
        make_context(MLPotential("mlffd", modelPath=f).createSystem(topology), ethanol.positions)
        for f in (student_file, other_student_file)
    ]
    first = [energy_and_forces(c)[1] for c in contexts]
    assert np.abs(first[0] - first[1]).max() > 0.1
    for _ in range(3):
        for context, expected in zip(contexts, first, strict=True):
            np.testing.assert_array_equal(energy_and_forces(context)[1], expected)


def test_contexts_of_one_system_in_threads_give_what_they_give_alone(
    make_system, make_context, energy_and_forces, ethanol
):
    system = make_system(ethanol)

    def trajectory(seed, out):
        integrator = openmm.VerletIntegrator(0.0003)
        context = make_context(system, ethanol.positions, integrator=integrator)
        context.setVelocitiesToTemperature(400.0, seed)
        integrator.step(25)
        out[seed] = energy_and_forces(context)

    alone, together = {}, {}
    for seed in (1, 2, 3):
        trajectory(seed, alone)
    threads = [threading.Thread(target=trajectory, args=(s, together)) for s in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({energy for energy, _ in alone.values()}) == 3
    for seed, (energy, forces) in alone.items():
        assert together[seed][0] == energy
        np.testing.assert_array_equal(together[seed][1], forces)


def test_memory_does_not_grow(make_system, make_context, ethanol):
    context = make_context(make_system(ethanol, precision="single"), ethanol.positions)
    good = ethanol.positions / ANGSTROM_PER_NM
    bad = np.full_like(good, np.nan)

    def call(n):
        for _ in range(n):
            context.getState(energy=True, forces=True)
            context.setPositions(good)

    def fail(n):
        context.setPositions(bad)
        for _ in range(n):
            with pytest.raises(openmm.OpenMMException):
                context.getState(energy=True)
        context.setPositions(good)

    call(300)
    fail(30)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(900)
    fail(100)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # MB
    assert grown < 40


def test_global_state_of_torch_is_left_alone(student_file, make_topology, make_context, ethanol):
    def state():
        return (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_rng_state().tolist(),
        )

    before = state()
    system = MLPotential("mlffd", modelPath=student_file).createSystem(make_topology(*ethanol))
    context = make_context(system, ethanol.positions)
    context.getIntegrator().step(3)
    assert state() == before


# the bundled student


def test_one_line_is_enough(make_topology, make_context, energy_and_forces, derivative, ethanol):
    assert "default" in bundled_students()
    topology = make_topology(*ethanol)
    system = MLPotential("mlffd").createSystem(topology)
    energy, forces = energy_and_forces(make_context(system, ethanol.positions))
    named = MLPotential("mlffd", model="default").createSystem(topology)
    assert energy_and_forces(make_context(named, ethanol.positions))[0] == energy

    double = MLPotential("mlffd").createSystem(topology, precision="double")
    context = make_context(double, ethanol.positions)
    assert energy == pytest.approx(energy_and_forces(context)[0], abs=1e-6 * 9)
    np.testing.assert_allclose(forces, energy_and_forces(context)[1], atol=1e-4)
    np.testing.assert_allclose(
        derivative(context, [0, 5]), energy_and_forces(context)[1][[0, 5]], atol=1e-5
    )


def test_the_bundled_student_holds_a_molecule_together(make_topology, make_context, ethanol):
    system = MLPotential("mlffd").createSystem(make_topology(*ethanol))
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.0005)
    integrator.setRandomNumberSeed(1)
    context = make_context(system, ethanol.positions, integrator=integrator)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 100)
    integrator.step(200)
    positions = context.getState(positions=True).getPositions(asNumpy=True)
    found = positions.value_in_unit(unit.angstrom)
    bonds = [(b.atom1.index, b.atom2.index) for b in make_topology(*ethanol).bonds()]
    lengths = [np.linalg.norm(found[i] - found[j]) for i, j in bonds]
    assert len(bonds) == 8
    assert all(0.85 < length < 1.75 for length in lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["single", "double"])
def test_the_cuda_platform_agrees_with_the_cpu(
    student_file, make_topology, make_context, energy_and_forces, structure, precision
):
    topology = make_topology(*structure)
    results = [
        energy_and_forces(
            make_context(
                MLPotential("mlffd", modelPath=student_file).createSystem(
                    topology, device=device, precision=precision, allowMissingHydrogens=True
                ),
                structure.positions,
                platform=platform,
            )
        )
        for platform, device in [("Reference", "cpu"), ("Reference", "cuda"), ("CUDA", "cuda")]
    ]
    for energy, forces in results[1:]:
        assert energy == pytest.approx(results[0][0], abs=1e-5 * len(structure.numbers))
        np.testing.assert_allclose(forces, results[0][1], atol=1e-3)
