# %% [markdown]
# # A distilled student in OpenMM
#
# Three simulations on the CPU, five minutes on two cores: a peptide, a drug that the student was
# not trained on, and a box of liquid water at constant pressure. Each is checked, and all numbers
# end up in one HTML report.
#
#     python examples/01_demo.py             # the report is demo_output/report.html
#     python examples/01_demo.py --quick     # the same, much too short to mean anything
#
# The exit code is 1 if a check fails.

# %%
import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Threads that spin while they wait for one another starve on a busy machine. Before PyTorch starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import mdtraj
import numpy as np
import openmm
import torch
from openmm import app, unit
from openmmml import MLPotential

import openmm_mlffd
from openmm_mlffd.memory import keep_freed_memory
from openmm_mlffd.modelfile import StudentHeader, read_header
from openmm_mlffd.validation import analysis, figures
from openmm_mlffd.validation.conservation import Check
from openmm_mlffd.validation.nve import NVEResult, measure_nve
from openmm_mlffd.validation.report import (
    FigureBlock,
    Report,
    Section,
    TableBlock,
    conservation_table,
    number,
)
from openmm_mlffd.validation.structures import read_structure

STRUCTURES = Path(__file__).parent / "structures"
TEMPERATURE = 300.0  # K
PRESSURE = 1.0  # bar
SEED = 20
LONGEST_BOND = 1.5  # times its length in the minimised structure
BOND_CHECK = "longest bond / its length at rest"
EXPERIMENT_OO = 2.80  # Å, first peak of water at 295 K: Skinner et al. 2013, doi:10.1063/1.4790861


# %% [markdown]
# ## What is simulated, and for how long


# %%
@dataclass(frozen=True)
class Plan:
    """One simulation; lengths in ps."""

    name: str
    file: str
    langevin: float  # at constant temperature, or at constant temperature and pressure
    nve: float  # at constant energy, with each of two time steps
    frame: float  # between frames of the trajectory
    minimization: int = 200  # iterations at most
    constant_pressure: bool = False
    threads: int = 1  # of PyTorch; on small molecules more would mostly wait for one another

    @property
    def ensemble(self) -> str:
        return "NPT" if self.constant_pressure else "NVT"


DIPEPTIDE = Plan("alanine dipeptide", "alanine-dipeptide.pdb", langevin=3.0, nve=2.0, frame=0.01)
DRUG = Plan("pramipexole", "pramipexole.sdf", langevin=1.0, nve=1.0, frame=0.01)
WATER = Plan(
    "water", "water-64.pdb", langevin=0.5, nve=0.05, frame=0.005, minimization=20,
    constant_pressure=True, threads=os.cpu_count() or 1,
)  # fmt: skip


def shortened(plan: Plan) -> Plan:
    if plan.constant_pressure:
        return replace(plan, langevin=0.02, frame=0.002, minimization=5)
    return replace(plan, langevin=0.1, nve=0.2)


# %% [markdown]
# ## One simulation
#
# `MLPotential("mlffd").createSystem(topology)` is all that is special here; the rest is plain
# OpenMM.


# %%
@dataclass(frozen=True)
class Run:
    """What a simulation gave."""

    plan: Plan
    n_atoms: int
    trajectory: mdtraj.Trajectory
    series: np.ndarray  # time [ps], energy [kJ/mol], temperature [K], volume [nm^3], density [g/mL]
    nve: NVEResult
    seconds_per_step: float
    checks: list[Check]


def simulate(plan: Plan, folder: Path, student: dict[str, str]) -> Run:
    torch.set_num_threads(plan.threads)
    topology, positions = read_structure(STRUCTURES / plan.file)
    system = MLPotential("mlffd", **student).createSystem(topology, device="cpu")
    if plan.constant_pressure:
        barostat = openmm.MonteCarloBarostat(PRESSURE * unit.bar, TEMPERATURE * unit.kelvin, 10)
        barostat.setRandomNumberSeed(SEED)
        system.addForce(barostat)
    integrator = openmm.LangevinMiddleIntegrator(
        TEMPERATURE * unit.kelvin, 5 / unit.picosecond, 1 * unit.femtosecond
    )
    integrator.setRandomNumberSeed(SEED)
    cpu = openmm.Platform.getPlatform("CPU")
    simulation = app.Simulation(topology, system, integrator, cpu)
    simulation.context.setPositions(positions)
    say(f"{plan.name}: {topology.getNumAtoms()} atoms")
    simulation.minimizeEnergy(maxIterations=plan.minimization)
    minimum = simulation.context.getState(positions=True)
    reference = analysis.make_frame(minimum.getPositions(asNumpy=True), topology)

    simulation.context.setVelocitiesToTemperature(TEMPERATURE * unit.kelvin, SEED)
    stem = folder / plan.name.replace(" ", "-")
    every, n_steps = round(plan.frame * 1000), round(plan.langevin * 1000)
    simulation.reporters = [app.DCDReporter(f"{stem}.dcd", every), csv_reporter(stem, every)]
    show = progress(f"  {plan.ensemble}, 1 fs")
    began = time.perf_counter()
    for done in range(every, n_steps + 1, every):
        simulation.step(every)
        show(done, n_steps)
    seconds_per_step = (time.perf_counter() - began) / n_steps

    start = simulation.context.getState(positions=True, velocities=True)
    del simulation  # closes the files
    show = progress("  NVE, 0.5 and 1 fs")
    nve = measure_nve(system, start, picoseconds=plan.nve, platform="CPU", progress=show)
    write_energies(stem, nve)
    trajectory = analysis.load_trajectory(f"{stem}.dcd", topology)
    ends = [analysis.make_frame(trace.end, topology) for trace in nve.traces]
    if plan.constant_pressure:
        for end in ends:
            end.unitcell_vectors = trajectory.unitcell_vectors[-1:]
    longest = max(analysis.longest_bond(t, reference).ratio for t in (trajectory, *ends))
    checks = [*nve.checks, Check(name=BOND_CHECK, value=longest, unit="", high=LONGEST_BOND)]
    return Run(
        plan=plan,
        n_atoms=topology.getNumAtoms(),
        trajectory=trajectory,
        series=read_series(stem),
        nve=nve,
        seconds_per_step=seconds_per_step,
        checks=[replace(check, name=f"{plan.name}: {check.name}") for check in checks],
    )


# %% [markdown]
# Files and progress


# %%
def csv_reporter(stem: Path, every: int) -> app.StateDataReporter:
    return app.StateDataReporter(
        f"{stem}.csv", every, time=True, potentialEnergy=True, temperature=True, volume=True,
        density=True,
    )  # fmt: skip


def read_series(stem: Path) -> np.ndarray:
    table = np.genfromtxt(f"{stem}.csv", delimiter=",", skip_header=1)
    return np.atleast_2d(table)


def write_energies(stem: Path, nve: NVEResult) -> None:
    for trace in nve.traces:
        np.savetxt(
            f"{stem}-nve-{trace.timestep:g}fs.csv",
            np.column_stack([trace.time, trace.potential, trace.kinetic, trace.total]),
            fmt=["%.4f", "%.8f", "%.8f", "%.8f"],
            delimiter=",",
            header="time [ps],potential [eV],kinetic [eV],total [eV]",
            comments="",
        )


def say(text: str) -> None:
    print(text, flush=True)


def progress(label: str) -> Callable[[int, int], None]:
    """A line that counts up on a terminal, and one line at the end elsewhere."""
    began, live = time.perf_counter(), sys.stdout.isatty()

    def show(done: int, total: int) -> None:
        seconds = time.perf_counter() - began
        text = f"{label}: {done} of {total} steps, {1e3 * seconds / done:.1f} ms each"
        if live:
            print(f"\r{text:<72}", end="\n" if done == total else "", flush=True)
        elif done == total:
            say(text)

    return show


# %% [markdown]
# ## The report


# %%
def molecule_section(run: Run) -> Section:
    return Section(
        title=f"{run.plan.name.capitalize()}, {run.n_atoms} atoms",
        paragraphs=[
            f"Minimised, {run.plan.langevin:g} ps at {TEMPERATURE:g} K (LangevinMiddleIntegrator, "
            f"1 fs, friction 5/ps), then {run.plan.nve:g} ps at constant energy with time steps "
            "of 0.5 and 1 fs from the same start (velocity Verlet, no constraints)."
        ],
        tables=[conservation_table(run.nve.runs, run.nve.halving_ratios)],
        figures=[
            FigureBlock(
                svg=figures.draw_energies(run.nve.traces),
                caption="Constant energy. Left: potential and kinetic energy are exchanged while "
                "their sum stays (0.5 fs, the start of the run). Right: the sum, magnified; its "
                "ripple shrinks fourfold when the time step is halved.",
                alt=f"Energies of {run.plan.name} along the run at constant energy. The total "
                f"energy fluctuates by {number(run.nve.runs[0].rms)} meV per atom at 0.5 fs.",
            ),
            temperature_figure(run),
        ],
    )


def temperature_figure(run: Run) -> FigureBlock:
    mean, spread = run.series[:, 2].mean(), run.series[:, 2].std()
    return FigureBlock(
        svg=figures.draw_series(
            run.series[:, 0],
            {"kinetic temperature": run.series[:, 2]},
            "temperature [K]",
            target=TEMPERATURE,
            target_label="thermostat",
        ),
        caption=f"Kinetic temperature in the {run.plan.ensemble} run: {mean:.0f} K on average, "
        f"standard deviation {spread:.0f} K. The run starts from a minimum, so that half of the "
        "kinetic energy first flows into the bonds.",
        alt=f"Kinetic temperature of {run.plan.name} along time, around {mean:.0f} K.",
    )


def dipeptide_section(run: Run) -> Section:
    section = molecule_section(run)
    dihedrals = analysis.backbone_dihedrals(run.trajectory)
    ramachandran = FigureBlock(
        svg=figures.draw_ramachandran(dihedrals),
        caption=f"Backbone dihedrals of {len(dihedrals.phi)} frames of the NVT run. Labels are "
        "the usual names of regions. A few picoseconds stay near the start: this shows that the "
        "peptide moves, not where it would settle.",
        alt="Ramachandran plot: psi against phi of alanine dipeptide, coloured by time.",
    )
    return replace(section, figures=[*section.figures, ramachandran])


def water_section(run: Run) -> Section:
    oo = analysis.radial_distribution(run.trajectory, "O", "O", bin_width=0.1)
    oh = analysis.radial_distribution(run.trajectory, "O", "H", bin_width=0.1)
    density = analysis.density(run.trajectory)
    half = len(density) // 2
    lengths = run.trajectory.unitcell_lengths[:, 0] * 10
    rows = [
        ["density, mean of the second half", f"{density[half:].mean():.0f} kg/m³"],
        ["density, first and last frame", f"{density[0]:.0f} and {density[-1]:.0f} kg/m³"],
        ["box edge, first and last frame", f"{lengths[0]:.3f} and {lengths[-1]:.3f} Å"],
        ["first peak of g(r), O–O", f"{number(oo.peak[1])} at {number(oo.peak[0])} Å"],
    ]
    return Section(
        title=f"Liquid water, {run.n_atoms // 3} molecules in a periodic box",
        paragraphs=[
            f"{run.plan.langevin:g} ps at {TEMPERATURE:g} K and {PRESSURE:g} bar "
            "(LangevinMiddleIntegrator, 1 fs, MonteCarloBarostat every 10 steps) from a box that "
            "TIP3P had equilibrated, then a short run at constant energy. This is much too short "
            "for an equilibrium density: it shows that the box breathes and the liquid holds "
            "together."
        ],
        tables=[
            TableBlock(caption="Box and structure", columns=["quantity", "value"], rows=rows),
            conservation_table(run.nve.runs, run.nve.halving_ratios),
        ],
        figures=[
            FigureBlock(
                svg=figures.draw_radial(
                    {"O–O": oo, "O–H": oh}, marks={"O–O peak, X-ray": EXPERIMENT_OO}
                ),
                caption="Radial distribution between molecules. The dashed line is the first "
                "O–O peak of X-ray diffraction (Skinner et al. 2013).",
                alt=f"Radial distribution functions; O–O peaks at {number(oo.peak[0])} Å.",
            ),
            FigureBlock(
                svg=figures.draw_series(
                    run.series[:, 0], {"density": run.series[:, 4] * 1000}, "density [kg/m³]"
                ),
                caption="Density along the NPT run.",
                alt=f"Density along time, from {density[0]:.0f} to {density[-1]:.0f} kg/m³.",
            ),
            temperature_figure(run),
        ],
    )


def speed_section(runs: list[Run]) -> Section:
    rows = [
        [
            f"{run.plan.name}, {run.plan.ensemble}",
            str(run.n_atoms),
            str(run.plan.threads),
            number(1e3 * run.seconds_per_step),
            number(86.4 / (1e3 * run.seconds_per_step)),
        ]
        for run in runs
    ]
    return Section(
        title="Speed",
        paragraphs=[
            f"Wall time of whole steps at 1 fs, reporters and barostat included, on "
            f"{hardware()}. Short runs on a shared machine: good to some ten percent."
        ],
        tables=[
            TableBlock(
                caption="Speed of the Langevin runs",
                columns=["system", "atoms", "threads", "ms/step", "ns/day"],
                rows=rows,
            )
        ],
    )


def student_section(header: StudentHeader) -> Section:
    names = {
        "force_mae": "force MAE [meV/Å]",
        "force_rmse": "force RMSE [meV/Å]",
        "energy_mae": "energy MAE [meV/atom]",
        "angle": "force angle [°]",
        "stress_relative": "stress [%]",
    }
    errors = header.metrics.get("by_subset", {})
    rows = [
        [subset, f"{row['structures']:.0f}"]
        + ["–" if row.get(key) is None else number(row[key]) for key in names]
        for subset, row in errors.items()
    ]
    sizes = ", ".join(f"{key} {value}" for key, value in header.architecture.items())
    identity = [
        ["name", header.name],
        ["SHA-256", header.sha256],
        ["teacher", header.teacher],
        ["architecture", sizes],
        ["cutoff", f"{header.cutoff:g} Å"],
        ["elements", ", ".join(header.elements)],
        ["training structures", f"{header.dataset.get('train_structures', 0):,}"],
        ["licence of the weights", header.licence],
    ]
    tables = [TableBlock(caption="Identity", columns=[], rows=identity)]
    if rows:
        split = header.metrics.get("split", "held-out")
        tables.append(
            TableBlock(
                caption=f"Errors against the teacher on molecules that were not trained on "
                f"(“{split}” split), as the student file records them",
                columns=["subset", "structures", *names.values()],
                rows=rows,
            )
        )
    return Section(title="The student", tables=tables)


def method_section(runs: list[Run]) -> Section:
    rows = [
        [run.plan.name, run.plan.ensemble, f"{run.plan.langevin:g}", f"{run.plan.nve:g}"]
        for run in runs
    ]
    versions = {
        "openmm-mlffd": openmm_mlffd.__version__,
        "OpenMM": openmm.version.short_version,
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
    }
    return Section(
        title="How this was made",
        paragraphs=[
            f"Seed {SEED}; OpenMM's CPU platform, the network in single precision with energies "
            "and forces summed in double. "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + ".",
            "Trajectories (.dcd), series (.csv) and all numbers (numbers.json) are in the same "
            "folder as this file.",
        ],
        tables=[
            TableBlock(
                caption="Lengths of the runs",
                columns=["system", "ensemble", "length [ps]", "each NVE run [ps]"],
                rows=rows,
            )
        ],
    )


def hardware() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {os.cpu_count()} cores"


def write_numbers(path: Path, header: StudentHeader, runs: list[Run]) -> None:
    content: dict[str, Any] = {
        "student": {"name": header.name, "sha256": header.sha256},
        "hardware": hardware(),
        "seed": SEED,
        "systems": {
            run.plan.name: {
                "atoms": run.n_atoms,
                "plan": asdict(run.plan),
                "seconds_per_step": run.seconds_per_step,
                "mean_temperature": float(run.series[:, 2].mean()),
                "mean_density": float(np.nanmean(run.series[:, 4])),
                "nve": [asdict(result) for result in run.nve.runs],
                "halving_ratios": run.nve.halving_ratios,
            }
            for run in runs
        },
        "checks": [asdict(c) | {"passed": c.passed} for run in runs for c in run.checks],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


# %% [markdown]
# ## All together


# %%
def main() -> int:
    parser = argparse.ArgumentParser(description="Three simulations with a student, and a report.")
    parser.add_argument("--model", help="path of a student file; the bundled one by default")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--quick", action="store_true", help="too short to mean anything")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    header = read_header(options.model)
    student = {"modelPath": options.model} if options.model else {}

    began = time.perf_counter()
    plans = [shortened(p) if options.quick else p for p in (DIPEPTIDE, DRUG, WATER)]
    runs = [simulate(plan, options.output, student) for plan in plans]
    dipeptide, drug, water = runs
    checks = [check for run in runs for check in run.checks]
    minutes = (time.perf_counter() - began) / 60
    report = Report(
        title=f"Student “{header.name}” in OpenMM",
        summary=f"Three simulations with the student {header.name} on {hardware()}: a peptide, a "
        "drug that the student was not trained on, and a periodic box of water at constant "
        f"pressure. They took {minutes:.1f} minutes.",
        checks=checks,
        sections=[
            dipeptide_section(dipeptide),
            molecule_section(drug),
            water_section(water),
            speed_section(runs),
            student_section(header),
            method_section(runs),
        ],
    )
    write_numbers(options.output / "numbers.json", header, runs)
    path = report.write(options.output / "report.html")

    for check in checks:
        verdict = "passed" if check.passed else "FAILED"
        say(f"{verdict}  {check.name}: {number(check.value)} {check.unit}")
    say(f"{'all passed' if report.passed else 'NOT all passed'}; report: {path}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
