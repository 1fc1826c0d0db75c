"""Tests of the token file (the tokens of selected pairs of an evaluation), and of the choice of pairs for this file."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_engine.errors import DataError
from dpo_engine.reporting.shown_pairs import choose_pairs
from dpo_engine.reporting.token_file import KEY, TokenText, read_tokens, tokens_path, write_tokens
from support.evaluations import FACTS, evaluation


def test_file_round_trips(tmp_path):
    path = tokens_path(tmp_path / "eval" / "step_00000003.parquet")
    assert path.name == "step_00000003.tokens.parquet"
    prompt = TokenText("a", 3, "random", "prompt", [1, 2], ["x y"], cut=None)
    half = "\ud83d"  # an unpaired surrogate, as some tokenizers return
    chosen = TokenText("a", 3, "random", "chosen", [4, 5], ["p", half], [-1.5, math.nan], None, [True, False])
    write_tokens(path, [prompt, chosen], FACTS)
    (first, second), facts = read_tokens(path)
    assert (
        facts == FACTS
        and first.cut is None
        and second.cut == ""
        and first.text == ["x y"]
        and first.token_ids == [1, 2]
    )
    assert second.text == ["p", "?"] and second.logps[0] == -1.5 and math.isnan(second.logps[1])
    assert second.ref_logps is None and second.scored == [True, False]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.write_bytes(b"PAR1"), "is not a readable token file ("),
        (lambda path: pa.parquet.write_table(pa.table({"id": ["a"]}), path), "is not a readable token file ("),
        (
            lambda path: pa.parquet.write_table(
                pa.table({"id": ["a"]}).replace_schema_metadata({KEY: b'{"format": 1}'}), path
            ),
            "has a format that this version of dpo-engine does not read; run the evaluation again",
        ),
    ],
)
def test_unusable_files_are_refused(change, says, tmp_path):
    path = tmp_path / "x.tokens.parquet"
    change(path)
    with pytest.raises(DataError) as caught:
        read_tokens(path)
    assert str(caught.value).startswith(f"{path}: ") and says in str(caught.value)


def test_pairs_are_chosen_by_kind():
    # log-probability margins of eight pairs under each model; the change of a margin is policy minus reference
    reference, policy = np.array([1, 1, -1, -1, 2, 0.5, 3, 3]), np.array([-1, 1, 2, -1, 9, 0.6, 3, 3])
    columns = evaluation(
        0.1 * (policy - reference),
        chosen_logps=policy - 5,
        rejected_logps=np.full(8, -5.0),
        ref_chosen_logps=reference - 5,
        ref_rejected_logps=np.full(8, -5.0),
    ).columns
    assert choose_pairs(columns, 8) | {6: "", 7: "", 1: "", 3: "", 5: ""} == {
        0: "lowest reward margin",
        1: "",
        2: "became right",
        3: "",
        4: "most changed",
        5: "",
        6: "",
        7: "",
    }
    found = choose_pairs(columns, 8)
    assert [found[i] for i in (1, 3, 6, 7)] == [
        "lowest reward margin",
        *["random"] * 3,
    ]
    assert found[5] == "most changed"
    assert len(choose_pairs(columns, 3)) == 3 and choose_pairs(columns, 3) == choose_pairs(columns, 3)
    without = evaluation([-1.0, 1.0, 2.0], ref_chosen_logps=[math.nan] * 3).columns
    assert choose_pairs(without, 2)[0] == "lowest reward margin" and set(choose_pairs(without, 3).values()) == {
        "lowest reward margin",
        "random",
    }
