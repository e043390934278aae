import sys
from pathlib import Path

import pytest

from openmm_mlffd.training.parallel import WorkerLost, Workers, choose_workers, run_all

sys.path.append(str(Path(__file__).parent))
from toy_work import double


def outcomes(items, workers, **settings):
    return {
        i: (o.result, type(o.error).__name__)
        for i, o in run_all(double, items, workers, **settings)
    }


@pytest.mark.parametrize("workers", [Workers(count=0), Workers(count=2)], ids=["none", "threads"])
def test_every_item_has_its_result_or_its_error(workers):
    found = outcomes(range(12), workers, threads=True)
    assert found.pop(7) == (None, "ArithmeticError")
    assert found == {i: (2 * i, "NoneType") for i in range(12) if i != 7}


def test_item_that_takes_its_process_down_fails_alone():
    items = [1, 2, 7, 13, 4, 5, 6]
    found = outcomes(items, Workers(count=1))
    assert found == {
        1: (2, "NoneType"), 2: (4, "NoneType"), 4: (8, "NoneType"), 5: (10, "NoneType"),
        6: (12, "NoneType"), 7: (None, "ArithmeticError"), 13: (None, WorkerLost.__name__),
    }  # fmt: skip


def test_items_are_taken_only_a_few_ahead():
    taken = []

    def items():
        for i in range(14, 100):
            taken.append(i)
            yield i

    results = run_all(double, items(), Workers(count=2), threads=True)
    next(results)
    assert len(taken) <= 6
    results.close()


def test_options_of_a_cluster_are_json_where_they_can_be():
    workers = choose_workers(3, "slurm:4", ["cores=8", "queue=gpu", "memory=4GB"])
    assert workers.cluster_options == {"cores": 8, "queue": "gpu", "memory": "4GB"}
    with pytest.raises(ValueError, match="key=value"):
        choose_workers(1, "slurm:4", ["cores"])
    with pytest.raises(ValueError, match="but no cluster"):
        choose_workers(1, None, ["cores=8"])
    with pytest.raises(ValueError, match="must not be negative"):
        Workers(count=-1)
