"""Tests of automatically chosen micro-batches: they fit the card, and are not too small."""

import pytest

from runs import requires_null_gpu, run

pytestmark = requires_null_gpu

MIB = 1 << 20
H100 = "81559"
DEFAULTS = ("batch.layout=auto", "batch.tokens_per_micro_batch=auto")
SHORT = ("--model", "llama3_1b", "--pairs", "32", "--lengths", "200,100,100", "--vary")
LONG = ("--pairs", "16", "--vary")
LLAMA_8B = ("--model", "llama3_8b", "--world", "8", *LONG)
LLAMA_70B = ("--model", "llama3_70b", "--world", "64", *LONG, "parallel.tp=8", "parallel.pp=4")


@pytest.mark.parametrize(
    "card, arguments, least",
    [
        (H100, (*LLAMA_8B, "parallel.tp=2", *DEFAULTS), 8192),
        (H100, (*LLAMA_8B, "parallel.tp=2", "batch.layout=stacked", DEFAULTS[1]), 8192),
        (H100, (*LLAMA_8B, "parallel.tp=2", "parallel.cp=2", *DEFAULTS), 16384),
        (H100, (*LLAMA_8B, "parallel.pp=2", "model.recompute=selective", "reference.mode=stored", *DEFAULTS), 2048),
        (H100, (*LLAMA_70B, "parallel.vpp=2", *DEFAULTS), 2048),
        (H100, (*SHORT, *DEFAULTS), 8192),
        ("32768", (*SHORT, *DEFAULTS), 1024),
        ("32768", (*SHORT, "batch.layout=stacked", DEFAULTS[1]), 1024),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_chosen_micro_batches_fit_the_card(card, arguments, least):
    report = run(*arguments, card=card)
    last = report["last"]
    assert least <= report["tokens_per_micro_batch"] <= 16384, report["chosen"]
    assert "out_of_memory" not in report and last["reserved"] <= (int(card) - 2500) * MIB


def test_short_pairs_need_few_launches():
    """A step with automatically chosen micro-batches has at most 4,000 launches.

    The same step with micro-batches of one pair has more than eight times as many launches.
    """
    arguments = ("--model", "llama3_1b", "--pairs", "16", "--lengths", "200,100,100", "--vary")
    asked = (DEFAULTS, ("batch.layout=auto",))
    together, alone = (run(*arguments, *keys)["last"]["counts"]["launches"] for keys in asked)
    assert together <= 4000 and 8 * together < alone
