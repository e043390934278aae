"""Student and teacher side by side: tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.validation.report import FigureBlock, Section, TableBlock, number
from openmm_mlffd.validation.suite.curves import Line, draw_histograms, draw_lines, draw_map
from openmm_mlffd.validation.suite.dynamics import FRICTION
from openmm_mlffd.validation.suite.likeness import MAP_BINS, Feature, free_energy_map
from openmm_mlffd.validation.suite.plan import EnsembleRun

_WALL = 500.0  # meV, of dimer curves


def static_section(
    geometries: Mapping[str, Any], torsions: Mapping[str, Any], pairs: Mapping[str, Any]
) -> Section:
    """Geometries, vibrations, torsions and dimers."""
    tables = []
    if geometries:
        tables.append(_geometry_table(geometries))
    if torsions or pairs:
        tables.append(_energy_table(torsions, pairs))
    drawn = []
    if geometries:
        drawn.append(_frequency_figure(geometries))
    for name, found in torsions.items():
        lines = {k: (np.array(found["angles"]), np.array(found[k])) for k in ("teacher", "student")}
        drawn.append(
            FigureBlock(
                svg=draw_lines(lines, "torsion [degrees]", "energy [meV]", points=True),
                caption=f"Torsion of {name}: energies at the geometries that the teacher relaxed.",
                alt=f"Torsion profile of {name}.",
            )
        )
    for name, found in pairs.items():
        lines = {
            k: (np.array(found["distances"]), np.array(found[k])) for k in ("teacher", "student")
        }
        low = 1.3 * min(float(min(found["student"])), float(min(found["teacher"])))
        svg = draw_lines(
            lines, "distance [Å]", "interaction energy [meV]", ylim=(low, 1.2 * abs(low)),
            zero=True, points=True,
        )  # fmt: skip
        drawn.append(
            FigureBlock(
                svg=svg,
                caption=f"{name}: energy of the pair less that of its rigid molecules.",
                alt=f"Interaction energy of {name} along a distance.",
            )
        )
    return Section(
        title="Against the teacher: geometries, vibrations, torsions, dimers",
        paragraphs=[
            "Each model relaxed the molecules, the student from the teacher's minimum; wavenumbers "
            "are harmonic, from differences of forces. Torsions are scanned at geometries that the "
            "teacher relaxed with the torsion held. Molecules of dimers are rigid."
        ],
        tables=tables,
        figures=drawn,
    )


def _geometry_table(geometries: Mapping[str, Any]) -> TableBlock:
    keys = ("rmsd", "bond_mae", "angle_mae", "frequency_mae", "frequency_largest")
    return TableBlock(
        caption="Relaxed molecules",
        columns=[
            "molecule", "atoms", "RMSD [Å]", "bonds, MAE [Å]", "angles, MAE [°]",
            "wavenumbers, MAE [1/cm]", "largest [1/cm]",
        ],
        rows=[
            [name, str(row["atoms"]), *(number(row[key], 2) for key in keys)]
            for name, row in geometries.items()
        ],
    )  # fmt: skip


def _energy_table(torsions: Mapping[str, Any], pairs: Mapping[str, Any]) -> TableBlock:
    rows = [
        [f"{name}, torsion", number(t["mae"]), number(t["barrier"]), number(t["teacher_barrier"])]
        for name, t in torsions.items()
    ]
    rows += [
        [name, number(d["mae"]), number(d["deepest"]), number(d["teacher_deepest"])]
        for name, d in pairs.items()
    ]
    return TableBlock(
        caption="Torsions (highest point above the lowest) and dimers (deepest point; the error "
        f"counts where the teacher has less than {_WALL:g} meV)",
        columns=["curve", "MAE [meV]", "student [meV]", "teacher [meV]"],
        rows=rows,
    )


def _frequency_figure(geometries: Mapping[str, Any]) -> FigureBlock:
    from openmm_mlffd.validation.suite.force_figures import draw_parity

    mine, reference = (
        np.concatenate([np.asarray(g[key], float) for g in geometries.values()])
        for key in ("frequencies", "teacher_frequencies")
    )
    return FigureBlock(
        svg=draw_parity(reference, mine, "wavenumber [1/cm]"),
        caption=f"Harmonic wavenumbers of {len(geometries)} molecules; negative ones would be "
        "imaginary.",
        alt="Wavenumbers of the student against those of the teacher.",
    )


def short_section(run: EnsembleRun, numbers: Mapping[str, Any], text: str) -> Section:
    """What is said of runs that are too short, or failed."""
    return Section(
        title=f"Against the teacher: {run.name}",
        paragraphs=[f"{_length(run, numbers)} {text[0].upper()}{text[1:]}."],
    )


def molecule_section(
    run: EnsembleRun,
    numbers: Mapping[str, Any],
    features: Sequence[Feature],
    dihedrals: Sequence[NDArray[np.float64] | None],
) -> Section:
    """Distributions of a molecule's geometry."""
    rows = []
    table = dict(numbers["features"])
    if "ramachandran" in numbers:
        table["Ramachandran free energy"] = numbers["ramachandran"]
    for name, found in table.items():
        mae = "–"
        if "mae" in found and found["mae"] == found["mae"]:
            mae = f"{number(found['mae'], 2)} ± {number(found['mae_error'], 2)} {found['unit']}"
        rows.append(
            [
                name,
                f"{number(found['js'], 2)} ± {number(found['js_error'], 1)}",
                number(found["js_noise"], 2),
                mae,
            ]
        )
    drawn = [
        FigureBlock(
            svg=draw_histograms(
                {"teacher": f.teacher.ravel(), "student": f.student.ravel()},
                f.edges,
                f"{f.name} [{f.unit}]",
            ),
            caption=f"{f.name[0].upper()}{f.name[1:]}: all values of all frames.",
            alt=f"Distribution of {f.name} of student and teacher.",
        )
        for f in features
    ]
    if dihedrals[0] is not None and dihedrals[1] is not None:
        drawn += _maps(run, dihedrals[0], dihedrals[1])
    return Section(
        title=f"Against the teacher: {run.name}",
        paragraphs=[_length(run, numbers)],
        tables=[
            TableBlock(
                caption="Distances of the distributions: 0 alike, 1 nothing in common. Noise is "
                "what halves of one and the same trajectory differ by; errors are from five "
                "blocks. The last column is the mean difference of means (of free energies where "
                "both have been).",
                columns=["quantity", "Jensen–Shannon distance", "noise", "difference"],
                rows=rows,
            )
        ],
        figures=drawn,
    )


def _maps(
    run: EnsembleRun, student: NDArray[np.float64], teacher: NDArray[np.float64]
) -> list[FigureBlock]:
    edges = np.linspace(-180, 180, MAP_BINS + 1)
    maps = {
        "teacher": 1e3 * free_energy_map(teacher, run.temperature),
        "student": 1e3 * free_energy_map(student, run.temperature),
    }
    axes = ("φ [degrees]", "ψ [degrees]")
    drawn = [
        FigureBlock(
            svg=draw_map(values, edges, axes, "free energy [meV]"),
            caption=f"Ramachandran free energy of the {who}; white has not been visited.",
            alt=f"Free energy of phi and psi of the {who}.",
        )
        for who, values in maps.items()
    ]
    both = maps["student"] - maps["teacher"]
    if np.isfinite(both).any():
        drawn.append(
            FigureBlock(
                svg=draw_map(both, edges, axes, "student − teacher [meV]", centered=True),
                caption="Difference, where both have been.",
                alt="Difference of the free energies of student and teacher.",
            )
        )
    return drawn


def box_section(run: EnsembleRun, numbers: Mapping[str, Any], densities: Sequence[Line]) -> Section:
    """Density and structure of a liquid."""
    rows = [
        [
            "density [g/cm³]",
            number(numbers["density"]),
            number(numbers["teacher_density"]),
            f"{number(100 * numbers['density_difference'], 2)} ± "
            f"{number(100 * numbers['density_difference_error'], 2)} %",
        ]
    ]
    drawn = [
        FigureBlock(
            svg=draw_lines(
                {"teacher": densities[1], "student": densities[0]},
                "time [ps]",
                "density [g/cm³]",
            ),
            caption="Density of both along the same protocol from the same start.",
            alt="Densities of student and teacher along time.",
        )
    ]
    for pair, found in numbers["radial"].items():
        for what, k in (("position of the first peak [Å]", 0), ("its height", 1)):
            mine, reference = found["peak_student"][k], found["peak_teacher"][k]
            rows.append(
                [f"{pair}, {what}", number(mine), number(reference), number(mine - reference, 2)]
            )
        rows.append(
            [
                f"{pair}, mean difference of g(r)", "", "",
                f"{number(found['mae'], 2)} ± {number(found['mae_error'], 2)}",
            ]
        )  # fmt: skip
        lines = {k: (np.array(found["r"]), np.array(found[k])) for k in ("teacher", "student")}
        drawn.append(
            FigureBlock(
                svg=draw_lines(lines, "distance [Å]", f"g(r), {pair}"),
                caption=f"Radial distribution of {pair} between molecules.",
                alt=f"Radial distribution of {pair} of student and teacher.",
            )
        )
    return Section(
        title=f"Against the teacher: {run.name}",
        paragraphs=[_length(run, numbers)],
        tables=[
            TableBlock(
                caption="Liquid",
                columns=["quantity", "student", "teacher", "difference"],
                rows=rows,
            )
        ],
        figures=drawn,
    )


def _length(run: EnsembleRun, numbers: Mapping[str, Any]) -> str:
    text = (
        f"Both ran {number(numbers['picoseconds'])} ps from the same start, minimised by "
        f"themselves, with the same seed: LangevinMiddleIntegrator, {run.temperature:g} K, "
        f"friction {FRICTION:g}/ps, {run.timestep:g} fs; the first fifth is left out."
    )
    if numbers["picoseconds"] < 0.999 * run.picoseconds:
        text += f" {run.picoseconds:g} ps were planned."
    for key, who in (("failure", "student"), ("teacher_failure", "teacher")):
        if numbers[key]:
            text += f" The {who} did not reach the end: {numbers[key]}."
    return text
