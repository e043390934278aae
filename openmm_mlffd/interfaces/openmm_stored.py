"""Students in stored Systems: found, checked before anything is run, written and read."""

import hashlib
import io
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints
from xml.etree import ElementTree

try:
    import openmm
except ImportError as error:
    raise ImportError(f"OpenMM is needed ({error}): pip install 'openmm-mlffd[openmm]'") from error

from openmm_mlffd.interfaces import openmm_correction, openmm_embedding, openmm_force
from openmm_mlffd.interfaces.openmm_embedding import ElectrostaticEmbedding, EmbeddingSettings
from openmm_mlffd.interfaces.openmm_force import (
    ComputationSettings,
    LastGood,
    restore_computation,
)
from openmm_mlffd.storage import replacing

# what a stored function may consist of: our own restore functions, called once, with plain values
_OPCODES = """
    PROTO FRAME STOP MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET MARK
    SHORT_BINUNICODE BINUNICODE STACK_GLOBAL GLOBAL REDUCE
    EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT
"""
_RESTORERS: dict[tuple[str, str], Callable[..., Any]] = {
    (function.__module__, function.__name__): function
    for function in (
        openmm_force.restore_computation,
        openmm_correction.restore_correction,
        openmm_embedding.restore_embedding,
    )
}
_HASH_LINE = re.compile(rb"\n<!-- mlffd sha256: ([0-9a-f]{64}) -->\s*\Z")


class UnsafeSystemError(ValueError):
    """A stored System that is damaged, or that would run code which is not openmm-mlffd's."""


class _Unpickler(pickle.Unpickler):
    """Knows the restore functions of this package and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _RESTORERS[module, name]
        except KeyError:
            raise UnsafeSystemError(
                f"a stored function asks for {module}.{name}, which is not openmm-mlffd's"
            ) from None


def restore_function(payload: bytes) -> Any:
    """Rebuild the function of a stored `PythonForce`, if it is one of openmm-mlffd's.

    Parameters
    ----------
    payload
        The pickle in the System's XML.

    Returns
    -------
    StudentComputation, TeacherCorrection or ElectrostaticEmbedding
        Nothing is loaded yet.

    Raises
    ------
    UnsafeSystemError
        If the pickle is damaged, or consists of anything but one call of a restore function of
        this package with plain values. Nothing of it was run then.
    """
    try:
        names = [opcode.name for opcode, _, _ in pickletools.genops(payload)]
    except Exception as error:
        raise UnsafeSystemError(f"a stored function is damaged: {error}") from error
    strange = sorted(set(names) - set(_OPCODES.split()))
    if strange or names.count("REDUCE") != 1:
        raise UnsafeSystemError(
            "a stored function is not openmm-mlffd's: more than one call with plain values "
            f"(pickle operations {', '.join(strange) or 'REDUCE'})"
        )
    try:
        function = _Unpickler(io.BytesIO(payload)).load()
    except UnsafeSystemError:
        raise
    except Exception as error:
        raise UnsafeSystemError(f"a stored function is damaged: {error}") from error
    wanted: type = ComputationSettings
    if isinstance(function, ElectrostaticEmbedding):
        wanted = EmbeddingSettings
    for settings in getattr(function, "all_settings", None) or [function.settings]:
        _check_settings(settings, wanted)
    return function


def student_functions(system: openmm.System) -> dict[int, Any]:
    """Students among the forces of a System, by the force's index; see `package_functions`."""
    return {
        index: function
        for index, function in package_functions(system).items()
        if not isinstance(function, ElectrostaticEmbedding)
    }


def package_functions(system: openmm.System) -> dict[int, Any]:
    """Functions of this package among the forces of a System, by the force's index.

    Forces inside a `CustomCVForce`, as interpolation makes them, are not looked at; functions of
    others are left out.
    """
    found = {}
    for index, force in enumerate(system.getForces()):
        if isinstance(force, openmm.PythonForce):
            xml = openmm.XmlSerializer.serialize(force)
            try:
                found[index] = restore_function(_payload(ElementTree.fromstring(xml)))
            except UnsafeSystemError:
                continue
        elif type(force) is openmm.Force or type(force).__name__ == "TorchForce":
            from openmm_mlffd.interfaces.openmm_torch import settings_of

            settings = settings_of(force)
            if settings is not None:
                found[index] = restore_computation(settings)
    return found


def last_good(system: openmm.System) -> LastGood | None:
    """The last configuration that the student of a System could evaluate, in any Context.

    For when a step ended with an exception: by then OpenMM's Context may hold the positions that
    could not be evaluated.

    Parameters
    ----------
    system
        The System.

    Returns
    -------
    LastGood or None
        None if nothing was evaluated in this process.

    Raises
    ------
    ValueError
        If the System has no student.
    """
    functions = student_functions(system)
    if not functions:
        raise ValueError("the System has no student among its forces")
    function = functions[min(functions)]
    settings = (getattr(function, "all_settings", None) or [function.settings])[0]
    return openmm_force.last_good(settings)


def save_system(system: openmm.System, path: str | Path) -> str:
    """Write a System as XML, with its hash on the last line.

    Parameters
    ----------
    system
        The System.
    path
        File to write; replaced as a whole or not at all. Any OpenMM reads it.

    Returns
    -------
    str
        SHA-256 of the XML, to be handed to `load_system` by another way than the file itself
        where that matters.
    """
    content = openmm.XmlSerializer.serialize(system).rstrip().encode()
    digest = hashlib.sha256(content).hexdigest()
    with replacing(path) as file:
        file.write(content + f"\n<!-- mlffd sha256: {digest} -->\n".encode())
    return digest


def load_system(
    path: str | Path, *, sha256: str | None = None, trusted: bool = False
) -> openmm.System:
    """Read a System, after looking at what its XML would run.

    `openmm.XmlSerializer.deserialize` unpickles the functions of `PythonForce` objects, and so
    runs whatever code the writer of the file wished. This one looks first.

    Parameters
    ----------
    path
        XML of a System, from `save_system` or `openmm.XmlSerializer`.
    sha256
        Refuse the file unless it has this hash, as `save_system` returned it.
    trusted
        Whether to read a `TorchForce` too (engine='torchscript'). It holds code, which nobody
        looks at here: only for files that you wrote yourself.

    Returns
    -------
    openmm.System
        Students are looked for in the first evaluation, and refused unless their hash is the
        stored one.

    Raises
    ------
    UnsafeSystemError
        If the file is damaged, holds no System, has another hash than its own or the one asked
        for, or has a `PythonForce` whose function is not openmm-mlffd's, or a force that is not
        part of OpenMM. Nothing of it was run then.

    Notes
    -----
    The hash in the file notices damage, not malice: who can change the file can change the hash.
    """
    content = Path(path).read_bytes()
    written = _HASH_LINE.search(content)
    if written is not None:
        content = content[: written.start()]
    digest = hashlib.sha256(content).hexdigest()
    if written is not None and written[1].decode() != digest:
        raise UnsafeSystemError(
            f"{path}: damaged or altered; its SHA-256 is {digest}, its last line says "
            f"{written[1].decode()}"
        )
    if sha256 is not None and sha256 != digest:
        raise UnsafeSystemError(f"{path}: has SHA-256 {digest}, but {sha256} was asked for")
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise UnsafeSystemError(f"{path}: has a document type; OpenMM never writes one")
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise UnsafeSystemError(f"{path}: not readable as XML ({error})") from error
    if root.tag != "System":
        raise UnsafeSystemError(f"{path}: holds a {root.tag}, not a System")
    for element in root.iter():
        _check_element(element, path, trusted)
    # as it was understood here: another parser cannot see another file
    return openmm.XmlSerializer.deserialize(ElementTree.tostring(root, encoding="unicode"))


def _check_element(element: ElementTree.Element, path: str | Path, trusted: bool) -> None:
    kind = element.attrib.get("type")
    if element.tag == "Force" and kind == "TorchForce":
        if not trusted:
            raise UnsafeSystemError(
                f"{path}: holds a TorchForce, which is code that runs when it is used. If you "
                "wrote the file yourself: load_system(path, trusted=True). Systems with "
                "engine='python' hold no code"
            )
        from openmm_mlffd.interfaces.openmm_torch import torch_force_class

        torch_force_class()  # and what its module needs
        return
    if element.tag == "Force" and not hasattr(openmm, str(kind)):
        raise UnsafeSystemError(f"{path}: a force of type {kind} is not part of OpenMM")
    if kind == "PythonForce":
        try:
            restore_function(_payload(element))
        except UnsafeSystemError as error:
            raise UnsafeSystemError(f"{path}: {error}; it was not run") from error


def _payload(element: ElementTree.Element) -> bytes:
    try:
        return bytes.fromhex(element.attrib["function"])
    except (KeyError, ValueError) as error:
        raise UnsafeSystemError(f"a PythonForce without a readable function ({error})") from error


def _check_settings(settings: Any, wanted: type) -> None:
    if not isinstance(settings, dict) or not set(settings) <= set(get_type_hints(wanted)):
        raise UnsafeSystemError("a stored function has settings that openmm-mlffd does not know")
    lists = {key: int for key in ("numbers", "atoms", "molecules", "totals")} | {"charges": float}
    for key, kind in lists.items():
        values = settings.get(key) or []
        if not isinstance(values, list) or not all(isinstance(v, kind) for v in values):
            raise UnsafeSystemError(f"the setting {key} of a stored function is no list of numbers")
