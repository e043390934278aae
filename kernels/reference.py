"""Every operator in plain torch: slow and right, on any device, differentiable to any order."""

import torch
from torch import Tensor

from openmm_mlffd.kernels import splines


def neighbor_list(
    positions: Tensor, system: Tensor, cell: Tensor, pbc: Tensor, *, cutoff: float
) -> tuple[Tensor, Tensor]:
    """All directed pairs of atoms closer than the cutoff, periodic images included.

    A cell list over all systems at once. Any cell shape and size: in a box smaller than twice
    the cutoff an atom has several images of the same neighbor, and images of itself.

    Parameters
    ----------
    positions
        Atom positions [Å], shape ``(n_atoms, 3)``, float32 or float64, inside the box or not.
    system
        Which system each atom belongs to, ascending, shape ``(n_atoms,)``, int64.
    cell
        Box vectors as rows [Å], shape ``(n_systems, 3, 3)``. Rows of directions that are not
        periodic are ignored.
    pbc
        Whether each box vector is periodic, shape ``(n_systems, 3)``, bool.
    cutoff
        Largest distance [Å].

    Returns
    -------
    edge_index
        Receiver i and sender j of each edge, sorted by receiver, shape ``(2, n_edges)``, int64.
    edge_shift
        The image of the sender in units of the box vectors, shape ``(n_edges, 3)``, with the
        dtype of ``positions``: the edge is the vector
        ``positions[j] + edge_shift @ cell - positions[i]``.

    Raises
    ------
    ValueError
        If a periodic box has no volume.

    Notes
    -----
    Waits for the device (the number of edges is data). Positions must be finite; callers check.
    """
    if positions.shape[0] == 0:
        return system.new_empty((2, 0)), positions.new_empty((0, 3))
    box, origin = _bounding_boxes(positions, system, cell, pbc)
    fractional = torch.einsum(
        "na,nab->nb", positions - origin[system], torch.linalg.inv(box)[system]
    )
    image = torch.where(pbc[system], fractional.floor(), 0.0)
    fractional = fractional - image

    height = torch.linalg.inv(box).norm(dim=1).reciprocal()  # (n_systems, 3)
    n_in_system = torch.bincount(system, minlength=cell.shape[0])
    most_bins = n_in_system.to(positions.dtype).pow(1 / 3).ceil()[:, None]
    n_bins = torch.minimum((height / cutoff).floor(), most_bins).clamp(min=1).long()
    reach = (cutoff * n_bins / height).ceil().long()
    reach = torch.where(pbc, reach, torch.minimum(reach, n_bins - 1))

    bin3 = torch.minimum((fractional * n_bins[system]).long().clamp(min=0), n_bins[system] - 1)
    first_bin = torch.cumsum(n_bins.prod(1), 0) - n_bins.prod(1)
    order, first_atom = _sort_by_bin(_flat_bin(bin3, n_bins[system], first_bin[system]), n_bins)

    receiver, sender, shift = [], [], []
    offsets = _bin_offsets(reach)
    # a few million candidates at a time bound the memory
    for block in torch.arange(positions.shape[0], device=system.device).split(
        max(1, 2**19 // max(1, offsets.shape[0]))
    ):
        i, j, s = _candidates(
            block, bin3, system, offsets, n_bins, reach, pbc, first_bin, order, first_atom
        )
        s = s.to(positions.dtype) + image[i] - image[j]
        vector = (
            positions[j]
            - positions[i]
            + torch.einsum("na,nab->nb", s, _periodic(box, pbc)[system[i]])
        )
        near = vector.square().sum(1) < cutoff**2
        near &= (i != j) | s.ne(0).any(1)
        receiver.append(i[near])
        sender.append(j[near])
        shift.append(s[near])
    return torch.stack([torch.cat(receiver), torch.cat(sender)]), torch.cat(shift)


def _periodic(box: Tensor, pbc: Tensor) -> Tensor:
    return torch.where(pbc[:, :, None], box, 0.0)


def _bounding_boxes(
    positions: Tensor, system: Tensor, cell: Tensor, pbc: Tensor
) -> tuple[Tensor, Tensor]:
    """A box with volume for each system: its cell, or around its atoms where not periodic."""
    box = cell.to(positions.dtype).clone()
    box = torch.where(pbc.any(1)[:, None, None], box, torch.eye(3).to(box))
    for s in (pbc.any(1) & ~pbc.all(1)).nonzero()[:, 0].tolist():
        box[s] = _complete(box[s], pbc[s])
    volume = torch.linalg.det(box).abs()
    if not bool((volume > 1e-6).all()):
        flat = int((volume <= 1e-6).nonzero()[0, 0])
        raise ValueError(
            f"the periodic box of system {flat} has no volume: box vectors {cell[flat].tolist()}"
        )
    fractional = torch.einsum("na,nab->nb", positions, torch.linalg.inv(box)[system])
    index = system[:, None].expand(-1, 3)
    low = torch.zeros_like(box[:, 0]).scatter_reduce(
        0, index, fractional, "amin", include_self=False
    )
    high = torch.zeros_like(box[:, 0]).scatter_reduce(
        0, index, fractional, "amax", include_self=False
    )
    extent = torch.where(pbc, 1.0, high - low + 1e-3)
    low = torch.where(pbc, 0.0, low)
    origin = torch.einsum("na,nab->nb", low, box)
    return box * extent[:, :, None], origin


def _complete(box: Tensor, pbc: Tensor) -> Tensor:
    """Replace the vectors of directions that are not periodic by perpendicular unit vectors."""
    box = torch.where(pbc[:, None], box, 0.0)
    if int(pbc.sum()) == 2:
        k = int((~pbc).nonzero()[0, 0])
        normal = torch.linalg.cross(box[(k + 1) % 3], box[(k + 2) % 3])
        box[k] = normal / normal.norm()
        return box
    k = int(pbc.nonzero()[0, 0])
    axis = box[k] / box[k].norm()
    helper = torch.zeros_like(axis)
    helper[int(axis.abs().argmin())] = 1.0
    first = torch.linalg.cross(axis, helper)
    box[(k + 1) % 3] = first / first.norm()
    box[(k + 2) % 3] = torch.linalg.cross(axis, box[(k + 1) % 3])
    return box


def _flat_bin(bin3: Tensor, n_bins: Tensor, first_bin: Tensor) -> Tensor:
    return (
        first_bin + (bin3[..., 0] * n_bins[..., 1] + bin3[..., 1]) * n_bins[..., 2] + bin3[..., 2]
    )


def _sort_by_bin(flat: Tensor, n_bins: Tensor) -> tuple[Tensor, Tensor]:
    """Atoms in the order of their bins, and where in that order each bin starts."""
    count = torch.bincount(flat, minlength=int(n_bins.prod(1).sum()))
    first_atom = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return torch.argsort(flat, stable=True), first_atom


def _bin_offsets(reach: Tensor) -> Tensor:
    """Relative bins to search, for the system that reaches farthest, shape (n_offsets, 3)."""
    axes = [torch.arange(-r, r + 1, device=reach.device) for r in reach.amax(0).tolist()]
    return torch.cartesian_prod(*axes)


def _candidates(
    atoms: Tensor,
    bin3: Tensor,
    system: Tensor,
    offsets: Tensor,
    n_bins: Tensor,
    reach: Tensor,
    pbc: Tensor,
    first_bin: Tensor,
    order: Tensor,
    first_atom: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each atom with everything in the bins around it: atom, other atom, image of the other bin."""
    sys = system[atoms][:, None]  # (n, 1)
    bins = n_bins[sys]  # (n, 1, 3)
    target = bin3[atoms][:, None, :] + offsets  # (n, n_offsets, 3)
    shift = torch.div(target, bins, rounding_mode="floor")
    inside = ((offsets.abs() <= reach[sys]) & (pbc[sys] | (shift == 0))).all(-1)
    row, column = inside.nonzero(as_tuple=True)
    shift = shift[row, column]
    wrapped = target[row, column] - shift * bins[row, 0]
    flat = _flat_bin(wrapped, bins[row, 0], first_bin[sys[row, 0]])
    count = first_atom[flat + 1] - first_atom[flat]
    pair = torch.repeat_interleave(torch.arange(flat.shape[0], device=flat.device), count)
    nth = torch.arange(pair.shape[0], device=flat.device) - (count.cumsum(0) - count)[pair]
    return atoms[row[pair]], order[first_atom[flat[pair]] + nth], shift[pair]


def message_sum(
    scalars: Tensor,
    vectors: Tensor | None,
    filters: Tensor,
    directions: Tensor,
    edge_index: Tensor,
    n_atoms: int = -1,
) -> tuple[Tensor, Tensor]:
    """Filter the senders' features along each edge and sum them on the receivers.

    For each edge e from j to i, with filters (a, c, b): scalars a·x_j, vectors
    c·y_j ⊗ u + b·m_j, where (x_j, y_j) are the halves of ``scalars`` and m_j is ``vectors``.
    PaiNN (Schütt et al. 2021, arXiv 2102.03150), equations 7 and 8, with the product of the
    context and the vector features taken once per atom instead of once per edge.

    Parameters
    ----------
    scalars
        Context of each atom for scalar and direction messages, ``(n_atoms, 2 n_channels)``.
    vectors
        Context times vector features, shape ``(n_atoms, 3, n_channels)``; None where they are
        all zero (the first block).
    filters
        Radial filters, zero at the cutoff, shape ``(n_edges, 3 n_channels)``; without
        ``vectors``, ``(n_edges, 2 n_channels)``.
    directions
        Unit vectors from receiver to sender, shape ``(n_edges, 3)``.
    edge_index
        Receiver and sender of each edge, shape ``(2, n_edges)``, int64.
    n_atoms
        Number of receivers; by default, as many as senders.

    Returns
    -------
    scalars
        Sums over the neighbors, shape ``(n_atoms, n_channels)``.
    vectors
        Sums over the neighbors, shape ``(n_atoms, 3, n_channels)``.
    """
    n_channels = scalars.shape[1] // 2
    if n_atoms < 0:
        n_atoms = scalars.shape[0]
    receiver, sender = edge_index[0], edge_index[1]
    gathered = scalars.index_select(0, sender) * filters[:, : 2 * n_channels]  # (E, 2C)
    x, y = gathered.split(n_channels, dim=1)
    message = y.unsqueeze(1) * directions.unsqueeze(2)  # (E, 3, C)
    if vectors is not None:
        b = filters[:, 2 * n_channels :].unsqueeze(1).to(message.dtype)
        message = torch.addcmul(message, b, vectors.index_select(0, sender))
    # features of lower precision are summed in that of the directions
    zeros = torch.zeros([n_atoms, 4, n_channels], dtype=message.dtype, device=x.device)
    return (
        zeros[:, 0].index_add(0, receiver, x.to(message.dtype)),
        zeros[:, 1:].index_add(0, receiver, message),
    )


def message(
    features: Tensor,
    rows: Tensor,
    table: Tensor,
    geometry: Tensor,
    neighbors: Tensor,
    counts: Tensor,
    degree: int,
) -> Tensor:
    """Filter the neighbors' features by tabulated filters and sum them on each atom.

    `message_sum` with the filters (a, c, b) from a spline, on rows of neighbors.

    Parameters
    ----------
    features
        Of each atom (x, y, m), shape ``(n_rows, 5, n_channels)``; (x, y), shape
        ``(n_rows, 2, n_channels)``, for the first block.
    rows
        Row of ``features`` of each atom, shape ``(n_atoms,)``, int32; the first block's, others
        have each atom's own.
    table
        Coefficients of the filters' spline, shape ``(n_intervals + degree, 2 or 3, n_channels)``.
    geometry
        Unit vector from the atom to the neighbor and distance in intervals of the table, negative
        beyond the cutoff, shape ``(n_atoms, capacity, 4)``.
    neighbors
        Shape ``(n_atoms, capacity)``, int32.
    counts
        Number of neighbors, shape ``(n_atoms,)``, int32.
    degree
        Of the spline, odd.

    Returns
    -------
    Tensor
        Sums of scalars and vectors, shape ``(n_atoms, 4, n_channels)``.
    """
    first = features.shape[1] == 2
    receiver, slot, sender = _used_slots(geometry, neighbors, counts)
    edges = geometry[receiver, slot]  # (E, 4)
    filters = splines.evaluate(table.flatten(1), edges[:, 3], degree)  # (E, 3C)
    gathered = features[rows[sender].long() if first else sender]
    index = torch.stack([receiver, torch.arange(receiver.shape[0], device=counts.device)])
    scalars, vectors = message_sum(
        gathered[:, :2].flatten(1),
        None if first else gathered[:, 2:],
        filters,
        edges[:, :3],
        index,
        n_atoms=neighbors.shape[0],
    )
    return torch.cat([scalars.unsqueeze(1), vectors], dim=1)


def message_table_gradient(
    gradient: Tensor,
    features: Tensor,
    rows: Tensor,
    table: Tensor,
    geometry: Tensor,
    neighbors: Tensor,
    counts: Tensor,
    degree: int,
) -> Tensor:
    """Gradient of Σ gradient · `message` by the table, with the shape of the table."""
    first = features.shape[1] == 2
    receiver, slot, sender = _used_slots(geometry, neighbors, counts)
    edges = geometry[receiver, slot]  # (E, 4)
    sent = features[rows[sender].long() if first else sender].to(geometry.dtype)
    received = gradient[receiver].to(geometry.dtype)  # (E, 4, C)
    along = torch.einsum("ek,ekc->ec", edges[:, :3], received[:, 1:])
    parts = [sent[:, 0] * received[:, 0], sent[:, 1] * along]
    if not first:
        parts.append((sent[:, 2:] * received[:, 1:]).sum(1))
    by_filter = torch.stack(parts, dim=1)  # (E, 2 or 3, C)
    knot = edges[:, 3].long().clamp(0, table.shape[0] - degree - 1)
    weights = splines.basis_splines(edges[:, 3] - knot, degree)  # (E, degree + 1)
    by_table = torch.zeros_like(table, dtype=geometry.dtype)
    for q in range(degree + 1):
        by_table.index_add_(0, knot + q, weights[:, q, None, None] * by_filter)
    return by_table.to(table.dtype)


def edge_message(
    features: Tensor, table: Tensor, geometry: Tensor, edge_index: Tensor, degree: int
) -> Tensor:
    """`message` on a list of edges, each atom with features of its own.

    Parameters
    ----------
    features
        Of each atom (x, y, m), shape ``(n_atoms, 5, n_channels)``; (x, y), shape
        ``(n_atoms, 2, n_channels)``, for the first block.
    table
        Coefficients of the filters' spline, shape ``(n_intervals + degree, 2 or 3, n_channels)``.
    geometry
        Unit vector from receiver to sender and distance in intervals of the table, shape
        ``(n_edges, 4)``; beyond the table's ends there is no message.
    edge_index
        Receiver and sender of each edge, shape ``(2, n_edges)``, int64.
    degree
        Of the spline, odd.

    Returns
    -------
    Tensor
        Sums of scalars and vectors, shape ``(n_atoms, 4, n_channels)``.
    """
    first = features.shape[1] == 2
    place, n_intervals = geometry[:, 3], table.shape[0] - degree
    present = (place >= 0) & (place < n_intervals)
    filters = splines.evaluate(table.flatten(1), torch.where(present, place, 0.0), degree)
    scalars, vectors = message_sum(
        features[:, :2].flatten(1),
        None if first else features[:, 2:],
        filters * present.unsqueeze(1),
        geometry[:, :3],
        edge_index,
    )
    return torch.cat([scalars.unsqueeze(1), vectors], dim=1)


def edge_message_second(
    gradient: Tensor,
    features: Tensor,
    d_features: Tensor,
    table: Tensor,
    geometry: Tensor,
    d_geometry: Tensor,
    edge_index: Tensor,
    degree: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of the change of Σ gradient · `edge_message` along features and geometry.

    Returns
    -------
    tuple of Tensor
        By gradient, features, table and geometry.
    """
    with torch.enable_grad():
        leaves = [
            t if t.requires_grad else t.detach().requires_grad_()
            for t in (gradient, features, table, geometry)
        ]
        sums = edge_message(leaves[1], leaves[2], leaves[3], edge_index, degree)
        by = torch.autograd.grad((leaves[0] * sums).sum(), leaves[1::2], create_graph=True)
        change = (d_features * by[0]).sum() + (d_geometry * by[1]).sum()
        found = torch.autograd.grad(change, leaves, create_graph=True, materialize_grads=True)
    return found[0], found[1], found[2], found[3]


def _used_slots(
    geometry: Tensor, neighbors: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Receiver, slot and sender of each edge within the cutoff."""
    slots = torch.arange(neighbors.shape[1], device=counts.device)
    used = (slots < counts[:, None]) & (geometry[:, :, 3] >= 0)
    receiver, slot = used.nonzero(as_tuple=True)
    return receiver, slot, neighbors[receiver, slot].long()


def node_norms(uv: Tensor, softening: float) -> Tensor:
    """Softened norms of v, of projections (u, v) with the shape ``(m, 3, 2c)``."""
    return torch.sqrt(uv[:, :, uv.shape[2] // 2 :].square().sum(dim=1) + softening)


def node_mix(
    uv: Tensor, a: Tensor, bias: Tensor, q: Tensor, mu: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """PaiNN's update: q + a_ss + a_sv u·v, and μ + a_vv u where there are vectors."""
    u, v = uv.chunk(2, dim=2)
    parts = (a + bias).split(u.shape[2], dim=1)
    scalars = q + parts[0] + parts[1] * (u * v).sum(dim=1)
    return scalars, None if mu is None else mu + parts[2].unsqueeze(1) * u


def node_features(phi: Tensor, bias: Tensor, mu: Tensor) -> Tensor:
    """Features for the neighbors (x, y, φ μ) from (x, y, φ), shape ``(m, 5, c)``."""
    x, y, scale = (phi + bias).chunk(3, dim=1)
    return torch.cat([torch.stack([x, y], dim=1), scale.unsqueeze(1) * mu], dim=1)


def node_readout(
    hidden: Tensor, bias: Tensor, weight: Tensor, scale: float, bound: float
) -> Tensor:
    """Energy of each atom, bent beyond the bound; see `node_ops.node_readout_`."""
    energy = scale * (torch.nn.functional.silu(hidden + bias) @ weight[:-1] + weight[-1])
    if bound == 0.0:
        return energy
    bent = bound + 0.5 * bound * torch.tanh((energy.abs() - bound) / (0.5 * bound))
    return torch.where(energy.abs() < bound, energy, energy.sign() * bent)
