"""Errors of a model on labelled structures: tables, figures, files of the worst."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from openmm_mlffd.training.evaluate import ANGLE_THRESHOLD
from openmm_mlffd.validation.report import FigureBlock, Section, TableBlock, number
from openmm_mlffd.validation.suite import force_figures as draw
from openmm_mlffd.validation.suite.forces import (
    Evaluated,
    force_checks,
    measure_forces,
    worst_structures,
)
from openmm_mlffd.validation.suite.frames import write_extended_xyz, write_pymol
from openmm_mlffd.validation.suite.job import Job, SectionResult, named

WORST_FOLDER = "worst"
"""Files of the worst structures, in the folder of the report."""

_DRAWN_ATOMS = 80  # larger structures cannot be read as a drawing


def run_forces(job: Job) -> SectionResult:
    """Errors on the data set of the job.

    Raises
    ------
    ValueError
        If there is no data set, or the model refuses its structures.
    """
    if job.data is None:
        raise ValueError("no data set was given (--data)")
    evaluated, numbers = measure_forces(job, job.data)
    files = write_worst(job, evaluated)
    numbers["files"] = files
    section = Section(
        title="Errors of forces, energies and stress",
        paragraphs=[_intro(numbers), _files_text(files)],
        tables=[
            _table(numbers["subsets"] | {"all": numbers["all"]}),
            _element_table(numbers["elements"]),
            _worst_table(numbers["worst"][: job.plan.forces.n_worst]),
        ],
        figures=make_figures(evaluated, numbers, job.plan.forces.n_worst),
    )
    checks = named(force_checks(numbers), "forces")
    return SectionResult(numbers=numbers, checks=checks, sections=[section])


def write_worst(job: Job, e: Evaluated) -> list[str]:
    """Write the structures with the largest errors as XYZ and PyMOL scripts; gives their names."""
    folder = job.output / WORST_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    worst = worst_structures(e, job.plan.forces.n_worst)
    for rank, i in enumerate(worst.tolist(), 1):
        structure, rows = e.structure(i)
        teacher, student = e.labels[rows], e.forces[rows]
        subset = e.subsets[e.structures.subset[i]]
        title = f"{subset}, structure {e.index[i]}: force RMSE {1e3 * e.rmse[i]:.0f} meV/Å"
        stem = f"worst-{rank:02d}"
        write_extended_xyz(folder / f"{stem}.xyz", structure, teacher, student, comment=title)
        write_pymol(folder / f"{stem}.pml", f"{stem}.xyz", structure, teacher, student, title=title)
        names.extend(f"{WORST_FOLDER}/{stem}{suffix}" for suffix in (".xyz", ".pml"))
    return names


def make_figures(e: Evaluated, numbers: Mapping[str, Any], n_worst: int) -> list[FigureBlock]:
    """All panels; those for which the data have nothing are left out."""
    return [
        *_parities(e),
        *_histograms(e),
        *_trends(e),
        *_groups(numbers),
        *_worst_figures(e, n_worst),
        *_stress_figure(e),
    ]


def _parities(e: Evaluated) -> list[FigureBlock]:
    composition = e.composition_energy()
    label = (e.structures.energy - composition) / e.count
    found = (e.energy - composition) / e.count
    lengths = [np.linalg.norm(f, axis=1) for f in (e.labels, e.forces)]
    return [
        FigureBlock(
            svg=draw.draw_parity(label, found, "energy [eV/atom]"),
            caption="Energy per atom, less what the numbers of atoms explain (by least squares "
            "over the labels). Points off the line are structures with a wrong energy.",
            alt="Energies of the student against those of the teacher.",
        ),
        FigureBlock(
            svg=draw.draw_parity(e.labels.ravel(), e.forces.ravel(), "force component [eV/Å]"),
            caption=f"All {3 * len(e.labels):,} components of the forces.",
            alt="Force components of the student against those of the teacher.",
        ),
        FigureBlock(
            svg=draw.draw_parity(lengths[0], lengths[1], "length of the force [eV/Å]"),
            caption="Length of the force on each atom. Below the line: the student is too soft.",
            alt="Lengths of the student's forces against the teacher's.",
        ),
    ]


def _histograms(e: Evaluated) -> list[FigureBlock]:
    angles = e.angles()
    known = angles[np.isfinite(angles)]
    energy = 1e3 * (e.energy - e.structures.energy) / e.count
    figures = [
        FigureBlock(
            svg=draw.draw_errors(energy, "error of the energy [meV/atom]"),
            caption=f"Errors of the energy: mean {number(float(energy.mean()))}, median size "
            f"{number(float(np.median(np.abs(energy))))} meV/atom. The outermost bins hold all "
            "that is further out.",
            alt="Histogram of the errors of the energy.",
        ),
        FigureBlock(
            svg=draw.draw_errors(
                1e3 * (e.forces - e.labels).ravel(), "error of a force component [meV/Å]"
            ),
            caption="Errors of the force components. A symmetric peak at zero is right; the "
            "outermost bins hold all that is further out.",
            alt="Histogram of the errors of force components.",
        ),
        FigureBlock(
            svg=draw.draw_cumulative(1e3 * e.error, "error of the force on an atom [meV/Å]"),
            caption="Share of the atoms whose force, as a vector, is wrong by less than this.",
            alt="Cumulative distribution of the errors of forces.",
        ),
    ]
    if len(known):
        figures.append(
            FigureBlock(
                svg=draw.draw_errors(known, "angle between forces [degrees]", signed=False),
                caption=f"Angle between the forces of student and teacher, where the teacher's "
                f"exceeds {ANGLE_THRESHOLD} eV/Å: median {number(float(np.median(known)))}°, "
                f"{number(100 * float((known > 15).mean()))} % above 15°.",
                alt="Histogram of the angles between forces.",
            )
        )
    return figures


def _trends(e: Evaluated) -> list[FigureBlock]:
    length, error = np.linalg.norm(e.labels, axis=1), 1e3 * e.error
    rmse, count = 1e3 * e.rmse, e.count.astype(float)
    temperature = e.structures.temperature.astype(float)
    ylabel = "RMSE of a structure [meV/Å]"
    figures = [
        FigureBlock(
            svg=draw.draw_trend(
                length, error, "length of the force [eV/Å]", "error [meV/Å]", logarithmic=True
            ),
            caption="Error of the force on an atom against its length.",
            alt="Error of forces against their length.",
        ),
        FigureBlock(
            svg=draw.draw_trend(count, rmse, "atoms", ylabel, logarithmic=True),
            caption="Error of the forces against the size of the structure.",
            alt="Error of forces against the number of atoms.",
        ),
    ]
    known = np.isfinite(temperature)
    if known.any() and np.ptp(temperature[known]) > 0:
        svg = draw.draw_trend(
            temperature[known], rmse[known], "temperature of the sampler [K]", ylabel
        )
        figures.append(
            FigureBlock(
                svg=svg,
                caption="Error of the forces against the temperature at which the structure was "
                "sampled.",
                alt="Error of forces against temperature.",
            )
        )
    near = np.isfinite(e.distance)
    if near.any():
        svg = draw.draw_trend(
            e.distance[near],
            error[near],
            "distance to the training set",
            "error [meV/Å]",
            logarithmic=True,
        )
        figures.append(
            FigureBlock(
                svg=svg,
                caption="Error of the force on an atom against how far its surroundings (5 Å) are "
                "from the nearest of the same element in the training set, in standard deviations "
                "of radial symmetry functions. Rising: the further, the worse.",
                alt="Error of forces against the distance to the training set.",
            )
        )
    return figures


def _groups(numbers: Mapping[str, Any]) -> list[FigureBlock]:
    figures = []
    for key, what in (("elements", "element"), ("subsets", "subset")):
        table = numbers[key]
        errors = {name: row["force_mae"] for name, row in table.items()}
        value, low, high = (
            np.array([row[k] for row in errors.values()], float) for k in ("value", "low", "high")
        )
        figures.append(
            FigureBlock(
                svg=draw.draw_bars(list(errors), value, low, high, "force MAE [meV/Å]"),
                caption=f"Mean error of force components by {what}; lines are 95 % confidence "
                "intervals (bootstrap over molecules).",
                alt=f"Force errors by {what}.",
            )
        )
    return figures


def _worst_figures(e: Evaluated, n_worst: int) -> list[FigureBlock]:
    order = worst_structures(e, max(50, n_worst))
    top = order[:n_worst]
    names = [f"{e.subsets[e.structures.subset[i]]} {e.index[i]}" for i in top]
    nothing = np.full(len(top), math.nan)
    figures = [
        FigureBlock(
            svg=draw.draw_bars(names, 1e3 * e.rmse[top], nothing, nothing, "force RMSE [meV/Å]"),
            caption="The worst structures, one of each molecule: subset and place in the data set.",
            alt="Force errors of the worst structures.",
        )
    ]
    drawn = [i for i in order if e.count[i] <= _DRAWN_ATOMS]
    if drawn:
        structure, rows = e.structure(int(drawn[0]))
        figures.append(
            FigureBlock(
                svg=draw.draw_molecule(structure, e.labels[rows], e.forces[rows]),
                caption=f"The worst structure of up to {_DRAWN_ATOMS} atoms (structure "
                f"{e.index[drawn[0]]}): fill of the atoms is the error, rims are the elements' "
                "colours, arrows are the forces of the teacher (dark) and the student (orange).",
                alt="A molecule with forces as arrows, atoms coloured by their error.",
            )
        )
    return figures


def _stress_figure(e: Evaluated) -> list[FigureBlock]:
    label = e.structures.stress.astype(float)
    known = np.isfinite(label).all((1, 2)) & np.isfinite(e.stress).all((1, 2))
    if not known.any():
        return []
    return [
        FigureBlock(
            svg=draw.draw_parity(
                1e3 * label[known].ravel(), 1e3 * e.stress[known].ravel(), "stress [meV/Å³]"
            ),
            caption=f"Components of the stress of {int(known.sum())} periodic structures; "
            "1 meV/Å³ is 1.6 kbar.",
            alt="Stress of the student against the teacher's.",
        )
    ]


def _intro(numbers: Mapping[str, Any]) -> str:
    found = numbers["all"]
    text = (
        f"{found['structures']:,} structures ({found['atoms']:,} atoms) of the split "
        f"“{numbers['split']}” of {numbers['data']}, labelled by {numbers['labels']}. Intervals "
        "are of 95 % confidence, by resampling whole molecules."
    )
    correlation = numbers["distance_correlation"]
    if correlation is not None and not math.isnan(correlation):
        text += (
            " Rank correlation of an atom's error with the distance of its surroundings to the "
            f"training set: {number(correlation, 2)}."
        )
    return text


def _files_text(files: list[str]) -> str:
    return (
        f"The worst structures are in the folder {WORST_FOLDER}: extended XYZ with both forces, "
        f"and scripts for PyMOL that draw them as arrows ({len(files) // 2} of each)."
    )


def interval(entry: Mapping[str, Any], digits: int = 3) -> str:
    """A value with its confidence interval as text; a dash where there is none."""
    if entry["value"] is None or math.isnan(entry["value"]):
        return "–"
    text = number(entry["value"], digits)
    if entry["low"] is None or math.isnan(entry["low"]):
        return text
    return f"{text} ({number(entry['low'], digits)} to {number(entry['high'], digits)})"


def _table(rows: Mapping[str, Any]) -> TableBlock:
    keys = ("force_mae", "force_rmse", "angle", "energy_mae", "conformer_mae", "stress_relative")
    return TableBlock(
        caption="Errors by subset. Force errors are per component; angles where the teacher's "
        f"force exceeds {ANGLE_THRESHOLD} eV/Å; relative energies are those within one molecule "
        "and composition; the stress error is relative to its root mean square.",
        columns=[
            "subset", "structures", "force MAE [meV/Å]", "force RMSE [meV/Å]", "angle [°]",
            "energy MAE [meV/atom]", "relative energy MAE [meV]", "stress [%]",
        ],
        rows=[
            [name, f"{row['structures']:,}", *(interval(row[key]) for key in keys)]
            for name, row in rows.items()
        ],
    )  # fmt: skip


def _element_table(elements: Mapping[str, Any]) -> TableBlock:
    return TableBlock(
        caption="Errors by element. The last column but one is what a force component is like.",
        columns=[
            "element", "atoms", "force MAE [meV/Å]", "force RMSE [meV/Å]", "angle [°]",
            "rms of the labels [eV/Å]", "largest error [eV/Å]",
        ],
        rows=[
            [
                name, f"{row['atoms']:,}", interval(row["force_mae"]), number(row["force_rmse"]),
                "–" if row["angle"] is None else number(row["angle"]),
                number(row["rms_label"]), number(row["largest"]),
            ]
            for name, row in elements.items()
        ],
    )  # fmt: skip


def _worst_table(worst: list[Mapping[str, Any]]) -> TableBlock:
    return TableBlock(
        caption="The worst structures, one of each molecule",
        columns=["place in the data", "subset", "atoms", "force RMSE [meV/Å]", "largest [eV/Å]"],
        rows=[
            [
                str(row["place"]), row["subset"], str(row["atoms"]), number(row["force_rmse"]),
                number(row["largest"]),
            ]
            for row in worst
        ],
    )  # fmt: skip
