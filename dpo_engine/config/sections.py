"""The sections of a run, typed: every key, its default and its range."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
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
]


class Section(BaseModel):
    """Strict types (no "2" for 2, no true for 1), no unknown keys, no change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    path: Text
    """the directory of a Hugging Face checkpoint, where the policy starts"""
    tokenizer: Text | None = None
    """directory of a transformers tokenizer, or a sentencepiece *.model file; null: that of model.path"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """of weights and activations; auto: bf16 on a GPU, fp32 on a CPU. bf16 trains fp32 main weights"""
    spec: Literal["auto", "native", "te"] = "auto"
    """layer implementation: our own on Megatron's linears, or Transformer Engine's; auto: te where it is installed"""
    recompute: Literal["none", "selective", "full"] = "none"
    """activations computed again in the backward pass: none of them, the core attention, whole layers"""


class ParallelConfig(Section):
    tp: Count = 1
    """tensor-parallel ranks: each layer's matrices and the vocabulary are split"""
    pp: Count = 1
    """pipeline stages: the layers are split"""
    vpp: Annotated[int, Field(ge=2)] | None = None
    """model chunks per pipeline stage (interleaved schedule); null: one"""
    cp: Count = 1
    """context-parallel ranks: each sequence is split"""
    ep: Count = 1
    """expert-parallel ranks"""
    sequence_parallel: bool | Literal["auto"] = "auto"
    """activations between tensor-parallel regions are split too; auto: when tp > 1"""
    distributed_optimizer: bool = True
    """optimiser states are split over the data-parallel ranks"""
    overlap: bool = False
    """gradients are reduced while the backward pass still runs, and weights gathered while the next step has begun"""
    timeout_s: Count = 600
    """a collective that takes longer ends the run"""


class Source(Section):
    """One file of preference records."""

    path: Text
    """a .jsonl, .jsonl.gz or .parquet file"""
    format: Text = "auto"
    """a registered data format; auto: recognised from the first record"""


class TrainSource(Source):
    """One file of preference records to train on."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """how often this source's pairs are drawn, relative to the other sources"""


class DataConfig(Section):
    train: Annotated[tuple[TrainSource, ...], Field(min_length=1, strict=False)]
    """a file, or a list of files or {path, format, weight}"""
    validation: Annotated[tuple[Source, ...], Field(min_length=1, strict=False)] | None = None
    """a file, or a list of files or {path, format}, evaluated and never trained on"""
    validation_fraction: Fraction = 0.0
    """share of data.train held out by content, when there is no data.validation"""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """tokens of prompt, response and EOS together"""
    max_prompt_length: Count | None = None
    """tokens of the prompt alone; null: only max_length limits it"""
    truncation: Literal["left", "drop"] = "left"
    """what is too long loses the left of its prompt (and is dropped if a response alone does not fit), or is dropped"""
    chat_template: Text | None = None
    """file with a Jinja chat template; null: the tokenizer's own"""
    add_eos: bool = True
    """the end-of-sequence token is the last token of each response"""
    cache_dir: Text | None = None
    """where tokenised data is kept; null: <train.output_dir>/cache"""
    on_bad_line: Literal["error", "skip"] = "error"
    """a record that cannot be used ends the run, or is counted and passed over"""
    seed: Natural = 0
    """of the order of the pairs"""
    shuffle: bool = True
    """a new order each epoch; false: the order of the files"""
    group_by_prompt: bool = False
    """a file's pairs of one prompt follow each other, so that layout tree computes it once for all of them in a step"""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, (list, tuple)):
            return tuple({"path": item} if isinstance(item, str) else item for item in value)
        return value


class BatchConfig(Section):
    layout: Literal["auto", "stacked", "tree"] = "auto"
    """each response a padded row with its prompt, or one row with each prompt once; auto: by the lengths of pairs"""
    share: bool = True
    """tree only: a prompt stands once for all of its responses; false: plain packing"""
    tokens_per_micro_batch: Count | None = None
    """tree only: tokens of one data-parallel rank's forward pass; null: train.micro_batch_size of the longest pairs"""


class LossConfig(Section):
    """A registered loss and what any loss may have; every other key is one of that loss's own options."""

    model_config = ConfigDict(extra="allow")

    name: Text = "sigmoid"
    """a registered loss"""
    ld_alpha: Fraction | None = None
    """factor of log-probabilities beyond the length of the pair's shorter response (LD-DPO); null: all tokens count"""
    use_weighting: bool = False
    """each pair's loss is multiplied by how likely the policy is to write it (WPO)"""

    @property
    def token_weighting(self) -> dict[str, Any]:
        """What is set of the keys that are no options of the loss."""
        return self.model_dump(include={"ld_alpha", "use_weighting"}, exclude_defaults=True)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the loss, as given; what is not given has the default of its signature."""
        return dict(self.model_extra or {})


class ReferenceConfig(Section):
    mode: Literal["resident", "offloaded", "stored", "dataset", "none"] = "resident"
    """a model beside the policy; one in host memory, swapped in; log-probabilities on disk; those of the records"""
    path: Text | None = None
    """directory of a Hugging Face checkpoint; null: model.path"""
    sync_every: Count | None = None
    """resident only: steps after which the reference moves towards the policy (TR-DPO); null: never"""
    sync_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """how far it moves: 1 replaces it by the policy"""
    ahead: Count = 16
    """offloaded only: steps whose pairs are scored each time the weights are swapped"""
    store: Text | None = None
    """stored only: directory of the log-probabilities, for any number of runs; null: <data.cache_dir>/reference"""
    missing: Literal["score", "error"] = "score"
    """stored only: pairs without stored log-probabilities are scored and added before training, or refused"""
    verify: Natural = 8
    """stored and dataset only: pairs that are scored again at the start and compared"""


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """highest learning rate"""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """lowest learning rate after the warm-up"""
    schedule: Literal["constant", "cosine", "linear", "wsd", "inverse_sqrt"] = "cosine"
    """shape of the learning rate after the warm-up"""
    warmup_steps: Natural | None = None
    """steps of linear warm-up from zero"""
    warmup_ratio: Fraction | None = None
    """the same as a share of all steps"""
    decay_steps: Count | None = None
    """wsd only: steps of the final decay"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """decoupled, on matrices only"""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """of Adam"""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """of Adam"""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """largest global gradient norm; 0: no clipping"""


class TrainConfig(Section):
    output_dir: Text
    """the directory for everything the run writes"""
    global_batch_size: Count = 64
    """pairs per optimiser step"""
    micro_batch_size: Count = 1
    """pairs per forward pass of one data-parallel rank"""
    epochs: Count = 1
    """passes over data.train"""
    max_steps: Count | None = None
    """stop after so many steps"""
    save_by: Count | None = None
    """all is saved by then, exit code 75: [D-]H:MM:SS or seconds after the start of Slurm's job, else of the process"""
    eval_interval: Natural = 0
    """steps between evaluations; 0: only at the end"""
    eval_at_start: bool = False
    """evaluate before the first step too"""
    seed: Natural = 1234
    """of everything random but the order of the pairs"""
    deterministic: bool = True
    """the same layout and seed give bitwise the same numbers"""
    guard_interval: Natural = 100
    """steps between comparisons of all ranks (settings, code, data, equal weights), before saves too; 0: at first"""

    @field_validator("save_by", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        if not isinstance(value, str):  # YAML itself reads some of these times as seconds
            return value
        parts = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", value)
        if not parts:
            raise ValueError("a time as [D-]H:MM:SS, or a whole number of seconds, at least 1")
        days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class BadStepsConfig(Section):
    """What becomes of a step whose numbers are not finite: it is skipped, on all ranks, and its pairs are named."""

    stop_after: Count = 3
    """bad steps in a row that end the run. Each is skipped: nothing is updated, its pairs are passed over"""
    spike_sigma: Annotated[float, Field(gt=0)] | None = None
    """a loss or gradient norm is bad too when so many standard deviations over the mean of good steps; null: never"""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """the latest good steps that a spike is measured by; judged from half as many on"""


class CheckpointConfig(Section):
    save_interval: Natural = 0
    """steps between checkpoints; 0: only at the end"""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """newest checkpoints kept, at least 2"""
    async_save: bool = True
    """the run goes on while a checkpoint is written, from a copy in host memory; false: it waits"""
    resume: bool = True
    """continue from the newest whole checkpoint in train.output_dir, when there is one"""
    accept_changes: Annotated[tuple[Acceptable, ...], Field(strict=False)] = ()
    """what may differ from the checkpoint's run when this one continues it; see Resuming"""
    export: bool = True
    """write a Hugging Face checkpoint to <train.output_dir>/hf at the end"""


class WandbConfig(Section):
    project: Text
    """the name of the W&B project"""
    name: Text | None = None
    """of the run; null: the name of train.output_dir"""
    mode: Literal["online", "offline"] | None = None
    """null: as the environment says (WANDB_MODE)"""


class MlflowConfig(Section):
    experiment: Text
    """the name of the MLflow experiment"""
    tracking_uri: Text | None = None
    """null: as the environment says (MLFLOW_TRACKING_URI)"""


class LoggingConfig(Section):
    log_interval: Count = 1
    """steps between lines of metrics"""
    entropy: bool = False
    """also the entropy of the policy's distribution over the vocabulary, a mean over the tokens of responses"""
    tensorboard: bool = False
    """also to <train.output_dir>/tensorboard"""
    wandb: WandbConfig | None = None
    """also to Weights & Biases"""
    mlflow: MlflowConfig | None = None
    """also to MLflow"""
    progress: Literal["auto", "rich", "plain", "off"] = "auto"
    """on the console; auto: rich on a terminal, plain lines elsewhere"""
