"""The student with fused kernels: energies, forces and virials without autograd.

The same function as `Potential`, but that filters come from a spline. Written for TorchScript:
the module can be scripted, and its operators are those of `openmm_mlffd.kernels`.

A state is what an atom knows, scalars q and vectors μ. Scalars are the first half of rows of
2 n_channels, whose second half is for the norms of projected vectors; vectors have the shape
(n_atoms, 3, n_channels). Matrix products read and write where their operands are used. Forward, the
states between messages are kept and little else; backward, what is between them is computed again
(`remember` keeps it, for speed where memory is no matter).
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

_CHUNK = 8192
"""Beyond what is remembered, as many atoms are between messages at once: their numbers stay in the
caches of a GPU, and of what is computed with them only the states need memory for all atoms."""

_CHUNKS_TO_REMEMBER = 8
"""From as many chunks on there is room to remember one block."""

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


def _rounded(x: Tensor) -> Tensor:
    """To 10 bits of mantissa."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent)


class _Product(nn.Module):
    """A matrix product whose derivative is written out; both write where they are told to."""

    weight: Tensor

    def __init__(self, weight: Tensor, like: Tensor, reduced: bool) -> None:
        super().__init__()
        self.reduced = reduced
        weight = weight.detach().to(like)
        if reduced:
            weight = _rounded(weight)
        self.register_buffer("weight", weight.contiguous())

    def forward(self, x: Tensor, out: Tensor) -> None:
        """``x @ weight.T``."""
        if self.reduced:
            torch.ops.mlffd.product_(x, self.weight.t(), out, False)
        else:
            torch.mm(x, self.weight.t(), out=out)

    def backward(self, gradient: Tensor, out: Tensor, add: bool) -> None:
        """``gradient @ weight``, or that added to what is there."""
        if self.reduced:
            torch.ops.mlffd.product_(gradient, self.weight, out, add)
        elif add:
            out.addmm_(gradient, self.weight)
        else:
            torch.mm(gradient, self.weight, out=out)


class _Perceptron(nn.Module):
    """Two affine maps with a SiLU between them; the second one's bias is left to who reads it."""

    bias: Tensor
    outer_bias: Tensor

    def __init__(self, layers: nn.Sequential, n_out: int, like: Tensor, reduced: bool) -> None:
        super().__init__()
        inner, outer = layers[0], layers[2]
        assert isinstance(inner, nn.Linear)
        assert isinstance(outer, nn.Linear)
        self.reduced = reduced
        self.inner = _Product(inner.weight, like, reduced)
        self.outer = _Product(outer.weight[:n_out], like, reduced)
        self.register_buffer("bias", inner.bias.detach().to(like).contiguous())
        self.register_buffer("outer_bias", outer.bias[:n_out].detach().to(like).contiguous())

    def forward(self, x: Tensor, hidden: Tensor, bent: Tensor, out: Tensor) -> None:
        """Values without bias to ``out``; ``hidden`` is for `backward`, ``bent`` for nothing."""
        self.inner(x, hidden)
        torch.ops.mlffd.node_silu_(hidden, self.bias, bent, self.reduced)
        self.outer(bent, out)

    def backward(
        self, gradient: Tensor, hidden: Tensor, bent: Tensor, out: Tensor, add: bool
    ) -> None:
        self.outer.backward(gradient, bent, False)
        torch.ops.mlffd.node_silu_backward_(hidden, self.bias, bent, self.reduced)
        self.inner.backward(bent, out, add)


class _Kept(NamedTuple):
    """What the backward pass of a block needs from its forward pass, of n atoms."""

    uv: Tensor  # (n, 3, 2c), projections u and v of the vectors
    hidden: Tensor  # (n, c), of the mixing's perceptron
    a: Tensor  # (n, 3c), its values
    inner: Tensor  # (n, c), hidden of the context's perceptron
    scale: Tensor  # (n, c), of the vectors among the features


class _Space(NamedTuple):
    """Room for what is needed for a moment only, of n atoms."""

    bent: Tensor  # (n, c)
    phi: Tensor  # (n, 3c)
    q: Tensor  # (n, 2c)
    mu: Tensor  # (n, 3, c)
    by_features: Tensor  # (n, 5, c)


class _Mix(nn.Module):
    """`Mixing` on states; without new vectors where they are not used any more."""

    def __init__(self, mixing: Mixing, last: bool, like: Tensor, reduced: bool) -> None:
        super().__init__()
        self.n_channels, self.reduced = mixing.n_channels, reduced
        self.softening = mixing.softening
        n_out = (2 if last else 3) * self.n_channels
        self.project = _Product(mixing.project.weight, like, reduced)
        self.context = _Perceptron(mixing.context, n_out, like, reduced)

    def forward(
        self, q: Tensor, mu: Tensor, uv: Tensor, hidden: Tensor, a: Tensor, bent: Tensor,
        new_q: Tensor, new_mu: Tensor,
    ) -> None:  # fmt: skip
        """New state, which may be in the place of the old one; the rest as in `_Kept`."""
        n, c = q.shape[0], self.n_channels
        self.project(mu.view(3 * n, c), uv.view(3 * n, 2 * c))
        torch.ops.mlffd.node_norms_(uv, q, self.softening, self.reduced)
        self.context(q, hidden, bent, a)
        torch.ops.mlffd.node_mix_(
            uv, a, self.context.outer_bias, q, mu, new_q, new_mu, self.reduced
        )

    def backward(
        self, by_q: Tensor, by_mu: Tensor, uv: Tensor, hidden: Tensor, a: Tensor, bent: Tensor,
        by_a: Tensor, by_input: Tensor,
    ) -> None:  # fmt: skip
        """The gradient by the new state becomes that by the old one; ``uv`` is used up."""
        n, c = by_q.shape[0], self.n_channels
        last = a.shape[1] == 2 * c
        torch.ops.mlffd.node_mix_backward_(uv, by_q, by_mu, by_a, self.reduced)
        self.context.backward(by_a, hidden, bent, by_input, False)
        torch.ops.mlffd.node_project_backward_(
            a, self.context.outer_bias, by_input, by_mu, by_q, uv, self.softening, self.reduced
        )
        self.project.backward(uv.view(3 * n, 2 * c), by_mu.view(3 * n, c), not last)


class _Block(nn.Module):
    """From one message to the next: mixing, then the context of the next block's features."""

    table: Tensor

    def __init__(
        self, mixing: Mixing, following: Interaction, table: Tensor, like: Tensor, reduced: bool
    ) -> None:
        super().__init__()
        self.n_channels = c = mixing.n_channels
        self.mixing = _Mix(mixing, False, like, reduced)
        self.context = _Perceptron(following.context, 3 * c, like, reduced)
        self.register_buffer("table", table.view(table.shape[0], 3, -1).contiguous())

    def forward(
        self, q: Tensor, mu: Tensor, kept: _Kept, space: _Space, new_q: Tensor, new_mu: Tensor,
        features: Tensor,
    ) -> None:  # fmt: skip
        """New state, and the features for the neighbors, of n atoms."""
        n, c = q.shape[0], self.n_channels
        self.mixing(q, mu, kept.uv, kept.hidden, kept.a, space.bent, new_q, new_mu)
        phi = space.phi
        if features.dtype == phi.dtype:  # in the place where it stays
            phi = features.view(n, 5 * c)[:, : 3 * c]
        self.context(new_q[:, :c], kept.inner, space.bent, phi)
        torch.ops.mlffd.node_features_(phi, self.context.outer_bias, new_mu, features, kept.scale)

    def backward(
        self, mu: Tensor, kept: _Kept, space: _Space, old_q: Tensor, old_mu: Tensor, by_q: Tensor,
        by_mu: Tensor,
    ) -> None:  # fmt: skip
        """From the gradients by the new state, and by the features in ``space``, that by the old.

        It goes to ``by_q`` and ``by_mu``, which may be in the place of the others.
        """
        n, c = by_q.shape[0], self.n_channels
        bias = self.mixing.context.outer_bias
        by_features = space.by_features
        torch.ops.mlffd.node_features_backward_(
            kept.uv,
            kept.a,
            bias,
            mu,
            kept.scale,
            by_features,
            old_q,
            old_mu,
            by_q,
            by_mu,
            self.mixing.reduced,
        )
        by_phi = by_features.view(n, 5 * c)[:, : 3 * c]
        self.context.backward(by_phi, kept.inner, space.bent, by_q, True)
        self.mixing.backward(
            by_q, by_mu, kept.uv, kept.hidden, kept.a, space.bent, space.phi, space.q
        )


def _part(tensor: Tensor, start: int, n: int) -> Tensor:
    return tensor.narrow(0, start, n)


def _part_of(kept: _Kept, start: int, n: int) -> _Kept:
    return _Kept(
        _part(kept.uv, start, n),
        _part(kept.hidden, start, n),
        _part(kept.a, start, n),
        _part(kept.inner, start, n),
        _part(kept.scale, start, n),
    )


def _first_of(space: _Space, n: int) -> _Space:
    return _Space(
        _part(space.bent, 0, n),
        _part(space.phi, 0, n),
        _part(space.q, 0, n),
        _part(space.mu, 0, n),
        _part(space.by_features, 0, n),
    )


def _features(n: int, table: Tensor, like: Tensor) -> Tensor:
    return torch.empty([n, 5, like.shape[1]], dtype=table.dtype, device=like.device)


def _room(n: int, c: int, like: Tensor) -> _Kept:
    return _Kept(
        like.new_empty([n, 3, 2 * c]),
        like.new_empty([n, c]),
        like.new_empty([n, 3 * c]),
        like.new_empty([n, c]),
        like.new_empty([n, c]),
    )


def _space(n: int, c: int, like: Tensor) -> _Space:
    return _Space(
        like.new_empty([n, c]),
        like.new_empty([n, 3 * c]),
        like.new_empty([n, 2 * c]),
        like.new_empty([n, 3, c]),
        like.new_empty([n, 5, c]),
    )


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
        self.chunk, self.enough_chunks = _CHUNK, _CHUNKS_TO_REMEMBER
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
            _Block(mixing, following, table, like, reduced)  # type: ignore[arg-type]
            for mixing, following, table in zip(mixings[:-1], later, tables[1:], strict=True)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.backwards = nn.ModuleList(blocks[::-1])  # TorchScript cannot reverse the other
        self.mixing = _Mix(mixings[-1], True, like, reduced)  # type: ignore[arg-type]
        inner, outer = network.readout[0], network.readout[2]
        self.readout = _Product(inner.weight, like, reduced)  # type: ignore[arg-type]
        self.register_buffer("readout_bias", inner.bias.detach().to(like).contiguous())  # type: ignore[operator,union-attr]
        of_energy = torch.cat([outer.weight[0], outer.bias])  # type: ignore[index,list-item]
        self.register_buffer("of_energy", of_energy.detach().to(like))
        self._constants(potential, device)

    def _constants(self, potential: Potential, device: torch.device) -> None:
        zbl = potential.repulsion
        z, radii = zbl._numbers, zbl._radii
        core = (potential._core[:, None] + potential._core).clamp(min=potential.smallest_core)
        reach = (radii[:, None] + radii).clamp(min=zbl.shortest_range)
        per_length = (z[:, None] ** 0.23 + z**0.23) / zbl.screening_length
        strength = zbl.coulomb * z[:, None] * z
        pairs = torch.stack([core, reach, per_length, strength], dim=-1).contiguous()
        self.register_buffer("pairs", pairs.to(device))
        references = torch.tensor(potential.references, dtype=torch.float64)
        self.register_buffer("references", references.to(device))

    def forward(self, rows: Rows, with_virial: bool = True) -> Prediction:
        """Energy, forces, virial (zeros if not wanted) and energy of each atom."""
        if self.never:  # the first that a stored module asks for, see kernels/ops.py
            with_virial = torch.ops.mlffd.import_openmm_mlffd_kernels_ops_first(with_virial)
        geometry, by_slot = torch.ops.mlffd.edge_geometry(
            rows.positions, rows.cell, rows.system, rows.species, self.pairs, rows.neighbors,
            rows.images, rows.counts, self.cutoff, self.softening, self.shortest,
            self.per_interval, self.in_double,
        )  # fmt: skip
        learned = self.network(rows, geometry, by_slot)
        forces, terms = torch.ops.mlffd.edge_forces(
            rows.positions, rows.cell, rows.system, rows.species, self.pairs, rows.neighbors,
            rows.images, rows.reverse, rows.counts, by_slot, learned, self.references,
            self.cutoff, self.softening, self.per_interval, with_virial,
        )  # fmt: skip
        energy, virial = torch.ops.mlffd.system_sums(terms, rows.system, rows.cell.shape[0])
        return Prediction(energy, forces, virial, terms[0])

    def network(self, rows: Rows, geometry: Tensor, by_slot: Tensor) -> Tensor:
        """The network's energy of each atom [eV]; its gradient by the edges is added by slot."""
        like, c, n = self.embedding, self.n_channels, rows.counts.shape[0]
        n_parts = 1
        if geometry.is_cuda:
            n_parts = min(8, max(1, self.enough_rows // max(1, n)))
        # chunks of the same size; as many of the last blocks are remembered as there is room for
        size, n_kept = max(1, n), len(self.blocks)
        if not self.remember:
            size = -(-size // -(-size // self.chunk))
            n_kept = 1 if n >= self.enough_chunks * self.chunk else 0
        space, shared = _space(size, c, like), _room(size, c, like)
        q, mu = like.new_empty([n, 2 * c]), like.new_empty([n, 3, c])
        torch.ops.mlffd.message_(
            self.first, rows.species, self.table, geometry, rows.neighbors, rows.counts,
            self.embedding, q, mu, self.degree, n_parts,
        )  # fmt: skip
        mus: list[Tensor] = []
        qs: list[Tensor] = []
        sent: list[Tensor] = []
        kept: list[_Kept] = []
        n_forgotten = len(self.blocks) - n_kept
        for k, block in enumerate(self.blocks):
            remembered = k >= n_forgotten
            room = _room(n, c, like) if remembered else shared
            features = _features(n, self.table, like)
            # what is remembered is not computed again from the scalars
            new_q = q if remembered else torch.empty_like(q)
            new_mu = torch.empty_like(mu)
            for start in range(0, n, size):
                m = min(size, n - start)
                block(
                    _part(q, start, m), _part(mu, start, m),
                    _part_of(room, start if remembered else 0, m), _first_of(space, m),
                    _part(new_q, start, m), _part(new_mu, start, m), _part(features, start, m),
                )  # fmt: skip
            torch.ops.mlffd.message_(
                features, rows.species, block.table, geometry, rows.neighbors, rows.counts,
                self.embedding, new_q, new_mu, self.degree, n_parts,
            )  # fmt: skip
            mus.append(mu)
            if remembered:
                sent.append(features)
                kept.append(room)
            else:
                qs.append(q)
            q, mu = new_q, new_mu
        learned, by_q = self.energies(q, mu, space, shared, size)
        by_mu = mu
        for block in self.backwards:
            sent_q, sent_mu = self.sent(by_q, by_mu)
            # the gradient by the vectors in the place of the vectors, whose last use this is
            mu, by_old_q = mus.pop(), torch.empty_like(by_q)
            remembered = len(kept) > 0
            room = kept.pop() if remembered else shared
            features = sent.pop() if remembered else _features(size, self.table, like)
            q = by_q if remembered else qs.pop()
            for start in range(0, n, size):
                m = min(size, n - start)
                offset = start if remembered else 0
                here, now = _part_of(room, offset, m), _first_of(space, m)
                its_mu, its_features = _part(mu, start, m), _part(features, offset, m)
                if not remembered:
                    block(_part(q, start, m), its_mu, here, now, now.q, now.mu, its_features)
                torch.ops.mlffd.message_backward_(
                    sent_q, sent_mu, its_features, _part(rows.species, start, m), block.table,
                    _part(geometry, start, m), _part(rows.neighbors, start, m),
                    _part(rows.counts, start, m), _part(by_slot, start, m), now.by_features,
                    self.degree, n_parts,
                )  # fmt: skip
                block.backward(  # type: ignore[operator]
                    its_mu, here, now, _part(by_q, start, m), _part(by_mu, start, m),
                    _part(by_old_q, start, m), its_mu,
                )  # fmt: skip
            by_q, by_mu = by_old_q, mu
        sent_q, sent_mu = self.sent(by_q, by_mu)
        torch.ops.mlffd.message_backward_(
            sent_q, sent_mu, self.first, rows.species, self.table, geometry, rows.neighbors,
            rows.counts, by_slot, like.new_empty([0, 2, c]), self.degree, n_parts,
        )  # fmt: skip
        return learned

    def sent(self, q: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """What neighbors gather, as it is stored."""
        if self.table.dtype == q.dtype:
            return q, mu
        half_q = torch.empty_like(q, dtype=self.table.dtype)
        half_mu = torch.empty_like(mu, dtype=self.table.dtype)
        torch.ops.mlffd.node_halves_(q, mu, half_q, half_mu)
        return half_q, half_mu

    def energies(
        self, q: Tensor, mu: Tensor, space: _Space, shared: _Kept, size: int
    ) -> tuple[Tensor, Tensor]:
        """Energy of each atom [eV] from its last state, and the gradient of their sum by it.

        That by the scalars is returned, that by the vectors takes their place.
        """
        n, c, width = q.shape[0], self.n_channels, self.readout_bias.shape[0]
        energies = torch.empty([n], dtype=torch.float64, device=q.device)
        by_q = q.new_empty([n, c])
        for start in range(0, n, size):
            m = min(size, n - start)
            its_q, its_mu, its_by_q = _part(q, start, m), _part(mu, start, m), _part(by_q, start, m)
            here, now = _part_of(shared, 0, m), _first_of(space, m)
            a = here.a.flatten()[: m * 2 * c].view(m, 2 * c)
            by_a = now.phi.flatten()[: m * 2 * c].view(m, 2 * c)
            hidden = now.bent.flatten()[: m * width].view(m, width)
            self.mixing(its_q, its_mu, here.uv, here.hidden, a, now.bent, its_q, its_mu)
            self.readout(its_q[:, :c], hidden)
            torch.ops.mlffd.node_readout_(
                hidden, self.readout_bias, self.of_energy, _part(energies, start, m),
                self.energy_scale, self.energy_bound, self.readout.reduced,
            )  # fmt: skip
            self.readout.backward(hidden, its_by_q, False)
            self.mixing.backward(its_by_q, its_mu, here.uv, here.hidden, a, now.bent, by_a, now.q)
        return energies, by_q
