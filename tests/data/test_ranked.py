"""Tests of ranked lists: the pairs that each rule forms, their weights and rewards, ties, and refused records."""

import json
import math

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_engine.data.formats import FORMATS, BadRecord, detect, read_pairs
from dpo_engine.data.tokenize import build_dataset
from dpo_engine.data.tokenizer import load_tokenizer
from dpo_engine.errors import DataError
from support.built import Builder, data_config, write
from support.malformed import RIGHT, SYSTEM, USER, WRONG
from support.tiny_tokenizers import byte_level

ROW = {"prompt": "2 + 2 =", "responses": [" 5", " 4", " 22", " four"], "scores": [1, 9.5, 0, 7]}
TIED = {**ROW, "scores": [1, 7, 1, 7]}
EQUAL = {**ROW, "scores": [3, 3, 3, 3]}


def made(name, row):
    """Return (chosen, rejected) for each pair, in the order in which the format returns the pairs."""
    return [(pair.chosen, pair.rejected) for pair in FORMATS[name](row)]


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("ranked", ROW, [(" 4", " 22")]),
        ("ranked_adjacent", ROW, [(" 4", " four"), (" four", " 5"), (" 5", " 22")]),
        (
            "ranked_all",
            ROW,
            [(" 4", " four"), (" 4", " 5"), (" 4", " 22"), (" four", " 5"), (" four", " 22"), (" 5", " 22")],
        ),
        ("ranked", TIED, [(" 4", " 5")]),
        ("ranked_adjacent", TIED, [(" 4", " 5"), (" 4", " 22"), (" four", " 5"), (" four", " 22")]),
        ("ranked_all", TIED, [(" 4", " 5"), (" 4", " 22"), (" four", " 5"), (" four", " 22")]),
        ("ranked_all", {**ROW, "responses": [" 5", " 4", " 5", " 4"], "scores": [1, 2, 1, 2]}, [(" 4", " 5")] * 4),
        *((name, EQUAL, []) for name in ("ranked", "ranked_adjacent", "ranked_all")),
    ],
)
def test_pairs_of_each_rule(name, row, expected):
    assert made(name, row) == expected


@pytest.mark.parametrize("name", ["ranked", "ranked_adjacent", "ranked_all"])
@pytest.mark.parametrize("weight", [None, 1.0, 6.0])
def test_scores_become_rewards_and_pairs_split_the_weight(name, weight):
    pairs = FORMATS[name]({**ROW, "weight": weight})
    expected = dict(zip(ROW["responses"], map(float, ROW["scores"]), strict=True))
    for pair in pairs:
        assert pair.chosen_reward == expected[pair.chosen] and pair.rejected_reward == expected[pair.rejected]
        assert pair.margin == expected[pair.chosen] - expected[pair.rejected] > 0
        assert pair.weight == pytest.approx((weight or 1.0) / len(pairs))
    assert math.fsum(pair.weight for pair in pairs) == pytest.approx(weight or 1.0)


@pytest.mark.parametrize(
    ("prompt", "responses"),
    [
        ([SYSTEM, USER], [[RIGHT], [WRONG]]),
        ([SYSTEM, USER], [RIGHT["content"], WRONG["content"]]),
        ([SYSTEM, USER], [[RIGHT], WRONG["content"]]),
        (None, [[SYSTEM, USER, RIGHT], [SYSTEM, USER, WRONG]]),
        (USER["content"], [[SYSTEM, USER, RIGHT], [SYSTEM, USER, WRONG]]),
    ],
)
def test_every_shape_of_conversation_gives_the_same_pair(prompt, responses, tmp_path):
    row = {"prompt": prompt, "responses": responses, "scores": [2, 1]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    ((line, (pair,)),) = read_pairs(path)
    assert (line, pair.prompt, pair.chosen) == (1, (SYSTEM, USER), RIGHT["content"])
    assert pair.rejected == WRONG["content"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scores": [1, 2]}, "responses and scores differ in length: 4 and 2; give one score per response"),
        ({"responses": [" 4"], "scores": [1]}, "responses has 1 item; a pair needs at least 2"),
        ({"responses": " 4"}, "responses must be a list, not text"),
        ({"scores": None}, "scores must be a list, not null"),
        ({"scores": [1, "2", 3, 4]}, r"scores\[1\] must be a number, not text"),
        ({"scores": [1, 2, None, 4]}, r"scores\[2\] must be a number, not null"),
        ({"scores": [True, 2, 3, 4]}, r"scores\[0\] must be a number, not true or false"),
        ({"scores": [1, 2, 3, float("nan")]}, r"scores\[3\] must be a finite number, not nan"),
        ({"scores": [1, 2, 3, float("-inf")]}, r"scores\[3\] must be a finite number, not -inf"),
        (
            {"responses": [" 4", " 5", " 6", "4"]},
            r"responses\[0\] and responses\[3\] are equal up to .* whitespace, but have different scores \(1 and 7\)",
        ),
        ({"responses": [" 4", " ", " 5", " 6"]}, r"responses\[1\] contains only whitespace"),
        ({"responses": [" 4", None, " 5", " 6"]}, r"responses\[1\] must be text, not null"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": None}, "prompt must be text, not null"),
        ({"responses": [[RIGHT], [WRONG], [USER, RIGHT], [WRONG]]}, r"responses\[2\] does not start with"),
        ({"responses": [[RIGHT], [{**WRONG, "content": ""}], "a", "b"]}, r"responses\[1\]\[0\].content is empty"),
        ({"margin": 1.0}, "margin is computed from scores; remove this field from records with a field 'responses'"),
        ({"ref_chosen_logps": -3.0}, "ref_chosen_logps applies to a single pair; remove this field"),
        ({"tools": [{"type": "function"}]}, "tools needs a conversation; set data.columns={tools: null}"),
        ({"weight": -3.0}, "weight must be > 0, not -3"),
    ],
)
def test_invalid_records_are_refused(change, says):
    row = {**ROW, **change}
    if "start with" in says:
        row["prompt"] = [SYSTEM, USER]
    for name in ("ranked", "ranked_adjacent", "ranked_all"):
        with pytest.raises(BadRecord, match=says):
            FORMATS[name](row)


@pytest.mark.parametrize("name", ["prompt", "responses", "scores"])
def test_missing_field_is_named(name):
    row = {key: value for key, value in ROW.items() if key != name}
    with pytest.raises(BadRecord, match=rf"missing field '{name}' \(found {', '.join(row)}\)"):
        FORMATS["ranked"](row)


def test_ranked_is_detected_from_responses_and_scores_without_chosen_and_rejected():
    assert detect(ROW) is FORMATS["ranked"]
    assert detect({**ROW, "chosen": " 4", "rejected": " 5"}) is FORMATS["text"], "chosen and rejected take precedence"
    with pytest.raises(BadRecord, match="missing field 'chosen'"):
        detect({"prompt": "a", "responses": ["b", "c"]})


def test_ranked_lists_in_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([ROW, {**ROW, "scores": [1.0, math.nan, 0.0, 2.0]}]), path)
    with pytest.raises(DataError, match=r"a\.parquet:2: scores\[1\] must be a finite number, not nan"):
        list(read_pairs(path, "ranked_all"))


@pytest.fixture
def build(tmp_path):
    return Builder(tmp_path, byte_level(tmp_path / "tokenizer"))


def source(path, rows, name):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "format": name}


def test_dataset_and_its_report(build, tmp_path):
    long = {"prompt": "1 + 1 =", "responses": [" 2", " " + "9" * 80], "scores": [1, 0]}
    dataset, report = build(source(tmp_path / "a.jsonl", [ROW, EQUAL, long], "ranked_all"), max_length=40)
    assert (report.read, report.kept, len(dataset)) == (3, 6, 6)
    assert sorted(report.dropped.values()) == [1, 1]
    assert str(report).startswith("6 pairs from 3 records") and "1 dropped: record left out by the data format" in str(
        report
    )
    assert dataset.weights.tolist() == pytest.approx([1 / 6] * 6)
    assert dataset.numbers("chosen_reward").tolist() == [9.5, 9.5, 9.5, 7, 7, 1]
    assert dataset.numbers("margin").tolist() == [2.5, 8.5, 9.5, 6, 7, 1]
    assert build(source(tmp_path / "a.jsonl", [ROW, EQUAL, long], "ranked"), max_length=40)[1].kept == 1


def test_record_with_an_unusable_pair_is_dropped_whole(build, tmp_path):
    """If a pair cannot be used, for example because a response has no tokens, the pair's record is bad.

    `data.on_bad_line` decides whether the run ends with an error, or skips the record with all of its pairs. A pair
    that is too long does not make its record bad: only this pair is dropped.
    """
    unfit = {**ROW, "responses": [" 5", "<|im_end|>", " 22", " four"]}
    given = source(tmp_path / "a.jsonl", [ROW, unfit, ROW], "ranked_all")
    with pytest.raises(DataError, match=r"a\.jsonl:2: (chosen|rejected) has no tokens"):
        build(given)
    _, report = build(given, on_bad_line="skip")
    assert (report.read, report.kept, report.bad) == (3, 12, 1)


def test_order_is_kept_across_chunks(build, tmp_path, monkeypatch):
    rows = [{"prompt": f"{i} + 1 =", "responses": [" a", " b", " c"], "scores": [3, 2, 1]} for i in range(5)]
    expected, _ = build(source(tmp_path / "a.jsonl", rows, "ranked_all"))
    monkeypatch.setattr("dpo_engine.data.encode_block.CHUNK_PAIRS", 2)
    got, _ = build(source(tmp_path / "a.jsonl", rows, "ranked_all"), cache="other")
    assert got.digest == expected.digest and len(got) == 15


def test_pairs_that_fit_share_the_whole_weight_of_a_record(tmp_path):
    build = Builder(tmp_path, byte_level(tmp_path / "tokenizer"))
    row = {"prompt": "2 + 2 =", "responses": [" 4", " 5", " 6", " 7" * 20], "scores": [4, 3, 2, 1], "weight": 3}
    source = {"path": str(write(tmp_path / "a.jsonl", [row])), "format": "ranked_all"}
    for longest, kept in ((200, 6), (20, 3)):
        pairs, report = build(source, max_length=longest, cache=f"cache{longest}")
        assert len(pairs) == kept and sum(report.dropped.values()) == 6 - kept
        assert [pair.weight for pair in pairs] == pytest.approx([3 / kept] * kept)


@pytest.mark.parametrize(
    ("limit", "weights", "read", "shared"),
    [
        (2, [1 / 2] * 2, 1, "the last record has 3 pairs; 2 of them are kept and share the record's weight"),
        (3, [1 / 3] * 3, 1, None),
        (4, [1 / 3] * 3 + [2.0], 2, "the last record has 3 pairs; 1 of them is kept, with the record's whole weight"),
        (6, [1 / 3] * 3 + [2 / 3] * 3, 2, None),
    ],
)
def test_a_limit_within_a_record_keeps_its_weight(limit, weights, read, shared, tmp_path):
    row = {"prompt": "2 + 2 =", "responses": [" 4", " 5", " 6"], "scores": [3, 2, 1]}
    rows = [row, {**row, "prompt": "1 + 3 =", "weight": 2}, {**row, "prompt": "3 + 1 ="}]
    config = data_config(source(tmp_path / "a.jsonl", rows, "ranked_all"))
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer"))
    for _ in range(2):  # the second build reads the cache
        pairs, report = build_dataset(config.train, tokenizer, config, tmp_path / "cache", max_pairs=limit)
        assert [pair.weight for pair in pairs] == pytest.approx(weights)
        assert (report.kept, report.read, report.stopped) == (limit, read, True)
        assert str(report).startswith(f"{limit} pairs from {read} record")
        lines = [line.strip() for line in str(report).splitlines() if "last record" in line]
        assert lines == ([shared] if shared else [])
