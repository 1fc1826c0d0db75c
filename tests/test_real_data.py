"""Train on two sets of real, human-labeled pairs (text and conversations), in one process and in four processes."""

import gzip
import json
import math

import pytest

from dpo_engine.testing.ranks import run_ranks
from support.real_data import DATA, SETS

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}</s>{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not DATA.is_dir(), reason=f"no preference data in {DATA}; set DPO_TEST_DATA to use another directory"
    ),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Train a bare SentencePiece model of 500 pieces on parts of both data sets."""
    import sentencepiece

    def texts():
        for name in ("hh_harmless/harmless-base.train.text.jsonl.gz", "qa_feedback/qa-feedback.train.text.jsonl.gz"):
            with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
                for _, line in zip(range(300), lines, strict=False):
                    row = json.loads(line)
                    yield from (row[part].replace("\n", " ") for part in ("prompt", "chosen", "rejected"))

    prefix = tmp_path_factory.mktemp("tokenizer") / "pieces"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts(),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return f"{prefix}.model"


def run(config):
    from dpo_engine.verbs.train import train

    return train(config)


@pytest.mark.parametrize("name", SETS)
def test_real_pairs_train_the_same_in_two_layouts(name, tokenizer, tiny_hf, tmp_path):
    from dpo_engine.config.run import Config

    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    raw = {
        "model": {"path": str(tiny_hf("llama")), "tokenizer": tokenizer},
        "data": {
            "train": str(DATA / SETS[name]),
            "validation_fraction": 0.02,
            "max_length": 96,
            "on_bad_line": "skip",
            "cache_dir": str(tmp_path / "cache"),
        },
        "optim": {"lr": 1e-3, "schedule": "constant"},
        "train": {"global_batch_size": 16, "micro_batch_size": 4, "max_steps": 12, "eval_at_start": True},
        "checkpoint": {"export": False},
        "logging": {"progress": "off"},
    }
    if name == "qa_feedback":
        raw["data"]["chat_template"] = str(template)
    summaries = {}
    for layout, ranks, parallel in (("one", 1, {}), ("tp2 pp2", 4, {"tp": 2, "pp": 2})):
        raw["train"]["output_dir"] = str(tmp_path / layout)
        config = Config.parse({**raw, "parallel": parallel})
        summaries[layout] = run_ranks(run, ranks, config=config)[0]
        lines = [json.loads(line) for line in (tmp_path / layout / "metrics.jsonl").read_text().splitlines()]
        first = next(line for line in lines if "loss" in line)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert lines[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    one, other = summaries.values()
    assert one["eval"] == pytest.approx(other["eval"], rel=1e-3, abs=1e-3)
    assert one["train"]["loss"] == pytest.approx(other["train"]["loss"], rel=1e-3)
