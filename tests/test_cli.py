"""Tests of the command line: arguments, exit codes, and error messages.

Each problem is reported on its own line. Only one rank per node prints these lines.
"""

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

import dpo_engine
from dpo_engine import cli
from dpo_engine.errors import CheckpointError, ConfigError, DataError, NumbersError
from dpo_engine.verbs import console

GOOD = {"model": {"path": "m"}, "data": {"train": "a"}, "train": {"output_dir": "o"}}


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(GOOD))
    return str(path)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Remove launchers' variables from the environment."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


@pytest.fixture
def nothing_wrong(monkeypatch):
    """Replace the check of runs with a function that finds no problem. Return the list of the function's calls."""
    from dpo_engine.verbs import check

    asked = []

    def examine(config, world_size=None, **rest):
        asked.append((config, world_size, rest))
        return check.Findings()

    monkeypatch.setattr(check, "examine", examine)
    return asked


def stand_in(monkeypatch, module: str, **functions):
    """Replace a module, for example one that imports Megatron, with a module that has only these functions."""
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["train"], ["check", "a.yaml", "--world-size", "x"]])
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_help_and_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == dpo_engine.__version__
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "3 data" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("verb", ["train", "check", "eval", "export", "parity"])
def test_every_verb_refuses_a_missing_file(verb, tmp_path, capsys):
    missing = tmp_path / "no.yaml"
    assert cli.main([verb, str(missing)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"{missing}: cannot be read (No such file or directory); pass the path of a run's YAML file\n"
    )


def test_every_problem_is_on_its_own_line(run, capsys):
    code = cli.main(["check", run, "parallel.tp=0", "optim.decay_steps=3", "data.tain=x", "--world-size", "2"])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert code == 2 and captured.out == ""
    starts = ["parallel.tp=0", "data.tain=x", "optim.decay_steps=3", "model.path=m"]
    assert [line.split(":")[0] for line in lines[:4]] == starts
    assert lines[0] == "parallel.tp=0: must be a whole number of at least 1; the default is 1"
    assert "Traceback" not in captured.err


def test_overrides_and_options_come_in_any_order(run, nothing_wrong, monkeypatch):
    stand_in(monkeypatch, "dpo_engine.verbs.export", export=lambda config, *, step, to, **_: to)
    assert cli.main(["export", run, "parallel.tp=2", "--step", "3", "parallel.pp=2", "--debug", "optim.lr=1"]) == 0
    config = nothing_wrong[0][0]
    assert (config.parallel.tp, config.parallel.pp, config.optim.lr) == (2, 2, 1)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--parallel.tp=2", "unknown option --parallel.tp=2; write overrides without dashes: parallel.tp=2"),
        ("--fast", "unknown option --fast"),
    ],
)
def test_unknown_option_is_named(run, capsys, option, expected):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", run, option])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"dpo-engine: error: {expected}"


def test_a_run_may_have_no_file(nothing_wrong, monkeypatch):
    stand_in(monkeypatch, "dpo_engine.verbs.export", export=lambda config, *, step, to, **_: to)
    assert cli.main(["export", "model.path=m", "--step", "3", "data.train=a", "train.output_dir=o=1.yaml"]) == 0
    config, _, asked = nothing_wrong[0]
    assert (config.model.path, config.train.output_dir) == ("m", "o=1.yaml")
    assert asked["launch"] == "-m dpo_engine export model.path=m data.train=a train.output_dir=o=1.yaml"


def test_a_file_may_have_an_equals_sign_in_its_name(tmp_path, nothing_wrong, monkeypatch):
    stand_in(monkeypatch, "dpo_engine.verbs.export", export=lambda config, *, step, to, **_: to)
    path = tmp_path / "lr=1.yaml"
    path.write_text(json.dumps(GOOD))
    assert cli.main(["export", str(path), "parallel.tp=2"]) == 0
    assert nothing_wrong[0][0].parallel.tp == 2


def test_a_verb_without_file_and_overrides_says_what_it_needs(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train"])
    assert caught.value.code == 2
    expected = "dpo-engine: error: train needs a run: its YAML file, overrides (model.path=DIR ...), or both"
    assert capsys.readouterr().err.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("logging.report_to=wandb", "set logging.tensorboard, logging.wandb or logging.mlflow"),
        ("beta=0.1", "called loss.beta here"),
        ("train.beta=0.1", "called loss.beta here"),
        ("per_device_train_batch_size=4", "called train.micro_batch_size here"),
        ("train.learning_rate=1", "called optim.lr here"),
        ("tensor_model_parallel_size=2", "called parallel.tp here"),
        ("data.tain=x", "did you mean data.train?"),
    ],
)
def test_a_key_of_another_system_is_answered_with_ours(run, capsys, key, expected):
    assert cli.main(["train", run, key]) == 2
    name, _, value = key.partition("=")
    assert capsys.readouterr().err.splitlines()[0].startswith(f"{name}={value}: no such key; {expected}")


def test_compare_takes_two_files(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["compare", "a.parquet", "b.parquet", "c.parquet"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("compare has too many arguments: c.parquet")
    assert cli.main(["compare", "a.parquet", "b.parquet"]) == 3
    assert capsys.readouterr().err == "a.parquet: no such file; give a file written by `dpo-engine eval` or `train`\n"


@pytest.mark.parametrize(
    ("verb", "validation", "expected"),
    [
        ("train", "b", set()),
        ("check", "b", set()),
        ("eval", "b", {"data.train", "checkpoint.export"}),
        ("eval", "null", {"checkpoint.export"}),
        ("export", "null", {"data.train", "data.validation", "checkpoint.export"}),
    ],
)
def test_files_that_a_verb_does_not_read_are_not_checked(run, nothing_wrong, monkeypatch, verb, validation, expected):
    stop = failing(ConfigError("stop"))
    stand_in(monkeypatch, "dpo_engine.verbs.train", train=stop)
    stand_in(monkeypatch, "dpo_engine.verbs.export", export=stop)
    stand_in(monkeypatch, "dpo_engine.verbs.evaluate", evaluate=stop)
    stand_in(monkeypatch, "dpo_engine.verbs.dry_run", dry_run=stop)
    stand_in(monkeypatch, "dpo_engine.verbs.summary", summarize=stop)
    assert cli.main([verb, run, f"data.validation={validation}"]) == 2
    assert nothing_wrong[0][2]["broken"] == expected


def test_library_warnings_are_shown_only_with_debug(run, nothing_wrong, monkeypatch):
    def train(config, *_):
        warnings.warn_explicit("deprecated", FutureWarning, "x.py", 1, module="torch.distributed.x")
        warnings.warn_explicit("mine", UserWarning, "y.py", 1, module="my_lab.loss")
        return {"step": 1}

    stand_in(monkeypatch, "dpo_engine.verbs.train", train=train)
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert cli.main(["train", run]) == 0
    assert [str(w.message) for w in seen] == ["mine"]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert cli.main(["train", run, "--debug"]) == 0
    assert [str(w.message) for w in seen] == ["deprecated", "mine"]


@pytest.mark.parametrize("size", ["0", "-4"])
def test_world_size_must_be_positive(run, capsys, size):
    assert cli.main(["check", run, f"--world-size={size}"]) == 2
    assert capsys.readouterr().err == f"--world-size={size}: must be at least 1; pass the number of ranks\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a=1: b; c"), 2),
        (DataError(["x.jsonl:3: bad", "x.jsonl:4: worse"]), 3),
        (CheckpointError("c: d"), 4),
        (NumbersError("e: f"), 5),
    ],
)
def test_errors_give_their_exit_codes(run, nothing_wrong, monkeypatch, capsys, error, code):
    stand_in(monkeypatch, "dpo_engine.verbs.train", train=failing(error))
    assert cli.main(["train", run]) == code
    assert capsys.readouterr().err.splitlines() == error.problems


def test_debug_adds_the_traceback(run, nothing_wrong, monkeypatch, capsys):
    stand_in(monkeypatch, "dpo_engine.verbs.train", train=failing(ConfigError("a=1: b; c")))
    assert cli.main(["train", run, "--debug"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("a=1: b; c\n") and "Traceback (most recent call last)" in text


def test_unwritable_file_is_reported_on_one_line(run, nothing_wrong, monkeypatch, capsys):
    stand_in(monkeypatch, "dpo_engine.verbs.train", train=failing(OSError(28, "No space left on device", "/x/y")))
    assert cli.main(["train", run]) == 1
    assert capsys.readouterr().err == "/x/y: No space left on device\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("no file in it")])
def test_bugs_keep_their_traceback(run, nothing_wrong, monkeypatch, error):
    stand_in(monkeypatch, "dpo_engine.verbs.train", train=failing(error))
    with pytest.raises(type(error), match=str(error)):
        cli.main(["train", run])


def test_interrupted_run_prints_nothing(run, nothing_wrong, monkeypatch, capsys):
    stand_in(monkeypatch, "dpo_engine.verbs.train", train=failing(KeyboardInterrupt()))
    assert cli.main(["train", run]) == 130
    assert capsys.readouterr().err == ""


def test_train_prints_results_and_output_paths(run, nothing_wrong, monkeypatch, capsys):
    summary = {
        "step": 12,
        "train": {"loss": 0.25},
        "eval": {"loss": 0.5, "rewards/accuracies": 0.875, "rewards/margins": 1.5},
        "hf": "o/hf",
    }
    seen = []
    stand_in(monkeypatch, "dpo_engine.verbs.train", train=lambda config, *_: seen.append(config) or summary)
    assert cli.main(["train", run, "optim.lr=1e-5"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "done: 12 steps, loss 0.2500, held-out loss 0.5000, held-out accuracy 0.8750, held-out margin 1.5000",
        "metrics: o/metrics.jsonl",
        "model: o/hf",
    ]
    assert seen[0].optim.lr == 1e-5
    ((config, world, rest),) = nothing_wrong
    assert (config, world) == (seen[0], 1)
    assert rest["launch"] == f"-m dpo_engine train {run} optim.lr=1e-5"


def test_check_exits_with_3_if_only_the_data_is_wrong(run, monkeypatch, capsys):
    from dpo_engine.verbs import check

    found = check.Findings(data=["a.jsonl:1: bad"])
    monkeypatch.setattr(check, "examine", lambda *_, **__: found)
    assert cli.main(["check", run]) == 3
    assert capsys.readouterr().err == "a.jsonl:1: bad\n"
    assert cli.main(["check", run, "parallel.tp=0"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_export_passes_its_options_on(run, nothing_wrong, monkeypatch, capsys):
    def export(config, step, to, best, dtype):
        console.say("step 40 is passed over")
        return f"{to}/{step}/{best}/{dtype}"

    stand_in(monkeypatch, "dpo_engine.verbs.export", export=export)
    assert cli.main(["export", run, "--step", "30", "--to", "there"]) == 0
    assert capsys.readouterr().out == "step 40 is passed over\nwrote there/30/False/None\n"
    assert cli.main(["export", run, "--best", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.endswith("wrote None/None/True/bf16\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", run, "--best", "--step", "3"])
    assert stopped.value.code == 2
    assert "argument --step: not allowed with argument --best" in capsys.readouterr().err


@pytest.mark.parametrize(("holds", "code", "options"), [(True, 0, []), (False, 1, ["--fp64"])])
def test_parity_result_is_the_exit_code(run, nothing_wrong, monkeypatch, capsys, holds, code, options):
    def parity(config, fp64):
        assert fp64 == bool(options)
        console.say("8 pairs")
        return holds

    stand_in(monkeypatch, "dpo_engine.verbs.parity", parity=parity)
    assert cli.main(["parity", run, *options, "parallel.tp=2"]) == code
    assert capsys.readouterr().out == "8 pairs\n"
    assert nothing_wrong[0][1] is None  # no number of ranks, because parity starts its own ranks


LAUNCHERS = [
    ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 8, False),
    ({"RANK": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, 8, True),
    ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3", "SLURM_STEP_ID": "0"}, 4, False),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}, 4, True),
]


@pytest.mark.parametrize(("environment", "world", "speaks"), LAUNCHERS)
def test_one_rank_per_node_prints_under_a_launcher(run, nothing_wrong, monkeypatch, capsys, environment, world, speaks):
    monkeypatch.setattr(os, "environ", {**os.environ, **environment})
    stand_in(monkeypatch, "dpo_engine.verbs.train", train=failing(ConfigError("a=1: b; c")))
    assert cli.main(["train", run]) == 2
    assert ("a=1: b; c\n" in capsys.readouterr().err) == speaks
    assert nothing_wrong[0][1] == world


def test_only_rank_0_writes_to_stdout(run, nothing_wrong, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    stand_in(monkeypatch, "dpo_engine.verbs.train", train=lambda config, *_: {"step": 1})
    assert cli.main(["train", run]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_problem_is_printed_once_under_torchrun(run):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--no-python", sys.executable]
    done = subprocess.run(
        [*command, "-m", "dpo_engine", "train", run, "parallel.tp=0"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert done.stderr.count("parallel.tp=0: must be a whole number of at least 1; the default is 1") == 1


@pytest.mark.slow
def test_module_of_the_command_line_runs_verbs_too(run):
    command = [sys.executable, "-m", "dpo_engine.cli", "check", run, "parallel.tp=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "parallel.tp=0: must be a whole number of at least 1; the default is 1" in done.stdout + done.stderr


@pytest.mark.slow
def test_too_few_ranks_names_the_command(run):
    done = subprocess.run(
        [sys.executable, "-m", "dpo_engine", "train", run, "parallel.tp=2"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert (
        "parallel.tp=2 x parallel.pp=1 x parallel.cp=1: the number of ranks must be a multiple of 2, but is 1; start 2 "
        f"ranks, for example: torchrun --nproc-per-node 2 -m dpo_engine train {run} parallel.tp=2\n"
    ) in done.stderr
