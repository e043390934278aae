"""What training minimises."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from openmm_mlffd.potential import Prediction
from openmm_mlffd.training.batches import Batch
from openmm_mlffd.training.config import LossConfig


def huber(error: Tensor, delta: float) -> Tensor:
    """Linear beyond ``delta``, quadratic within: e² / 2δ or e - δ/2, of an error e ≥ 0."""
    return torch.where(error < delta, error.square() / (2 * delta), error - 0.5 * delta)


def loss_terms(prediction: Prediction, batch: Batch, config: LossConfig) -> dict[str, Tensor]:
    """Terms of the loss, weighted; their sum is what is minimised.

    Terms with weight 0, and stress where no structure has a stress label, are left out.
    Periodic structures without a label do not count.
    """
    terms = {}
    if config.energy:
        error = ((prediction.energy - batch.energy) / batch.n_atoms).abs()
        terms["energy"] = config.energy * huber(error, config.energy_delta).mean()
    difference = (prediction.forces - batch.forces).float()
    if config.forces:
        error = torch.sqrt(difference.square().sum(1) + 1e-12)
        terms["forces"] = config.forces * huber(error, config.forces_delta).mean()
    if config.stress:
        known = batch.virial.isfinite().all(2).all(1)
        label = torch.where(known[:, None, None], batch.virial, 0.0)
        square = ((prediction.virial - label) / batch.n_atoms[:, None, None]).square().sum((1, 2))
        error = torch.sqrt(torch.where(known, square, 0.0) + 1e-12)
        total = torch.where(known, huber(error, config.stress_delta), 0.0).sum()
        terms["stress"] = config.stress * total / known.sum().clamp(min=1)
    if config.angle:
        large = (batch.forces.norm(dim=1) > config.angle_threshold).double()
        cosine = cosine_similarity(prediction.forces, batch.forces, dim=1, eps=1e-6)
        terms["angle"] = config.angle * ((1 - cosine) * large).sum() / large.sum().clamp(min=1)
    return terms
