"""What became slower since a stored benchmark."""

from typing import Any

TOLERANCE = 0.15
"""Share by which a time may be longer."""

_KEYS = ("atoms", "engine", "precision", "systems")
_TIMES = ("bare", "step", "callback", "batch")


class OtherDeviceError(ValueError):
    """Times of two devices, which say nothing of one another."""


def slower(
    results: dict[str, Any], reference: dict[str, Any], *, tolerance: float = TOLERANCE
) -> list[str]:
    """Sentences on each time that is longer than the reference's by more than a tolerance.

    Parameters
    ----------
    results, reference
        What `mlffd bench` stores.
    tolerance
        Share by which it may be longer.

    Raises
    ------
    OtherDeviceError
        If the devices are not the same.
    ValueError
        If there is nothing to compare.
    """
    here, there = results["host"]["device"], reference["host"]["device"]
    if here not in there and there not in here:  # "NVIDIA H100" and "NVIDIA H100 80GB HBM3"
        raise OtherDeviceError(f"the reference is of {there}, and this is {here}")
    before, n_compared, found = dict(_times(reference)), 0, []
    for key, value in _times(results):
        if key not in before:
            continue
        n_compared += 1
        if value > (1.0 + tolerance) * before[key]:
            found.append(
                f"{' '.join(str(part) for part in key)}: {1e3 * value:.3f} ms, "
                f"{100 * (value / before[key] - 1):.0f} % more than {1e3 * before[key]:.3f} ms"
            )
    if not n_compared:
        raise ValueError("the reference has none of the numbers that were measured")
    return found


def _times(results: dict[str, Any]) -> list[tuple[tuple[Any, ...], float]]:
    found = []
    for section, rows in results.items():
        if not isinstance(rows, list):
            continue
        for row in rows:
            which = tuple(row[key] for key in _KEYS if key in row)
            found += [((section, *which, name), float(row[name])) for name in _TIMES if name in row]
    return found
