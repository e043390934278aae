"""What `mlffd prepare` does."""

from collections.abc import Callable
from pathlib import Path

import openmm
from openmm import app

from openmm_mlffd.interfaces.openmm_prepare import Preparation, prepare
from openmm_mlffd.interfaces.openmm_stored import save_system
from openmm_mlffd.validation.structures import read_structure


def run_prepare_command(
    structure: Path,
    output: Path,
    *,
    model: str | None,
    temperature: float,
    pressure: float | None,
    picoseconds: float,
    hydrogen_mass: float | None,
    seed: int,
    echo: Callable[[str], None],
) -> Preparation:
    """Prepare a structure, write it, and say what was done.

    Parameters
    ----------
    structure
        PDB, CIF or SDF file, with hydrogens.
    output
        PDB file to write; the System and the State go beside it, as ``.system.xml`` and
        ``.state.xml``.
    model, temperature, pressure, picoseconds, hydrogen_mass, seed
        As for `prepare`.
    echo
        Prints a line.

    Raises
    ------
    ValueError
        If the structure cannot be read, or hydrogens are missing; says how to add them.
    PreparationError
        If the structure came apart.
    """
    topology, positions = read_structure(structure)
    found = prepare(
        topology,
        positions,
        model=model,
        temperature=temperature,
        pressure=pressure,
        picoseconds=picoseconds,
        hydrogen_mass=hydrogen_mass,
        seed=seed,
    )
    topology.setPeriodicBoxVectors(
        found.state.getPeriodicBoxVectors()
        if topology.getPeriodicBoxVectors() is not None
        else None
    )
    with output.open("w") as file:
        app.PDBFile.writeFile(topology, found.state.getPositions(), file, keepIds=True)
    system_file, state_file = (output.with_suffix(f".{x}.xml") for x in ("system", "state"))
    save_system(found.system, system_file)
    state_file.write_text(openmm.XmlSerializer.serialize(found.state))
    for line in format_preparation(found):
        echo(line)
    echo(f"written: {output}, {system_file}, {state_file}")
    return found


def format_preparation(found: Preparation) -> list[str]:
    """What was done, and what to do next, as lines of text."""
    lines = [f"{'stage':36s} {'energy':>14s} {'largest force':>14s} {'temperature':>12s}"]
    lines.append(f"{'':36s} {'eV':>14s} {'eV/Å':>14s} {'K':>12s}")
    lines += [
        f"{s.name:36s} {s.energy:14.3f} {s.largest_force:14.2f} {s.temperature:12.0f}"
        for s in found.stages
    ]
    return [*lines, *found.advice]
