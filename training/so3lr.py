"""SO3LR as a teacher, in batches; a part of the worker process, which loads it by its path.

The model of Kabylda et al. (doi:10.1021/jacs.5c09558), with the weights in the wheel of
So3krates-torch. Its Coulomb energy within a cutoff is a shifted sum (Wolf et al.,
doi:10.1063/1.478738) of which the published model leaves out the self term; with it, a neutral
molecule much smaller than the cutoff has the energy of all pairs.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np

try:
    import torch
    from so3krates_torch.tools import torch_tools
except ImportError as error:
    raise ImportError(
        f"SO3LR is needed ({error}): mlffd teacher install so3lr, or pip install "
        "So3krates-torch==0.2.1 in an environment whose Python is then given as --teacher-python"
    ) from error

CUTOFF_LR = 12.0
"""Cutoff of Coulomb energy and dispersion [Å]."""

DAMPING = 2.0
"""Range over which the dispersion is switched off [Å]."""

ELEMENTS = frozenset({1, 6, 7, 8, 9, 15, 16, 17})
"""Atomic numbers that were trained; the model gives numbers without meaning for others."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}
_ALL_ON_GPU = 4000  # atoms; more pairs than that do not fit
_ALL_PAIRS = 1000  # molecules with more atoms get a cell list


def load_model(device: torch.device, dtype: torch.dtype) -> Any:
    """The published model, without its constant energy per atom.

    That constant is the same for all elements, has no meaning, and costs float32 its digits.
    Long-range pairs are listed once instead of twice, which gives the same energy.

    Notes
    -----
    The file is a pickled module. Only classes of torch.nn and of So3krates-torch are admitted.
    """
    path = str(files("so3krates_torch.pretrained.so3lr") / "so3lr.model")
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    admitted: list[Callable[..., Any]] = []
    for name in names:
        if not name.startswith(("torch.nn.modules.", "so3krates_torch.")):
            raise ValueError(f"{path}: holds {name}, which is no part of a model")
        module, _, attribute = name.rpartition(".")
        admitted.append(getattr(importlib.import_module(module), attribute))
    with torch.serialization.safe_globals(admitted):  # type: ignore[arg-type]
        model = torch.load(path, map_location=device, weights_only=True)
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    model.device = device
    model.r_max_lr = CUTOFF_LR
    model.dispersion_energy_cutoff_lr_damping = DAMPING
    model.electrostatic_potential.neighborlist_format_lr = "ordered_sparse"
    model.dispersion_potential.c = 1.0
    model.atomic_energy_output_block.energy_shifts.data.zero_()
    return model


def add_self_term(model: Any) -> None:
    """Add -½ k erf(r_c / σ) / r_c Σ q_i² to the Coulomb energy of a model.

    That is what keeps the shifted sum from depending on the charges by themselves.
    """
    coulomb = model.electrostatic_potential
    published = coulomb.forward

    def forward(
        partial_charges: Any,
        senders_lr: Any,
        receivers_lr: Any,
        lengths_lr: Any,
        num_nodes: Any,
        cutoff_lr: float | None = None,
        electrostatic_energy_scale: float = 1.0,
    ) -> Any:
        energy = published(
            partial_charges,
            senders_lr,
            receivers_lr,
            lengths_lr,
            num_nodes,
            cutoff_lr,
            electrostatic_energy_scale,
        )
        if cutoff_lr is None:
            return energy
        slope = math.erf(cutoff_lr / electrostatic_energy_scale) / cutoff_lr
        return energy - 0.5 * coulomb.ke * slope * partial_charges.reshape(-1, 1) ** 2

    coulomb.forward = forward


@contextmanager
def torch_left_alone(dtype: torch.dtype) -> Iterator[None]:
    """While the model runs, it needs its default dtype, and it changes the print options."""
    before = torch.get_default_dtype()
    with torch._tensor_str.printoptions():
        torch_tools.set_default_dtype(str(dtype).removeprefix("torch."))
        try:
            yield
        finally:
            torch_tools.set_default_dtype(str(before).removeprefix("torch."))


Edges = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""First atom, second atom, and whole box vectors between them."""


def pairs_of_molecules(
    positions: torch.Tensor, offsets: np.ndarray, molecules: np.ndarray, cutoff: float
) -> tuple[Edges, Edges]:
    """Pairs of molecules that are not periodic, all of them at once.

    Parameters
    ----------
    positions
        Of all atoms of a batch [Å], shape ``(n_atoms, 3)``, float64.
    offsets
        First atom of each structure of the batch, then the number of atoms.
    molecules
        Which of the structures to look at.
    cutoff
        Of the short pairs [Å].

    Returns
    -------
    tuple
        Pairs within `cutoff`, in both directions, and within 12 Å, each once.
    """
    device = positions.device
    first = torch.as_tensor(offsets[:-1][molecules], device=device)
    count = torch.as_tensor(np.diff(offsets)[molecules], device=device)
    # each atom beside every atom of its molecule: numbers within the molecule are those of all
    # less those of the molecules before
    partners = count.repeat_interleave(count)
    within = torch.arange(len(partners), device=device)
    start = first - (count.cumsum(0) - count)
    i = (within + start.repeat_interleave(count)).repeat_interleave(partners)
    before = (partners.cumsum(0) - partners).repeat_interleave(partners)
    lowest = first.repeat_interleave(count).repeat_interleave(partners)
    j = torch.arange(len(i), device=device) - before + lowest
    square = ((positions[j] - positions[i]) ** 2).sum(1)
    short, long = (square <= cutoff**2) & (i != j), (square <= CUTOFF_LR**2) & (i < j)

    def edges(chosen: torch.Tensor) -> Edges:
        a, b = i[chosen], j[chosen]
        return a, b, positions.new_zeros(len(a), 3)

    return edges(short), edges(long)


def pairs(
    positions: torch.Tensor, cell: np.ndarray, periodic: bool, cutoff: float
) -> tuple[Edges, Edges]:
    """Pairs of a box or of a large molecule, as for `pairs_of_molecules`.

    On a GPU those of a box are found by trying all of them, which takes milliseconds; a cell list
    on the processor would take longer than the model.
    """
    device = positions.device
    if periodic and device.type == "cuda" and len(positions) < _ALL_ON_GPU:
        return pairs_by_trying_all(positions, cell, cutoff)
    from matscipy.neighbours import neighbour_list

    x = positions.cpu().numpy()
    if not periodic:
        x = x - x.min(0)
        cell = np.diag(x.max(0) + 1.0)
    i, j, images, distances = neighbour_list(
        "ijSd", pbc=[periodic] * 3, cell=cell, positions=x, cutoff=CUTOFF_LR
    )
    # of (i, j, S) and (j, i, -S) one is kept; of an atom's own images, a half space
    side = np.sign(images) @ np.array([4, 2, 1])
    once = (i < j) | ((i == j) & (side > 0))

    def edges(chosen: np.ndarray) -> Edges:
        a, b = (torch.as_tensor(k[chosen], dtype=torch.long, device=device) for k in (i, j))
        return a, b, torch.as_tensor(images[chosen], dtype=torch.float64, device=device)

    return edges(distances <= cutoff), edges(once)


def pairs_by_trying_all(
    positions: torch.Tensor, cell: np.ndarray, cutoff: float
) -> tuple[Edges, Edges]:
    """`pairs` of a box: for each image of the box that is near enough, all pairs of atoms."""
    device = positions.device
    vectors = torch.as_tensor(cell, dtype=torch.float64, device=device)
    home = torch.floor(positions @ torch.linalg.inv(vectors))  # atoms may lie outside of the box
    x = positions - home @ vectors
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    reach = np.ceil(CUTOFF_LR / heights).astype(int)
    images = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij"), -1)
    images = images.reshape(-1, 3)
    upper = torch.triu(torch.ones(len(x), len(x), dtype=torch.bool, device=device), 1)
    found = []
    for image in images[len(images) // 2 :]:  # of an image and its opposite one is enough
        shift = torch.as_tensor(image, dtype=torch.float64, device=device)
        difference = x[None, :] + shift @ vectors - x[:, None]
        square = (difference**2).sum(-1)
        near = square <= CUTOFF_LR**2
        i, j = torch.nonzero(near if image.any() else near & upper, as_tuple=True)
        found.append((i, j, shift - home[j] + home[i], square[i, j] <= cutoff**2))
    first, second, box, is_short = (torch.cat(part) for part in zip(*found, strict=True))
    a, b, s = first[is_short], second[is_short], box[is_short]
    both = torch.cat([a, b]), torch.cat([b, a]), torch.cat([s, -s])
    return both, (first, second, box)


def _joined(edges: list[Edges]) -> Edges:
    return (
        torch.cat([i for i, _, _ in edges]),
        torch.cat([j for _, j, _ in edges]),
        torch.cat([images for _, _, images in edges]),
    )


class So3lr:
    """SO3LR with a long-range cutoff of 12 Å for every structure, periodic or not.

    Parameters
    ----------
    self_term
        Add the self term of the Coulomb energy; without it the model is the published one.
    dtype
        ``'float64'`` or ``'float32'``.
    device
        Torch device.
    """

    def __init__(
        self, *, self_term: bool = True, dtype: str = "float64", device: str = "cpu"
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self._device = torch.device(device)
        self._dtype = DTYPES[dtype]
        self._self_term = self_term
        with torch_left_alone(self._dtype):
            self._model = load_model(self._device, self._dtype)
        if self_term:
            add_self_term(self._model)
        # larger batches fall out of a processor's cache; a GPU needs about 1 MB per atom
        self.batch_atoms = 300 if self._device.type == "cpu" else 6000

    def describe(self) -> str:
        """Name, version and settings."""
        dtype = str(self._dtype).removeprefix("torch.")
        term = "with" if self._self_term else "without"
        return (
            f"SO3LR (So3krates-torch {version('So3krates-torch')}), {dtype}, long-range cutoff "
            f"{CUTOFF_LR:.0f} A {term} the Coulomb self term, dispersion damping {DAMPING:.0f} A, "
            "constant per-atom shift left out"
        )

    def refusal(self, numbers: np.ndarray, pbc: np.ndarray, charge: int) -> str:
        """Why a structure cannot be labelled, or an empty string."""
        strange = sorted(set(numbers.tolist()) - ELEMENTS)
        if strange:
            return f"the teacher does not know atomic number {', '.join(map(str, strange))}"
        electrons = int(numbers.sum()) - charge
        if electrons % 2:
            return f"{electrons} electrons, an odd number, at total charge {charge}"
        if pbc.any() and not pbc.all():
            return "periodic in some directions only"
        return ""

    def label(self, batch: Any) -> Any:
        """Label a batch; its fields and those of the result are those of the worker process."""
        periodic = batch.pbc.all(1)
        data = self._collate(batch, periodic)
        with torch_left_alone(self._dtype):
            out = self._model(data, compute_stress=bool(periodic.any()))

        def array(name: str) -> np.ndarray:
            return out[name].detach().cpu().double().numpy()

        n = len(periodic)
        stress = np.full((n, 3, 3), np.nan)
        if periodic.any():
            stress[periodic] = array("stress").reshape(n, 3, 3)[periodic]
        return _Labels(
            energy=array("energy").reshape(n),
            forces=array("forces"),
            stress=stress,
            partial_charges=array("partial_charges").reshape(-1),
            failure=np.full(n, "", dtype=object),
        )

    def _collate(self, batch: Any, periodic: np.ndarray) -> dict[str, Any]:
        cells = np.where(periodic[:, None, None], batch.cell, np.eye(3))
        count = np.diff(batch.offsets)
        system = self._tensor(np.repeat(np.arange(len(count)), count), torch.long)
        numbers = self._tensor(batch.atomic_numbers, torch.long)
        cell = self._tensor(cells)
        data = {
            "positions": self._tensor(batch.positions),
            "atomic_numbers": numbers,
            "node_attrs": torch.nn.functional.one_hot(numbers - 1, 118).to(self._dtype),
            "batch": system,
            "ptr": self._tensor(batch.offsets, torch.long),
            "head": torch.zeros(len(count), dtype=torch.long, device=self._device),
            "cell": cell,
            "total_charge": self._tensor(batch.total_charge),
            "total_spin": self._tensor(np.zeros(len(count))),  # its weights were never trained
        }
        lists = self._pairs(batch, cells, periodic)
        for suffix, (i, j, images) in zip(("", "_lr"), lists, strict=True):
            data[f"edge_index{suffix}"] = torch.stack([i, j])
            data[f"unit_shifts{suffix}"] = unit = images.to(self._dtype)
            data[f"shifts{suffix}"] = torch.einsum("ei,eij->ej", unit, cell[system[i]])
        return data

    def _pairs(self, batch: Any, cells: np.ndarray, periodic: np.ndarray) -> tuple[Edges, Edges]:
        x = self._tensor(batch.positions, torch.float64)
        cutoff = float(self._model.r_max)
        small = ~periodic & (np.diff(batch.offsets) <= _ALL_PAIRS)
        found = [pairs_of_molecules(x, batch.offsets, np.flatnonzero(small), cutoff)]
        for k in np.flatnonzero(~small).tolist():
            first, last = int(batch.offsets[k]), int(batch.offsets[k + 1])
            own = pairs(x[first:last], cells[k], bool(periodic[k]), cutoff)
            (i, j, s), (k_i, k_j, k_s) = own
            found.append(((i + first, j + first, s), (k_i + first, k_j + first, k_s)))
        return _joined([short for short, _ in found]), _joined([long for _, long in found])

    def _tensor(self, array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.as_tensor(array, dtype=dtype or self._dtype, device=self._device)


class _Labels:
    """Carries fields by name: this file cannot import the worker's `Labels`."""

    def __init__(self, **fields: np.ndarray) -> None:
        self.__dict__.update(fields)
