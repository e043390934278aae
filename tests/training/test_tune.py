import json
import multiprocessing
import sys
import time

import pytest
import yaml

from openmm_mlffd import cli
from openmm_mlffd.training.config import ConfigError, load_config
from openmm_mlffd.training.shards import FolderError, locked
from openmm_mlffd.training.tune import KIND, Search, load_search


@pytest.fixture
def base(data_folder, tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(f"""
data: {{files: [{data_folder / "sample.h5"}]}}
model: {{n_channels: 4, n_interactions: 1, n_basis: 6, cutoff: 3.5}}
optimizer: {{warmup_steps: 1, ema_decay: 0.5}}
device: cpu
batch_atoms: 600
validate_every: 2
checkpoint_every: 2
""")
    return path


@pytest.fixture
def write_space(tmp_path):
    def write(text):
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return path

    return write


SPACE = """
trials: 4
steps: 8
startup: 1
warmup: 0.2
space:
  optimizer.learning_rate: {low: 1.0e-9, high: 1.0e-2, log: true}
  model.n_channels: {choices: [4, 6]}
"""


def test_study_finds_prunes_and_tells(base, write_space, tmp_path):
    search = Search(base, write_space(SPACE), tmp_path / "out")
    # a good trial first, then one that learns nothing and has to be pruned
    for rate in (1e-2, 1e-9):
        search.study.enqueue_trial({"optimizer.learning_rate": rate, "model.n_channels": 4})
    assert search.run()
    results = search.results()
    assert len(results) == search.done() == 4
    by_number = {r["number"]: r for r in results}
    assert by_number[0]["state"] == "finished"
    assert (by_number[1]["state"], by_number[1]["steps"]) == ("pruned", 2)
    assert by_number[0]["steps"] == 8
    assert by_number[0]["weights"] > 100
    assert results[0]["value"] == min(r["value"] for r in results if r["state"] == "finished")
    # the best configuration trains
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert best["optimizer"]["learning_rate"] == results[0]["values"]["optimizer.learning_rate"]
    assert load_config(tmp_path / "out" / "best.yaml").model.n_basis == 6
    table = (tmp_path / "out" / "trials.md").read_text()
    assert table.count("\n") == 6
    assert "pruned" in table


def work(base, space, out):
    Search(base, space, out).run()


def test_killed_study_goes_on_with_the_trial_it_was_at(base, write_space, tmp_path):
    out, space = tmp_path / "out", write_space(SPACE.replace("steps: 8", "steps: 16"))
    process = multiprocessing.get_context("fork").Process(target=work, args=(base, space, out))
    process.start()
    while process.is_alive() and not (out / "trial-0001/checkpoint.pt").exists():
        time.sleep(0.005)
    assert process.is_alive()
    process.kill()
    process.join()
    first = (out / "trial-0000/trial.json").read_bytes()
    assert not (out / "trial-0001/trial.json").exists()
    search = Search(base, space, out)
    assert search.run()
    assert (out / "trial-0000/trial.json").read_bytes() == first
    # taken up under another number, in its folder, from its checkpoint
    second = json.loads((out / "trial-0001/trial.json").read_text())
    assert second["number"] > 1
    assert len(search.results()) == 4
    assert search.run()
    assert len(search.results()) == 4


def test_no_process_takes_up_what_another_is_beginning(base, write_space, tmp_path, monkeypatch):
    out, looks = tmp_path / "out", []

    def checked(name):
        original = getattr(Search, name)

        def method(self, *arguments):
            with pytest.raises(FolderError), locked(out, KIND):
                pass
            looks.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(Search, name, method)

    checked("_take_up")
    checked("_sampler")  # between the trial's number and the lock of its folder
    search = Search(base, write_space(SPACE), out)
    assert search.run()
    assert looks.count("_take_up") == 1
    assert looks.count("_sampler") == 4


def test_processes_share_a_study(base, write_space, tmp_path):
    out, space = tmp_path / "out", write_space(SPACE)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(base, space, out)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    results = Search(base, space, out).results()
    assert 4 <= len(results) <= 5
    drawn = {r["values"]["optimizer.learning_rate"] for r in results}
    assert len(drawn) == len(results)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("space: {epochs: {low: 1, high: 2}}", "needs a budget, either `minutes` or `steps`"),
        ("steps: 3\nspace: {epochs: {low: 2, high: 1}}", "either `choices` or `low` below"),
        ("steps: 3\nspace: {epochs: {lo: 2, high: 1}}", "did you mean 'space.epochs.low'"),
        ("steps: 3\nspace: {}", "space names no setting"),
        ("steps: 3\nspace: {epochs: {low: -1, high: 1, log: true}}", "log needs a positive low"),
        ("step: 3\nspace: {epochs: {low: 1, high: 2}}", "did you mean 'steps'"),
    ],
)
def test_wrong_search_is_refused(write_space, text, message):
    with pytest.raises(ConfigError, match=message):
        load_search(write_space(text))


def test_setting_that_does_not_exist_is_refused_before_anything_is_trained(
    base, write_space, tmp_path, monkeypatch, capsys
):
    space = write_space("steps: 3\nspace: {optimizer.lerning_rate: {choices: [1, 2]}}")
    monkeypatch.setattr(
        sys, "argv", ["mlffd", "tune", str(base), str(space), "-o", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert "did you mean 'optimizer.learning_rate'" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("trial-*"))
