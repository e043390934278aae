import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load():
    place = Path(__file__).with_name("inject_defects.py")
    spec = importlib.util.spec_from_file_location("inject_defects", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DEFECTS = load().DEFECTS


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_defect_fits_the_source_and_names_tests_that_exist(defect):
    source = (ROOT / defect.file).read_text()
    assert load().patched(source, defect) != source
    assert all((ROOT / test).is_file() for test in defect.tests.split(" "))


def test_source_that_has_changed_is_reported():
    with pytest.raises(SystemExit, match=r"holds the following 0 times, it must be once"):
        load().patched("something else", DEFECTS[0])
