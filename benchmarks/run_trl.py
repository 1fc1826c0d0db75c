"""Run TRL's DPOTrainer once in its own process and print its measurements: `python run_trl.py JOB.json`."""

import sys
from contextlib import nullcontext
from typing import Any

import transformers
from datasets import Dataset
from flops import executed_flops
from measure import METRICS, Job, Measured, Meter, said
from tokenizers import Tokenizer, models
from trl import DPOConfig, DPOTrainer

from dpo_engine.data.dataset import PairDataset
from dpo_engine.platform.host import multiply_by_onednn

MODEL = {"dtype": "float32", "attn_implementation": "sdpa"}
"""Arguments for loading the model. With bf16, TRL uses autocast over fp32 weights."""

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class MeteredTrainer(DPOTrainer):
    """TRL's trainer with fixed token ids and a fixed order of pairs. The trainer also measures times."""

    def __init__(self, meter: Meter, order: list[int], **given: Any):
        self.meter, self.order, self.measured = meter, order, Measured()
        super().__init__(**given, callbacks=[_Laps(meter, self.measured)])

    def _prepare_dataset(self, dataset: Dataset, *rest: Any) -> Dataset:
        return dataset  # the token ids are given

    def _precompute_ref_logps(self, *given: Any) -> Dataset:
        self.meter.start()
        scored = super()._precompute_ref_logps(*given)
        self.measured.filling_s = self.meter.lap()
        return scored

    def _get_train_sampler(self, dataset: Dataset | None = None) -> list[int]:
        return self.order

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if METRICS.keys() <= logs.keys():
            self.measured.metrics.append(said(logs))


class _Laps(transformers.TrainerCallback):
    """Timer of every optimizer step. Models are loaded and prepared before the first measurement."""

    def __init__(self, meter: Meter, measured: Measured):
        self.meter, self.measured = meter, measured

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        self.meter.start()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        self.measured.steps_s.append(self.meter.lap())


def run(job: Job, meter: Meter) -> Measured:
    """Train on the job's pairs. With `grouped`, sort each global batch by length to reduce the padding.

    The batch is sorted here, because the length-grouping sampler of transformers would also change which pairs form a
    step.
    """
    pairs = PairDataset(job.pairs)
    rows = {int(i): pairs.lengths[i, 0] + pairs.lengths[i, 1:].max() for step in job.steps for i in step}
    order = [i for step in job.steps for i in (sorted(step, key=rows.get, reverse=True) if job.grouped else step)]
    size = job.micro_batch_size
    args = DPOConfig(
        output_dir=job.scratch,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=len(job.steps[0]) // size,
        num_train_epochs=1,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        bf16=job.dtype == "bf16",
        gradient_checkpointing=False,
        precompute_ref_log_probs=job.precomputed,
        model_init_kwargs=None if job.adapter else MODEL,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    columns = {name: [pairs[i][part].tolist() for i in range(len(pairs))] for part, name in enumerate(COLUMNS)}
    trainer = MeteredTrainer(
        meter,
        order,
        model=_adapted(job) if job.adapter else job.model,
        args=args,
        train_dataset=Dataset.from_dict(columns),
        processing_class=_tokenizer(),
    )
    trainer.train()
    measured = trainer.measured
    measured.peak_bytes = meter.peak_bytes()
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    measured.largest_tokens = int(max(2 * size * max(rows[i] for i in chunk) for chunk in chunks))
    return measured


def _adapted(job: Job) -> Any:
    """Load the model with its adapter. TRL then makes a copy of the adapter for the reference."""
    from peft import PeftModel

    base = transformers.AutoModelForCausalLM.from_pretrained(job.model, **MODEL)
    return PeftModel.from_pretrained(base, job.adapter, is_trainable=True)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer that is used only for its padding id. No text is tokenized."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def main() -> None:
    job, meter = Job.read(sys.argv[1]), Meter()
    if job.onednn:
        multiply_by_onednn()
    with executed_flops() if job.count else nullcontext() as counter:
        measured = run(job, meter)
    measured.flops = float(counter.get_total_flops()) if counter else 0.0
    measured.report()


if __name__ == "__main__":
    main()
