"""The student with fused kernels: energies, forces and virials without autograd.

The same function as `Potential`, but that filters come from a spline. Written for TorchScript:
the module can be scripted, and its operators are those of `openmm_mlffd.kernels`.

A state is what an atom knows, scalars q and vectors μ, as rows (q, μx, μy, μz) of shape
(n_atoms, 4, n_channels). Forward, the states between messages are kept and nothing else; backward,
what is between them is computed again (`remember` keeps it, for speed where memory is no matter).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from openmm_mlffd.filters import tabulate
from openmm_mlffd.kernels import ops  # noqa: F401 (registers torch.ops.mlffd)
from openmm_mlffd.painn import Interaction, Mixing, PaiNN
from openmm_mlffd.potential import Potential, Prediction
from openmm_mlffd.radial import SOFTENING

PRECISIONS = ("single", "mixed", "double")
"""Arithmetic of the network. Mixed: features and tables are gathered in half precision."""

_TABLES = {"single": (192, 5), "mixed": (64, 5), "double": (1024, 7)}
"""Intervals and degree of the filters' splines for up to 20 radial functions. Slopes of finer or
lower ones suffer from rounding in float32 more than they gain."""
_SHORTEST_SEEN = 5.0 / 7.0
"""Compressed distances are at least this share of the core, see `radial.compress_core`."""

_ENOUGH_ROWS = 4096
"""On CUDA, the rows of fewer atoms than this are split among up to eight groups of lanes."""


class Rows(NamedTuple):
    """Atoms of one or more systems with their neighbors in rows; see `neighbor_rows`."""

    positions: Tensor
    """Atom positions [Å], shape (n_atoms, 3), float64."""

    species: Tensor
    """Index of each atom's element in the model's element list, shape (n_atoms,), int32."""

    system: Tensor
    """Index of each atom's system, ascending, shape (n_atoms,), int32."""

    cell: Tensor
    """Box vectors as rows [Å], zero where not periodic, shape (n_systems, 3, 3), float64."""

    neighbors: Tensor
    """Senders, shape (n_atoms, capacity), int32."""

    images: Tensor
    """Packed images of the senders, shape (n_atoms, capacity), int64."""

    reverse: Tensor
    """Slot of the other direction of each edge, shape (n_atoms, capacity), int32."""

    counts: Tensor
    """Number of neighbors of each atom, shape (n_atoms,), int32."""


class _Linear(nn.Module):
    """An affine map whose derivative is written out."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear, n_out: int, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight[:n_out].detach().to(like).contiguous())
        bias = layer.weight.new_zeros(n_out) if layer.bias is None else layer.bias[:n_out]
        self.register_buffer("bias", bias.detach().to(like).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.t())

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient @ self.weight


class _Perceptron(nn.Module):
    """Two affine maps with a SiLU between them."""

    def __init__(self, layers: nn.Sequential, n_out: int, like: Tensor) -> None:
        super().__init__()
        inner, outer = layers[0], layers[2]
        assert isinstance(inner, nn.Linear)
        assert isinstance(outer, nn.Linear)
        self.inner = _Linear(inner, inner.out_features, like)
        self.outer = _Linear(outer, n_out, like)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values, and what `backward` needs."""
        hidden = self.inner(x)
        return self.outer(nn.functional.silu(hidden)), hidden

    def backward(self, gradient: Tensor, hidden: Tensor) -> Tensor:
        return self.inner.backward(
            torch.ops.aten.silu_backward(self.outer.backward(gradient), hidden)
        )


class _Mix(nn.Module):
    """`Mixing` on states; without new vectors where they are not used any more."""

    project: Tensor

    def __init__(self, mixing: Mixing, last: bool, like: Tensor) -> None:
        super().__init__()
        self.n_channels = mixing.n_channels
        self.softening = mixing.softening
        self.last = last
        self.register_buffer("project", mixing.project.weight.detach().to(like).t().contiguous())
        self.context = _Perceptron(mixing.context, (2 if last else 3) * self.n_channels, like)

    def forward(self, state: Tensor) -> tuple[Tensor, list[Tensor]]:
        """New state (new scalars, if last), and what `backward` needs."""
        n, c = state.shape[0], self.n_channels
        uv = torch.mm(state[:, 1:].reshape(3 * n, c), self.project).view(n, 3, 2 * c)
        u, v = uv[:, :, :c], uv[:, :, c:]
        norm = torch.sqrt(v.square().sum(dim=1) + self.softening)
        a, hidden = self.context(torch.cat([state[:, 0], norm], dim=1))
        dot = (u * v).sum(dim=1)
        scalars = torch.addcmul(state[:, 0] + a[:, :c], a[:, c : 2 * c], dot)
        kept = [uv, norm, a, hidden, dot]
        if self.last:
            return scalars, kept
        vectors = torch.addcmul(state[:, 1:], a[:, 2 * c :].unsqueeze(1), u)
        return torch.cat([scalars.unsqueeze(1), vectors], dim=1), kept

    def backward(self, by_scalars: Tensor, by_vectors: Tensor, kept: list[Tensor]) -> Tensor:
        """Gradient by the state, from that by the new one; no vectors, if last."""
        c = self.n_channels
        uv, norm, a, hidden, dot = kept
        u, v = uv[:, :, :c], uv[:, :, c:]
        by_a = [by_scalars, by_scalars * dot]
        if not self.last:
            by_a.append((by_vectors * u).sum(dim=1))
        by_input = self.context.backward(torch.cat(by_a, dim=1), hidden)
        by_dot = (by_scalars * a[:, c : 2 * c]).unsqueeze(1)
        by_norm = (by_input[:, c:] / norm).unsqueeze(1)
        by_u = by_dot * v
        by_v = torch.addcmul(by_dot * u, by_norm, v)
        if not self.last:
            by_u = torch.addcmul(by_u, a[:, 2 * c :].unsqueeze(1), by_vectors)
        by_uv = torch.cat([by_u, by_v], dim=2)
        n = by_uv.shape[0]
        through = torch.mm(by_uv.view(3 * n, 2 * c), self.project.t()).view(n, 3, c)
        if not self.last:
            through = through + by_vectors
        by_state = (by_scalars + by_input[:, :c]).unsqueeze(1)
        return torch.cat([by_state, through], dim=1)


class _Block(nn.Module):
    """From one message to the next: mixing, then the context of the next block's features."""

    table: Tensor

    def __init__(self, mixing: Mixing, following: Interaction, table: Tensor, like: Tensor) -> None:
        super().__init__()
        self.n_channels = mixing.n_channels
        self.mixing = _Mix(mixing, False, like)
        self.context = _Perceptron(following.context, 3 * mixing.n_channels, like)
        self.register_buffer("table", table.view(table.shape[0], 3, -1).contiguous())

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """New state, features for its neighbors, and what `backward` needs."""
        c = self.n_channels
        new, kept = self.mixing(state)
        phi, hidden = self.context(new[:, 0])
        scaled = new[:, 1:] * phi[:, 2 * c :].unsqueeze(1)
        features = torch.cat([phi[:, : 2 * c].view(-1, 2, c), scaled], dim=1)
        kept.extend([new, phi, hidden])
        return new, features.to(self.table.dtype), kept

    def backward(self, by_new: Tensor, by_features: Tensor, kept: list[Tensor]) -> Tensor:
        """Gradient by the state, from those by the new state and by the features."""
        c = self.n_channels
        new, phi, hidden = kept[5], kept[6], kept[7]
        by_scaled = by_features[:, 2:]
        by_scale = (new[:, 1:] * by_scaled).sum(dim=1)
        by_phi = torch.cat([by_features[:, :2].reshape(-1, 2 * c), by_scale], dim=1)
        by_vectors = torch.addcmul(by_new[:, 1:], phi[:, 2 * c :].unsqueeze(1), by_scaled)
        by_scalars = by_new[:, 0] + self.context.backward(by_phi, hidden)
        return self.mixing.backward(by_scalars, by_vectors, kept[:5])


class FastPotential(nn.Module):
    """A student for evaluation only.

    Parameters
    ----------
    potential
        The student, with weights that are not rounded to less than the precision asked for.
    precision
        "single", "mixed" or "double". Positions, edges and sums are in double either way.
    remember
        Keep what the forward pass computes for the backward pass, instead of computing it twice:
        faster, 20 KB more for each atom.

    Raises
    ------
    ValueError
        If the precision is not one of these, the student is a variant of PaiNN, or its cutoff is
        within its core.
    """

    table: Tensor
    embedding: Tensor
    first: Tensor
    pairs: Tensor
    limits: Tensor
    references: Tensor

    def __init__(
        self, potential: Potential, *, precision: str = "single", remember: bool = True
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        network, device = potential.network, next(potential.parameters()).device
        if not isinstance(network, PaiNN):
            raise ValueError(
                "the fused kernels are those of PaiNN, and this student is a variant of it; use "
                "plain torch (engine='eager' or 'auto')"
            )
        real = torch.float64 if precision == "double" else torch.float32
        like = torch.zeros((), dtype=real, device=device)
        stored = torch.float16 if precision == "mixed" else real
        n_intervals, self.degree = _TABLES[precision]
        n_intervals *= -(-network.basis.n_basis // 20)  # more waves, more knots
        self.in_double, self.remember = precision == "double", remember
        self.enough_rows = _ENOUGH_ROWS
        self.never = False
        self.cutoff, self.softening = potential.cutoff, SOFTENING
        self.shortest = _SHORTEST_SEEN * potential.smallest_core
        if not self.shortest < self.cutoff:
            raise ValueError(f"a cutoff of {self.cutoff} Å is within the core of the repulsion")
        self.per_interval = n_intervals / (self.cutoff - self.shortest)
        self.energy_scale, self.energy_bound = potential.energy_scale, potential.energy_bound
        of_basis = tabulate(
            network.basis, shortest=self.shortest, n_intervals=n_intervals, degree=self.degree
        )
        weights = [i.filter.weight.detach().double() for i in network.interactions]  # type: ignore[union-attr,operator]
        tables = [(of_basis.to(device) @ weight.T).to(stored) for weight in weights]
        self.register_buffer("table", tables[0].view(tables[0].shape[0], 2, -1).contiguous())
        embedding = network.embedding.weight.detach()
        first = network.interactions[0].context(embedding)  # type: ignore[operator]
        self.register_buffer("embedding", embedding.to(like))
        self.register_buffer(
            "first", first.detach().view(len(embedding), 2, -1).to(stored).contiguous()
        )
        mixings, later = list(network.mixings), list(network.interactions)[1:]
        blocks = [
            _Block(mixing, following, table, like)  # type: ignore[arg-type]
            for mixing, following, table in zip(mixings[:-1], later, tables[1:], strict=True)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.backwards = nn.ModuleList(blocks[::-1])  # TorchScript cannot reverse the other
        self.mixing = _Mix(mixings[-1], True, like)  # type: ignore[arg-type]
        self.readout = _Perceptron(network.readout, 1, like)
        self._constants(potential, device)

    def _constants(self, potential: Potential, device: torch.device) -> None:
        zbl = potential.repulsion
        z, radii = zbl._numbers, zbl._radii
        core = (potential._core[:, None] + potential._core).clamp(min=potential.smallest_core)
        reach = (radii[:, None] + radii).clamp(min=zbl.shortest_range)
        per_length = (z[:, None] ** 0.23 + z**0.23) / zbl.screening_length
        strength = zbl.coulomb * z[:, None] * z
        crowding = potential.crowding
        bond = crowding.bonded * (radii[:, None] + radii)
        free = crowding.free * (radii[:, None] + radii)
        pairs = torch.stack([core, reach, per_length, strength, bond, free], dim=-1).contiguous()
        self.register_buffer("pairs", pairs.to(device))
        self.register_buffer("limits", crowding._limits.to(device))
        self.strength, self.softness = crowding.strength, crowding.softness
        references = torch.tensor(potential.references, dtype=torch.float64)
        self.register_buffer("references", references.to(device))

    def forward(self, rows: Rows, with_virial: bool = True) -> Prediction:
        """Energy, forces, virial (zeros if not wanted) and energy of each atom."""
        if self.never:  # the first that a stored module asks for, see kernels/ops.py
            with_virial = torch.ops.mlffd.import_openmm_mlffd_kernels_ops_first(with_virial)
        geometry, crowded = torch.ops.mlffd.edge_geometry(
            rows.positions, rows.cell, rows.system, rows.species, self.pairs, self.limits,
            rows.neighbors, rows.images, rows.counts, self.cutoff, self.softening, self.shortest,
            self.per_interval, self.strength, self.softness, self.in_double,
        )  # fmt: skip
        learned, by_slot = self.network(rows, geometry)
        totals = torch.ops.mlffd.edge_forces(
            rows.positions, rows.cell, rows.system, rows.species, self.pairs, rows.neighbors,
            rows.images, rows.reverse, rows.counts, by_slot, crowded, self.cutoff, self.softening,
            self.per_interval, with_virial,
        )  # fmt: skip
        references = self.references.index_select(0, rows.species)
        atom_energies = learned + totals[:, 3] + references
        n_systems = rows.cell.shape[0]
        sums = torch.cat([atom_energies.unsqueeze(1), totals[:, 4:]], dim=1)
        if n_systems == 1:
            sums = sums.sum(dim=0, keepdim=True)
        else:
            lengths = torch.bincount(rows.system, minlength=n_systems)
            sums = torch.segment_reduce(sums, "sum", lengths=lengths, axis=0, initial=0.0)
        xx, yy, zz, yz, xz, xy = sums[:, 1:].unbind(1)
        virial = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], dim=1).view(n_systems, 3, 3)
        return Prediction(sums[:, 0], totals[:, :3], virial, atom_energies)

    def network(self, rows: Rows, geometry: Tensor) -> tuple[Tensor, Tensor]:
        """The network's energy of each atom [eV], and its gradient by the edges, by slot."""
        neighbors, reverse, counts = rows.neighbors, rows.reverse, rows.counts
        n_parts = 1
        if geometry.is_cuda:
            n_parts = min(8, max(1, self.enough_rows // max(1, counts.shape[0])))
        state = torch.ops.mlffd.message(
            self.first, rows.species, self.table, geometry, neighbors, reverse, counts,
            self.degree, n_parts,
        )  # fmt: skip
        state[:, 0] += self.embedding.index_select(0, rows.species)
        states: list[Tensor] = []
        sent: list[Tensor] = []
        kept: list[list[Tensor]] = []
        for block in self.blocks:
            states.append(state)
            new, features, more = block(state)
            if self.remember:
                kept.append(more)
                sent.append(features)
            state = new + torch.ops.mlffd.message(
                features, rows.species, block.table, geometry, neighbors, reverse, counts,
                self.degree, n_parts,
            )  # fmt: skip
        learned, gradient = self.energies(state)
        by_slot = torch.zeros_like(geometry)
        k = len(states)
        for block in self.backwards:
            k -= 1
            if self.remember:
                more, features = kept[k], sent[k]
            else:
                _, features, more = block(states[k])
            table: Tensor = block.table  # type: ignore[assignment]
            by_features = torch.ops.mlffd.message_backward_(
                gradient.to(table.dtype), features, rows.species, table, geometry,
                neighbors, counts, by_slot, self.degree, True, n_parts,
            )  # fmt: skip
            gradient = block.backward(gradient, by_features, more)  # type: ignore[operator]
        torch.ops.mlffd.message_backward_(
            gradient.to(self.table.dtype), self.first, rows.species, self.table, geometry,
            neighbors, counts, by_slot, self.degree, False, n_parts,
        )  # fmt: skip
        return learned, by_slot

    def energies(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Energy of each atom [eV] from its last state, and the gradient of their sum by it."""
        scalars, kept = self.mixing(state)
        out, hidden = self.readout(scalars)
        energies = out.squeeze(1).to(torch.float64) * self.energy_scale
        slope = torch.full_like(energies, self.energy_scale)
        if self.energy_bound > 0:  # as `soft_bound`, with its derivative
            width = 0.5 * self.energy_bound
            size = energies.abs()
            bent = torch.tanh((size - self.energy_bound) / width)
            within = size < self.energy_bound
            beyond = torch.sign(energies) * (self.energy_bound + width * bent)
            energies = torch.where(within, energies, beyond)
            slope = torch.where(within, slope, slope * (1.0 - bent * bent))
        by_scalars = self.readout.backward(slope.to(out.dtype).unsqueeze(1), hidden)
        return energies, self.mixing.backward(by_scalars, by_scalars, kept)
