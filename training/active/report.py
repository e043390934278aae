"""Rounds as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

_TERMS = (
    ("force_mae", "force MAE [meV/Å]"),
    ("force_rmse", "force RMSE [meV/Å]"),
    ("energy_mae", "energy MAE [meV/atom]"),
    ("angle", "angle [°]"),
    ("stress_relative", "stress error [%]"),
)


def format_round(result: Mapping[str, Any]) -> str:
    """One round, as Markdown."""
    explored = result["explored"]
    lines = [
        f"# Round {result['round']}: {verdict(result)}",
        "",
        f"{explored['runs']} runs of {explored['picoseconds']:g} ps, {len(explored['failures'])} "
        f"of which failed; {explored['collected']} frames beyond {explored['threshold']:.3g} or "
        f"before a failure, {explored['frames']} of them chosen, {result['labelled']} labelled.",
    ]
    lines += [f"- not labelled: {reason}" for reason in result["not_labelled"][:10]]
    lines += [f"- failed: {name}, {reason}" for name, reason in explored["failures"][:10]]
    if result["mixture"]:
        mixture = result["mixture"]
        lines += [
            "",
            f"Trained on {mixture['old']} old structures and {mixture['new']} new ones, each "
            f"{mixture['repeats']} times.",
        ]
    if "errors" in result:
        lines += ["", *_errors(result["errors"])]
    return "\n".join(lines) + "\n"


def verdict(result: Mapping[str, Any]) -> str:
    """What became of the retrained student."""
    if "errors" not in result:
        return "nothing new was labelled"
    return "accepted" if result["accepted"] else "not accepted"


def _errors(errors: Mapping[str, Any]) -> list[str]:
    lines = [
        "| error | held out, before | after | new frames, before | after |",
        "|---|---:|---:|---:|---:|",
    ]
    columns = [
        errors[when][where] if where == "new" else errors[when][where]["all"]
        for where in ("held_out", "new")
        for when in ("before", "after")
    ]
    for term, name in _TERMS:
        values = ["–" if c[term] is None else f"{c[term]:.2f}" for c in columns]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return lines


def format_rounds(rounds: Sequence[Mapping[str, Any]]) -> str:
    """All rounds, as Markdown."""
    lines = [
        "| round | runs | failed | labelled | held-out force MAE | on new frames | |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    for result in rounds:
        held, new = "–", "–"
        if "errors" in result:
            before, after = (result["errors"][k] for k in ("before", "after"))
            held = _change(before["held_out"]["all"]["force_mae"],
                           after["held_out"]["all"]["force_mae"])  # fmt: skip
            new = _change(before["new"]["force_mae"], after["new"]["force_mae"])
        explored = result["explored"]
        lines.append(
            f"| {result['round']} | {explored['runs']} | {len(explored['failures'])} | "
            f"{result['labelled']} | {held} | {new} | {verdict(result)} |"
        )
    return "\n".join([*lines, "", "Force errors in meV/Å, before → after the round."]) + "\n"


def _change(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{before:.1f} → {after:.1f}"
