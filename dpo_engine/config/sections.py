"""The typed sections of a run's configuration: every key with its default and range.

The docstring of a key is its description in the documentation and in the output of ``dpo-engine config``.
"""

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
    """A section with strict types (no "2" for 2, no true for 1) and no unknown keys; read-only after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    path: Text
    """the directory of the Hugging Face checkpoint that the policy starts from"""
    tokenizer: Text | None = None
    """path of a transformers tokenizer directory or a sentencepiece *.model file; null: the tokenizer in model.path"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """data type of weights and activations (bf16 keeps fp32 main weights); auto: bf16 on a GPU, fp32 on a CPU"""
    spec: Literal["auto", "native", "te"] = "auto"
    """layer implementation: native (Megatron-Core) or te (Transformer Engine); auto: te if available, else native"""
    recompute: Literal["none", "selective", "full"] = "none"
    """activations recomputed in the backward pass: none, only core attention (selective), or whole layers (full)"""


class ParallelConfig(Section):
    tp: Count = 1
    """tensor-parallel size: ranks that split each layer's weight matrices and the vocabulary"""
    pp: Count = 1
    """pipeline-parallel size: stages that split the layers"""
    vpp: Annotated[int, Field(ge=2)] | None = None
    """model chunks per pipeline stage (interleaved schedule); null: one chunk, not interleaved"""
    cp: Count = 1
    """context-parallel size: ranks that split each sequence"""
    ep: Count = 1
    """expert-parallel size: ranks that split the experts of a mixture-of-experts model"""
    sequence_parallel: bool | Literal["auto"] = "auto"
    """sequence parallelism: activations between tensor-parallel regions are split too; auto: on when tp > 1"""
    distributed_optimizer: bool = True
    """sharding of optimizer states over the data-parallel ranks"""
    overlap: bool = False
    """overlap of gradient reduction with the backward pass, and of weight gathering with the next forward pass"""
    timeout_s: Count = 600
    """timeout in seconds of a collective; the run ends when one takes longer"""


class Source(Section):
    """One file of preference records."""

    path: Text
    """the path of a .jsonl, .jsonl.gz or .parquet file"""
    format: Text = "auto"
    """name of a registered data format; auto: detected from the first record"""


class TrainSource(Source):
    """One file of preference records to train on."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """sampling weight of this source's pairs, relative to the other sources"""


class DataConfig(Section):
    train: Annotated[tuple[TrainSource, ...], Field(min_length=1, strict=False)]
    """a file of preference records, or a list of files or {path, format, weight} mappings"""
    validation: Annotated[tuple[Source, ...], Field(min_length=1, strict=False)] | None = None
    """a file of preference records for evaluation only, or a list of files or {path, format} mappings; null: none"""
    validation_fraction: Fraction = 0.0
    """fraction of the prompts in data.train held out for evaluation, when data.validation is null"""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """maximum tokens of a prompt and one response together, EOS included"""
    max_prompt_length: Count | None = None
    """maximum tokens of a prompt; null: limited by max_length only"""
    truncation: Literal["left", "drop"] = "left"
    """handling of overlong pairs: left cuts the start of the prompt (never a response), drop removes the pair"""
    chat_template: Text | None = None
    """path of a Jinja chat template; null: the tokenizer's own template"""
    add_eos: bool = True
    """end-of-sequence token as the last token of each response"""
    cache_dir: Text | None = None
    """directory for tokenized data; null: <train.output_dir>/cache"""
    workers: Count | None = None
    """processes that tokenize the data, on one rank per node; null: one per core that this rank may use, at most 32"""
    on_bad_line: Literal["error", "skip"] = "error"
    """handling of unusable records: error ends the run, skip counts them and continues"""
    seed: Natural = 0
    """random seed of the order of the pairs"""
    shuffle: bool = True
    """new random order of the pairs in each epoch; false: the order in the files"""
    group_by_prompt: bool = False
    """grouping of a file's pairs by prompt, so that the tree layout computes each prompt once per step"""

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
    """micro-batch layout: stacked (padded rows) or tree (packed, each prompt once); auto: chosen by pair lengths"""
    share: bool = True
    """tree layout only: all responses to a prompt share one copy of it; false: plain packing, one copy per response"""
    tokens_per_micro_batch: Count | None = None
    """tree layout only: token budget of a micro-batch; null: tokens of the train.micro_batch_size longest pairs"""


class LossConfig(Section):
    """A registered loss and the settings that apply to any loss; every other key is an option of that loss."""

    model_config = ConfigDict(extra="allow")

    name: Text = "sigmoid"
    """name of a registered loss"""
    ld_alpha: Fraction | None = None
    """weight of a token beyond the length of the pair's shorter response (LD-DPO); null: all tokens count fully"""
    use_weighting: bool = False
    """weighting of each pair's loss by the policy's likelihood of the pair (WPO)"""

    @property
    def token_weighting(self) -> dict[str, Any]:
        """The settings that apply to any loss, without those at their defaults."""
        return self.model_dump(include={"ld_alpha", "use_weighting"}, exclude_defaults=True)

    @property
    def options(self) -> dict[str, Any]:
        """The given keyword arguments of the loss; the others have the defaults of its signature."""
        return dict(self.model_extra or {})


class ReferenceConfig(Section):
    mode: Literal["resident", "offloaded", "stored", "dataset", "none"] = "resident"
    """source of reference log-probabilities: a resident or offloaded model, a store on disk, the dataset, or none"""
    path: Text | None = None
    """directory of the reference's Hugging Face checkpoint; null: model.path"""
    sync_every: Count | None = None
    """resident mode only: steps between updates of the reference toward the policy (TR-DPO); null: no updates"""
    sync_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """weight of the policy in each update of the reference (TR-DPO); 1: the reference becomes a copy of the policy"""
    ahead: Count = 16
    """offloaded mode only: steps whose pairs are scored per swap of the weights"""
    store: Text | None = None
    """stored mode only: directory of log-probabilities, shared between runs; null: <data.cache_dir>/reference"""
    missing: Literal["score", "error"] = "score"
    """stored mode only: handling of pairs without stored log-probabilities: score them before training, or error"""
    verify: Natural = 8
    """stored and dataset modes only: number of pairs scored again at the start to check their log-probabilities"""


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """peak learning rate"""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """minimum learning rate after warmup"""
    schedule: Literal["constant", "cosine", "linear", "wsd", "inverse_sqrt"] = "cosine"
    """learning-rate schedule after warmup"""
    warmup_steps: Natural | None = None
    """steps of linear warmup from zero; null: set by warmup_ratio, or no warmup"""
    warmup_ratio: Fraction | None = None
    """steps of linear warmup as a fraction of all steps; null: set by warmup_steps, or no warmup"""
    decay_steps: Count | None = None
    """wsd schedule only: steps of the final decay; null: a tenth of all steps"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """decoupled weight decay, applied to weight matrices only"""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """Adam's beta1 and beta2"""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon"""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """maximum global gradient norm; 0: no clipping"""


class TrainConfig(Section):
    output_dir: Text
    """the directory for everything that the run writes"""
    global_batch_size: Count = 64
    """pairs per optimizer step, over all ranks"""
    micro_batch_size: Count = 1
    """pairs per forward pass of one data-parallel rank"""
    epochs: Count = 1
    """passes over data.train"""
    max_steps: Count | None = None
    """maximum number of optimizer steps; null: all epochs in full"""
    save_by: Count | None = None
    """deadline for save and exit (code 75): [D-]H:MM:SS or seconds after job (Slurm) or process start; null: none"""
    eval_interval: Natural = 0
    """steps between evaluations; 0: only at the end"""
    eval_at_start: bool = False
    """additional evaluation before the first step"""
    seed: Natural = 1234
    """random seed of everything except the order of the pairs"""
    deterministic: bool = True
    """bitwise identical results for the same layout and seed"""
    guard_interval: Natural = 100
    """steps between checks that all ranks agree (settings, code, data, weights), also before saves; 0: only at start"""

    @field_validator("save_by", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        if not isinstance(value, str):  # a number of seconds, or null
            return value
        parts = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", value)
        if not parts:
            raise ValueError("a time as [D-]H:MM:SS, or a whole number of seconds, at least 1")
        days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class BadStepsConfig(Section):
    """Handling of steps with non-finite numbers: all ranks skip them, and the log names their pairs."""

    stop_after: Count = 3
    """consecutive bad steps that end the run; each bad step is skipped: no update, and its pairs are not repeated"""
    spike_sigma: Annotated[float, Field(gt=0)] | None = None
    """standard deviations above the mean of recent good steps that make a loss or gradient norm bad; null: no limit"""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """number of recent good steps that spike_sigma refers to; spike checks start after half as many good steps"""


class CheckpointConfig(Section):
    save_interval: Natural = 0
    """steps between checkpoints; 0: only at the end"""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """number of newest checkpoints to keep, at least 2"""
    async_save: bool = True
    """checkpoint writing in the background, from a copy in host memory; false: training waits"""
    resume: bool = True
    """resumption from the newest complete checkpoint in train.output_dir, if there is one"""
    accept_changes: Annotated[tuple[Acceptable, ...], Field(strict=False)] = ()
    """settings that may differ from those of the checkpoint that the run resumes from; see Resuming"""
    export: bool = True
    """export of a Hugging Face checkpoint to <train.output_dir>/hf at the end"""


class WandbConfig(Section):
    project: Text
    """the name of the W&B project"""
    name: Text | None = None
    """name of the W&B run; null: the name of train.output_dir"""
    mode: Literal["online", "offline"] | None = None
    """W&B mode; null: the environment's (WANDB_MODE)"""


class MlflowConfig(Section):
    experiment: Text
    """the name of the MLflow experiment"""
    tracking_uri: Text | None = None
    """URI of the MLflow tracking server; null: the environment's (MLFLOW_TRACKING_URI)"""


class LoggingConfig(Section):
    log_interval: Count = 1
    """steps between logged metrics"""
    entropy: bool = False
    """logging of the entropy of the policy's next-token distribution, averaged over response tokens"""
    tensorboard: bool = False
    """logging to TensorBoard, in <train.output_dir>/tensorboard"""
    wandb: WandbConfig | None = None
    """logging to Weights & Biases; null: off"""
    mlflow: MlflowConfig | None = None
    """logging to MLflow; null: off"""
    progress: Literal["auto", "rich", "plain", "off"] = "auto"
    """console output: rich (progress bar), plain (lines) or off; auto: rich on a terminal, plain elsewhere"""
