"""Process in which a teacher labels structures: run by its path, by any Python that has a teacher.

It needs numpy and the packages of its teacher, and nothing of this project. `WorkerTeacher` of
`teachers.py` starts it and talks to it over standard input and output; what a teacher prints goes
to standard error. A message is its length in bytes (8 bytes, little endian), then an npz file
without pickles. The first request holds the teacher's name and its options as JSON; each further
one is a `Batch`, and its answer `Labels`, or an error, after which the process ends.
"""

import hashlib
import importlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

_LENGTH_BYTES = 8


class Batch(NamedTuple):
    """Structures to label, as flat arrays; atoms of structure i are offsets[i]:offsets[i + 1]."""

    offsets: np.ndarray
    """First atom of each structure, then the number of atoms, shape (n + 1,)."""

    atomic_numbers: np.ndarray
    """Shape (n_atoms,)."""

    positions: np.ndarray
    """[Å], shape (n_atoms, 3), float64."""

    cell: np.ndarray
    """Box vectors as rows [Å], zeros where not periodic, shape (n, 3, 3)."""

    pbc: np.ndarray
    """Periodic box vectors, shape (n, 3)."""

    total_charge: np.ndarray
    """[e], shape (n,), integers."""


class Labels(NamedTuple):
    """What a teacher says of a `Batch`; NaN is not known."""

    energy: np.ndarray
    """[eV], shape (n,)."""

    forces: np.ndarray
    """[eV/Å], shape (n_atoms, 3)."""

    stress: np.ndarray
    """dE/dε / V, ASE's sign [eV/Å^3], NaN where not periodic, shape (n, 3, 3)."""

    partial_charges: np.ndarray
    """[e], shape (n_atoms,)."""

    failure: np.ndarray
    """Why a structure has no labels, empty if it has, shape (n,)."""


def unknown_labels(batch: Batch) -> Labels:
    """Labels of a batch that are all unknown, to be filled in."""
    n, n_atoms = len(batch.total_charge), len(batch.positions)
    return Labels(
        energy=np.full(n, np.nan),
        forces=np.full((n_atoms, 3), np.nan),
        stress=np.full((n, 3, 3), np.nan),
        partial_charges=np.full(n_atoms, np.nan),
        failure=np.full(n, "", dtype=object),
    )


def atoms_of(batch: Batch, structures: np.ndarray) -> np.ndarray:
    """Indices of the atoms of some structures, in the order of the structures."""
    ranges = [np.arange(batch.offsets[i], batch.offsets[i + 1]) for i in structures]
    return np.concatenate([np.zeros(0, int), *ranges])


def select(batch: Batch, structures: np.ndarray) -> Batch:
    """The structures with these indices, in this order."""
    count = np.diff(batch.offsets)[structures]
    atoms = atoms_of(batch, structures)
    return Batch(
        offsets=np.concatenate([[0], np.cumsum(count)]).astype(np.int64),
        atomic_numbers=batch.atomic_numbers[atoms],
        positions=batch.positions[atoms],
        cell=batch.cell[structures],
        pbc=batch.pbc[structures],
        total_charge=batch.total_charge[structures],
    )


def insert(labels: Labels, part: Labels, batch: Batch, structures: np.ndarray) -> None:
    """Write the labels of some structures of a batch to their place."""
    atoms = atoms_of(batch, structures)
    for name in ("energy", "stress", "failure"):
        getattr(labels, name)[structures] = getattr(part, name)
    for name in ("forces", "partial_charges"):
        getattr(labels, name)[atoms] = getattr(part, name)


def send(stream: IO[bytes], **arrays: Any) -> None:
    """Write a message; objects are sent as their text, never as pickles."""
    values = {k: np.asarray(v) for k, v in arrays.items()}
    values = {k: v.astype(str) if v.dtype == object else v for k, v in values.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **values)  # type: ignore[arg-type]
    stream.write(buffer.tell().to_bytes(_LENGTH_BYTES, "little"))
    stream.write(buffer.getbuffer())
    stream.flush()


def receive(stream: IO[bytes]) -> dict[str, np.ndarray] | None:
    """Read a message; None if the other side is gone."""
    head = stream.read(_LENGTH_BYTES)
    if len(head) < _LENGTH_BYTES:
        return None
    length = int.from_bytes(head, "little")
    content = stream.read(length)
    if len(content) < length:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {k: arrays[k] for k in arrays.files}


def refusal(
    numbers: np.ndarray, charge: int, *, elements: frozenset[int] | None, closed_shell: bool
) -> str:
    """Why a teacher for these elements cannot label a structure, or an empty string.

    Parameters
    ----------
    numbers
        Atomic numbers, shape ``(n_atoms,)``.
    charge
        Total charge [e].
    elements
        Atomic numbers that the teacher knows; None for any.
    closed_shell
        Whether it knows only structures with an even number of electrons.
    """
    if elements is not None:
        strange = sorted(set(numbers.tolist()) - elements)
        if strange:
            return f"the teacher does not know atomic number {', '.join(map(str, strange))}"
    electrons = int(numbers.sum()) - charge
    if closed_shell and electrons % 2:
        return f"{electrons} electrons, an odd number, at total charge {charge}"
    return ""


class AseTeacher:
    """Any ASE calculator.

    Parameters
    ----------
    place
        ``package.module:factory``; the factory returns a calculator. Modules in the current
        folder are found, too.
    charge_key
        Name under which the calculator looks for the total charge in `atoms.info`. Without it
        charged structures are refused, since the calculator would take them for neutral.
    options
        Arguments of the factory.
    """

    batch_atoms = 200
    """Atoms per request; few are lost when a calculator crashes."""

    def __init__(self, place: str, charge_key: str | None = None, **options: Any) -> None:
        module, _, factory = place.partition(":")
        if not factory:
            raise ValueError(f"an ASE calculator is named ase:package.module:factory, not {place}")
        self._make: Callable[..., Any] = getattr(importlib.import_module(module), factory)
        self._place = place
        self._options = options
        self._charge_key = charge_key
        self._calculator: Any = self._make(**options)

    def describe(self) -> str:
        """Name and options of the calculator."""
        import ase

        options = ", ".join(f"{k}={v!r}" for k, v in sorted(self._options.items()))
        return f"ASE calculator {self._place}({options}), ASE {ase.__version__}"

    def refusal(self, numbers: np.ndarray, pbc: np.ndarray, charge: int) -> str:
        """Why a structure cannot be labelled, or an empty string."""
        if charge and self._charge_key is None:
            return f"total charge {charge}, of which the calculator is not told (no charge_key)"
        return ""

    def tell(self, atoms: Any, charge: int) -> None:
        """Write the total charge [e] where the calculator looks for it."""
        if self._charge_key is not None:
            atoms.info[self._charge_key] = charge

    def calculator(self, charge: int) -> Any:
        """Calculator for a structure of this total charge [e]."""
        return self._calculator

    def label(self, batch: Batch) -> Labels:
        """Label each structure by itself; an exception fails that structure."""
        labels = unknown_labels(batch)
        for i in range(len(batch.total_charge)):
            part = select(batch, np.array([i]))
            own = unknown_labels(part)
            try:
                self._label_one(part, own)
            except Exception as error:
                own = unknown_labels(part)
                own.failure[0] = f"{type(error).__name__}: {error}"
            insert(labels, own, batch, np.array([i]))
        return labels

    def _label_one(self, one: Batch, labels: Labels) -> None:
        from ase import Atoms

        charge, periodic = int(one.total_charge[0]), bool(one.pbc[0].all())
        atoms = Atoms(
            numbers=one.atomic_numbers, positions=one.positions, cell=one.cell[0], pbc=one.pbc[0]
        )
        self.tell(atoms, charge)
        calculator = self.calculator(charge)
        if hasattr(calculator, "reset"):
            calculator.reset()
        atoms.calc = calculator
        labels.forces[:] = atoms.get_forces()
        labels.energy[0] = atoms.get_potential_energy()
        known = getattr(calculator, "implemented_properties", [])
        if periodic and "stress" in known:
            labels.stress[0] = atoms.get_stress(voigt=False)
        if "charges" in known:
            labels.partial_charges[:] = atoms.get_charges()


class Gfn2Teacher(AseTeacher):
    """GFN2-xTB, by tblite; molecules only, since its periodic stress is not to be relied on."""

    elements = frozenset(range(1, 87))
    """Atomic numbers with parameters."""

    def __init__(self, **options: Any) -> None:
        super().__init__("tblite.ase:TBLite", method="GFN2-xTB", verbosity=0, **options)

    def describe(self) -> str:
        """Method, program and options."""
        from importlib.metadata import version

        rest = {k: v for k, v in self._options.items() if k not in ("method", "verbosity")}
        options = "".join(f", {k}={v!r}" for k, v in sorted(rest.items()))
        return f"GFN2-xTB (tblite {version('tblite')}){options}"

    def refusal(self, numbers: np.ndarray, pbc: np.ndarray, charge: int) -> str:
        """Why a structure cannot be labelled, or an empty string."""
        if pbc.any():
            return "periodic, and GFN2-xTB is for molecules"
        return refusal(numbers, charge, elements=self.elements, closed_shell=True)

    def calculator(self, charge: int) -> Any:
        """A fresh calculator, which knows the charge."""
        return self._make(charge=charge, **self._options)


class FennixTeacher(AseTeacher):
    """A model file of FeNNol, such as FeNNix.

    Parameters
    ----------
    model
        The file, in FeNNol's own format; pickles, which could run any code, are refused.
    dtype
        ``'float64'`` or ``'float32'``, which has 0.5 meV left of an energy of 4000 eV.
    device
        ``'cpu'`` or ``'gpu'``.

    Raises
    ------
    ValueError
        If there is no such file, or it is a pickle.
    """

    def __init__(self, model: str, *, dtype: str = "float64", device: str = "cpu") -> None:
        path = Path(model).expanduser()
        if path.suffix in (".pkl", ".pickle"):
            raise ValueError(f"{path}: is a pickle, which could run any code; save it as .fnx")
        if not path.is_file():
            raise ValueError(f"{path}: there is no such model file of FeNNol")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")
        os.environ.setdefault("JAX_PLATFORMS", "cpu" if device == "cpu" else "cuda")
        try:
            import jax
            from fennol import FENNIX
        except ImportError as error:
            raise ImportError(
                f"FeNNol is needed ({error}): mlffd teacher install fennix, or pip install "
                "fennol==2026.6.29 in an environment whose Python is then given as "
                "--teacher-python"
            ) from error
        # before the weights are read, which would lose half of their digits
        jax.config.update("jax_enable_x64", dtype == "float64")
        self._dtype, self._digest = dtype, hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        self._model = FENNIX.load(path)
        self._elements = _elements_of(self._model)
        self._sees_charge: bool | None = None
        super().__init__("fennol.ase:FENNIXCalculator", **self._settings())

    def _settings(self) -> dict[str, Any]:
        double = self._dtype == "float64"
        return {"model": self._model, "use_float64": double, "gpu_preprocessing": False}

    def describe(self) -> str:
        """File, program and precision."""
        from importlib.metadata import version

        return (
            f"FeNNol model with SHA-256 {self._digest} (FeNNol {version('fennol')}), {self._dtype}"
        )

    def refusal(self, numbers: np.ndarray, pbc: np.ndarray, charge: int) -> str:
        """Why a structure cannot be labelled, or an empty string."""
        if pbc.any() and not pbc.all():
            return "periodic in some directions only"
        return refusal(numbers, charge, elements=self._elements, closed_shell=True)

    def tell(self, atoms: Any, charge: int) -> None:
        """The total charge is the sum of the initial ones."""
        atoms.set_initial_charges([charge] + [0] * (len(atoms) - 1))

    def calculator(self, charge: int) -> Any:
        """A calculator that knows no other structure: it keeps the atoms of its first."""
        return self._make(**self._settings())

    def _label_one(self, one: Batch, labels: Labels) -> None:
        super()._label_one(one, labels)
        charge = int(one.total_charge[0])
        if charge and self._sees_charge is None:
            neutral = unknown_labels(one)
            super()._label_one(one._replace(total_charge=np.zeros(1, int)), neutral)
            self._sees_charge = bool(neutral.energy[0] != labels.energy[0])
        if charge and not self._sees_charge:
            raise ValueError(f"total charge {charge}, on which this model does not depend")


def _elements_of(model: Any) -> frozenset[int] | None:
    """Atomic numbers of the species that a FeNNol model lists; None if it lists none."""
    from ase.data import atomic_numbers

    found: list[set[int]] = []

    def visit(settings: Any) -> None:
        if not hasattr(settings, "items"):
            return
        for key, value in settings.items():
            if key == "species_order":
                names = value.split(",") if isinstance(value, str) else value
                found.append({atomic_numbers[str(n).strip()] for n in names})
            visit(value)

    visit(model._input_args)
    return frozenset(set.intersection(*found)) if found else None


def load(name: str, options: dict[str, Any]) -> Any:
    """Teacher of a name.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if name in ("so3lr", "so3lr-stock"):
        return _sibling("so3lr").So3lr(self_term=name == "so3lr", **options)
    if name == "gfn2-xtb":
        return Gfn2Teacher(**options)
    if name == "fennix":
        return FennixTeacher(**options)
    if name.startswith("orb"):
        return _sibling("orb").Orb(name, **options)
    if name.startswith("ase:"):
        return AseTeacher(name.removeprefix("ase:"), **options)
    raise ValueError(
        f"no teacher is called {name!r}; there are so3lr, so3lr-stock, gfn2-xtb, fennix, orb-NAME "
        "(such as orb-v2) and ase:package.module:factory"
    )


def _sibling(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(teacher: Any, batch: Batch) -> Labels:
    """Labels of the structures that the teacher accepts, and why it refuses the others."""
    labels = unknown_labels(batch)
    for i, charge in enumerate(batch.total_charge.tolist()):
        numbers = batch.atomic_numbers[batch.offsets[i] : batch.offsets[i + 1]].astype(int)
        labels.failure[i] = teacher.refusal(numbers, batch.pbc[i], charge)
    accepted = np.flatnonzero(labels.failure == "")
    if len(accepted):
        insert(labels, teacher.label(select(batch, accepted)), batch, accepted)
    return labels


def main() -> int:
    """Serve until standard input is closed."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    # calculators may be modules of the folder where the command was given; the folder of this
    # file, which Python puts here, holds modules that are not meant for them
    sys.path[0] = os.getcwd()
    hello = receive(requests)
    if hello is None:
        return 1
    try:
        teacher = load(str(hello["teacher"]), json.loads(str(hello["options"])))
        send(answers, describe=teacher.describe(), batch_atoms=teacher.batch_atoms)
        while (request := receive(requests)) is not None:
            send(answers, **answer(teacher, Batch(**request))._asdict())
    except Exception as error:
        send(answers, error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
