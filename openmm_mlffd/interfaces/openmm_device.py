"""On which GPU the Context runs that a `PythonForce` is called for.

A `PythonForce` is not told its Context. Here the Contexts of the process are looked at instead, and
that is taken whose step and time are those of the State. It is done once for each thread that
evaluates: OpenMM evaluates a Context in a thread of its own.
"""

import gc
from collections.abc import Iterable
from typing import NamedTuple

import openmm


class Running(NamedTuple):
    """A Context on a GPU."""

    device: int
    """Index of its (first) GPU."""

    n_particles: int
    """Number of particles of its System."""

    step: int
    """Number of its step."""

    time: float
    """Its time [ps]."""


class AmbiguousDeviceError(RuntimeError):
    """Contexts on different GPUs of which any could be the one that asks."""


def running_contexts() -> list[Running]:
    """All Contexts of this process that run on a GPU, as far as Python knows them."""
    found = []
    for thing in gc.get_objects():
        if type(thing) is not openmm.Context:
            continue
        try:
            platform = thing.getPlatform()
            name = platform.getPropertyValue(thing, "DeviceIndex")
        except (openmm.OpenMMException, AttributeError):
            continue  # not on a GPU, or not made completely
        first = name.split(",")[0].strip()
        if first.isdecimal():
            found.append(
                Running(
                    int(first),
                    thing.getSystem().getNumParticles(),
                    thing.getStepCount(),
                    thing.getTime()._value,
                )
            )
    return found


def device_of(contexts: Iterable[Running], n_atoms: int, step: int, time: float) -> int | None:
    """GPU of the Context that evaluates.

    Parameters
    ----------
    contexts
        Those of `running_contexts`.
    n_atoms
        Atoms of the student; the System has as many particles, or more.
    step, time
        Of the State that is to be evaluated.

    Returns
    -------
    int or None
        None if none of them can be it: it runs on the CPU, or Python does not know it.

    Raises
    ------
    AmbiguousDeviceError
        If it can be several, on different GPUs.
    """
    found = [c for c in contexts if c.n_particles >= n_atoms]
    for same in (
        [c for c in found if c.step == step and c.time == time],
        found,
    ):
        devices = sorted({c.device for c in same})
        if len(devices) == 1:
            return devices[0]
        if devices:
            break
    else:
        return None
    raise AmbiguousDeviceError(
        f"Contexts with a student run on GPUs {', '.join(map(str, devices))} and are at the same "
        "step, so the student cannot tell which of them it works for: make their first step one "
        "after the other, or give createSystem the device, such as device='cuda:1'"
    )
