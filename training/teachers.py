"""Teachers: what gives structures their labels, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openmm_mlffd.training import teacher_worker
from openmm_mlffd.training.teacher_worker import Batch, Labels, insert, select, unknown_labels

TIMEOUT = 600.0
"""Time within which a teacher must have started, or answered a batch [s]."""


class Teacher(Protocol):
    """Labels structures, a batch at a time."""

    batch_atoms: int
    """Atoms that it likes to be given at a time."""

    def describe(self) -> str:
        """Name, version and settings, as stored in the data set."""

    def label(self, batch: Batch) -> Labels:
        """Label a batch; structures that it cannot label have a reason in `failure`."""


class TeacherError(ValueError):
    """A teacher that cannot be started; the message has the cause."""


class WorkerDied(RuntimeError):
    """The process of a teacher ended instead of answering; the message says how."""


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Options given as key=value; values are JSON where they can be, else text.

    Raises
    ------
    ValueError
        If there is no equals sign.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"a teacher's option is given as key=value, got {pair!r}")
        try:
            options[key.strip()] = json.loads(value)
        except ValueError:
            options[key.strip()] = value
    return options


class WorkerTeacher:
    """A teacher in a process of its own, of this Python or another; use as a context manager.

    A process that crashes, raises or does not answer is replaced, and its batch is halved until
    the structure that is to blame stands alone: that one fails, the others are labelled.

    Parameters
    ----------
    name
        ``so3lr``, ``so3lr-stock``, ``gfn2-xtb``, ``fennix``, a model of orb-models such as
        ``orb-v2``, or ``ase:package.module:factory``.
    options
        Keyword arguments of the teacher, of types that JSON has.
    python
        Python that has the teacher's packages, but not necessarily this one; None is the one that
        runs.
    timeout
        Time to start, and to answer a batch [s].

    Raises
    ------
    TeacherError
        If the teacher cannot be started.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any] | None = None,
        *,
        python: str | Path | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.name = name
        self._options = dict(options or {})
        self._python = str(python or sys.executable)
        self._timeout = timeout
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._description = ""
        self.batch_atoms = 0
        self._start()

    def __enter__(self) -> "WorkerTeacher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; a thread that waits for its answer gets an error."""
        self._closed = True
        self._stop()
        self._log.close()

    def describe(self) -> str:
        """Name, version and settings, as the teacher gives them."""
        return self._description

    def label(self, batch: Batch) -> Labels:
        """Label a batch, whatever becomes of the process meanwhile.

        Raises
        ------
        TeacherError
            If the teacher was lost and cannot be started again.
        """
        if not len(batch.total_charge):
            return unknown_labels(batch)
        try:
            if self._process is None:
                self._start()
            found = Labels(**self._exchange(**batch._asdict()))
            return found._replace(failure=found.failure.astype(object))
        except WorkerDied as death:
            return self._halve(batch, str(death))

    def _halve(self, batch: Batch, reason: str) -> Labels:
        labels = unknown_labels(batch)
        n = len(batch.total_charge)
        if n == 1:
            labels.failure[0] = reason
            return labels
        for part in np.array_split(np.arange(n), 2):
            insert(labels, self.label(select(batch, part)), batch, part)
        return labels

    def _start(self) -> None:
        if self._closed:
            raise TeacherError(f"teacher {self.name} was closed")
        # several threads slow down small molecules; a user who wants them sets the variable
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        try:
            self._process = subprocess.Popen(
                [self._python, str(Path(teacher_worker.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us, who then end it
            )
        except OSError as error:
            self.close()
            raise TeacherError(f"{self._python}: cannot be started ({error})") from error
        try:
            hello = self._exchange(teacher=self.name, options=json.dumps(self._options))
        except WorkerDied as death:
            self.close()
            raise TeacherError(f"teacher {self.name}, run by {self._python}: {death}") from death
        self._description = str(hello["describe"])
        self.batch_atoms = int(hello["batch_atoms"])

    def _exchange(self, **arrays: Any) -> dict[str, np.ndarray]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._timeout, give_up)
        timer.start()
        try:
            teacher_worker.send(process.stdin, **arrays)
            answer = teacher_worker.receive(process.stdout)
        except BrokenPipeError:
            answer = None
        finally:
            timer.cancel()
        if answer is not None and "error" not in answer:
            return answer
        if self._closed:
            raise TeacherError(f"teacher {self.name} was closed")
        self._stop(kill=False)
        if answer is not None:
            raise WorkerDied(str(answer["error"]))
        if late.is_set():
            raise WorkerDied(f"no answer within {self._timeout:g} s")
        raise WorkerDied(f"the teacher's process {_ending(process.returncode)}{self._last_words()}")

    def _stop(self, *, kill: bool = True) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # of what was not sent to a process that is gone
                stream.close()

    def _last_words(self) -> str:
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - 2000))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self._log.seek(0)
        self._log.truncate()
        return f": {lines[-1]}" if lines else ""


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
