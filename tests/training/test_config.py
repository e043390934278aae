from pathlib import Path

import pytest

import openmm_mlffd.training
from openmm_mlffd.training.config import ConfigError, TrainConfig, load_config

CONFIGS = sorted((Path(openmm_mlffd.training.__file__).parent / "configs").glob("default*.yaml"))


@pytest.fixture
def write(tmp_path):
    def make(text):
        (tmp_path / "run.yaml").write_text(text)
        return tmp_path / "run.yaml"

    return make


def test_file_and_overrides_replace_the_defaults(write):
    path = write("data: {files: [a.h5, b.h5]}\nepochs: 7\nloss: {energy: 2}\n")
    config = load_config(path, ["epochs=9", "optimizer.learning_rate=5e-4", "loss.stress=0"])
    assert isinstance(config, TrainConfig)
    assert config.data.files == ["a.h5", "b.h5"]
    assert config.epochs == 9
    assert config.optimizer.learning_rate == 5e-4
    assert (config.loss.energy, config.loss.stress) == (2.0, 0.0)
    defaults = TrainConfig(data=config.data)
    assert config.loss.forces == defaults.loss.forces
    assert config.model == defaults.model


def test_lists_and_null_can_be_given_on_the_command_line(write):
    path = write("data: {files: [a.h5]}\nmax_minutes: 5\n")
    overrides = ["data.files=[c.h5,d.h5]", "max_minutes=null", "model.elements=[H,O]"]
    config = load_config(path, overrides)
    assert config.data.files == ["c.h5", "d.h5"]
    assert config.max_minutes is None
    assert config.model.elements == ["H", "O"]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("epoch: 3", [], r"run.yaml: unknown setting 'epoch'; did you mean 'epochs'\?"),
        (
            "optimizer: {learning_rat: 1}",
            [],
            r"unknown setting 'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'\?",
        ),
        ("model: {qqq: 1}", [], r"unknown setting 'model.qqq'; known: elements, n_channels"),
        ("epochs: 3", ["epoch=4"], r"command line: unknown setting 'epoch'; did you mean"),
        ("epochs: 3", ["epochs"], "epochs: overrides are written key=value"),
        ("epochs: many", [], r"run.yaml: epochs: .*many.*Integer"),
        ("epochs: 3.5", [], r"run.yaml: epochs: .*3.5.*Integer"),
        ("optimizer: {clip: [1]}", [], "optimizer.clip: "),
        ("data: {files: a.h5}", [], "run.yaml: data.files: .*not a ListConfig"),
        ("data: {files: {a: 1}}", [], "run.yaml: Cannot merge incompatible container types"),
        ("model: 3", [], "run.yaml: model must hold settings, got 3"),
        ("data:", [], "run.yaml: data must hold settings, got None"),
        ("- a\n- b", [], "run.yaml: must hold settings as `key: value`"),
        ("epochs: [1", [], r"run.yaml: cannot be read \("),
        ("epochs: 3", [], "run.yaml: data: .*missing mandatory value"),
    ],
)
def test_setting_that_cannot_be_is_named(write, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(text), overrides)


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_words_that_yaml_takes_for_truth_mean_what_they_say(write, word):
    path = write("data: {files: [a.h5]}\n")
    assert load_config(path, [f"compile={word}"]).compile == word
    assert load_config(write(f"data: {{files: [a.h5]}}\ncompile: {word}\n")).compile == word


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no.yaml: cannot be read"):
        load_config(tmp_path / "no.yaml")


def test_configuration_cannot_be_changed(write):
    config = load_config(write("data: {files: [a.h5]}"))
    with pytest.raises(AttributeError, match="epochs"):
        config.epochs = 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_that_come_with_the_package_are_valid(path):
    config = load_config(path)
    assert path.stem.split("_")[0] == config.name
    assert config.data.files
