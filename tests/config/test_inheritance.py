"""Tests of ``base: other.yaml``, with which a run's file inherits the keys of another file."""

import pytest
import yaml

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError

BASE = {
    "model": {"path": "m", "dtype": "fp32"},
    "data": {"train": ["a.jsonl", "b.jsonl"], "max_length": 64},
    "loss": {"name": "sigmoid", "beta": 0.2, "gamma": 1.0, "ld_alpha": 0.5},
    "train": {"output_dir": "o", "epochs": 3},
}


@pytest.fixture
def write(tmp_path):
    def write(name: str, **raw):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


def test_mappings_are_merged_and_other_values_replaced(write):
    write("shared/base.yaml", **BASE)
    path = write("run.yaml", base="shared/base.yaml", model={"dtype": "bf16"}, data={"train": "c.jsonl"})
    config = Config.load(path, ["train.epochs=5"])
    assert (config.model.path, config.model.dtype) == ("m", "bf16")
    assert [source.path for source in config.data.train] == ["c.jsonl"] and config.data.max_length == 64
    assert config.loss == Config.parse(BASE).loss and config.train.epochs == 5


def test_a_base_may_have_a_base_and_is_found_beside_the_file_that_names_it(write):
    write("shared/site.yaml", **BASE)
    write("shared/base.yaml", base="site.yaml", optim={"lr": 1e-5})
    config = Config.load(write("run.yaml", base="shared/base.yaml", optim={"min_lr": 1e-6}))
    assert (config.optim.lr, config.optim.min_lr, config.model.path) == (1e-5, 1e-6, "m")


def test_another_loss_replaces_the_whole_section(write):
    write("base.yaml", **BASE)
    config = Config.load(write("run.yaml", base="base.yaml", loss={"name": "simpo"}))
    assert config.loss.name == "simpo" and config.loss.options == {} and config.loss.ld_alpha is None


@pytest.mark.parametrize("base, own", [({"beta": 0.2}, {"name": "sigmoid"}), ({"name": "sigmoid", "beta": 0.2}, {})])
def test_the_default_loss_may_be_named_or_not(base, own, write):
    write("base.yaml", **BASE | {"loss": base})
    config = Config.load(write("run.yaml", base="base.yaml", loss={**own, "gamma": 1.5}))
    assert config.loss.options == {"beta": 0.2, "gamma": 1.5}


def test_null_returns_a_loss_option_to_its_default_if_the_base_has_no_loss(write):
    write("base.yaml", **{name: section for name, section in BASE.items() if name != "loss"})
    config = Config.load(write("run.yaml", base="base.yaml", loss={"beta": None}))
    assert config.loss.options == {}


def test_null_returns_a_loss_option_to_its_default(write):
    write("base.yaml", **BASE)
    config = Config.load(write("run.yaml", base="base.yaml", loss={"gamma": None, "ld_alpha": None}))
    assert config.loss.options == {"beta": 0.2} and config.loss.ld_alpha is None


def test_null_elsewhere_is_the_value_null(write):
    write("base.yaml", **BASE | {"data": {**BASE["data"], "validation": "v.jsonl"}})
    config = Config.load(write("run.yaml", base="base.yaml", data={"validation": None}))
    assert config.data.validation is None and config.data.max_length == 64


@pytest.mark.parametrize("base", [3, "", None, ["a.yaml"]])
def test_a_base_that_is_not_a_path_is_refused(write, base):
    path = write("run.yaml", base=base)
    with pytest.raises(ConfigError) as caught:
        Config.load(path)
    assert str(caught.value).startswith(f"{path}: base=") and "must be the path of a YAML file" in str(caught.value)


def test_a_missing_base_is_refused(write, tmp_path):
    path = write("run.yaml", base="no.yaml")
    with pytest.raises(ConfigError) as caught:
        Config.load(path)
    assert (
        str(caught.value)
        == f"{path}: base=no.yaml: {tmp_path / 'no.yaml'} is not a file; set a path relative to the folder of {path}"
    )


def test_a_cycle_of_bases_is_refused(write):
    first = write("a.yaml", base="b.yaml")
    second = write("b.yaml", base="a.yaml")
    with pytest.raises(ConfigError) as caught:
        Config.load(first)
    assert (
        str(caught.value)
        == f"{second}: base=a.yaml: creates a cycle of base files; remove the key base from one of them"
    )


def test_a_problem_in_a_base_is_reported(write):
    write("base.yaml", **BASE | {"optim": {"lr": -1}})
    with pytest.raises(ConfigError) as caught:
        Config.load(write("run.yaml", base="base.yaml"))
    assert str(caught.value).startswith("optim.lr=-1: must be")
