"""The student with fused kernels: energies, forces and virials without autograd.

The same function as `Potential`, but that filters come from a spline. Written for TorchScript:
the module can be scripted, and its operators are those of `openmm_mlffd.kernels`.

What happens between messages is in `blocks`. Forward, the states between messages are kept and
little else; backward, what is between them is computed again, a chunk of atoms at a time
(`remember` keeps it, for speed where memory is no matter).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from openmm_mlffd.blocks import (
    Block,
    Chain,
    Kept,
    Mix,
    Product,
    Space,
    feature_room,
    first_of,
    part,
    part_of,
    room_for,
    space_for,
)
from openmm_mlffd.filters import tabulate
from openmm_mlffd.painn import PaiNN
from openmm_mlffd.potential import Potential, Prediction
from openmm_mlffd.radial import SOFTENING

PRECISIONS = ("single", "mixed", "double")
"""Arithmetic of the network. Mixed: features and tables are gathered in half precision."""

_TABLES = {"single": (128, 5), "mixed": (96, 3), "double": (1024, 7)}
"""Intervals and degree of the filters' splines for up to 20 radial functions. A lower degree is
less work at each edge, and fewer intervals stay in the caches; but with too many intervals slopes
suffer from rounding, and of degree 3 single precision would need them."""
_SHORTEST_SEEN = 5.0 / 7.0
"""Compressed distances are at least this share of the core, see `radial.compress_core`."""

_CHUNK = 8192
"""Beyond what is remembered, half of the atoms are between messages at once, or so many: of what is
computed with them, only the states need memory for all atoms."""

_ENOUGH_ROWS = 4096
"""On CUDA, the rows of fewer atoms than this are split among up to sixteen groups of lanes."""


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
    readout_bias: Tensor
    of_energy: Tensor

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
        reduced = precision == "mixed"
        like = torch.zeros((), dtype=real, device=device)
        stored = torch.float16 if precision == "mixed" else real
        n_intervals, self.degree = _TABLES[precision]
        n_intervals *= -(-network.basis.n_basis // 20)  # more waves, more knots
        self.in_double, self.remember = precision == "double", remember
        self.n_channels = network.n_channels
        self.chunk, self.smallest_chunk = 0, _CHUNK  # 0: as large as is best
        self.enough_rows = _ENOUGH_ROWS
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
            Block(mixing, following, table, like, reduced)  # type: ignore[arg-type]
            for mixing, following, table in zip(mixings[:-1], later, tables[1:], strict=True)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.backwards = nn.ModuleList(blocks[::-1])  # TorchScript cannot reverse the other
        self.mixing = Mix(mixings[-1], True, like, reduced)  # type: ignore[arg-type]
        inner, outer = network.readout[0], network.readout[2]
        self.readout = Product(inner.weight, like, reduced)  # type: ignore[arg-type]
        self.register_buffer("readout_bias", inner.bias.detach().to(like).contiguous())  # type: ignore[operator]
        of_energy = torch.cat([outer.weight[0], outer.bias])  # type: ignore[index,list-item]
        self.register_buffer("of_energy", of_energy.detach().to(like))
        self.chain = Chain(self.n_channels, self.readout_bias.shape[0], like)
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
        geometry, by_slot, crowded = self.edges(rows)
        learned = self.network(rows, geometry, by_slot)
        forces, terms = torch.ops.mlffd.edge_forces(
            rows.positions, rows.cell, rows.system, rows.species, self.pairs, rows.neighbors,
            rows.images, rows.reverse, rows.counts, by_slot, crowded, learned, self.references,
            self.cutoff, self.softening, self.per_interval, with_virial,
        )  # fmt: skip
        energy, virial = torch.ops.mlffd.system_sums(terms, rows.system, rows.cell.shape[0])
        return Prediction(energy, forces, virial, terms[0])

    def edges(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Direction and distance of each edge, room for gradients by them, and crowding."""
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.mlffd.edge_geometry(
            rows.positions, rows.cell, rows.system, rows.species, self.pairs, self.limits,
            rows.neighbors, rows.images, rows.counts, self.cutoff, self.softening, self.shortest,
            self.per_interval, self.strength, self.softness, self.in_double,
        )  # fmt: skip
        return found

    def features(self, rows: Rows) -> Tensor:
        """Features of each atom from which its energy is read, shape ``(n_atoms, n_channels)``."""
        geometry, _, _ = self.edges(rows)
        like, c, n = self.embedding, self.n_channels, rows.counts.shape[0]
        size = max(1, n if self.remember else min(n, self.smallest_chunk))
        space, shared = space_for(size, c, like), room_for(size, c, like)
        qs, mus, _, _ = self.forth(rows, geometry, space, shared, size)
        q, mu = qs[-1], mus[-1]
        for start in range(0, n, size):
            m = min(size, n - start)
            its_q, its_mu = part(q, start, m), part(mu, start, m)
            here, now = part_of(shared, 0, m), first_of(space, m)
            a = here.a.flatten()[: m * 2 * c].view(m, 2 * c)
            self.mixing(its_q, its_mu, here.uv, here.hidden, a, now.bent, its_q, its_mu)
        return q[:, :c]

    def parts(self, geometry: Tensor) -> int:
        """Groups of lanes for each row."""
        if not geometry.is_cuda:
            return 1
        return min(16, max(1, self.enough_rows // max(1, geometry.shape[0])))

    def network(self, rows: Rows, geometry: Tensor, by_slot: Tensor) -> Tensor:
        """The network's energy of each atom [eV]; its gradient by the edges is added by slot."""
        like, c, n = self.embedding, self.n_channels, rows.counts.shape[0]
        size = max(1, n)
        if not self.remember:  # chunks of the same size
            chunk = self.chunk if self.chunk > 0 else max(self.smallest_chunk, -(-size // 2))
            size = -(-size // -(-size // chunk))
        space, shared = space_for(size, c, like), room_for(size, c, like)
        qs, mus, sent, kept = self.forth(rows, geometry, space, shared, size)
        # nothing here may hold what the others have used up
        learned, by_q = self.energies(qs.pop(), mus[-1], space, shared, size)
        self.back(
            rows, geometry, by_slot, by_q, mus.pop(), qs, mus, sent, kept, space, shared, size
        )
        return learned

    def forth(
        self, rows: Rows, geometry: Tensor, space: Space, shared: Kept, size: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Kept]]:
        """All messages.

        Returns
        -------
        qs
            Scalars of the states that are computed again from them, and of the last one.
        mus
            Vectors of all states.
        sent, kept
            Features and what else is kept of all blocks with ``remember``, else of none.
        """
        like, c, n = self.embedding, self.n_channels, rows.counts.shape[0]
        q, mu = like.new_empty([n, 2 * c]), like.new_empty([n, 3, c])
        torch.ops.mlffd.message_(
            self.first, rows.species, self.table, geometry, rows.neighbors, rows.counts,
            self.embedding, q, mu, self.degree, self.parts(geometry),
        )  # fmt: skip
        mus: list[Tensor] = []
        qs: list[Tensor] = []
        sent: list[Tensor] = []
        kept: list[Kept] = []
        for block in self.blocks:
            room = room_for(n, c, like) if self.remember else shared
            features = feature_room(n, self.table, like)
            # what is remembered is not computed again from the scalars
            new_q = q if self.remember else torch.empty_like(q)
            new_mu = torch.empty_like(mu)
            for start in range(0, n, size):
                m = min(size, n - start)
                block(
                    part(q, start, m), part(mu, start, m),
                    part_of(room, start if self.remember else 0, m), first_of(space, m),
                    part(new_q, start, m), part(new_mu, start, m), part(features, start, m),
                )  # fmt: skip
            torch.ops.mlffd.message_(
                features, rows.species, block.table, geometry, rows.neighbors, rows.counts,
                self.embedding, new_q, new_mu, self.degree, self.parts(geometry),
            )  # fmt: skip
            mus.append(mu)
            if self.remember:
                sent.append(features)
                kept.append(room)
            else:
                qs.append(q)
            q, mu = new_q, new_mu
        qs.append(q)
        mus.append(mu)
        return qs, mus, sent, kept

    def back(
        self, rows: Rows, geometry: Tensor, by_slot: Tensor, by_q: Tensor, by_mu: Tensor,
        qs: list[Tensor], mus: list[Tensor], sent: list[Tensor], kept: list[Kept], space: Space,
        shared: Kept, size: int,
    ) -> None:  # fmt: skip
        """From the gradient by the last state to that by the edges; uses up what `forth` gave."""
        n, n_parts = by_q.shape[0], self.parts(geometry)
        for block in self.backwards:
            sent_q, sent_mu = self.sent(by_q, by_mu)
            # the gradient by the vectors in the place of the vectors, whose last use this is
            mu, by_old_q = mus.pop(), torch.empty_like(by_q)
            room = kept.pop() if self.remember else shared
            features = (
                sent.pop() if self.remember else feature_room(size, self.table, self.embedding)
            )
            q = by_q if self.remember else qs.pop()
            for start in range(0, n, size):
                m = min(size, n - start)
                offset = start if self.remember else 0
                here, now = part_of(room, offset, m), first_of(space, m)
                its_mu, its_features = part(mu, start, m), part(features, offset, m)
                if not self.remember:
                    block(part(q, start, m), its_mu, here, now, now.q, now.mu, its_features)
                torch.ops.mlffd.message_backward_(
                    sent_q, sent_mu, its_features, part(rows.species, start, m), block.table,
                    part(geometry, start, m), part(rows.neighbors, start, m),
                    part(rows.counts, start, m), part(by_slot, start, m), now.by_features,
                    self.degree, n_parts,
                )  # fmt: skip
                block.backward(  # type: ignore[operator]
                    its_mu, here, now, part(by_q, start, m), part(by_mu, start, m),
                    part(by_old_q, start, m), its_mu,
                )  # fmt: skip
            by_q, by_mu = by_old_q, mu
        sent_q, sent_mu = self.sent(by_q, by_mu)
        torch.ops.mlffd.message_backward_(
            sent_q, sent_mu, self.first, rows.species, self.table, geometry, rows.neighbors,
            rows.counts, by_slot, geometry.new_empty([0, 2, self.n_channels]), self.degree, n_parts,
        )  # fmt: skip

    def sent(self, q: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """What neighbors gather, as it is stored."""
        if self.table.dtype == q.dtype:
            return q, mu
        half_q = torch.empty_like(q, dtype=self.table.dtype)
        half_mu = torch.empty_like(mu, dtype=self.table.dtype)
        torch.ops.mlffd.node_halves_(q, mu, half_q, half_mu)
        return half_q, half_mu

    def energies(
        self, q: Tensor, mu: Tensor, space: Space, shared: Kept, size: int
    ) -> tuple[Tensor, Tensor]:
        """Energy of each atom [eV] from its last state, and the gradient of their sum by it.

        That by the scalars is returned, that by the vectors takes their place.
        """
        n, c, width = q.shape[0], self.n_channels, self.readout_bias.shape[0]
        energies = torch.empty([n], dtype=torch.float64, device=q.device)
        by_q = q.new_empty([n, c])
        for start in range(0, n, size):
            m = min(size, n - start)
            its_q, its_mu, its_by_q = part(q, start, m), part(mu, start, m), part(by_q, start, m)
            if self.chain.holds(its_q):
                mix, mixed = self.mixing.project, self.mixing.context
                torch.ops.mlffd.chain_last_(
                    its_q, its_mu,
                    [mix.transposed, mixed.inner.transposed, mixed.bias, mixed.outer.transposed,
                     mixed.outer_bias, self.readout.transposed, self.readout_bias,
                     self.of_energy],
                    [self.readout.weight, mixed.outer.weight, mixed.inner.weight, mix.weight],
                    part(energies, start, m), its_by_q, its_mu, self.mixing.softening,
                    self.energy_scale, self.energy_bound,
                )  # fmt: skip
                continue
            here, now = part_of(shared, 0, m), first_of(space, m)
            a = here.a.flatten()[: m * 2 * c].view(m, 2 * c)
            by_a = now.phi.flatten()[: m * 2 * c].view(m, 2 * c)
            hidden = now.bent.flatten()[: m * width].view(m, width)
            self.mixing(its_q, its_mu, here.uv, here.hidden, a, now.bent, its_q, its_mu)
            self.readout(its_q[:, :c], hidden)
            torch.ops.mlffd.node_readout_(
                hidden, self.readout_bias, self.of_energy, part(energies, start, m),
                self.energy_scale, self.energy_bound, self.readout.reduced,
            )  # fmt: skip
            self.readout.backward(hidden, its_by_q, False)
            self.mixing.backward(its_by_q, its_mu, here.uv, here.hidden, a, now.bent, by_a, now.q)
        return energies, by_q
