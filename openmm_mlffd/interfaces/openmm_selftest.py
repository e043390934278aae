"""The self-test of a student at its first use. Imports neither openmm nor openmmml."""

import logging
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_mlffd.evaluator import Evaluator, StudentSource
from openmm_mlffd.graph import Graph, build_graph
from openmm_mlffd.potential import Potential, Prediction, edge_vectors

LARGEST = 20_000
"""Larger systems are not tested: the comparison in double precision may not fit into memory."""

N_CALLS = 3
"""Compiled engines change between their first calls; all must agree, the step's among them."""

STEPS = (1e-4, 1e-5)
"""Of the finite differences [Å]; the second where energies bend too much for the first."""

# of energies [eV/atom], of forces [eV/Å], and of both relative to the largest force: where atoms
# clash, all numbers are large
TOLERANCES = {
    "single": (1e-5, 1e-3, 1e-4),
    "mixed": (1e-3, 2e-2, 2e-3),
    "double": (1e-8, 1e-6, 1e-8),
}
DIFFERENCE_TOLERANCE = (2e-4, 1e-5)
"""Of the derivative by finite differences [eV/Å], absolute and relative to the largest force."""

_log = logging.getLogger(__name__)


class SelfTestError(RuntimeError):
    """A student does not compute what it should; the message has the numbers."""


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What a self-test found; the largest of `N_CALLS` calls."""

    n_atoms: int
    """Atoms."""

    precision: str
    """Of the student at work; what it is compared with is in double."""

    device: str
    """Of both."""

    energy_error: float
    """Energy against that of the plain network in double precision [eV/atom]."""

    force_error: float
    """Largest difference of a component of a force [eV/Å]."""

    difference_error: float
    """Plain network's forces against finite differences of its energy, root mean square [eV/Å]."""

    largest_force: float
    """Largest component of a force [eV/Å]."""

    seconds: float
    """Time that the test took."""

    @property
    def failures(self) -> list[str]:
        """What is beyond its tolerance, in words; empty if all is well."""
        energy, force, relative = TOLERANCES[self.precision]
        difference, relative_difference = DIFFERENCE_TOLERANCE
        checks = (
            ("energy [eV/atom]", self.energy_error, energy + relative * self.largest_force),
            ("forces [eV/Å]", self.force_error, force + relative * self.largest_force),
            (
                "finite differences [eV/Å]",
                self.difference_error,
                difference + relative_difference * self.largest_force,
            ),
        )
        return [
            f"{name} off by {value:.2e}, at most {limit:.2e} is right"
            for name, value, limit in checks
            if not value <= limit
        ]

    def __str__(self) -> str:
        return (
            f"{self.n_atoms} atoms, {self.precision} precision on {self.device}: energy within "
            f"{self.energy_error:.1e} eV/atom and forces within {self.force_error:.1e} eV/Å of the "
            f"plain network in double precision, whose forces are within "
            f"{self.difference_error:.1e} eV/Å of finite differences ({self.seconds:.2f} s)"
        )


def self_test_evaluator(
    evaluator: Evaluator,
    source: StudentSource,
    precision: str,
    positions: NDArray[np.float64],
    cell: NDArray[np.float64] | None,
    *,
    first: tuple[float, NDArray[np.float64]] | None = None,
) -> SelfTest | None:
    """Compare an evaluator with the plain network in double precision, and that with differences.

    The comparison has its own weights, read from the file again, and makes its own graph, without
    the evaluator's neighbor list, engine or compiled kernels.

    Parameters
    ----------
    evaluator
        The student at work.
    source
        Where its file is.
    precision
        Of the evaluator.
    positions
        Atom positions [Å], shape ``(n_atoms, 3)``.
    cell
        Box vectors as rows [Å], shape ``(3, 3)``; None for no box.
    first
        Energy [eV] and forces [eV/Å] that it has said of these positions already; counts as a call.

    Returns
    -------
    SelfTest or None
        None if the system is too large to be tested.

    Raises
    ------
    SelfTestError
        If anything is beyond its tolerance.
    """
    n_atoms = len(positions)
    if n_atoms > LARGEST:
        _log.warning("no self-test: %d atoms are more than %d", n_atoms, LARGEST)
        return None
    began = time.perf_counter()
    found = []
    if first is not None:
        found.append((torch.tensor(first[0], dtype=torch.float64), torch.tensor(first[1])))
    while len(found) < N_CALLS:
        found.append(_copy(evaluator.predict(positions, cell, virial=False)))
    try:
        test = _compare(found, evaluator, source, positions, cell, evaluator.device)
    except torch.OutOfMemoryError:
        _log.warning("the self-test does not fit onto %s; it runs on the CPU", evaluator.device)
        test = _compare(found, evaluator, source, positions, cell, torch.device("cpu"))
    energy_error, force_error, difference_error, largest = test
    result = SelfTest(
        n_atoms=n_atoms,
        precision=precision,
        device=str(evaluator.device),
        energy_error=energy_error,
        force_error=force_error,
        difference_error=difference_error,
        largest_force=largest,
        seconds=time.perf_counter() - began,
    )
    if result.failures:
        raise SelfTestError(
            f"the student failed its self-test ({'; '.join(result.failures)}; largest force "
            f"{largest:.3g} eV/Å; {n_atoms} atoms, {precision} precision on {result.device}). Its "
            "results cannot be trusted here; selfTest=False skips the test"
        )
    _log.info("self-test passed: %s", result)
    return result


def _copy(prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Energy and forces; an engine may overwrite its own in the next call."""
    return prediction.energy[0].clone(), prediction.forces.clone()


def _compare(
    found: list[tuple[Tensor, Tensor]],
    evaluator: Evaluator,
    source: StudentSource,
    positions: NDArray[np.float64],
    cell: NDArray[np.float64] | None,
    device: torch.device,
) -> tuple[float, float, float, float]:
    with torch.inference_mode(False), torch.enable_grad():
        potential = source.load(device=device, precision="double")
        species = potential.species(torch.tensor(evaluator.numbers)).to(device)

        def graph_at(where: NDArray[np.float64]) -> Graph:
            return build_graph(
                torch.tensor(where, device=device),
                species,
                cutoff=potential.cutoff,
                cell=None if cell is None else torch.tensor(cell, device=device),
            )

        right = potential(graph_at(positions))
        energy, forces = right.energy[0], right.forces.detach()
        energy_error = max(abs(float(e.to(device) - energy)) for e, _ in found)
        force_error = max(float((f.to(device) - forces).abs().max()) for _, f in found)
        # one direction through all atoms at once tells as much as any single atom would
        direction = np.random.default_rng(0).normal(size=positions.shape)
        along = float((forces * torch.tensor(direction, device=device)).sum())
        n_atoms = len(positions)
        absolute, relative = DIFFERENCE_TOLERANCE
        difference_error = math.inf
        for step in STEPS:
            before, after = (
                _energy(potential, graph_at(positions + sign * step * direction))
                for sign in (-1, 1)
            )
            derivative = float((after - before) / (2 * step))
            difference_error = abs(derivative + along) / n_atoms**0.5
            if difference_error < absolute + relative * float(forces.abs().max()):
                break
    return (
        energy_error / n_atoms,
        force_error,
        difference_error,
        float(forces.abs().max()),
    )


@torch.no_grad()
def _energy(potential: Potential, graph: Graph) -> Tensor:
    vectors = edge_vectors(graph)
    learned = potential.learned_energies(graph, vectors)
    return (learned + potential.repulsion_energies(graph, vectors)).sum()
