"""All pairs within the cutoff by comparing everything with everything, for TorchScript.

Nothing but plain torch, so that a compiled student runs in hosts without Python.
`kernels.reference.neighbor_list` is faster for many atoms, and cannot be scripted.
"""

import torch
from torch import Tensor


def pairs_within(
    positions: Tensor, cell: Tensor, pbc: Tensor, cutoff: float, at_a_time: int
) -> tuple[Tensor, Tensor]:
    """All directed pairs of atoms of one system closer than the cutoff, images included.

    Parameters
    ----------
    positions
        Atom positions [Å], finite, inside the box or not, shape ``(n_atoms, 3)``, float64.
    cell
        Box vectors as rows [Å], zero where not periodic, shape ``(3, 3)``, float64.
    pbc
        Whether each box vector is periodic, shape ``(3,)``, bool.
    cutoff
        Largest distance [Å].
    at_a_time
        About how many distances are in memory at once.

    Returns
    -------
    edge_index
        Receiver and sender, sorted by receiver, shape ``(2, n_edges)``, int64.
    edge_shift
        Image of the sender in units of the box vectors, shape ``(n_edges, 3)``, float64.

    Notes
    -----
    That periodic boxes have a volume is not checked.
    """
    # columns are the dual vectors of periodic directions, and zero for others
    dual = torch.linalg.pinv(cell)
    reach = cutoff * dual.square().sum(0).sqrt() + 1e-6  # in units of the box vectors
    image = torch.floor(positions @ dual)
    wrapped = positions - image @ cell
    most = torch.ceil(torch.where(pbc, reach, torch.zeros_like(reach)))
    axes = [
        torch.arange(-float(n), float(n) + 1.0, dtype=torch.float64, device=cell.device)
        for n in most.unbind(0)
    ]
    shifts = torch.cartesian_prod(axes[0], axes[1], axes[2])
    # images of atoms that are near enough to the box to be anybody's neighbor
    places = (wrapped @ dual).unsqueeze(1) + shifts
    near = (((places >= -reach) & (places <= 1.0 + reach)) | ~pbc).all(dim=2)
    found = near.nonzero()
    atom, shift = found[:, 0], shifts[found[:, 1]]
    ghosts = wrapped[atom] + shift @ cell
    here = shift.eq(0.0).all(dim=1)
    edges: list[Tensor] = []
    images: list[Tensor] = []
    n_atoms = positions.shape[0]
    block = max(1, at_a_time // max(1, ghosts.shape[0]))
    for start in range(0, n_atoms, block):
        mine = torch.arange(start, min(start + block, n_atoms), device=cell.device)
        squares = (ghosts - wrapped[mine].unsqueeze(1)).square().sum(dim=2)
        itself = here & (atom == mine.unsqueeze(1))
        pair = ((squares < cutoff * cutoff) & ~itself).nonzero()
        receiver, sender = mine[pair[:, 0]], atom[pair[:, 1]]
        edges.append(torch.stack([receiver, sender]))
        images.append(shift[pair[:, 1]] + image[receiver] - image[sender])
    return torch.cat(edges, dim=1), torch.cat(images)
