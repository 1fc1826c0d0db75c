"""The typed sections of a run's configuration. They declare every key with its type, default and range.

The docstring of a key is its description in the documentation, in error messages, and in ``dpo-engine config``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from dpo_engine.config.adapter_section import AdapterConfig as AdapterConfig
from dpo_engine.config.data_section import DataConfig as DataConfig
from dpo_engine.config.data_section import Source as Source
from dpo_engine.config.optim_section import OptimConfig as OptimConfig
from dpo_engine.config.parallel_section import MegatronConfig as MegatronConfig
from dpo_engine.config.parallel_section import ParallelConfig as ParallelConfig
from dpo_engine.config.paths import Place
from dpo_engine.config.section import Count, Fraction, Interval, Natural, Section, Text

Acceptable = Literal[
    "dtype",
    "tokenizer",
    "reference",
    "loss",
    "train_data",
    "limits",
    "order",
    "global_batch_size",
    "seed",
    "optim",
    "total_steps",
    "megatron",
]


class ModelConfig(Section):
    path: Place
    """the Hugging Face checkpoint that the policy starts from: a directory, or a Hub id org/name[@revision]"""
    tokenizer: Place | None = None
    """transformers tokenizer directory, Hub id, or sentencepiece *.model file; null: the tokenizer in model.path"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """data type of weights and activations (with bf16, the optimizer keeps fp32 main weights); auto: bf16 on a
    GPU, fp32 on a CPU"""
    spec: Literal["auto", "native", "te"] = "auto"
    """layer implementation: native (Megatron-Core) or te (Transformer Engine); auto: te on a GPU if it is installed and
    supports the model, otherwise native"""
    recompute: Literal["none", "selective", "full"] = "none"
    """what to recompute in the backward pass instead of storing it: nothing (none), the MLP of each layer (selective),
    or whole layers (full)"""
    attention: Text = "auto"
    """kernels for attention in packed (tree) rows and in sliding windows: varlen (flash attention), te (Transformer
    Engine), triton, sdpa, eager or a name that a plugin registers; auto: the fastest kernels that support the model,
    dtype and layout; the log names them"""
    flash_attention: Literal[2, 3, 4] = 2
    """version of flash attention that torch uses for stacked rows and for varlen: 2 comes with torch; 3 and 4 need a
    separate package"""
    cuda_graphs: bool = False
    """whether to record the work of each layer, except attention, as CUDA graphs, which the host starts faster than
    single kernels; requires batch.layout=tree, and pads all rows to one size"""
    head: Text = "auto"
    """kernels for the log-probabilities of the output layer: eager, triton or a name that a plugin registers; auto:
    eager, unless a plugin or the environment variable DPO_KERNELS sets another default"""


class BatchConfig(Section):
    layout: Literal["auto", "stacked", "tree"] = "auto"
    """micro-batch layout: stacked (padded rows) or tree (packed, each prompt once); auto: stacked if it would
    compute less than 1.05 times as many tokens as tree, or if the chosen kernels are slow for trees on this
    device; otherwise tree"""
    share: bool = True
    """tree layout only: whether all responses to a prompt share one copy of the prompt; false: plain packing, with
    one copy per response"""
    tokens_per_micro_batch: Count | Literal["auto"] = "auto"
    """maximum number of tokens in a micro-batch, including padding; a longer pair is a micro-batch of its own; auto:
    enough for an efficient step, within the device's memory"""


class LossConfig(Section):
    """The name of a registered loss, and the settings that apply to any loss. Every other key is an option of the
    loss."""

    model_config = ConfigDict(extra="allow")

    name: Text = "sigmoid"
    """name of a registered loss"""
    ld_alpha: Fraction | None = None
    """weight of the tokens of the longer response that lie beyond the length of the shorter response (LD-DPO); null:
    all tokens count fully"""
    use_weighting: bool = False
    """whether to weight each pair's loss by the likelihood of its responses under the policy (WPO)"""

    balance: Annotated[float, Field(ge=0)] = 0.0
    """mixture-of-experts models only: coefficient of the routers' load-balancing loss, computed on response tokens; see
    router/balance in the metrics"""
    router_z: Annotated[float, Field(ge=0)] = 0.0
    """mixture-of-experts models only: coefficient of the routers' z-loss, which limits the size of their logits; see
    router/z in the metrics"""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that apply to any loss, if they differ from their defaults."""
        return self.model_dump(include={*LossConfig.model_fields} - {"name"}, exclude_defaults=True)

    @property
    def token_weighting(self) -> dict[str, Any]:
        """The settings that give weights to tokens and pairs. Settings with their default values are left out."""
        return self.model_dump(include={"ld_alpha", "use_weighting"}, exclude_defaults=True)

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set for the loss. All other options keep the defaults in the loss's signature."""
        return dict(self.model_extra or {})


class ReferenceConfig(Section):
    mode: Literal["auto", "resident", "shared", "offloaded", "stored", "dataset", "none"] = "auto"
    """source of the reference log-probabilities: a model in device memory (resident) or in host memory
    (offloaded), the policy's model without its trained adapters (shared), a store on disk (stored), the records
    themselves (dataset), or none; auto: shared with an adapter, otherwise resident"""
    path: Place | None = None
    """directory or Hub id of the reference's Hugging Face checkpoint; null: the model that the policy starts from"""
    adapter: Literal["start", "none"] = "start"
    """with adapter.path only: whether the reference has the adapter that training starts from (start), or no adapter
    (none)"""
    sync_every: Count | None = None
    """resident and shared modes only: number of steps between updates of the reference toward the policy (TR-DPO);
    null: no updates"""
    sync_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """weight of the policy in each update of the reference (TR-DPO); 1: the reference becomes a copy of the policy"""
    ahead: Count = 16
    """offloaded mode only: number of steps to score ahead each time the reference weights are swapped in"""
    store: Place | None = None
    """stored mode only: directory of the stored log-probabilities, which runs may share; null:
    <data.cache_dir>/reference"""
    missing: Literal["score", "error"] = "score"
    """stored mode only: what to do with pairs that have no stored log-probabilities: score them before training
    (score), or end the run (error)"""
    verify: Natural = 8
    """stored and dataset modes only: number of pairs whose given log-probabilities are checked at the start by
    scoring the pairs again"""


class TrainConfig(Section):
    output_dir: Place
    """the directory for everything that the run writes"""
    global_batch_size: Count = 64
    """number of pairs per optimizer step, over all ranks"""
    micro_batch_size: Count | None = None
    """number N of pairs per micro-batch on one data-parallel rank; in the tree layout, N limits tokens instead of
    pairs: a micro-batch has at most as many tokens as the N longest pairs of the data; null: as many pairs as
    batch.tokens_per_micro_batch allows"""
    epochs: Count = 1
    """number of passes over data.train"""
    max_steps: Count | None = None
    """maximum number of optimizer steps; null: all epochs in full"""
    save_by: Count | None = None
    """time limit, as [D-]H:MM:SS or in seconds, counted from the start of the Slurm job or, without Slurm, of the
    process; before the limit, the run saves and exits with code 75; null: no limit"""
    eval_interval: Interval = 0
    """number of steps between evaluations, or number of epochs such as 0.25epoch; 0: only at the end"""
    eval_at_start: bool = False
    """whether to evaluate before the first step as well"""
    stop_after_no_gain: Count | None = None
    """the run ends early after this number of consecutive evaluations without a new best value; the metric is that of
    checkpoint.keep_best or, without checkpoint.keep_best, eval/loss; null: the run never ends early"""
    seed: Natural = 1234
    """random seed for everything except the order of the pairs"""
    deterministic: bool = True
    """whether to use torch's deterministic kernels; the same layout and seed then give bitwise identical results"""
    freeze_router: bool = False
    """mixture-of-experts models only: whether to exclude the weights of routers from training"""
    guard_interval: Natural = 100
    """number of steps between checks that all ranks agree on settings, code, data and weights; the ranks are also
    checked at the start, before each scheduled save, before evaluations that can lead to a save, and after the last
    step; 0: only at the start"""

    @field_validator("save_by", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        if not isinstance(value, str):  # a number of seconds, or null
            return value
        parts = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", value)
        if not parts:
            raise ValueError("a time in the form [D-]H:MM:SS, or a whole number of seconds >= 1")
        days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class BadStepsConfig(Section):
    """Handling of bad steps, such as steps with non-finite numbers. All ranks skip a bad step, and the log names its
    pairs."""

    stop_after: Count = 3
    """number of consecutive bad steps after which the run ends; a bad step updates nothing, and its pairs are not
    retried in the same epoch"""
    spike_sigma: Annotated[float, Field(gt=0)] | None = None
    """a step is bad if its loss or gradient norm exceeds the mean of recent good steps by more than this many standard
    deviations; null: no limit"""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """number of recent good steps used for spike_sigma; the check starts after half this number of good steps"""


class KeepBest(Section):
    """The metric by which checkpoints are compared, and how many of the best checkpoints to keep."""

    metric: Text
    """a metric of the evaluations, such as eval/loss or eval/rewards/accuracies; the prefix eval/ may be omitted"""
    mode: Literal["min", "max"] | None = None
    """whether low (min) or high (max) values are better; null: min for a loss, max for accuracies and margins; required
    for all other metrics"""
    count: Count = 1
    """how many of the best steps to save and keep"""

    @field_validator("metric")
    @classmethod
    def _with_prefix(cls, value: str) -> str:
        return f"eval/{value.removeprefix('eval/')}"

    @model_validator(mode="after")
    def _has_direction(self) -> KeepBest:
        if self.mode is None and self._last not in DIRECTIONS:
            raise ValueError(
                f"given a mode, because it is not known whether low or high values of {self.metric} are better; add "
                "mode: min or mode: max"
            )
        return self

    @property
    def _last(self) -> str:
        return self.metric.rpartition("/")[2]

    @property
    def direction(self) -> Literal["min", "max"]:
        """``mode``, or the direction that follows from the metric's name."""
        return self.mode or DIRECTIONS[self._last]

    def __str__(self) -> str:
        """Return a description such as ``lowest eval/loss``."""
        return f"{'lowest' if self.direction == 'min' else 'highest'} {self.metric}"


DIRECTIONS: dict[str, Literal["min", "max"]] = {
    "loss": "min",
    "accuracies": "max",
    "accuracies_per_token": "max",
    "margins": "max",
}
"""Whether low or high values of a metric are better, by the last part of the metric's name."""

FORMER_NAMES = {"loss": "eval/loss", "accuracy": "eval/rewards/accuracies", "margin": "eval/rewards/margins"}


class CheckpointConfig(Section):
    save_interval: Interval = 0
    """number of steps between checkpoints, or number of epochs such as 0.5epoch; the run also saves at the end, when it
    is interrupted, and for checkpoint.keep_best; 0: no other saves"""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """how many of the newest checkpoints to keep; at least 2"""
    keep_best: KeepBest | None = None
    """mapping {metric, mode, count}: also save and keep the evaluated steps with the best values of this metric on
    held-out pairs; null: keep only the newest checkpoints"""
    async_save: bool = True
    """whether to write checkpoints in the background from a copy in host memory; false: training waits for each save"""
    resume: bool = True
    """whether to resume from the newest intact checkpoint in train.output_dir; false: stop if there is a checkpoint"""
    accept_changes: Annotated[tuple[Acceptable, ...], Field(strict=False)] = ()
    """settings that may differ from those in the checkpoint that the run resumes from; see "Settings that must not
    change" in the documentation of checkpoints"""
    export: bool | Literal["best"] = True
    """whether to export a Hugging Face checkpoint to <train.output_dir>/hf at the end: from the last step (true), from
    the best checkpoint according to checkpoint.keep_best (best), or not at all (false)"""

    @field_validator("keep_best", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"a mapping; write {{metric: {FORMER_NAMES.get(value, value)}, count: 1}}")
        return value


class WandbConfig(Section):
    project: Text
    """the name of the W&B project"""
    name: Text | None = None
    """name of the W&B run; null: the name of train.output_dir"""
    mode: Literal["online", "offline"] | None = None
    """W&B mode; null: taken from the environment variable WANDB_MODE"""


class MlflowConfig(Section):
    experiment: Text
    """the name of the MLflow experiment"""
    tracking_uri: Text | None = None
    """URI of the MLflow tracking server; null: taken from the environment variable MLFLOW_TRACKING_URI"""


class ProfileConfig(Section):
    """The steps to profile, and the tool."""

    steps: Annotated[tuple[Count, Count], Field(strict=False)]
    """the first and the last step to profile; the first step of a run is 1"""
    tool: Literal["torch", "nsys", "memory"] = "torch"
    """torch: a trace of all operations; nsys: ranges for Nsight Systems, for a run that is started under
    `nsys profile`; memory: a record of GPU allocations. torch and memory write to <train.output_dir>/profile"""


class LoggingConfig(Section):
    log_interval: Count = 1
    """number of steps between log entries of the metrics"""
    entropy: bool = False
    """whether to log the entropy of the policy's next-token distribution, averaged over response tokens"""
    num_zeros: bool = False
    """whether to log num_zeros_in_grad, the number of gradient values that are exactly 0"""
    tensorboard: bool = False
    """whether to log to TensorBoard, in <train.output_dir>/tensorboard"""
    wandb: WandbConfig | None = None
    """settings for logging to Weights & Biases; null: off"""
    mlflow: MlflowConfig | None = None
    """settings for logging to MLflow; null: off"""
    sinks: dict[Text, dict[str, Any]] = {}
    """mapping from the names of metric sinks to their options; the sinks are trackio, swanlab, and those that plugins
    register"""
    progress: Literal["auto", "rich", "plain", "off"] = "auto"
    """console output: rich (progress bar), plain (text lines) or off; auto: rich on a terminal, plain otherwise"""
    page: bool = True
    """whether to write report.html, a page that shows what the run has learned, at every evaluation and at the end"""
    token_samples: Natural = 64
    """number of held-out pairs for which the log-probability of each token is written at every evaluation, for
    report.html"""
    profile: ProfileConfig | None = None
    """steps to profile and the tool, such as {steps: [10, 12], tool: torch}; null: no steps are profiled"""
