"""One training step: batch → loss and gradient → clipped AdamW → average, plain or compiled."""

import importlib.util
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from openmm_mlffd.potential import Potential
from openmm_mlffd.training.clash import Clashes, lack_of_push, make_clashes
from openmm_mlffd.training.config import TrainConfig
from openmm_mlffd.training.flat import FlatWeights
from openmm_mlffd.training.loss import TERMS, NetworkPrediction, loss_terms
from openmm_mlffd.training.muon import Muon
from openmm_mlffd.training.targets import BatchTotals, TrainingBatch, scatter_gradient

log = logging.getLogger(__name__)

_LARGEST_CLASH = 1e30  # eV; gradients of what is larger overflow in single precision
_COMPILED = 2e-2  # largest relative deviation of a compiled gradient; TF32 alone makes 1e-3


def predict(
    network: nn.Module, batch: TrainingBatch, energy_scale: float, *, hessian: bool = False
) -> NetworkPrediction:
    """Energies, forces and virials of a network, differentiable with respect to its weights.

    The same as `Potential` gives, without its float64 sums, and without what no weight changes.

    Parameters
    ----------
    network
        Of a potential.
    batch
        Structures.
    energy_scale
        Energy [eV] of the network's unit.
    hessian
        Also multiply the Hessian with the batch's probes: one more derivative.
    """
    vectors = batch.vectors.detach().requires_grad_(True)
    inputs: tuple[Tensor, ...] = (batch.species, vectors, batch.edge_index, batch.core)
    if getattr(network, "has_tail", False):
        inputs = (*inputs, batch.near)
    if getattr(network, "has_charges", False):
        energies, charges = network.energies_and_charges(*inputs)  # type: ignore[operator]
    else:
        energies = network(*inputs)
        charges = torch.zeros_like(energies)
    energies = energies.to(vectors.dtype) * energy_scale
    n_systems = batch.energy.shape[0]
    zeros = torch.zeros([n_systems], dtype=energies.dtype, device=energies.device)
    energy = zeros.index_add(0, batch.system, energies)
    gradient = _derivative(energies.sum(), vectors)
    forces, virial = scatter_gradient(gradient, vectors, batch.edge_index, batch.system, n_systems)
    curvature = torch.zeros_like(forces)
    if hessian:
        receiver, sender = batch.edge_index[0], batch.edge_index[1]
        along = (gradient * (batch.probe[sender] - batch.probe[receiver])).sum()
        change = _derivative(along, vectors)
        curvature = curvature.index_add(0, sender, change).index_add(0, receiver, -change)
    return NetworkPrediction(
        energy, forces + batch.repulsion, virial, charges.to(vectors.dtype), curvature
    )


def _derivative(value: Tensor, vectors: Tensor) -> Tensor:
    # structures without edges, and networks that a wrong setting made linear, have none
    if not value.requires_grad:
        return torch.zeros_like(vectors)
    gradient = torch.autograd.grad(value, vectors, create_graph=True, allow_unused=True)[0]
    return torch.zeros_like(vectors) if gradient is None else gradient


def clashes_in_range(potential: Potential) -> Tensor:
    """Mask of the clashing structures at which the network's numbers stay in their range."""
    clashes = make_clashes(potential)
    energy = predict(potential.network, clashes.batch, potential.energy_scale).energy.detach()
    fine = energy.abs() < _LARGEST_CLASH
    if not bool(fine.all()):
        log.warning(
            "loss.clash: %d of %d structures are left out, where energies exceed %.0e eV; "
            "after this run a second one may have them all",
            int((~fine).sum()), len(fine), _LARGEST_CLASH,
        )  # fmt: skip
    return fine


class _Loss(nn.Module):
    """The terms of the loss, as a module, so that its weights can be arguments of a function."""

    def __init__(self, potential: Potential, config: TrainConfig, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._scale = potential.energy_scale
        self._config = config
        self.clashes = make_clashes(potential) if config.loss.clash else None

    def forward(self, batch: TrainingBatch, totals: Tensor, factors: Tensor) -> Tensor:
        """Weighted terms in the order of `TERMS`, shape (len(TERMS),)."""
        config = self._config
        with torch.autocast(
            batch.vectors.device.type, dtype=torch.bfloat16, enabled=config.mixed_precision
        ):
            found = predict(self.network, batch, self._scale, hessian=config.loss.hessian > 0)
            close = None
            if self.clashes is not None:
                close = predict(self.network, self.clashes.batch, self._scale)
        named = dict(zip(TERMS, factors.unbind(), strict=True))
        sums = BatchTotals(*totals.unbind())
        terms = loss_terms(found, batch, config.loss, totals=sums, factors=named)
        if (
            close is not None and self.clashes is not None
        ):  # of several processes, each counts for its part of the atoms
            part = config.loss.clash * named["clash"] * batch.real.sum() / sums.atoms
            terms["clash"] = part * lack_of_push(close.forces, self.clashes)
        zero = torch.zeros_like(found.energy[0])
        return torch.stack([terms.get(name, zero).to(zero.dtype) for name in TERMS])


class LossGradient:
    """Terms of the loss and the gradient of their sum, as a function of tensors alone.

    Parameters
    ----------
    potential
        The student.
    config
        Terms of the loss, mixed precision.
    network
        Another way to evaluate the student's network, with its weights; None for the network.
    """

    def __init__(
        self, potential: Potential, config: TrainConfig, network: nn.Module | None = None
    ) -> None:
        self.is_fused = network is not None
        self._loss = _Loss(potential, config, network or potential.network)
        self._names = [name for name, _ in self._loss.named_parameters()]

    @property
    def clashes(self) -> Clashes | None:
        """What the term "clash" is taken over; None without it."""
        return self._loss.clashes

    @clashes.setter
    def clashes(self, clashes: Clashes | None) -> None:
        self._loss.clashes = clashes

    def __call__(
        self, weights: Sequence[Tensor], batch: Sequence[Tensor], totals: Tensor, factors: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Terms, shape (len(TERMS),), and the gradient by each of the weights."""
        own = dict(zip(self._names, weights, strict=True))
        arguments = (TrainingBatch(*batch), totals, factors)
        terms = torch.func.functional_call(self._loss, own, arguments)
        gradients = torch.autograd.grad(terms.sum(), list(weights), allow_unused=True)
        pairs = zip(gradients, weights, strict=True)
        return terms.detach(), [torch.zeros_like(w) if g is None else g for g, w in pairs]

    def traced(
        self, weights: Sequence[Tensor], batch: Sequence[Tensor], totals: Tensor, factors: Tensor
    ) -> torch.fx.GraphModule:
        """The same for tensors of just these shapes, all derivatives written out as operations.

        `torch.compile` alone cannot differentiate twice; of this there is nothing left to
        differentiate.
        """
        leaves = [w.detach().requires_grad_(True) for w in weights]

        def gradient(  # not self.__call__, of which the tracer would want `self` as an argument
            weights: list[Tensor], batch: list[Tensor], totals: Tensor, factors: Tensor
        ) -> tuple[Tensor, list[Tensor]]:
            return self(weights, batch, totals, factors)

        # what else a network holds, as the tail's radii, becomes a constant of the graph
        trace = make_fx(gradient, tracing_mode="fake", _allow_non_fake_inputs=True)
        return _without_unused(trace(leaves, list(batch), totals, factors))


_BY_GEOMETRY = {"mlffd::edge_message_backward": 6, "mlffd::edge_message_second": 8}
"""Operators and the number of their argument whether to differentiate by the geometry, too."""


def _without_unused(traced: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Leave out what nobody reads: of fused messages, derivatives by the geometry for weights."""
    traced.graph.eliminate_dead_code()
    for node in traced.graph.nodes:
        name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
        number = _BY_GEOMETRY.get(name.split(".")[0])
        if number is not None and all(user.args[1] != 1 for user in node.users):
            node.args = (*node.args[:number], False)
    traced.recompile()
    return traced


class _SkippingAdamW(torch.optim.AdamW):
    """AdamW whose fused step is left out, on the device, where `found_inf` is not zero."""

    found_inf: Tensor


class TrainingStep:
    """Everything that one step does to the weights.

    Parameters
    ----------
    potential
        The student; its weights are moved into one tensor.
    average
        The same student again, with the average of the weights.
    config
        Loss, optimizer, precision.
    reduce
        Sums a tensor over all processes, in place; None where there is one.
    """

    def __init__(
        self,
        potential: Potential,
        average: Potential,
        config: TrainConfig,
        *,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._config = config
        self._reduce = reduce
        self._flat = FlatWeights(potential.network, extra=len(TERMS))
        self._average = FlatWeights(average.network)
        self.loss_gradient = LossGradient(potential, config)
        self._plain = self.loss_gradient
        self.clashes_kept: Tensor | None = None
        self._gradient: Callable[..., tuple[Tensor, list[Tensor]]] = self.loss_gradient
        self._potential = potential
        self._unfused = wants_fused(config, self._flat.weights.device)
        self.shortfall = ""
        device = self._flat.weights.device
        on_gpu = device.type == "cuda"
        rate = config.optimizer.learning_rate
        self.optimizer = _SkippingAdamW(
            [self._flat.weights],
            lr=torch.tensor(rate, device=device) if on_gpu else rate,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
            capturable=on_gpu,
        )
        self.muon = Muon(potential.network, self._flat) if config.optimizer.muon else None
        # learning rate, weight of the newest in the average, epoch, batch, factors of the loss
        self._controls = torch.zeros(4 + len(TERMS), device=device)
        self.bad_steps = torch.zeros((), device=device)
        self.last_bad = torch.zeros(2, device=device)

    def limit_clashes(self, kept: Tensor | None = None) -> None:
        """Leave out clashing structures at which the weights, as they are now, overflow.

        Parameters
        ----------
        kept
            Mask of those to keep, if it is known from an earlier part of the run.
        """
        if self._config.loss.clash:
            self.clashes_kept = clashes_in_range(self._potential) if kept is None else kept
            self._plain.clashes = make_clashes(self._potential, self.clashes_kept)

    @property
    def losses(self) -> Tensor:
        """Terms of the last step's loss, over all processes, in the order of `TERMS`."""
        return self._flat.extra

    @property
    def gradient(self) -> Tensor:
        """Gradient of all weights, as the last step left it."""
        return self._flat.gradient

    @property
    def weights(self) -> list[nn.Parameter]:
        """The student's parameters."""
        return self._flat.parameters

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Moments of a checkpoint, whatever device it was made on."""
        group = self.optimizer.param_groups[0]
        mine = {k: v for k, v in group.items() if k != "params"}
        self.optimizer.load_state_dict(state)
        self.optimizer.param_groups[0].update(mine)

    def set_controls(
        self, rate: float, newest: float, place: tuple[int, int], factors: Sequence[float]
    ) -> None:
        """Set what the host decides about the next step, in one copy."""
        # pinned and without waiting, so that the host stays ahead of the device
        pinned = self._controls.device.type == "cuda"
        new = torch.tensor([rate, newest, *place, *factors], pin_memory=pinned)
        self._controls.copy_(new, non_blocking=True)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(self._controls[0])
            else:
                group["lr"] = rate

    def run(self, batch: TrainingBatch, totals: Tensor) -> None:
        """One step on a batch, whose loss is divided by these counts, see `BatchTotals`."""
        self.differentiate(batch, totals)
        self.update()

    def differentiate(self, batch: TrainingBatch, totals: Tensor) -> None:
        """Loss and gradient of a batch."""
        self.fuse(batch, totals)
        terms, gradients = self._gradient(
            self._flat.parameters, list(batch), totals, self._controls[4:].to(batch.energy.dtype)
        )
        self._flat.write_gradient(gradients)
        self._flat.extra.copy_(terms)

    @torch.no_grad()
    def update(self) -> None:
        """Sum the gradient over processes, clip it, move the weights and their average.

        A loss or gradient that is not finite moves nothing, and is counted in `bad_steps`.
        """
        if self._reduce is not None:
            self._reduce(self._flat.summed)
        gradient = self._flat.gradient
        norm = torch.linalg.vector_norm(gradient)
        finite = torch.isfinite(norm) & torch.isfinite(self._flat.extra).all()
        scale = (self._config.optimizer.clip / (norm + 1e-6)).clamp(max=1.0)
        # a NaN would stay in the gaps between the parameters, which no step writes
        gradient.mul_(torch.where(finite, scale, 1.0))
        if self.muon is not None:
            self.muon.step(self._controls[0], finite)
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        self._average.weights.lerp_(self._flat.weights, self._controls[1].to(gradient.dtype))
        self.bad_steps += self.optimizer.found_inf
        self.last_bad.copy_(torch.where(finite, self.last_bad, self._controls[2:4]))

    def snapshot(self) -> list[Tensor]:
        """Copy of everything that a step changes."""
        if not self.optimizer.state:  # made by a first step, which is left out
            self.optimizer.found_inf = torch.ones_like(self.bad_steps)
            self.optimizer.step()
        return [t.detach().clone() for t in self._state()]

    @torch.no_grad()
    def restore(self, saved: list[Tensor]) -> None:
        """Put a snapshot back, in place."""
        for tensor, value in zip(self._state(), saved, strict=True):
            tensor.copy_(value)

    def _state(self) -> list[Tensor]:
        of_optimizer = self.optimizer.state[self._flat.weights]
        return [
            self._flat.weights,
            self._average.weights,
            self.bad_steps,
            self.last_bad,
            *(self.muon.state() if self.muon is not None else ()),
            *(of_optimizer[k] for k in sorted(of_optimizer)),
        ]

    def fuse(self, batch: TrainingBatch, totals: Tensor) -> None:
        """Messages by fused kernels from now on, if the run wants them: done at the first batch.

        What hinders it is logged and in `shortfall`, and the step goes on without.
        """
        if not self._unfused:
            return
        self._unfused = False
        arguments = (self._flat.parameters, *self._comparable(batch, totals))
        try:
            fused = fused_gradient(self._potential, self._config)
            fused.clashes = self._plain.clashes
            deviation = _deviation(fused(*arguments), self._plain(*arguments))
            if not deviation < _COMPILED:
                raise RuntimeError(f"the fused gradient differs by a part of {deviation:.1e}")
        except Exception as error:  # Warp's compiler fails in many ways, too
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("messages are not fused (%s)", reason)
            self.shortfall += "not fused; "
            return
        self.loss_gradient = self._gradient = fused
        log.info("messages are fused; the gradient differs by %.1e", deviation)

    def _comparable(
        self, batch: TrainingBatch, totals: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Arguments of a gradient whose rounding tells little of it; see `comparable`.

        Clashing atoms do not count: what their forces of hundreds of eV/Å lack of a few is
        rounding alone, and the operations are those of the batch.
        """
        factors = self._controls[4:].to(batch.energy.dtype, copy=True)
        factors[TERMS.index("clash")] = 0.0
        return list(comparable(batch)), totals, factors

    def write_out(self, batch: TrainingBatch, totals: Tensor) -> None:
        """For batches of these shapes, of fused messages' derivatives compute only what is needed.

        Autograd cannot know that nobody will read some of them; a list of operations shows it.
        """
        if self.loss_gradient.is_fused:
            factors = self._controls[4:].to(batch.energy.dtype)
            traced = self.loss_gradient.traced(self._flat.parameters, batch, totals, factors)
            self._gradient = _of_values(traced)

    def compile(self, batch: TrainingBatch, totals: Tensor) -> bool:
        """Fuse the operations of the gradient for batches of these shapes; whether it worked.

        What hinders it is logged, and the step goes on without.
        """
        factors = self._controls[4:].to(batch.energy.dtype)
        weights = self._flat.parameters
        self.fuse(batch, totals)
        started = time.monotonic()
        try:
            traced = self.loss_gradient.traced(weights, batch, totals, factors)
            gradient = _of_values(torch.compile(traced, dynamic=False))
            arguments = (weights, *self._comparable(batch, totals))
            deviation = _deviation(gradient(*arguments), self._plain(*arguments))
            if not deviation < _COMPILED:
                raise RuntimeError(f"the compiled gradient differs by a part of {deviation:.1e}")
        except Exception as error:  # compilers fail in many ways, none of which matters here
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("the step is not compiled (%s); it runs uncompiled, slower", reason)
            return False
        self._gradient = gradient
        seconds = time.monotonic() - started
        log.info("compiled the step in %.0f s; the gradient differs by %.1e", seconds, deviation)
        return True


def _of_values(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """A gradient that is written out, as a function of weights that are parameters."""

    @torch.no_grad()
    def gradient(weights: Sequence[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor]]:
        found: tuple[Tensor, list[Tensor]] = function([w.detach() for w in weights], *rest)
        return found

    return gradient


def wants_fused(config: TrainConfig, device: torch.device) -> bool:
    """Whether to fuse messages: as set, or, for "auto", on a GPU if Warp is there."""
    if config.fused == "auto":
        return device.type == "cuda" and importlib.util.find_spec("warp") is not None
    return config.fused == "on"


def fused_gradient(potential: Potential, config: TrainConfig) -> LossGradient:
    """Terms and gradient of the loss with fused messages.

    Raises
    ------
    ImportError
        If Warp is not installed.
    ValueError
        If the student's messages cannot be fused, or the loss needs third derivatives of them.
    """
    from openmm_mlffd.fused import FusedNetwork

    if config.loss.hessian > 0:
        raise ValueError("rows of the Hessian need third derivatives, which have no kernels")
    return LossGradient(potential, config, FusedNetwork(potential))


def comparable(batch: TrainingBatch) -> TrainingBatch:
    """A batch whose labels are zero, to compare two ways to evaluate the same gradient.

    Near its labels a student's errors are small differences of large forces, and rounding to TF32
    turns their directions: the gradient of a trained student changes by some percent, that of a
    student far from its labels by less than a thousandth.
    """
    return batch._replace(
        energy=torch.zeros_like(batch.energy),
        forces=torch.zeros_like(batch.forces),
        virial=torch.where(batch.virial.isfinite(), 0.0, batch.virial),
    )


def _deviation(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> float:
    """Larger of the relative deviations of the losses and of the gradient."""
    gradients = [torch.cat([g.flatten() for g in side[1]]) for side in (found, expected)]
    pairs = [(found[0], expected[0]), (gradients[0], gradients[1])]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)
