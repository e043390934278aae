"""Rules for the source that no linter knows."""

import ast
import io
import math
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file
    for folder in ("openmm_mlffd", "kernels", "training")
    for file in (ROOT / folder).rglob("*.py")
)

# leading digits of numbers that convert units, whatever their power of ten
CONVERSIONS = {
    "eV to kJ/mol": 96.4853,
    "hartree to eV": 27.2114,
    "hartree to kcal/mol": 627.509,
    "hartree to kJ/mol": 2625.5,
    "bohr to Å": 0.529177,
    "Å to bohr": 1.889726,
    "kcal to kJ": 4.184,
    "eV to kcal/mol": 23.0605,
    "elementary charge": 1.602177,
    "Avogadro constant": 6.02214,
    "Boltzmann constant": 1.380649,
    "Boltzmann constant in eV": 8.61733,
    "gas constant": 8.31446,
    "Coulomb constant in eV Å": 14.39964,
    "Coulomb constant in kJ nm/mol": 138.9355,
}


def mantissa(number):
    return number / 10 ** math.floor(math.log10(number))


def unit_literals(source):
    """Numbers in the source that look like conversions of units, cut or rounded."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        digits = token.string.replace(".", "").replace("_", "").lower().split("e")[0].strip("0")
        if token.type != tokenize.NUMBER or not digits.isdigit() or len(digits) < 3:
            continue
        value = mantissa(abs(float(token.string.replace("_", ""))))
        for name, known in CONVERSIONS.items():
            if abs(value / mantissa(known) - 1) < 1e-3:
                yield f"line {token.start[0]}: {token.string} is {name}"


def forbidden_calls(source):
    """Calls that run code from files, or change what belongs to the caller."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"line {node.lineno}: {name}"
        if name.startswith(("pickle.load", "dill.", "joblib.load", "marshal.", "cloudpickle.")):
            yield where
        if name in ("eval", "exec", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "print"):
            yield where
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield f"{where} without weights_only=True"
        if keywords.get("allow_pickle") == "True" or keywords.get("weights_only") == "False":
            yield f"{where} with a pickle"
        if name in (
            "torch.manual_seed",
            "torch.set_default_dtype",
            "torch.set_default_device",
            "torch.set_num_threads",
            "torch.set_float32_matmul_precision",
            "torch.use_deterministic_algorithms",
            "warnings.filterwarnings",
            "warnings.simplefilter",
            "np.random.seed",
            "sys.path.insert",
            "sys.path.append",
        ):
            yield f"{where} changes what belongs to the caller"


def names(file):
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", SOURCES, ids=names)
def test_units_are_converted_by_units_py_alone(file):
    if file.name == "elements.py":
        pytest.skip("a table of radii, some of which look like units")
    found = list(unit_literals(file.read_text()))
    assert bool(found) == (file.name == "units.py"), found


@pytest.mark.parametrize("file", SOURCES, ids=names)
def test_nothing_runs_code_from_files_or_changes_global_state(file):
    found = [f.split(": ")[1] for f in forbidden_calls(file.read_text())]
    # compiled students are code; the user who loads one is told so
    compiled = file.name == "torchscript.py"
    assert found == (["torch.jit.load"] if compiled else []), found


@pytest.mark.parametrize("file", SOURCES, ids=names)
def test_files_are_short_enough_to_be_read(file):
    assert len(file.read_text().splitlines()) <= 500


@pytest.mark.parametrize(
    "literal", ["96.4853", "96.49", "9.6485e4", "27.2114", "0.529", "4.184", "4184.0", "23.06"]
)
def test_unit_literal_is_noticed(literal):
    assert list(unit_literals(f"x = 2.0 * {literal}\n"))


@pytest.mark.parametrize("literal", ["0.5", "100.0", "1e-3", "0.30", "4096", "42", "0x9648"])
def test_other_number_is_not_taken_for_a_unit(literal):
    assert not list(unit_literals(f"x = 2.0 * {literal}\n"))


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "torch.set_default_dtype(torch.float64)",
    ],
)
def test_forbidden_call_is_noticed(line):
    assert list(forbidden_calls(line))
