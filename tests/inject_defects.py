"""Nine defects that force-field code has had, put into a copy of the project one at a time.

    python tests/inject_defects.py              all of them, one or two minutes
    python tests/inject_defects.py 2 7          some of them

What a test suite is worth is which of them it catches. The checkout itself is never touched.
The exit code is 0 if at least eight of nine (one fewer than those chosen) are caught.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("openmm_mlffd", "kernels", "training", "tests")
FILES = ("pyproject.toml", "setup.cfg")
MAY_MISS = 1


class Defect(NamedTuple):
    """A change of the source that does harm, and the tests that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


DEFECTS = (
    Defect(
        "eV to kJ/mol wrong by 0.5 %",
        "openmm_mlffd/units.py",
        "ELEMENTARY_CHARGE * AVOGADRO / 1000.0",
        "ELEMENTARY_CHARGE * AVOGADRO / 1005.0",
        "tests/core/test_units.py tests/interfaces/test_openmm_potential.py",
    ),
    Defect(
        "nearest image only, in a box smaller than twice the cutoff",
        "kernels/reference.py",
        "        near &= (i != j) | s.ne(0).any(1)\n",
        "        near &= i != j\n"
        '        place = torch.einsum("na,nab->nb", vector, torch.linalg.inv(box)[system[i]])\n'
        "        near &= ((place.abs() <= 0.5) | ~pbc[system[i]]).all(1)\n",
        "tests/kernels/test_reference.py tests/core/test_potential.py",
    ),
    Defect(
        "the first n atoms instead of those chosen",
        "openmm_mlffd/interfaces/openmm_potential.py",
        "force.setParticles(indices)",
        "force.setParticles(list(range(len(indices))))",
        "tests/interfaces/test_openmm_mixed.py tests/interfaces/test_openmm_potential.py",
    ),
    Defect(
        "force group ignored",
        "openmm_mlffd/interfaces/openmm_potential.py",
        "        force.setForceGroup(forceGroup)\n        system.addForce(force)\n",
        "        system.addForce(force)\n",
        "tests/interfaces/test_openmm_potential.py tests/interfaces/test_openmm_mixed.py",
    ),
    Defect(
        "off-diagonal elements of the box dropped",
        "openmm_mlffd/interfaces/openmm_force.py",
        "np.array(vectors, dtype=np.float64)",
        "np.array(vectors, dtype=np.float64) * np.eye(3)",
        "tests/interfaces/test_openmm_potential.py tests/interfaces/test_openmm_storage.py",
    ),
    Defect(
        "hard cutoff",
        "openmm_mlffd/radial.py",
        "    return 1.0 + x**6 * (-28.0 + x * (48.0 - 21.0 * x))\n",
        "    return (x < 1.0).to(x.dtype)\n",
        "tests/core/test_potential.py tests/core/test_radial.py",
    ),
    Defect(
        "total energy in float32",
        "openmm_mlffd/potential.py",
        "        return Prediction(energy, forces, virial, atom_energies)\n",
        "        return Prediction(energy.float().double(), forces, virial, atom_energies)\n",
        "tests/core/test_potential.py",
    ),
    Defect(
        "energy divided by the number of atoms",
        "openmm_mlffd/painn.py",
        "        return self.readout(scalars).squeeze(1)\n",
        "        return self.readout(scalars).squeeze(1) / species.shape[0]\n",
        "tests/core/test_potential.py tests/core/test_painn.py",
    ),
    Defect(
        "positions that are NaN answered with NaN",
        "openmm_mlffd/evaluator.py",
        "        self._check(array)\n",
        "        if not np.isfinite(array).all():\n"
        "            nan = torch.full((len(array), 3), torch.nan, dtype=torch.float64)\n"
        "            return Prediction(nan[0, :1], nan, nan[None, :3], nan[:, 0])\n"
        "        self._check(array)\n",
        "tests/core/test_evaluator.py tests/interfaces/test_openmm_refusals.py",
    ),
)


def patched(source: str, defect: Defect) -> str:
    """The source with the defect in it.

    Raises
    ------
    SystemExit
        If the source has changed, so that the place is not found exactly once.
    """
    if source.count(defect.old) != 1:
        raise SystemExit(
            f"{defect.file} holds the following {source.count(defect.old)} times, it must be once; "
            f"bring DEFECTS in {Path(__file__).name} up to date:\n{defect.old}"
        )
    return source.replace(defect.old, defect.new)


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy, which comes before any installed package."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


def check_imports(copy: Path) -> None:
    """Make sure that tests run in the copy test the copy.

    Raises
    ------
    SystemExit
        If another installation would be tested.
    """
    names = "openmm_mlffd", "openmm_mlffd.kernels.reference", "openmm_mlffd.training"
    code = f"import {', '.join(names)}\nprint({', '.join(f'{n}.__file__' for n in names)})"
    out = run(copy, "-c", code).stdout.split()
    if len(out) != 3 or not all(Path(f).resolve().is_relative_to(copy) for f in out):
        raise SystemExit(f"the copy in {copy} would not be tested, but {out}")


def failures(copy: Path, tests: str) -> tuple[str, str]:
    """First test that fails in the copy, or nothing, and the last line of pytest."""
    options = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    result = run(copy, *options, *tests.split(" "))
    last = (result.stdout.strip().splitlines() or [""])[-1]
    if result.returncode == 0:
        return "", last
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if found is None or result.returncode != 1:
        raise SystemExit(f"pytest could not run:\n{result.stdout}\n{result.stderr}")
    return found[1], last


def main(chosen: list[str]) -> int:
    defects = [DEFECTS[int(n) - 1] for n in chosen] or list(DEFECTS)
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / "openmm-mlffd"
        for name in FOLDERS:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        for name in FILES:
            shutil.copy(ROOT / name, copy / name)
        check_imports(copy)
        everything = dict.fromkeys(t for d in defects for t in d.tests.split(" "))
        failed, last = failures(copy, " ".join(everything))
        if failed:
            raise SystemExit(f"{failed} fails without any defect ({last})")
        print(f"without a defect: {last}\n", flush=True)
        print(f"{'defect':60s} {'':6s} {'time':>5s}  first test that fails")
        for defect in defects:
            file, started = copy / defect.file, time.monotonic()
            source = file.read_text()
            file.write_text(patched(source, defect))
            failed, _ = failures(copy, defect.tests)
            file.write_text(source)
            caught += bool(failed)
            state, seconds = "caught" if failed else "MISSED", time.monotonic() - started
            print(f"{defect.name:60s} {state} {seconds:4.0f}s  {failed}", flush=True)
    print(f"\nscore {caught}/{len(defects)}")
    return 0 if caught >= len(defects) - MAY_MISS else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
