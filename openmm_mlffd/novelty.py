"""How far the surroundings of an atom are from anything that a student was trained on.

The distance of an atom's last hidden features from those of its element in the training data, in
standard deviations (Mahalanobis), divided by the square root of their number: about 1 for what
the student knows. It needs no gradient, so it costs a fraction of an evaluation, and the energy
and the forces know nothing of it.

References
----------
Lee et al., NeurIPS 2018, arXiv 1807.03888 (Mahalanobis distance in feature space); Angelopoulos
and Bates, arXiv 2107.07511 (conformal bounds).
"""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import openmm_mlffd
from openmm_mlffd.engines import can_run_kernels
from openmm_mlffd.graph import Graph
from openmm_mlffd.modelfile import ModelFileError, find_student, load_student
from openmm_mlffd.neighbors import VerletList
from openmm_mlffd.painn import PaiNN
from openmm_mlffd.potential import Potential, edge_vectors
from openmm_mlffd.storage import replacing

if TYPE_CHECKING:
    from openmm_mlffd.novelty_fused import FusedNovelty

FORMAT = "mlffd-novelty"
VERSION = 1
SUFFIX = ".novelty"
_KEY = "mlffd"

SHRINKAGE = 1e-5
"""Variances are at least this share of the largest one: what never varied must not divide."""

STOP_ERROR = 1.5
"""Bound of the force error [eV/Å] at which a run is stopped: as large as forces at 300 K are."""

COVERAGE = 0.9
"""Share of held-out atoms whose force error is below the bound."""


@dataclass(frozen=True, kw_only=True)
class NoveltyHeader:
    """What a novelty file says of itself."""

    student: str
    """SHA-256 of the student that it belongs to; no other is accepted."""

    elements: list[str]
    """Chemical symbols, in the order of the species index."""

    counts: list[int]
    """Training atoms of each element; an element without any is always as novel as can be."""

    warn: float
    """Held-out atoms reach this once in a thousand."""

    stop: float
    """Here the bound of the force error reaches `STOP_ERROR`."""

    error_factor: float
    """Force errors are below ``error_factor * novelty ** error_exponent`` [eV/Å] ..."""

    error_exponent: float
    """... for `COVERAGE` of the held-out atoms."""

    figures: dict[str, float] = field(default_factory=dict)
    """How well novelty tells errors on the test split, as `mlffd novelty` prints it."""

    dataset: dict[str, Any] = field(default_factory=dict)
    """Data that it was fitted on: files, sizes."""

    created_with: str = ""
    """Package version that wrote the file."""

    sha256: str = ""
    """Hash of the numbers and of the rest of this header."""


@dataclass(frozen=True)
class Novelty:
    """Statistics of a student's features on its training data.

    Attributes
    ----------
    header
        Where they come from, thresholds and calibration.
    mean
        Mean features of each element, shape (n_elements, n_features), float64.
    whitening
        For each element W with ``‖W (x − mean)‖² / n_features`` the squared novelty, shape
        (n_elements, n_features, n_features), float64.
    """

    header: NoveltyHeader
    mean: Tensor
    whitening: Tensor

    def to(self, device: torch.device) -> "Novelty":
        """The same on a device."""
        return Novelty(self.header, self.mean.to(device), self.whitening.to(device))

    def of_features(
        self,
        features: Tensor,
        species: Tensor,
        atoms: Sequence[tuple[int, Tensor]] | None = None,
    ) -> Tensor:
        """Novelty of each atom, shape ``(n_atoms,)``, float64.

        Parameters
        ----------
        features
            From `atom_features`, shape ``(n_atoms, n_features)``, on the device of the statistics.
        species
            Index of each atom's element, shape ``(n_atoms,)``.
        atoms
            From `atoms_of_elements`, where it is asked for the same atoms again and again.
        """
        found = torch.full((len(features),), torch.inf, dtype=torch.float64, device=features.device)
        for index, here in atoms or atoms_of_elements(species):
            if self.header.counts[index]:
                away = features[here].double() - self.mean[index]
                found[here] = (away @ self.whitening[index].T).square().mean(1).sqrt()
        return torch.where(found.isnan(), torch.inf, found)

    def error_bound(self, novelty: ArrayLike) -> NDArray[np.float64]:
        """Force error [eV/Å] that `COVERAGE` of held-out atoms of this novelty stay below.

        Beyond the novelty of held-out data it is an extrapolation.
        """
        header = self.header
        return header.error_factor * np.asarray(novelty, np.float64) ** header.error_exponent


class FeatureSums:
    """Adds up the features of training atoms, in float64.

    Parameters
    ----------
    n_elements
        Elements of the student.
    n_features
        Features of an atom.
    """

    def __init__(self, n_elements: int, n_features: int) -> None:
        self.counts = torch.zeros(n_elements, dtype=torch.int64)
        self._sum = torch.zeros((n_elements, n_features), dtype=torch.float64)
        self._square = torch.zeros((n_elements, n_features, n_features), dtype=torch.float64)

    def add(self, features: Tensor, species: Tensor, only: Sequence[int] | None = None) -> None:
        """Count the atoms of a batch, or those of some elements, given by their indices."""
        for index in range(len(self.counts)) if only is None else only:
            here = features[species == index].double().cpu()
            self.counts[index] += len(here)
            self._sum[index] += here.sum(0)
            self._square[index] += here.T @ here

    def forget(self, indices: Sequence[int]) -> None:
        """Start again with these elements."""
        for numbers in (self.counts, self._sum, self._square):
            numbers[list(indices)] = 0

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and whitening of each element, as `Novelty` has them."""
        count = self.counts.clamp(min=1).double()
        mean = self._sum / count[:, None]
        covariance = self._square / count[:, None, None] - mean[:, :, None] * mean[:, None, :]
        values, axes = torch.linalg.eigh(covariance)
        values = values.clamp(min=0.0) + SHRINKAGE * values[:, -1:]
        whitening = axes.transpose(1, 2) / values.clamp(min=1e-300).sqrt()[:, :, None]
        return mean, torch.where((self.counts > 0)[:, None, None], whitening, 0.0)


class NoveltyMeter:
    """Measures the novelty of the same atoms again and again.

    Parameters
    ----------
    numbers
        Atomic number of each atom.
    model
        Name of a bundled student, or path of a student file; None is the bundled default.
    device
        Torch device.
    novelty
        The statistics; None for those that lie beside the student.
    fused
        Whether features come from the fused kernels; None: on a GPU, if they are made for the
        student.

    Raises
    ------
    ModelFileError
        If there is no such student, or no statistics of this student.
    ValueError
        If the student does not know an element, or is not one for the fused kernels that are asked
        for.

    Notes
    -----
    Threads may share an instance. It has the student's weights for itself.
    """

    def __init__(
        self,
        numbers: Sequence[int] | NDArray[np.integer[Any]],
        model: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        novelty: Novelty | None = None,
        fused: bool | None = None,
    ) -> None:
        self._device = torch.device(device)
        with torch.inference_mode(False):
            self.potential = load_student(model, device=device)
            self.species = self.potential.species(torch.tensor(np.asarray(numbers, np.int64)))
            self.species = self.species.to(device)
        if novelty is None:
            novelty = load_novelty(model)
        _check_student(novelty.header, self.potential, model)
        self.novelty = novelty.to(self._device)
        self._atoms = atoms_of_elements(self.species)
        self._neighbors = VerletList(self.potential.cutoff)
        self._lock = threading.Lock()
        if fused is None:
            fused = (
                self._device.type == "cuda"
                and isinstance(self.potential.network, PaiNN)
                and can_run_kernels(self._device)
            )
        self._fast: FusedNovelty | None = None
        if fused:
            from openmm_mlffd import novelty_fused

            weights = load_student(model, device=device, precision="double")
            self._fast = novelty_fused.FusedNovelty(
                weights, self.species, self.novelty, self._atoms
            )

    def measure(self, positions: ArrayLike, cell: ArrayLike | None = None) -> NDArray[np.float64]:
        """Novelty of each atom, shape ``(n_atoms,)``; infinite where positions are not finite.

        Parameters
        ----------
        positions
            [Å], shape ``(n_atoms, 3)``.
        cell
            Box vectors as rows [Å], shape ``(3, 3)``; None for no box.
        """
        array = np.array(positions, dtype=np.float64)
        if not np.isfinite(array).all():
            return np.full(len(array), np.inf)
        if self._fast is not None:
            with self._lock:
                return self._fast.measure(array, cell)
        box = None if cell is None else torch.tensor(np.asarray(cell, dtype=np.float64))
        with self._lock, torch.inference_mode(False):
            graph = self._neighbors.graph(
                torch.tensor(array, device=self._device), self.species, cell=box
            )
            features = atom_features(self.potential, graph)
            return self.novelty.of_features(features, self.species, self._atoms).cpu().numpy()


def atom_features(potential: Potential, graph: Graph) -> Tensor:
    """Features of each atom from which the network reads its energy.

    Parameters
    ----------
    potential
        The student; no other thread may evaluate it meanwhile.
    graph
        Atoms and edges.

    Returns
    -------
    Tensor
        Shape ``(n_atoms, n_features)``, without gradients.
    """
    caught: list[Tensor] = []

    def catch(_: Any, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0].detach())

    hook = potential.network.readout.register_forward_pre_hook(catch)
    try:
        with torch.no_grad():
            potential.learned_energies(graph, edge_vectors(graph))
    finally:
        hook.remove()
    return caught[0]


def atoms_of_elements(species: Tensor) -> list[tuple[int, Tensor]]:
    """Index of each element that is there, and the indices of its atoms, shape ``(n,)`` each.

    On a GPU it waits for the device.
    """
    return [(index, (species == index).nonzero()[:, 0]) for index in species.unique().tolist()]


def novelty_path(model: str | Path | None = None) -> Path:
    """Where the statistics of a student lie: beside it, with the suffix ``.novelty``."""
    return find_student(model).with_suffix(SUFFIX)


def save_novelty(path: str | Path, novelty: Novelty) -> NoveltyHeader:
    """Write statistics; the file is replaced as a whole or not at all.

    Returns
    -------
    NoveltyHeader
        The header as written, with its hash.
    """
    tensors = {
        "mean": novelty.mean.float().contiguous(),
        "whitening": novelty.whitening.float().contiguous(),
    }
    values = asdict(novelty.header)
    values["created_with"] = f"openmm-mlffd {openmm_mlffd.__version__}"
    values["sha256"] = _digest(values, tensors)
    content = {"format": FORMAT, "version": VERSION, **values}
    with replacing(path) as file:
        file.write(save(tensors, {_KEY: json.dumps(content, ensure_ascii=False)}))
    return NoveltyHeader(**values)


def load_novelty(model: str | Path | None = None, path: str | Path | None = None) -> Novelty:
    """Read the statistics of a student.

    Parameters
    ----------
    model
        Name of a bundled student, or path of a student file; None is the bundled default.
    path
        File with the statistics; None for the one beside the student.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, of another format or a newer version; says how to make it.
    """
    path = novelty_path(model) if path is None else Path(path)
    if not path.is_file():
        raise ModelFileError(
            f"{path}: there are no novelty statistics for this student. Fit them to its training "
            f"data: mlffd novelty {model or 'default'} data.h5"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        content = json.loads(metadata[_KEY])
        found, version = content.pop("format"), content.pop("version")
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise ModelFileError(f"{path}: not a readable {FORMAT} file ({error})") from error
    if (found, version) != (FORMAT, VERSION):
        raise ModelFileError(
            f"{path}: has format {found!r} version {version!r}; openmm-mlffd "
            f"{openmm_mlffd.__version__} reads {FORMAT!r} version {VERSION}"
        )
    known = {f.name for f in fields(NoveltyHeader)}
    if set(content) != known or set(tensors) != {"mean", "whitening"}:
        raise ModelFileError(f"{path}: fields missing or unknown: {sorted(known ^ set(content))}")
    digest = _digest(content, tensors)
    if digest != content["sha256"]:
        raise ModelFileError(
            f"{path}: damaged or altered; its SHA-256 is {digest}, its header says "
            f"{content['sha256']}"
        )
    header = NoveltyHeader(**content)
    return Novelty(header, tensors["mean"].double(), tensors["whitening"].double())


def _check_student(header: NoveltyHeader, potential: Potential, model: str | Path | None) -> None:
    if header.student != potential.header.sha256:
        raise ModelFileError(
            f"the novelty statistics are those of a student with SHA-256 {header.student}, but "
            f"this student ({potential.header.name}) has {potential.header.sha256}. Fit them "
            f"again, to the data that it was trained on: mlffd novelty {model or 'default'} data.h5"
        )


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    rest = {k: v for k, v in header.items() if k not in ("sha256", "format", "version")}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
