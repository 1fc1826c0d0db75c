"""Tests of `logging.profile`: files, marked ranges, and refused settings. Profiling must not change metrics."""

import contextlib
import json
import types

import pytest
import torch

from dpo_engine.config.rules import contradictions
from dpo_engine.config.run import Config
from dpo_engine.config.sections import ProfileConfig
from dpo_engine.platform import ranges
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.training import profile
from support.small_run import config_of, log_of, run


def train(files, tiny_hf, output, asked, ranks=1, **sections):
    """Train 4 steps of at most 8 pairs, unless ``sections`` sets another number of steps.

    After every second step, evaluate 7 pairs and save.
    """
    base = {
        "parallel": {"pp": ranks},
        "batch": {"layout": "stacked"},
        "train": {"eval_interval": 2, "max_steps": 4, **sections.pop("train", {})},
        "checkpoint": {"save_interval": 2, "export": False, "async_save": False, **sections.pop("checkpoint", {})},
        "logging": {"profile": asked},
    }
    config = config_of(files, tiny_hf("llama", num_hidden_layers=2), output, **base, **sections)
    return run_ranks(run, ranks, config=config)


def events(path):
    """Return the ranges that the engine marked in a trace, as (name, start, end) in microseconds."""
    found = json.loads(path.read_text())["traceEvents"]
    marked = [one for one in found if one.get("cat") == "user_annotation"]
    return [(one["name"], one["ts"], one["ts"] + one["dur"]) for one in marked]


def numbers(output):
    timed = ("_s", "layout_gain", "time")
    return [{name: value for name, value in line.items() if not name.endswith(timed)} for line in log_of(output)]


def test_trace_names_the_parts_of_steps_and_changes_no_number(files, tiny_hf, tmp_path):
    plain = train(files, tiny_hf, tmp_path / "plain", None)[0]
    found = train(files, tiny_hf, tmp_path / "run", {"steps": [2, 3]})[0]
    assert found["train"]["loss"] == plain["train"]["loss"] and found["eval"] == plain["eval"]
    assert numbers(tmp_path / "run") == numbers(tmp_path / "plain")
    (file,) = (tmp_path / "run" / "profile").iterdir()
    assert file.name == "torch_steps_2-3_rank_00000.json"
    marked = events(file)
    counts = {name: sum(one == name for one, *_ in marked) for name, *_ in marked}
    twice = dict.fromkeys(("step", "batches", "reference", "reduce", "metrics", "optimizer"), 2)
    # Step 2 has 8 pairs in 4 micro-batches. Step 3 has 6 pairs in 3 micro-batches. The evaluation has 4 micro-batches.
    wanted = twice | {"forward": 11, "loss": 7, "backward": 7, "evaluate": 1, "save": 1}
    assert {name: counts.get(name) for name in wanted} == wanted
    assert all(inside(one, marked, "forward") for one in marked if one[0] == "loss")
    assert all(inside(one, marked, "step") for one in marked if one[0] in ("batches", "backward", "optimizer"))


def inside(one, marked, name):
    return any(start <= one[1] and one[2] <= end for other, start, end in marked if other == name)


@pytest.mark.slow
def test_resumed_run_profiles_only_its_own_steps(files, tiny_hf, tmp_path):
    asked = {"steps": [1, 3]}
    train(files, tiny_hf, tmp_path / "run", None, ranks=2, train={"max_steps": 2})
    changes = {"accept_changes": ["total_steps"]}
    train(files, tiny_hf, tmp_path / "run", asked, ranks=2, checkpoint=changes)
    names = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    assert names == [f"torch_steps_3-3_rank_0000{rank}.json" for rank in (0, 1)]
    train(files, tiny_hf, tmp_path / "run", asked, ranks=2, checkpoint=changes)
    assert len(list((tmp_path / "run" / "profile").iterdir())) == 2


def fake_run(folder):
    """Return a stand-in for a run of one rank, with the attributes that the profiler reads."""
    engine = types.SimpleNamespace(
        platform=types.SimpleNamespace(synchronize=lambda: None),
        groups=types.SimpleNamespace(world=types.SimpleNamespace(rank=lambda: 0)),
    )
    chunk = types.SimpleNamespace(config=types.SimpleNamespace(timers=None))
    lines = []
    return types.SimpleNamespace(
        step=0,
        output=folder,
        engine=engine,
        trained=types.SimpleNamespace(chunks=[chunk]),
        sinks=types.SimpleNamespace(say=lines.append, lines=lines),
    )


def test_profile_that_cannot_be_made_is_refused_before_the_model_is_loaded(files, tiny_hf, tmp_path, monkeypatch):
    from dpo_engine.training.engine import Engine

    monkeypatch.setattr(Engine, "load_policy", None)
    asked = {"steps": [2, 9], "tool": "nsys"}
    kind, message = train(files, tiny_hf, tmp_path / "run", asked, train={"epochs": 2, "max_steps": None})[0]
    assert (kind, message.splitlines()) == (
        "ConfigError",
        [
            "logging.profile.tool=nsys: needs a GPU, because Nsight Systems traces CUDA calls; set "
            "logging.profile.tool=torch",
            "logging.profile.steps=[2, 9]: the run has 6 steps; set the last profiled step to at most "
            "6, or train longer",
        ],
    )


@pytest.mark.parametrize(
    "tool, gpu, refused", [("memory", False, True), ("memory", True, False), ("torch", False, False)]
)
def test_memory_snapshot_needs_a_gpu(tool, gpu, refused):
    from dpo_engine.errors import ConfigError

    raw = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"output_dir": "o"}}
    config = Config.parse({**raw, "logging": {"profile": {"steps": [1, 2], "tool": tool}}})
    why = "because a snapshot records the allocations of torch's GPU allocator; set logging.profile.tool=torch"
    with pytest.raises(ConfigError, match=why) if refused else contextlib.nullcontext():
        profile.require_profile(config, gpu=gpu, num_steps=2)


@pytest.mark.parametrize(
    "steps, line",
    [
        ([3, 2], "logging.profile.steps=[3, 2]: the first step must not be after the last step; swap them"),
        ([3, 6], "logging.profile.steps=[3, 6]: the last step must be at most train.max_steps=5; lower the last step"),
    ],
)
def test_steps_are_checked_with_the_configuration(steps, line):
    raw = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"output_dir": "o", "max_steps": 5}}
    assert contradictions(Config.parse({**raw, "logging": {"profile": {"steps": steps}}})) == [line]


def advance(profiler, run, last):
    profiler.on_start(run)
    for run.step in range(1, last + 1):
        with ranges.part("step"):
            pass
        profiler.on_step(run, {})


def test_nsys_captures_the_steps_and_pushes_ranges(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    monkeypatch.setattr(profile, "without_time_limit", lambda group, work, meter: work())
    run = fake_run(tmp_path)
    advance(profile.Profiler(ProfileConfig(steps=(2, 3), tool="nsys")), run, 5)
    assert calls == ["start", "step", "pop", "step", "pop", "stop"]
    assert run.sinks.lines == ["profile: steps 2-3 were marked for nsys"]
    assert run.trained.chunks[0].config.timers is None and not list(tmp_path.iterdir())


def test_memory_snapshot_is_written_before_the_record_ends(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", calls.append)
    run = fake_run(tmp_path)
    profiler = profile.Profiler(ProfileConfig(steps=(1, 4), tool="memory"))
    profiler.on_start(run)
    run.step = 2
    profiler.on_step(run, {})
    profiler.on_end(run)  # the run ended early
    path = tmp_path / "profile" / "memory_steps_1-2_rank_00000.pickle"
    assert calls == [{"max_entries": profile.MEMORY_EVENTS}, str(path), {"enabled": None}]
    assert run.sinks.lines == [f"profile: steps 1-2 are in {path.parent}, one file for each rank"]


def test_recording_stops_if_a_snapshot_cannot_be_written(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))

    def full(path):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    run = fake_run(tmp_path)
    profiler = profile.Profiler(ProfileConfig(steps=(1, 4), tool="memory"))
    profiler.on_start(run)
    run.step = 2
    profiler.on_step(run, {})
    profiler.on_end(run)
    assert calls[-1] == {"enabled": None}
    assert "No space left on device" in run.sinks.lines[0]


@pytest.mark.parametrize("where", ["write", "stop"])
def test_profile_that_cannot_be_written_does_not_end_the_run(where, tmp_path):
    class Broken:
        needs_gpu, ending = "", ".json"

        def start(self):
            pass

        def stop(self):
            if where == "stop":
                raise RuntimeError("CUDA error")

        def write(self, path):
            raise OSError("disk full")

    run = fake_run(tmp_path)
    profiler = profile.Profiler(ProfileConfig(steps=(1, 4)))
    profiler.tool = Broken()
    profiler.on_start(run)
    profiler.on_end(run)
    path = tmp_path / "profile" / "torch_steps_1-1_rank_00000.json"
    wanted = {
        "write": f"profile: {path} cannot be written (disk full)",
        "stop": "profile: cannot be written (CUDA error)",
    }
    assert run.sinks.lines == [wanted[where]]


def test_ranges_do_nothing_unless_steps_are_profiled():
    assert ranges.part("step") is ranges.part("loss") is ranges.OFF
    opened = []

    @contextlib.contextmanager
    def open_range(name):
        opened.append(name)
        yield
        opened.append(f"end of {name}")

    ranges.mark_with(open_range)
    try:
        timers = ranges.MegatronTimers()
        timers("forward-compute", log_level=2).start()
        with ranges.part("loss"):
            pass
        timers("forward-compute").stop()
    finally:
        ranges.mark_with(None)
    assert opened == ["forward", "loss", "end of loss", "end of forward"]
