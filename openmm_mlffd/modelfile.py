"""Student files: weights in safetensors, everything else in a JSON header. No pickle."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import openmm_mlffd
from openmm_mlffd.elements import atomic_number, symbol
from openmm_mlffd.painn import PaiNN
from openmm_mlffd.potential import Potential
from openmm_mlffd.storage import replacing
from openmm_mlffd.variants import FILTERS, VariantPaiNN

FORMAT = "mlffd-student"
VERSION = 1
UNITS = {"length": "Å", "energy": "eV"}
PRECISIONS = {"single": torch.float32, "double": torch.float64}
DEFAULT = "default"
_KEY = "mlffd"
_CHOICES = ("filters", "pair_filters", "charges", "tail", "message_cutoff")
_LIMITS = {"n_channels": 4096, "n_interactions": 32, "n_basis": 512}
_LATER = {"coordination_limits"}  # fields that the first files of this version do not have
_FIRST_SOFTENING = 1e-4  # of the files that do not say what theirs is


class ModelFileError(ValueError):
    """A student file that cannot be used; the message names the file and the cause."""


@dataclass(frozen=True, kw_only=True)
class StudentHeader:
    """What a student file says of itself."""

    name: str
    """Name of the student."""

    architecture: dict[str, Any]
    """`kind` ("painn"), `n_channels`, `n_interactions`, `n_basis`, `norm_softening`; of
    "painn-variant" also `filters`, `pair_filters`, `charges`, `tail`, `message_cutoff`."""

    elements: list[str]
    """Chemical symbols, in the order of the species index."""

    references: list[float]
    """Reference energy of each element [eV], kept as decimal text of float64."""

    cutoff: float
    """Neighbor cutoff [Å]; with a tail, its reach."""

    energy_scale: float = 1.0
    """Energy [eV] of the network's unit."""

    energy_bound: float | None = None
    """Bound of the network's energy of an atom [eV]; see `Potential`."""

    coordination_limits: list[float] | None = None
    """Coordination of each element beyond which neighbors repel; see `Crowding`."""

    teacher: str = ""
    """What labelled the training data."""

    dataset: dict[str, Any] = field(default_factory=dict)
    """Training data: files, sizes, split."""

    licence: str = "MIT"
    """Licence of the weights."""

    metrics: dict[str, Any] = field(default_factory=dict)
    """Errors on held-out data, as `mlffd evaluate` prints them."""

    training: dict[str, Any] = field(default_factory=dict)
    """The configuration that made it."""

    created_with: str = ""
    """Package version that wrote the file."""

    sha256: str = ""
    """Hash of the weights and of the rest of this header; the identity of the student."""


def save_student(path: str | Path, potential: Potential, header: StudentHeader) -> StudentHeader:
    """Write a student file.

    Parameters
    ----------
    path
        File to write, `.safetensors`; replaced as a whole or not at all.
    potential
        The student. Its weights are written as float32, or as float64 if they are that.
    header
        Description; `sha256` and `created_with` are filled in.

    Returns
    -------
    StudentHeader
        The header as written.

    Raises
    ------
    ModelFileError
        If a weight is not finite.
    ValueError
        If the header does not describe the potential.
    """
    _check_described(potential, header)
    tensors = {k: v.detach().cpu().contiguous() for k, v in potential.network.state_dict().items()}
    _check_weights(tensors, str(path))
    values = _stored(header) | {"created_with": f"openmm-mlffd {openmm_mlffd.__version__}"}
    values["sha256"] = _digest(values, tensors)
    content = {"format": FORMAT, "version": VERSION, "units": UNITS, **values}
    # not save_file, which lets nobody else read the file
    with replacing(path) as file:
        file.write(save(tensors, {_KEY: json.dumps(content, ensure_ascii=False)}))
    return StudentHeader(**values)


def make_potential(header: StudentHeader) -> Potential:
    """The potential that a header describes, with untrained weights.

    Raises
    ------
    ModelFileError
        If the architecture is not one this version knows, or a size or number is absurd.
    """
    sizes = dict(header.architecture)
    kind = sizes.pop("kind", None)
    softening = sizes.pop("norm_softening", _FIRST_SOFTENING)
    known = {"painn": set(_LIMITS), "painn-variant": set(_LIMITS) | set(_CHOICES)}
    if kind not in known or set(sizes) != known[kind]:
        raise ModelFileError(
            f"{header.name}: architecture {header.architecture} is not known to openmm-mlffd "
            f"{openmm_mlffd.__version__}; it knows kind 'painn' with {', '.join(_LIMITS)}, "
            f"norm_softening, and 'painn-variant' with {', '.join(_CHOICES)} besides"
        )
    for key in _LIMITS:
        value = sizes[key]
        if not isinstance(value, int) or not 0 < value <= _LIMITS[key]:
            raise ModelFileError(
                f"{header.name}: {key} must be a whole number from 1 to {_LIMITS[key]}, "
                f"got {value!r}"
            )
    _check_numbers(header, softening)
    numbers = [_known_number(name, header) for name in header.elements]
    if len(set(numbers)) != len(numbers):
        raise ModelFileError(f"{header.name}: an element is listed twice: {header.elements}")
    network: PaiNN | VariantPaiNN
    if kind == "painn":
        network = PaiNN(len(numbers), cutoff=header.cutoff, norm_softening=softening, **sizes)
    else:
        network = _make_variant(header, sizes, numbers, softening)
    return Potential(
        network,
        numbers,
        header.cutoff,
        references=header.references,
        energy_scale=header.energy_scale,
        energy_bound=header.energy_bound,
        coordination_limits=header.coordination_limits,
    )


def _check_numbers(header: StudentHeader, softening: Any) -> None:
    for value in (header.cutoff, header.energy_scale, *header.references):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelFileError(
                f"{header.name}: cutoff, energy scale and reference energies must be finite "
                f"numbers, got {value!r}"
            )
    if not (isinstance(softening, int | float) and 0 < softening < math.inf):
        raise ModelFileError(f"{header.name}: norm_softening must be positive, got {softening!r}")
    bound = header.energy_bound
    if bound is not None and not (isinstance(bound, int | float) and 0 < bound < math.inf):
        raise ModelFileError(f"{header.name}: the energy bound must be positive, got {bound!r}")
    limits = header.coordination_limits
    if limits is not None and not (
        isinstance(limits, list)
        and len(limits) == len(header.elements)
        and all(isinstance(x, int | float) and 0 < x < math.inf for x in limits)
    ):
        raise ModelFileError(
            f"{header.name}: one positive coordination limit is needed for each of "
            f"{len(header.elements)} elements, got {limits!r}"
        )
    if not 0.5 <= header.cutoff <= 50.0:
        raise ModelFileError(
            f"{header.name}: the cutoff must be between 0.5 and 50 Å, got {header.cutoff!r}"
        )
    if len(header.references) != len(header.elements) or not header.elements:
        raise ModelFileError(
            f"{header.name}: one reference energy is needed for each element, "
            f"got {len(header.references)} for {len(header.elements)} elements"
        )


def _make_variant(
    header: StudentHeader, settings: dict[str, Any], numbers: list[int], softening: float
) -> VariantPaiNN:
    cutoff, tail = settings.pop("message_cutoff"), settings.pop("tail")
    if settings["filters"] not in FILTERS:
        raise ModelFileError(
            f"{header.name}: filters must be one of {', '.join(FILTERS)}, "
            f"got {settings['filters']!r}"
        )
    flags = {k: settings[k] for k in ("pair_filters", "charges")} | {"tail": tail}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise ModelFileError(f"{header.name}: {key} must be true or false, got {value!r}")
    if tail and not settings["charges"]:
        raise ModelFileError(f"{header.name}: a tail needs charges")
    if not isinstance(cutoff, int | float) or not 0.5 <= cutoff <= header.cutoff:
        raise ModelFileError(
            f"{header.name}: message_cutoff must be between 0.5 Å and the neighbor cutoff of "
            f"{header.cutoff} Å, got {cutoff!r}"
        )
    if not tail and cutoff != header.cutoff:
        raise ModelFileError(
            f"{header.name}: without a tail the neighbor cutoff must be the message_cutoff of "
            f"{cutoff} Å, got {header.cutoff}"
        )
    return VariantPaiNN(
        numbers,
        cutoff=cutoff,
        tail_cutoff=header.cutoff if tail else None,
        energy_scale=header.energy_scale,
        norm_softening=softening,
        **settings,
    )


def read_header(model: str | Path | None = None) -> StudentHeader:
    """Read and check the header of a student: a bundled name, or a path.

    Raises
    ------
    ModelFileError
        As `load_student`; the weights are not read and the hash is not checked.
    """
    path = find_student(model)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path}: not a readable safetensors file ({error})") from error
    return _parse_header(path, metadata)


def load_student(
    model: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "single",
    sha256: str | None = None,
) -> Potential:
    """Load a student, ready to be evaluated.

    Parameters
    ----------
    model
        Name of a bundled student, or path of a student file; None is the bundled default.
    device
        Where to put it.
    precision
        "single" or "double": the arithmetic of the network. Edge vectors, energies and force
        sums are in double either way.
    sha256
        Refuse the file unless it has this hash.

    Returns
    -------
    Potential
        In evaluation mode, weights without gradients, its `header` the `StudentHeader`.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, of another format or a newer version, has weights
        that are not finite or do not fit its architecture, or a hash other than its own or
        the one asked for.
    ValueError
        If the precision is not one of the above.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    path = find_student(model)
    header = read_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            # safetensors types its handle loosely
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path}: the weights cannot be read ({error})") from error
    _check_weights(tensors, str(path))
    found = _digest(_stored(header), tensors)
    if found != header.sha256:
        raise ModelFileError(
            f"{path}: damaged or altered; its SHA-256 is {found}, its header says {header.sha256}"
        )
    if sha256 is not None and sha256 != header.sha256:
        raise ModelFileError(
            f"{path}: this is another student (SHA-256 {header.sha256}) than the one asked for "
            f"({sha256})"
        )
    # on no device: no random numbers are drawn, and weights take no detour over the default dtype
    with torch.device("meta"):
        potential = make_potential(header)
    try:
        potential.network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ModelFileError(f"{path}: weights do not fit the architecture: {error}") from error
    potential.network.to(PRECISIONS[precision])
    potential.header = header
    return potential.to(device).eval().requires_grad_(False)


def bundled_students() -> dict[str, Path]:
    """Students that come with the package: name to path."""
    folder = Path(str(files("openmm_mlffd.students")))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def find_student(model: str | Path | None = None) -> Path:
    """Path of a bundled student's name (None: the default), or the path itself if it is a file.

    Raises
    ------
    ModelFileError
        If there is no such student and no such file.
    """
    bundled = bundled_students()
    if model is None:
        model = DEFAULT
    if str(model) in bundled:
        return bundled[str(model)]
    if Path(model).is_file():
        return Path(model)
    raise ModelFileError(
        f"{model}: neither a file nor a bundled student; bundled are {', '.join(bundled) or 'none'}"
    )


def _parse_header(path: Path, metadata: Mapping[str, str]) -> StudentHeader:
    try:
        content = json.loads(metadata[_KEY])
        found, version = content.pop("format"), content.pop("version")
    except (KeyError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ModelFileError(
            f"{path}: no {FORMAT} header; not written by openmm-mlffd, or damaged"
        ) from error
    if found != FORMAT or version != VERSION:
        raise ModelFileError(
            f"{path}: has format {found!r} version {version!r}; openmm-mlffd "
            f"{openmm_mlffd.__version__} reads {FORMAT!r} version {VERSION}; "
            "a newer openmm-mlffd may be needed"
        )
    units = content.pop("units", None)
    if units != UNITS:
        raise ModelFileError(f"{path}: has units {units}; {UNITS} are needed")
    known = {f.name for f in fields(StudentHeader)}
    for name in known & _LATER - set(content):
        content[name] = None
    if set(content) != known:
        raise ModelFileError(
            f"{path}: header fields missing or unknown: {sorted(known ^ set(content))}"
        )
    return StudentHeader(**content)


def _stored(header: StudentHeader) -> dict[str, Any]:
    """The header's fields as a file has them: later ones only if they say something."""
    values = asdict(header)
    return {k: v for k, v in values.items() if not (k in _LATER and v is None)}


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    rest = {k: v for k, v in header.items() if k != "sha256"}
    digest.update(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_described(potential: Potential, header: StudentHeader) -> None:
    softening = header.architecture.get("norm_softening", _FIRST_SOFTENING)
    if softening != potential.network.norm_softening:
        raise ValueError(
            f"the header must describe the potential: its norm_softening is {softening}, the "
            f"potential's {potential.network.norm_softening}"
        )
    described = {
        "elements": [symbol(z) for z in potential.numbers],
        "references": potential.references,
        "cutoff": potential.cutoff,
        "energy_scale": potential.energy_scale,
        "energy_bound": potential.energy_bound or None,
        "coordination_limits": potential.coordination_limits,
    }
    for name, value in described.items():
        if getattr(header, name) != value:
            raise ValueError(
                f"the header must describe the potential: its {name} are "
                f"{getattr(header, name)}, the potential's {value}"
            )


def _known_number(name: str, header: StudentHeader) -> int:
    try:
        return atomic_number(name)
    except ValueError as error:
        raise ModelFileError(f"{header.name}: {error}") from error


def _check_weights(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in PRECISIONS.values():
            raise ModelFileError(
                f"{where}: weight {name} is {tensor.dtype}; float32 or float64 is needed"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(f"{where}: weight {name} holds values that are not finite")
