"""Structures that no training set holds: finite forces, no holes, loud failures."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_mlffd import prepare
from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.units import (
    ANGSTROM_PER_NM,
    KJ_PER_MOL_NM_PER_EV_ANGSTROM,
    KJ_PER_MOL_PER_EV,
)
from openmm_mlffd.validation.nve import make_context
from openmm_mlffd.validation.suite.dynamics import run_langevin
from openmm_mlffd.validation.suite.job import Job
from openmm_mlffd.validation.suite.models import Structure, pack
from openmm_mlffd.validation.suite.plan import PEPTIDE, EnsembleRun
from openmm_mlffd.validation.suite.store import read_arrays, write_arrays
from openmm_mlffd.validation.suite.systems import System, load_system, molecules

SHORTEST = 0.5
"""Distorted structures have atoms as near as this [Å]."""

HOLE = 0.5
"""A structure this much below its molecule's minimum [eV] fell into a hole."""

DEEP = 3.0
"""A molecule's given structure, sound as it is, does not lie so far above its minimum [eV]."""

FUSED = 0.6
"""Atoms nearer than this share of the sum of their covalent radii are fused."""

TORN = 1.5
"""A bond longer than this many times the sum of the covalent radii is torn."""

CONVERGED = 0.1
"""Largest force [eV/Å] of a minimisation that ended well."""

HOT = 1000.0
"""Temperature of the hot runs [K]."""

_KINDS = ("rattled", "clashing", "squeezed", "overlapping")


def distort(system: System, kind: str, rng: np.random.Generator) -> Structure:
    """A distorted copy of a molecule.

    Parameters
    ----------
    system
        The molecule.
    kind
        ``rattled``: all atoms displaced by up to 0.6 Å. ``clashing``: one atom put at 0.5 to
        0.9 Å from another. ``squeezed``: all distances reduced to 0.6 to 0.95 of what they were.
        ``overlapping``: a second copy of the molecule pushed into the first.
    rng
        Source of the distortion.

    Returns
    -------
    Structure
        No two atoms are nearer than `SHORTEST`.
    """
    numbers, base = system.numbers, system.positions
    for attempt in range(200):
        x = base.copy()
        if kind == "rattled":
            x = x + rng.normal(scale=rng.uniform(0.05, 0.35), size=x.shape)
        elif kind == "clashing":
            i, j = rng.choice(len(x), 2, replace=False)
            direction = rng.normal(size=3)
            x[i] = x[j] + rng.uniform(SHORTEST, 0.9) * direction / np.linalg.norm(direction)
        elif kind == "squeezed":
            x = x.mean(0) + rng.uniform(0.6, 0.95) * (x - x.mean(0))
        else:
            turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            other = (x - x.mean(0)) @ turn + x.mean(0)
            shift = rng.normal(size=3)
            shift *= rng.uniform(0.5, 3.0) * (1 + attempt / 20) / np.linalg.norm(shift)
            x = np.concatenate([x, other + shift])
        if _nearest(x) >= SHORTEST:
            copies = len(x) // len(numbers)
            return Structure(np.tile(numbers, copies), x, charge=copies * system.charge)
    raise ValueError(f"{system.name} cannot be {kind} without atoms nearer than {SHORTEST} Å")


def measure_robustness(job: Job) -> dict[str, Any]:
    """Distorted structures, minimisations, hot runs: all numbers."""
    return {
        "distorted": measure_distorted(job),
        "minimizations": measure_minimizations(job),
        "preparations": measure_minimizations(job, prepared=True),
        "relaxations": _relaxations(job),
        "hot": {name: measure_hot(job, name) for name in hot_names(job)},
    }


def hot_names(job: Job) -> list[str]:
    """Molecules that are heated."""
    names = job.plan.robustness.hot_molecules
    return list(molecules()) if names is None else list(names)


def _relaxations(job: Job) -> dict[str, Any]:
    """Minimisations of the molecules as they are: energies [eV], and those that ended wrong.

    The energy of a molecule that was torn or fused is that of its structure before: what lies
    below it in a hole is no minimum to compare with.
    """
    names = dict.fromkeys([*hot_names(job), *_small_names(job)])

    def measure(_: Path) -> dict[str, Any]:
        energies, wrong = {}, []
        for name in names:
            system = load_system(name)
            given = job.model.label(pack([Structure(system.numbers, system.positions)])).energy[0]
            found = minimise(job, system)
            outcome = verdict(found, float(given) - DEEP)
            sound = outcome in ("converged", "slow")
            energy = found["energy"] if sound else float(given)
            energies[name] = energy if math.isfinite(energy) else None
            if not sound and outcome != "loud":
                wrong.append(f"{name} ({outcome})")
        return {"energies": energies, "silent": len(wrong), "silent_of": wrong}

    settings = {"model": job.model.identity, "names": list(names), "judged": "with bonds"}
    return job.store.piece("minima", settings, measure).numbers


def _minima(job: Job) -> dict[str, float]:
    """Energy of each minimised molecule [eV], by the model itself."""
    energies = _relaxations(job)["energies"]
    return {name: math.nan if e is None else e for name, e in energies.items()}


def _small_names(job: Job) -> list[str]:
    return ["methanol"] if job.plan.level == "tiny" else [*molecules(), PEPTIDE]


def _make_distorted(job: Job, n: int, seed: int) -> list[tuple[str, str, Structure]]:
    rng = np.random.default_rng(seed)
    names = _small_names(job)
    found = []
    for k in range(n):
        name, kind = names[k // len(_KINDS) % len(names)], _KINDS[k % len(_KINDS)]
        if len(load_system(name).numbers) < 5 and kind == "squeezed":
            kind = "clashing"  # its hydrogens would be too near
        found.append((name, kind, distort(load_system(name), kind, rng)))
    return found


def measure_distorted(job: Job) -> dict[str, Any]:
    """Energies and forces of distorted structures."""
    minima = _minima(job)
    n = job.plan.robustness.distorted

    def measure(folder: Path) -> dict[str, Any]:
        made = _make_distorted(job, n, seed=0)
        batch = pack([s for _, _, s in made])
        labels = job.model.label(batch)
        forces = np.split(labels.forces, batch.offsets[1:-1])
        largest = np.array([np.abs(f).max() for f in forces])
        finite = np.isfinite(labels.energy) & np.isfinite(largest)
        copies = np.array([len(s.numbers) / len(load_system(m).numbers) for m, _, s in made])
        above = labels.energy - copies * np.array([minima[m] for m, _, _ in made])
        nearest = np.array([_nearest(s.positions) for _, _, s in made])
        holes = finite & ~(above > -HOLE)
        write_arrays(
            folder / "arrays.npz", above=above, largest=largest, nearest=nearest, finite=finite
        )
        return {
            "structures": n,
            "not_finite": int((~finite).sum()),
            "holes": int(holes.sum()),
            "hole_of": [
                f"{made[i][0]}, {made[i][1]}, {above[i]:.3g} eV, nearest atoms {nearest[i]:.2f} Å"
                for i in np.flatnonzero(holes)[:10]
            ],
            "shortest_distance": float(nearest.min()),
            "lowest": float(np.nanmin(above)) if np.isfinite(above).any() else None,
            "largest_force": float(largest[finite].max()) if finite.any() else None,
            "folder": folder.name,
        }

    settings = {"model": job.model.identity, "structures": n, "level": job.plan.level}
    return job.store.piece("distorted structures", settings, measure).numbers


def minimise(job: Job, system: System, start: Structure | None = None) -> dict[str, Any]:
    """Minimise a structure in OpenMM and say how it ended.

    Returns
    -------
    dict
        ``energy`` [eV] and ``largest_force`` [eV/Å] at the end, ``error``: the text of the
        exception, if there was one, ``nearest`` and ``longest``: the smallest distance of two
        atoms and the longest bond, each over the sum of their covalent radii.
    """
    positions = system.positions if start is None else start.positions
    try:
        made = job.model.system(system.topology, charge=system.charge)
        context = make_context(made, openmm.VerletIntegrator(0.001))
        context.setPositions(positions / ANGSTROM_PER_NM)
        openmm.LocalEnergyMinimizer.minimize(context, tolerance=5.0, maxIterations=500)
        state = context.getState(positions=True, energy=True, forces=True)
    except openmm.OpenMMException as error:
        return _failed(error)
    return _describe(system, state)


def prepare_start(job: Job, system: System, start: Structure) -> dict[str, Any]:
    """Bring a structure to rest as users are told to, with `prepare`, and say how it ended."""
    try:
        made = job.model.system(system.topology, charge=system.charge)
        found = prepare(
            system.topology, start.positions / ANGSTROM_PER_NM, system=made, picoseconds=0.0
        )
        context = make_context(made, openmm.VerletIntegrator(0.001))
        context.setPositions(found.state.getPositions())
        state = context.getState(positions=True, energy=True, forces=True)
    except (openmm.OpenMMException, RuntimeError) as error:
        return _failed(error)
    result = _describe(system, state)
    # of the minimum, not of the heated structure that comes after it
    energies = [s.energy for s in found.stages[1:]]
    result.update(energy=min(energies), largest_force=found.stages[1].largest_force)
    return result


def _failed(error: Exception) -> dict[str, Any]:
    numbers = dict.fromkeys(("energy", "largest_force", "nearest", "longest"))
    return {**numbers, "error": str(error) or repr(error)}


def _describe(system: System, state: openmm.State) -> dict[str, Any]:
    forces = state.getForces(asNumpy=True)._value / KJ_PER_MOL_NM_PER_EV_ANGSTROM
    end = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    return {
        "energy": state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV,
        "largest_force": float(np.linalg.norm(forces, axis=1).max()),
        "nearest": _relative_nearest(system.numbers, end),
        "longest": _relative_longest(system, end),
        "error": "",
    }


def verdict(result: Mapping[str, Any], minimum: float) -> str:
    """How a minimisation ended: ``converged``, ``loud``, ``slow``, or what is wrong.

    ``slow`` are finite forces that are not small yet, in a structure that is sound; ``fused``,
    ``torn``, ``hole`` and ``not finite`` are failures that nothing said aloud.
    """
    if result["error"]:
        return "loud"
    values = [result[k] for k in ("energy", "largest_force", "nearest", "longest")]
    if not all(v is not None and math.isfinite(v) for v in values):
        return "not finite"
    if result["energy"] < minimum - HOLE:
        return "hole"
    if result["nearest"] < FUSED:
        return "fused"
    if result["longest"] > TORN:
        return "torn"
    return "converged" if result["largest_force"] < CONVERGED else "slow"


def measure_minimizations(job: Job, *, prepared: bool = False) -> dict[str, Any]:
    """How minimisations from distorted structures end, by OpenMM alone or with `prepare`."""
    minima = _minima(job)
    n = job.plan.robustness.minimizations
    end = prepare_start if prepared else minimise
    title = "preparations" if prepared else "minimisations"

    def measure(folder: Path) -> dict[str, Any]:
        # the same molecule only: two would need a System of their own
        made = [m for m in _make_distorted(job, 4 * n + 8, seed=1) if m[1] != "overlapping"][:n]
        ends: dict[str, list[str]] = {}
        rows = []
        for i, (name, kind, structure) in enumerate(made):
            job.store.clock.check()
            path = folder / f"{i:04d}.npz"
            if path.is_file():
                outcome = str(read_arrays(path)["outcome"])
            else:
                outcome = verdict(end(job, load_system(name), structure), minima[name])
                write_arrays(path, outcome=np.array(outcome))
            job.progress(title, i + 1, n)
            ends.setdefault(outcome, []).append(f"{name}, {kind}")
            rows.append(outcome)
        silent = ("not finite", "hole", "fused", "torn")
        return {
            "structures": len(rows),
            "outcomes": {k: len(v) for k, v in sorted(ends.items())},
            "silent": sum(len(ends.get(k, [])) for k in silent),
            "silent_of": [f"{what} ({k})" for k in silent for what in ends.get(k, [])][:10],
        }

    settings = {"model": job.model.identity, "structures": n, "level": job.plan.level}
    return job.store.piece(title, settings | {"judged": "with bonds"}, measure).numbers


def measure_hot(job: Job, name: str) -> dict[str, Any]:
    """A molecule at 1,000 K."""
    minima = _minima(job)
    length = job.plan.robustness.hot_picoseconds
    system = load_system(name)
    run = EnsembleRun(
        system=name, picoseconds=length, frame=length / 50, temperature=HOT, timestep=0.25
    )

    def measure(folder: Path) -> dict[str, Any]:
        trajectory = run_langevin(
            lambda: job.model.system(system.topology, charge=system.charge), system, run, folder,
            clock=job.store.clock, minutes=job.limit(), progress=job.progress,
        )  # fmt: skip
        above = trajectory.potential - minima[name]
        return {
            "picoseconds": float(trajectory.time[-1]) if len(trajectory.time) else 0.0,
            "failure": trajectory.failure,
            "holes": int((~(above > -HOLE)).sum()),
            "lowest": float(above.min()) if len(above) else None,
            "mean_above": float(above.mean()) if len(above) else None,
            "time": trajectory.time,
            "above": above,
        }

    settings = {"model": job.model.identity, "system": name, "picoseconds": length}
    return job.store.piece(f"{HOT:g} K {name}", settings, measure).numbers


def _nearest(x: NDArray[np.float64]) -> float:
    distances = np.linalg.norm(x[:, None] - x, axis=2)
    return float(distances[np.triu_indices(len(x), 1)].min())


def _relative_nearest(numbers: NDArray[np.int64], x: NDArray[np.float64]) -> float:
    radii = np.array([COVALENT_RADII[z] for z in numbers])
    share = np.linalg.norm(x[:, None] - x, axis=2) / (radii[:, None] + radii)
    return float(share[np.triu_indices(len(x), 1)].min())


def _relative_longest(system: System, x: NDArray[np.float64]) -> float:
    radii = np.array([COVALENT_RADII[z] for z in system.numbers])
    first, second = system.bonds.T
    share = np.linalg.norm(x[first] - x[second], axis=1) / (radii[first] + radii[second])
    return float(share.max(initial=0.0))
