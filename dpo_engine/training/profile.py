"""Profile a few steps of a run (``logging.profile``) with torch's profiler, Nsight Systems, or a record of GPU memory.

Profiling starts at the end of the step before ``steps[0]``, and stops at the end of step ``steps[1]``. If training
starts at a step from ``steps[0]`` to ``steps[1]``, profiling starts with the training loop. Evaluations and saves
between the start and the stop are included. :mod:`~dpo_engine.platform.ranges` marks the parts of a step, and
Megatron's timers mark forward and backward passes. None of the tools changes what a step computes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from dpo_engine.config.run import Config
from dpo_engine.config.sections import ProfileConfig
from dpo_engine.errors import ConfigError
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.platform.ranges import MegatronTimers, mark_with
from dpo_engine.training.callbacks import Callback, Run
from dpo_engine.wording import show

MEMORY_EVENTS = 1_000_000
"""Largest number of allocations and frees in a memory snapshot; older events are dropped."""


class Tool(Protocol):
    """A profiler.

    needs_gpu   why the tool requires a GPU; empty if it does not
    ending      suffix of the file that the tool writes on each rank; empty if it writes no file
    """

    needs_gpu: str
    ending: str

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def write(self, path: Path) -> None: ...


class TorchTrace:
    """Trace of the operations on CPU and GPU, for chrome://tracing and Perfetto."""

    needs_gpu = ""
    ending = ".json"

    def start(self) -> None:
        """Begin the trace."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        mark_with(torch.profiler.record_function)

    def stop(self) -> None:
        """End the trace."""
        mark_with(None)
        self._profiler.stop()

    def write(self, path: Path) -> None:
        """Write the trace in Chrome's JSON format."""
        self._profiler.export_chrome_trace(str(path))


class NsightSystems:
    """Control when ``nsys profile --capture-range=cudaProfilerApi`` captures, and mark NVTX ranges."""

    needs_gpu = "Nsight Systems traces CUDA calls"
    ending = ""

    def start(self) -> None:
        """Tell nsys to begin the capture."""
        torch.cuda.profiler.start()
        mark_with(torch.cuda.nvtx.range)

    def stop(self) -> None:
        """Tell nsys to end the capture."""
        mark_with(None)
        torch.cuda.profiler.stop()

    def write(self, path: Path) -> None:
        """Do nothing, because nsys writes the report."""


class MemorySnapshot:
    """Record of allocations in GPU memory, with their stack traces, for https://pytorch.org/memory_viz."""

    needs_gpu = "a snapshot records the allocations of torch's GPU allocator"
    ending = ".pickle"  # torch's own format; nothing in the engine reads it

    def start(self) -> None:
        """Begin to record."""
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)

    def stop(self) -> None:
        """Do nothing, because :meth:`write` still needs the record."""

    def write(self, path: Path) -> None:
        """Write the snapshot, and stop recording."""
        try:
            torch.cuda.memory._dump_snapshot(str(path))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)


TOOLS: dict[str, Callable[[], Tool]] = {"torch": TorchTrace, "nsys": NsightSystems, "memory": MemorySnapshot}


class Profiler(Callback):
    """On every rank, profile the steps in ``asked.steps``. A resumed run profiles only the steps that it runs.

    On each rank, ``torch`` and ``memory`` write one file to ``<train.output_dir>/profile``, for example
    ``torch_steps_10-12_rank_00000.json``.
    """

    def __init__(self, asked: ProfileConfig):
        self.first, self.last = asked.steps
        self.name = asked.tool
        self.tool = TOOLS[asked.tool]()
        self.began: int | None = None  # first profiled step; None while no step is profiled

    def on_start(self, run: Run) -> None:
        """Start if the next step is to be profiled."""
        self._start_if_due(run)

    def on_step(self, run: Run, metrics: dict[str, float]) -> None:
        """Stop after the last profiled step, or start before the first."""
        if self.began is not None and run.step == self.last:
            write = self._stop(run)
            run.sinks.say(without_time_limit(run.engine.groups.world, write, Meter("writing the profile")))
        self._start_if_due(run)

    def on_end(self, run: Run) -> None:
        """If the run ends or fails before the end of the last step to profile, write what has been profiled so far."""
        if self.began is not None:
            try:
                line = self._stop(run)()
            except RuntimeError as error:  # a GPU error has ended the run, and must stay the error that is reported
                line = f"profile: cannot be written ({error})"
            run.sinks.say(line)

    def _start_if_due(self, run: Run) -> None:
        if self.began is None and self.first <= run.step + 1 <= self.last:
            self.began = run.step + 1
            self._time(run, MegatronTimers())
            self.tool.start()

    def _stop(self, run: Run) -> Callable[[], str]:
        """Stop profiling. Return a function that writes this rank's file and returns a line for the log."""
        run.engine.platform.synchronize()
        self.tool.stop()
        self._time(run, None)
        first, self.began = self.began, None
        steps = f"{first}-{max(run.step, first)}"
        rank = run.engine.groups.world.rank()
        path = run.output / "profile" / f"{self.name}_steps_{steps}_rank_{rank:05d}{self.tool.ending}"
        return partial(self._write, path, steps)

    def _write(self, path: Path, steps: str) -> str:
        if not self.tool.ending:
            return f"profile: steps {steps} were marked for nsys"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.tool.write(path)
        except (OSError, RuntimeError) as error:  # a trace that cannot be written must not end a run
            return f"profile: {path} cannot be written ({error})"
        return f"profile: steps {steps} are in {path.parent}, one file for each rank"

    @staticmethod
    def _time(run: Run, timers: Any) -> None:
        """Let Megatron's schedules mark forward and backward passes with ``timers``."""
        for chunk in run.trained.chunks:
            chunk.config.timers = timers


def require_profile(config: Config, *, gpu: bool, num_steps: int) -> None:
    """Check that the run can be profiled as ``logging.profile`` requires. Call this before models are loaded.

    Raises :class:`~dpo_engine.errors.ConfigError` if the tool needs a GPU and there is none, or if the last step to
    profile is not among the run's ``num_steps`` steps.
    """
    asked, problems = config.logging.profile, []
    if asked is None:
        return
    why = TOOLS[asked.tool]().needs_gpu
    if why and not gpu:
        problems.append(
            f"logging.profile.tool={asked.tool}: needs a GPU, because {why}; set logging.profile.tool=torch"
        )
    if asked.steps[1] > num_steps:
        steps = f"{num_steps} step{'' if num_steps == 1 else 's'}"
        problems.append(
            f"logging.profile.steps={show(asked.steps)}: the run has {steps}; set the last profiled step to at most "
            f"{num_steps}, or train longer"
        )
    if problems:
        raise ConfigError(problems)
