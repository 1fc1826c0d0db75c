"""Tests of the log-probabilities of single tokens: they equal those of transformers in every layout."""

import json
import re

import numpy as np
import pytest

from dpo_engine.reporting.pair_file import read_evaluation
from dpo_engine.reporting.token_file import read_tokens
from dpo_engine.testing.ranks import run_ranks
from support.small_run import config_of, write_pairs
from support.tiny_tokenizers import byte_level

LAYOUTS = {
    "stacked": (1, {}, "stacked"),
    "tp2 pp2 trees": (4, {"tp": 2, "pp": 2}, "tree"),
    "cp2 stacked": (2, {"cp": 2}, "stacked"),
    "tp2 cp2 trees": (4, {"tp": 2, "cp": 2}, "tree"),
    "pp2 vpp2 dp2 trees": (4, {"pp": 2, "vpp": 2}, "tree"),
}
DEFAULT = ("tp2 cp2 trees",)


def judge(config, **asked):
    from dpo_engine.errors import EngineError
    from dpo_engine.verbs.evaluate import evaluate

    try:
        return evaluate(config, **asked)
    except EngineError as error:
        return type(error).__name__, str(error)


def of_transformers(path, prompt, response):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Write a file of pairs, some of which share a prompt or a response. Return its path."""
    path = tmp_path_factory.mktemp("ranked") / "pairs.jsonl"
    write_pairs(path, 5, 100)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows += [{**rows[0], "rejected": " larger 7"}, {**rows[0], "chosen": " first of 3"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in LAYOUTS]
)
def test_tokens_match_transformers(name, ranked, files, tiny_hf, tmp_path):  # noqa: F811
    ranks, parallel, layout = LAYOUTS[name]
    policy, other = (
        tiny_hf("llama", num_hidden_layers=4),
        tiny_hf("llama", num_hidden_layers=4, initializer_range=0.03),
    )
    config = config_of(
        files,
        policy,
        tmp_path,
        data={"validation": str(ranked)},
        reference={"path": str(other)},
        parallel=parallel,
        batch={"layout": layout},
    )
    found = run_ranks(judge, ranks, config=config, step=0, tokens=7)[0]
    assert found["files"][2] == str(tmp_path / "eval/step_00000000.tokens.parquet")
    texts, facts = read_tokens(tmp_path / "eval/step_00000000.tokens.parquet")
    assert facts["step"] == 0 and [text.side for text in texts] == ["prompt", "chosen", "rejected"] * 7
    columns = read_evaluation(tmp_path / "eval/step_00000000.parquet").columns
    for row, (prompt, *responses) in enumerate(zip(*[iter(texts)] * 3, strict=True)):
        for text in responses:
            assert text.id == prompt.id == columns["id"][row] and all(text.scored)
            for model, values, sums in ((policy, text.logps, ""), (other, text.ref_logps, "ref_")):
                expected = of_transformers(model, prompt.token_ids, text.token_ids)
                assert np.array(values) == pytest.approx(expected, rel=1e-5, abs=1e-5)
                assert sum(values) == pytest.approx(columns[f"{sums}{text.side}_logps"][row], rel=1e-6)
        assert "".join(prompt.text).startswith("which is larger 10")


def test_tokens_of_a_model_with_capped_logits(ranked, files, tiny_hf, tmp_path):  # noqa: F811
    model = tiny_hf("gemma2", num_hidden_layers=2, final_logit_softcapping=0.5)
    config = config_of(files, model, tmp_path, data={"validation": str(ranked)}, parallel={"tp": 2})
    run_ranks(judge, 2, config=config, step=0, tokens=2)
    texts, _ = read_tokens(tmp_path / "eval/step_00000000.tokens.parquet")
    columns = read_evaluation(tmp_path / "eval/step_00000000.parquet").columns
    for prompt, *responses in zip(*[iter(texts)] * 3, strict=True):
        for text in responses:
            expected = of_transformers(model, prompt.token_ids, text.token_ids)
            assert np.array(text.logps) == pytest.approx(expected, rel=1e-5, abs=1e-5)
            place = list(columns["id"]).index(text.id)
            assert sum(text.logps) == pytest.approx(columns[f"{text.side}_logps"][place], rel=1e-6)


def test_tokens_of_turns_that_are_not_scored(files, tiny_hf, tmp_path):  # noqa: F811
    """A user's turn within a response is not scored. The text has characters that consist of several tokens."""
    row = {
        "prompt": [{"role": "user", "content": "which is larger?"}],
        "chosen": [
            {"role": "assistant", "content": "the first \N{OWL}\N{SNOWMAN}"},
            {"role": "user", "content": "of them?"},
            {"role": "assistant", "content": "number 2"},
        ],
        "rejected": [{"role": "assistant", "content": "the second"}],
    }
    path, tokenizer = tmp_path / "pairs.jsonl", byte_level(tmp_path / "tokenizer")
    path.write_text(json.dumps(row) + "\n")
    model = tiny_hf("llama", num_hidden_layers=1)
    config = config_of(
        {**files, "tokenizer": str(tokenizer)},
        model,
        tmp_path,
        data={"validation": str(path), "max_length": 200},
        batch={"layout": "tree"},
    )
    run_ranks(judge, 2, config=config, step=0, tokens=64)
    texts, _ = read_tokens(tmp_path / "eval/step_00000000.tokens.parquet")
    prompt, chosen, rejected = texts
    assert "".join(chosen.text).startswith("the first \N{OWL}\N{SNOWMAN}<|im_end|>\n<|im_start|>user\nof them?")
    assert "" in chosen.text and "\N{OWL}" in chosen.text, (
        "the whole character must be the text of the character's last token"
    )
    left_out = "".join(piece for piece, scored in zip(chosen.text, chosen.scored, strict=True) if not scored)
    assert "of them?" in left_out and "number" not in left_out and "first" not in left_out
    expected = of_transformers(model, prompt.token_ids, chosen.token_ids)
    for value, found, scored in zip(expected, chosen.logps, chosen.scored, strict=True):
        assert found == pytest.approx(value, rel=1e-5, abs=1e-5) if scored else np.isnan(found)
    assert all(rejected.scored) and prompt.cut == ""


def judge_slowly(config, **asked):
    from dpo_engine.platform import progress_line

    progress_line.FIRST_S = progress_line.EVERY_S = 0.0
    return judge(config, **asked)


def test_progress_of_evaluating_and_scoring(files, tiny_hf, tmp_path, capfd):  # noqa: F811
    """All progress lines have the same form. In the percentage, a pair counts once for each model that scores it.

    Tokens have no log-probability under a stored reference, because a store has only sums over responses.
    """
    config = config_of(
        files,
        tiny_hf("llama", num_hidden_layers=2),
        tmp_path,
        parallel={"pp": 2},
        batch={"layout": "stacked"},
        reference={"mode": "stored"},
        logging={"progress": "plain"},
    )
    run_ranks(judge_slowly, 2, config=config, step=0, tokens=7)
    form = r"^([a-z ]+): (\d+)% of 7 pairs, [\d.,]+ pairs/s, \d:\d\d:\d\d left$"
    out = capfd.readouterr().out
    found = re.findall(form, out, re.MULTILINE)
    for what in ("scoring the reference", "evaluating", "scoring tokens"):
        shares = [int(share) for name, share in found if name == what]
        assert shares == sorted(shares) and len(set(shares)) >= 3 and shares[-1] == 100, (what, shares)
    texts, _ = read_tokens(tmp_path / "eval/step_00000000.tokens.parquet")
    assert len(texts) == 21 and texts[1].ref_logps is None and all(np.isfinite(texts[1].logps))
    says = "tokens: reference.mode=stored provides only one log-probability per response, so tokens have no "
    assert says in out


def test_number_of_pairs_is_checked(files, tiny_hf, tmp_path):  # noqa: F811
    outcome = judge(config_of(files, tiny_hf("llama"), tmp_path), step=0, tokens=0)
    assert outcome == (
        "ConfigError",
        "--tokens=0: must be at least 1; pass the number of pairs whose tokens are written",
    )
