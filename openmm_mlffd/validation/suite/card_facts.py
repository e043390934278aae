"""What a model card says beyond its tables: domain and weaknesses, from stored numbers alone."""

from collections.abc import Iterator, Mapping
from typing import Any

from openmm_mlffd.validation.report import number, range_text, value_text
from openmm_mlffd.validation.suite.stability_section import result

FEW_ATOMS = 300
"""Elements with fewer atoms among the labelled structures are hardly tested."""

WORSE = 1.5
"""Subsets and elements whose force error is that of everything times this are named."""


def domain(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where a student may be used, as far as its file and its validation tell."""
    header = content["student"]["header"]
    if header is None:
        return [("", "not recorded: the model is no student file")]
    blocks = header["architecture"].get("n_interactions")
    rows = [
        ("elements", ", ".join(header["elements"])),
        ("states", "closed shells; charges follow from the hydrogens, no charge can be set"),
    ]
    if blocks is not None:
        far = blocks * header["architecture"].get("message_cutoff", header["cutoff"])
        tail = header["architecture"].get("tail", False)
        text = f"{far:g} Å ({blocks} interactions); "
        text += (
            f"a Coulomb and dispersion tail to {header['cutoff']:g} Å"
            if tail
            else "nothing beyond acts, neither charges nor dispersion"
        )
        rows.append(("atoms feel one another up to", text))
    data = header["dataset"]
    if "train_structures" in data:
        text = f"{data['train_structures']:,} structures"
        text += f", {data['train_atoms']:,} atoms" if "train_atoms" in data else ""
        rows.append(("trained on", f"{text} of {', '.join(data.get('files', []))}"))
    forces = content["sections"].get("forces", {})
    if "subsets" in forces:
        rows.append(("tested on", ", ".join(forces["subsets"])))
    found = stability_rows(content)
    if found:
        temperatures = sorted({run["kelvin"] for _, run in found})
        rows.append(("stability tested at", ", ".join(f"{t:g} K" for t in temperatures)))
    return rows


def weaknesses(content: Mapping[str, Any]) -> list[str]:
    """What is known to be weak: failed checks, what is worse than the rest, what is untested."""
    lines = [*_failed(content), *_worse(content), *_unstable(content), *_untested(content)]
    return lines or ["None that the checks above would show."]


def _failed(content: Mapping[str, Any]) -> Iterator[str]:
    for check in content["checks"]:
        if not check["passed"]:
            value = value_text(check["value"], check["high"], check["unit"])
            limit = range_text(check["low"], check["high"], check["unit"])
            yield f"{check['name']}: {value}; it has to be {limit}."


def _worse(content: Mapping[str, Any]) -> Iterator[str]:
    forces = content["sections"].get("forces", {})
    if "all" not in forces:
        return
    mean = forces["all"]["force_mae"]["value"]
    for kind in ("subsets", "elements"):
        for name, row in forces[kind].items():
            low, value = row["force_mae"]["low"], row["force_mae"]["value"]
            if low is not None and value is not None and low > WORSE * mean:
                yield (
                    f"Forces of {name}: MAE {number(value)} meV/Å (at least {number(low)} with "
                    f"95 % confidence), {number(mean)} of everything."
                )
    few = [f"{n} ({row['atoms']})" for n, row in forces["elements"].items()
           if row["atoms"] < FEW_ATOMS]  # fmt: skip
    if few:
        text = ", ".join(few)
        yield f"Few atoms among the labelled structures, so that errors are uncertain: {text}."


def _unstable(content: Mapping[str, Any]) -> Iterator[str]:
    for name, run in stability_rows(content):
        if run["failure"] or run["broken"]:
            yield f"{name}: {result(run)}."
    short = [
        (run["picoseconds"], run["planned_picoseconds"])
        for _, run in stability_rows(content)
        if not (run["failure"] or run["broken"])
        and run["picoseconds"] < 0.999 * run["planned_picoseconds"]
    ]
    if short:
        length, planned = min(short)
        yield (
            f"{len(short)} stability runs were ended before their time, the shortest after "
            f"{number(length)} of {number(planned)} ps."
        )


def _untested(content: Mapping[str, Any]) -> Iterator[str]:
    missing = [name for name, said in content["status"].items() if said != "finished"]
    if missing:
        yield f"Not measured, or not to the end: {', '.join(missing)}."
    if content["level"] != "full":
        yield (
            "The short form of the validation says little of slow drifts, equilibrium densities "
            "and rare events."
        )


def stability_rows(content: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Runs of the stability section, each with its result in words; empty without them."""
    found = content["sections"].get("stability", {})
    runs = {**found.get("molecules", {}), **found.get("boxes", {})}
    return [(name, {**run, "result": result(run)}) for name, run in runs.items()]


def drift_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The finest time step of each constant-energy run."""
    runs = content["sections"].get("nve", {}).get("runs", {})
    return [{"name": name, **run["runs"][0]} for name, run in runs.items()]


def speed_table(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Times per step with their hardware; None without them."""
    rows = content["sections"].get("speed", {}).get("systems")
    if not rows:
        return None
    return {"rows": rows, "hardware": content["hardware"], "timestep": 0.5}
