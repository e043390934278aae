"""What training minimises."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from openmm_mlffd.training.config import LossConfig
from openmm_mlffd.training.targets import BatchTotals, TrainingBatch, count_totals

TERMS = ("energy", "forces", "stress", "angle", "charges", "hessian", "clash")
"""Names of the terms, in the order of their weights; "clash" is that of `clash.py`."""

_TINY = 1e-12  # within roots, whose slope at zero is infinite


class NetworkPrediction(NamedTuple):
    """What a network gives for a `TrainingBatch`."""

    energy: Tensor
    """Energy of each structure without references and repulsion [eV], shape (n_systems,)."""

    forces: Tensor
    """Forces, those of the repulsion included [eV/Å], shape (n_atoms, 3)."""

    virial: Tensor
    """Virial without the repulsion's [eV], shape (n_systems, 3, 3)."""

    charges: Tensor
    """Partial charges [e], shape (n_atoms,); zeros where the network has none."""

    curvature: Tensor
    """Hessian times the probe without the repulsion's [eV/Å], (n_atoms, 3); zeros if not asked."""


def huber(error: Tensor, delta: Tensor | float) -> Tensor:
    """Linear beyond ``delta``, quadratic within: e² / 2δ or e - δ/2, of an error e ≥ 0."""
    return torch.where(error < delta, error.square() / (2 * delta), error - 0.5 * delta)


def conditional_delta(size: Tensor, delta: float) -> Tensor:
    """Width of the Huber function by the size of the reference force.

    δ below 1 eV/Å, then 0.7, 0.4 and 0.1 δ beyond 1, 2 and 3 eV/Å: large forces, of structures
    far from those that matter, pull less (Batatia et al. 2023, arXiv 2401.00096, section 7.1, with
    their steps of 100, 200 and 300 eV/Å scaled down to the forces of thermal molecules).
    """
    steps = torch.where(size < 2.0, 0.7, torch.where(size < 3.0, 0.4, 0.1))
    return delta * torch.where(size < 1.0, 1.0, steps.to(size.dtype))


def loss_terms(
    prediction: NetworkPrediction,
    batch: TrainingBatch,
    config: LossConfig,
    *,
    totals: BatchTotals | None = None,
    factors: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Terms of the loss, weighted; their sum is what is minimised.

    Parameters
    ----------
    prediction, batch
        Of the same structures.
    config
        Weights; terms with weight 0 are left out.
    totals
        What sums are divided by where the batch is a part of a larger one; None for its own.
    factors
        Further factors of the weights by name, of the schedule.

    Returns
    -------
    dict
        Name to term, shape (). Atoms and structures without a label do not count.
    """
    if totals is None:
        totals = BatchTotals(*count_totals(batch, config.angle_threshold))
    weights = {n: getattr(config, n) for n in TERMS if getattr(config, n)}
    found: dict[str, Tensor] = {}
    of_atoms: Tensor | float = 1.0
    of_systems: Tensor | float = 1.0
    if config.large_force is not None:
        of_atoms, of_systems = steepness(batch, config.large_force)
    if "energy" in weights:
        found["energy"] = _energy(prediction, batch, config, of_systems) / totals.structures
    if "forces" in weights:
        found["forces"] = _forces(prediction, batch, config, of_atoms) / totals.atoms
    if "stress" in weights:
        stress = _stress(prediction, batch, config, of_systems)
        found["stress"] = stress / totals.stressed.clamp(min=1)
    if "angle" in weights:
        found["angle"] = _angle(prediction, batch, config) / totals.pushed.clamp(min=1)
    if "charges" in weights:
        found["charges"] = _charges(prediction, batch, config) / totals.charged.clamp(min=1)
    if "hessian" in weights:
        found["hessian"] = _hessian(prediction, batch, config) / totals.probed.clamp(min=1)
    factors = factors or {}
    return {n: weights[n] * factors.get(n, 1.0) * term for n, term in found.items()}


def steepness(batch: TrainingBatch, large: float) -> tuple[Tensor, Tensor]:
    """How much less errors count where reference forces are larger than a limit [eV/Å].

    Of atoms limit / max(limit, |F|), of structures that of their largest force: torn and squeezed
    molecules, whose energies change by tens of eV within an Å, would else decide over all others.

    Returns
    -------
    tuple
        Factors of atoms, shape (n_atoms,), and of structures, shape (n_systems,).
    """
    size = batch.forces.square().sum(1).sqrt()
    largest = torch.zeros_like(batch.energy).scatter_reduce(0, batch.system, size, "amax")
    return large / size.clamp(min=large), large / largest.clamp(min=large)


def _energy(
    prediction: NetworkPrediction, batch: TrainingBatch, config: LossConfig, factor: Tensor | float
) -> Tensor:
    error = factor * (prediction.energy - batch.energy).abs() / batch.n_atoms.clamp(min=1)
    return torch.where(batch.n_atoms > 0, huber(error, config.energy_delta), 0.0).sum()


def _forces(
    prediction: NetworkPrediction, batch: TrainingBatch, config: LossConfig, factor: Tensor | float
) -> Tensor:
    square = (prediction.forces - batch.forces).square().sum(1)
    error = factor * torch.sqrt(square + _TINY)
    if config.forces_loss == "l2":
        value = error.square()
    elif config.forces_loss == "conditional":
        size = batch.forces.square().sum(1).sqrt()
        value = huber(error, conditional_delta(size, config.forces_delta))
    else:
        value = huber(error, config.forces_delta)
    return torch.where(batch.real > 0, value, 0.0).sum()


def _stress(
    prediction: NetworkPrediction, batch: TrainingBatch, config: LossConfig, factor: Tensor | float
) -> Tensor:
    known = batch.virial.isfinite().all(2).all(1) & (batch.n_atoms > 0)
    label = torch.where(known[:, None, None], batch.virial, 0.0)
    per_atom = (prediction.virial - label) / batch.n_atoms.clamp(min=1)[:, None, None]
    square = torch.where(known, per_atom.square().sum((1, 2)), 0.0)
    error = factor * torch.sqrt(square + _TINY)
    return torch.where(known, huber(error, config.stress_delta), 0.0).sum()


def _angle(prediction: NetworkPrediction, batch: TrainingBatch, config: LossConfig) -> Tensor:
    long = batch.forces.square().sum(1) > config.angle_threshold**2
    cosine = cosine_similarity(prediction.forces, batch.forces, dim=1, eps=1e-6)
    return torch.where(long & (batch.real > 0), 1 - cosine, 0.0).sum()


def _charges(prediction: NetworkPrediction, batch: TrainingBatch, config: LossConfig) -> Tensor:
    known = batch.charges.isfinite() & (batch.real > 0)
    error = (prediction.charges - torch.where(known, batch.charges, 0.0)).abs()
    return torch.where(known, huber(error, config.charges_delta), 0.0).sum()


def _hessian(prediction: NetworkPrediction, batch: TrainingBatch, config: LossConfig) -> Tensor:
    known = batch.curvature.isfinite().all(1) & (batch.real > 0)
    label = torch.where(known.unsqueeze(1), batch.curvature, 0.0)
    square = torch.where(known, (prediction.curvature - label).square().sum(1), 0.0)
    return torch.where(known, huber(torch.sqrt(square + _TINY), config.hessian_delta), 0.0).sum()
