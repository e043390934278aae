"""What the OpenMM interface does on a GPU, in a few minutes; numbers as JSON.

    python tests/benchmarks/openmm_gpu.py --output numbers.json --budget 330
    python tests/benchmarks/openmm_gpu.py --only npt --budget 580  # 200 ps if fast

Each section stands for itself: what fails is recorded, and the others go on. With
``--platform CPU --small`` everything runs in its smallest form.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import openmm
import torch
from gpu_systems import peptide, temperature, villin, water
from openmm import app, unit

from openmm_mlffd import Barometer, NoveltyProbe, load_student
from openmm_mlffd.bench.systems import relaxed
from openmm_mlffd.bench.systems import water as bench_water
from openmm_mlffd.bench.timing import evaluation_time, make_topology
from openmm_mlffd.bench.timing import make_potential as potential
from openmm_mlffd.engines import open_evaluator
from openmm_mlffd.evaluator import StudentSource
from openmm_mlffd.graph import build_graph
from openmm_mlffd.interfaces import openmm_torch
from openmm_mlffd.interfaces.openmm_force import positions_of
from openmm_mlffd.interfaces.openmm_prepare import repartition_hydrogen_mass
from openmm_mlffd.interfaces.openmm_stored import student_functions
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

ROOT = Path(__file__).parents[2]
GRAMS_PER_CM3 = 1.66053907  # of amu/Å³


class Bench:
    """Settings, the deadline and the numbers so far."""

    def __init__(self, options):
        self.platform = options.platform
        self.small = options.small
        self.output = options.output
        self.began = time.perf_counter()
        self.deadline = self.began + options.budget
        self.numbers = {}

    @property
    def left(self):
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()

    def run(self, section):
        """Run a section; whatever comes of it is written."""
        name = section.__name__
        began = time.perf_counter()
        found = {}
        try:
            section(self, found)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
            found["traceback"] = traceback.format_exc()[-1500:]
        found["seconds"] = round(time.perf_counter() - began, 1)
        self.numbers[name] = found
        self.output.write_text(json.dumps(self.numbers, indent=1, default=str) + "\n")
        print(name, json.dumps(found, default=str), flush=True)

    def context(self, system, *, timestep=0.5, friction=1.0, properties=None):
        """Context on the platform, Langevin dynamics at 300 K [fs, 1/ps]."""
        integrator = openmm.LangevinMiddleIntegrator(
            300 * unit.kelvin, friction / unit.picosecond, timestep * unit.femtosecond
        )
        integrator.setRandomNumberSeed(1)
        return openmm.Context(
            system, integrator, openmm.Platform.getPlatform(self.platform), properties or {}
        )


def state_of(context):
    """Energy [eV], forces [eV/Å], positions and box [Å]."""
    state = context.getState(positions=True, energy=True, forces=True)
    return (
        state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV,
        np.array(state.getForces(asNumpy=True)._value) / KJ_PER_MOL_NM_PER_EV_ANGSTROM,
        np.array(state.getPositions(asNumpy=True)._value) * ANGSTROM_PER_NM,
        np.array(state.getPeriodicBoxVectors(asNumpy=True)._value) * ANGSTROM_PER_NM,
    )


def timed(context, n_steps):
    """Milliseconds of a step."""
    began = time.perf_counter()
    context.getIntegrator().step(n_steps)
    context.getState(energy=True)
    return 1e3 * (time.perf_counter() - began) / n_steps


def machine(bench, found):
    """Versions and devices."""
    found["torch"], found["openmm"] = torch.__version__, openmm.__version__
    found["student"] = load_student().header.sha256
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def agreement(bench, found):
    """This platform in single precision against the Reference platform in double; self-test."""
    for name, (topology, positions) in (("peptide", peptide()), ("water", water(64))):
        if bench.small and name == "water":
            continue
        context = bench.context(potential().createSystem(topology))
        context.setPositions(positions)
        began = time.perf_counter()
        energy, forces, _, _ = state_of(context)
        first = time.perf_counter() - began
        function = potential().createSystem(topology, precision="double", selfTest=False)
        right = openmm.Context(
            function, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
        )
        right.setPositions(positions)
        expected, expected_forces, _, _ = state_of(right)
        found[name] = {
            "energy_error_eV_per_atom": abs(energy - expected) / topology.getNumAtoms(),
            "force_error_eV_A": float(np.abs(forces - expected_forces).max()),
            "first_evaluation_s": first,
        }
        context = bench.context(potential().createSystem(topology, selfTest=False))
        context.setPositions(positions)
        began = time.perf_counter()
        state_of(context)
        found[name]["first_evaluation_without_self_test_s"] = time.perf_counter() - began


def alarm(bench, found):
    """What the alarm costs, sampled every 100 steps."""
    for name, (topology, positions) in (("peptide", peptide()), ("water", water(216))):
        if bench.small and name == "water":
            continue
        system = potential().createSystem(topology, selfTest=False)
        context = bench.context(system, friction=10.0)
        context.setPositions(positions)
        openmm.LocalEnergyMinimizer.minimize(context, maxIterations=20)
        context.setVelocitiesToTemperature(300, 1)
        n_steps = 10 if bench.small else 400
        timed(context, n_steps)
        step = timed(context, n_steps)
        probe = NoveltyProbe(system)
        probe.measure(context.getState(positions=True))
        began = time.perf_counter()
        for _ in range(10):
            novelty = probe.measure(context.getState(positions=True))
        sample = 1e3 * (time.perf_counter() - began) / 10
        found[name] = {
            "step_ms": step, "sample_ms": sample, "share_of_100_steps": sample / (100 * step),
            "largest_novelty": float(novelty.max()),
        }  # fmt: skip


def gpu_tests(bench, found):
    """The tests of the interfaces that are marked gpu."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
         "--continue-on-collection-errors", "tests/interfaces"],
        cwd=ROOT, capture_output=True, text=True, timeout=max(20.0, min(90.0, bench.left - 60.0)),
        check=False,
    )  # fmt: skip
    found["exit_code"] = result.returncode
    found["last_lines"] = (result.stdout + result.stderr)[-1500:]


def ligand(bench, found):
    """A mixed system: phenol with the student, protein and water classical."""
    topology, positions, classical = villin(6.3, not bench.small)
    atoms = [a.index for a in topology.atoms() if a.residue.name == "PHN"]
    mixed = potential().createMixedSystem(topology, classical, atoms)
    n_steps = 5 if bench.small else 2000
    found["atoms"], found["ml_atoms"] = topology.getNumAtoms(), len(atoms)
    start = None
    for name, system in (("classical", classical), ("mixed", mixed)):
        context = bench.context(system)
        context.setPositions(positions if start is None else start.getPositions())
        openmm.LocalEnergyMinimizer.minimize(context, maxIterations=20 if bench.small else 200)
        start = context.getState(positions=True)
        context.setVelocitiesToTemperature(300, 1)
        timed(context, max(2, n_steps // 5))
        step = timed(context, n_steps)
        found[name] = {"step_ms": step, "ns_per_day": 0.5e-6 * 86_400e3 / step}
        found[name]["temperature_K"] = temperature(context)
    found["share_of_the_student"] = 1.0 - found["classical"]["step_ms"] / found["mixed"]["step_ms"]
    done, whole, temperatures = 0, (10 if bench.small else 20_000), []
    began, seconds = time.perf_counter(), min(60.0, bench.left - 10.0)
    while done < whole and time.perf_counter() - began < seconds:
        context.getIntegrator().step(whole // 10)
        temperatures.append(temperature(context))
        done += whole // 10
    after = context.getState(positions=True)
    found["picoseconds"] = 0.5e-3 * done
    found["temperatures_K"] = [round(t) for t in temperatures]
    found["longest_bond_of_the_ligand_over_start"] = bonds_over_start(
        topology, start, after, only=set(atoms)
    )


class Silence:
    """A force of nothing: what a `PythonForce` costs without a student."""

    def __init__(self, n_atoms):
        self.forces = np.zeros((n_atoms, 3))

    def __call__(self, state):
        state.getPositions(asNumpy=True)
        return 0.0, self.forces


class Replay:
    """A force of nothing that lets PyTorch work on the GPU: what two users of a GPU cost."""

    def __init__(self, n_atoms):
        self.forces = np.zeros((n_atoms, 3))
        self.numbers = torch.zeros(3 * n_atoms, device="cuda")
        self.numbers.mul_(1.0)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.numbers.mul_(1.0)

    def __call__(self, state):
        positions_of(state)
        self.graph.replay()
        torch.cuda.current_stream().synchronize()
        return 0.0, self.forces


def host(bench, found):
    """Where the time of a step of 50 atoms goes: OpenMM, Python, PyTorch beside it, the student."""
    structure = bench_water(50)
    topology, n_atoms = make_topology(structure), len(structure.numbers)
    evaluator = open_evaluator(StudentSource.find(), structure.numbers.tolist())
    start = relaxed(evaluator, structure.positions, structure.cell) / ANGSTROM_PER_NM
    evaluation = evaluation_time(evaluator, structure)
    found["atoms"], found["evaluation_us"] = n_atoms, 1e6 * evaluation["median"]
    forces = {"nothing": None, "python": lambda: openmm.PythonForce(Silence(n_atoms))}
    if bench.platform == "CUDA":
        forces["python_and_torch"] = lambda: openmm.PythonForce(Replay(n_atoms))
    engines = ["python"]
    if torch_forces_work(bench.platform):
        engines.append("torchscript")
    for engine in engines:
        forces[f"student_{engine}"] = engine
    settings = [("", {})]
    if bench.platform == "CUDA":
        settings = [(f"_blocking_{b}", {"UseBlockingSync": b}) for b in ("true", "false")]
    n_steps = 5 if bench.small else 400
    for suffix, properties in settings:
        for name, make in forces.items():
            if isinstance(make, str):
                system = potential().createSystem(topology, engine=make, selfTest=False)
            else:
                system = openmm.System()
                for atom in topology.atoms():
                    system.addParticle(atom.element.mass)
                if make is not None:
                    system.addForce(make())
            context = bench.context(system, friction=5.0, properties=properties)
            context.setPositions(start)
            context.setVelocitiesToTemperature(300, 1)
            timed(context, n_steps)
            found[f"{name}{suffix}_us"] = 1e3 * min(timed(context, n_steps) for _ in range(5))


def torch_forces_work(platform):
    """Whether OpenMM-Torch is there and works."""
    try:
        openmm_torch.torch_force_class()
    except ImportError:
        return False
    return not openmm_torch._failure("CUDA" if platform == "CUDA" else "Reference")


def protein(bench, found):
    """About 25,000 atoms of protein, ligand and water, all with the student."""
    topology, positions, classical = villin(6.3, not bench.small)
    n_atoms = found["atoms"] = topology.getNumAtoms()
    longest = min(45.0, bench.left - 10.0)
    context = bench.context(classical, timestep=0.5, friction=10.0)
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=5 if bench.small else 300)
    context.setVelocitiesToTemperature(300, 1)
    context.getIntegrator().step(2 if bench.small else 6000)
    start = context.getState(positions=True, velocities=True)
    del context
    system = potential().createSystem(topology)
    context = bench.context(system, friction=10.0)
    context.setPeriodicBoxVectors(*start.getPeriodicBoxVectors())
    context.setPositions(start.getPositions())
    began = time.perf_counter()
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=2 if bench.small else 30)
    found["minimised_s"] = time.perf_counter() - began
    context.setVelocities(start.getVelocities())
    portion, trace = (2 if bench.small else 100), []
    enough = 1 if bench.small else 200  # 10 ps
    began = time.perf_counter()
    while not trace or (time.perf_counter() - began < longest and len(trace) < enough):
        context.getIntegrator().step(portion)
        energy, forces, _, _ = state_of(context)
        trace.append((energy / n_atoms, float(np.abs(forces).max()), temperature(context)))
    found["picoseconds"] = 0.5e-3 * portion * len(trace)
    found["energy_eV_per_atom_first_last"] = trace[0][0], trace[-1][0]
    found["largest_force_eV_A"] = max(t[1] for t in trace)
    found["temperatures_K"] = [round(t[2]) for t in trace[:: max(1, len(trace) // 20)]]
    found["longest_bond_over_start"] = bonds_over_start(
        topology, start, context.getState(positions=True)
    )
    timed(context, portion)
    step = timed(context, portion)
    found["step_ms"], found["ns_per_day"] = step, 0.5e-6 * 86_400e3 / step
    quiet = openmm.System()
    for i in range(n_atoms):
        quiet.addParticle(system.getParticleMass(i))
    quiet.addForce(openmm.PythonForce(Silence(n_atoms)))
    context = bench.context(quiet)
    context.setPositions(start.getPositions())
    timed(context, portion)
    found["step_ms_without_student"] = timed(context, portion)
    found["share_of_the_student"] = 1.0 - found["step_ms_without_student"] / step


def bonds_over_start(topology, start, after, only=None):
    """The largest factor by which a bond grew (within some atoms)."""
    pairs = np.array([(b.atom1.index, b.atom2.index) for b in topology.bonds()])
    if only is not None:
        pairs = pairs[[i in only and j in only for i, j in pairs.tolist()]]
    found = []
    for state in (start, after):
        x = np.array(state.getPositions(asNumpy=True)._value)
        found.append(np.linalg.norm(x[pairs[:, 0]] - x[pairs[:, 1]], axis=1))
    return float((found[1] / found[0]).max())


def liquid(bench):
    """Water after a classical equilibration at constant pressure: Topology and State."""
    topology, positions = water(8 if bench.small else 216)
    system = app.ForceField("tip3p.xml").createSystem(
        topology, nonbondedMethod=app.PME, rigidWater=False,
        nonbondedCutoff=(0.2 if bench.small else 0.8) * unit.nanometer,
    )  # fmt: skip
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0, 25))
    context = bench.context(system, friction=10.0)
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=100)
    context.setVelocitiesToTemperature(300, 1)
    context.getIntegrator().step(100 if bench.small else 20_000)
    return topology, context.getState(positions=True, velocities=True)


class Recorder:
    """Every evaluation that OpenMM asks for."""

    def __init__(self, function):
        self.function = function
        self.calls = []

    def __call__(self, state):
        energy, forces = self.function(state)
        positions = np.array(state.getPositions(asNumpy=True)._value) * ANGSTROM_PER_NM
        box = np.array(state.getPeriodicBoxVectors(asNumpy=True)._value) * ANGSTROM_PER_NM
        self.calls.append((positions, box, energy / KJ_PER_MOL_PER_EV))
        return energy, forces


def barostat_moves(bench, found):
    """Energies of accepted and rejected boxes against double precision."""
    topology, start = liquid(bench)
    system = potential().createSystem(topology, selfTest=False)
    recorder = Recorder(student_functions(system)[0])
    system.removeForce(0)
    force = openmm.PythonForce(recorder)
    force.setUsesPeriodicBoundaryConditions(True)
    system.addForce(force)
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0, 1))
    context = bench.context(system, friction=10.0)
    context.setState(start)
    kept = []
    for _ in range(5 if bench.small else 100):
        context.getIntegrator().step(1)
        energy, _, positions, box = state_of(context)
        kept.append((positions, box, energy))
    device = torch.device("cuda" if bench.platform == "CUDA" else "cpu")
    student = load_student(device=device, precision="double")
    species = student.species(torch.tensor([a.element.atomic_number for a in topology.atoms()])).to(
        device
    )

    def error(positions, box, energy):
        graph = build_graph(
            torch.tensor(positions, device=device), species, cutoff=student.cutoff,
            cell=torch.tensor(box, device=device),
        )  # fmt: skip
        return (energy - student(graph).energy.item()) / len(positions)

    accepted = {box.tobytes() for _, box, _ in kept} | {recorder.calls[0][1].tobytes()}
    rejected = [call for call in recorder.calls if call[1].tobytes() not in accepted]
    # every second evaluation is of the same kind: chosen by lot, not by their number
    chosen = np.random.default_rng(0).permutation(len(recorder.calls))[:150]
    boxes = {box.tobytes() for _, box, _ in recorder.calls}
    found["boxes_tried"], found["boxes_kept"] = len(boxes) - 1, len(accepted) - 1
    for name, calls in (
        ("evaluations", [recorder.calls[i] for i in chosen]),
        ("rejected_boxes", rejected),
        ("after_moves", kept),
    ):
        errors = np.array([error(*call) for call in calls])
        found[name] = {
            "number": len(errors),
            "largest_error_eV_per_atom": float(np.abs(errors).max(initial=0.0)),
            "std_eV_per_atom": float(errors.std()) if len(errors) else 0.0,
        }


def npt(bench, found):
    """Water at 300 K and 1 bar for as long as there is time."""
    topology, start = liquid(bench)
    system = potential().createSystem(topology)
    repartition_hydrogen_mass(system, topology, 3.0)
    mass = sum(system.getParticleMass(i)._value for i in range(system.getNumParticles()))
    barometer = Barometer(system)
    barostat = openmm.MonteCarloBarostat(1.0, 300.0, 25)
    barostat.setRandomNumberSeed(1)
    system.addForce(barostat)
    context = bench.context(system, timestep=1.0, friction=5.0)
    context.setState(start)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=50)
    context.setVelocitiesToTemperature(300, 1)
    portion, volumes, temperatures, pressures = (5 if bench.small else 100), [], [], []
    began = time.perf_counter()
    while not volumes or (bench.left > 10.0 and len(volumes) < 2000 and not bench.small):
        context.getIntegrator().step(portion)
        temperatures.append(temperature(context))
        volumes.append(barometer_volume(context))
        if len(volumes) % 5 == 0:
            pressures.append(barometer.measure(context).bar)
    seconds = time.perf_counter() - began
    found["molecules"] = topology.getNumResidues()
    found["picoseconds"] = 1e-3 * portion * len(volumes)
    found["ns_per_day"] = 1e-6 * portion * len(volumes) / seconds * 86_400
    density = mass / np.array(volumes) * GRAMS_PER_CM3
    for name, values in (
        ("density_g_cm3", density), ("volume_A3", volumes), ("temperature_K", temperatures),
        ("pressure_bar", pressures),
    ):  # fmt: skip
        found[name] = blocks(np.array(values))
    found["density_trace_g_cm3"] = [
        round(float(x), 4) for x in density[:: max(1, len(density) // 40)]
    ]


def barometer_volume(context):
    """[Å³]."""
    volume = context.getState().getPeriodicBoxVolume()
    return volume.value_in_unit(unit.angstrom**3)


def blocks(values):
    """Mean of the second half and its error from five blocks; smallest and largest of all."""
    if len(values) < 10:
        return {"mean": float(np.mean(values)) if len(values) else None}
    half = values[len(values) // 2 :]
    means = [block.mean() for block in np.array_split(half, 5)]
    return {
        "mean": float(half.mean()), "error": float(np.std(means, ddof=1) / 5**0.5),
        "smallest": float(values.min()), "largest": float(values.max()),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("openmm_gpu.json"))
    parser.add_argument("--budget", type=float, default=330.0, help="seconds")
    parser.add_argument("--platform", default="CUDA")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", help="sections, with commas between them")
    options = parser.parse_args()
    sections = (
        machine, host, agreement, alarm, gpu_tests, barostat_moves, ligand, protein, npt,
    )  # fmt: skip
    names = [section.__name__ for section in sections]
    wanted = options.only.split(",") if options.only else names
    if not set(wanted) <= set(names):
        parser.error(f"the sections are {', '.join(names)}")
    bench = Bench(options)
    for section in sections:
        if section.__name__ in wanted:
            bench.run(section)


if __name__ == "__main__":
    main()
