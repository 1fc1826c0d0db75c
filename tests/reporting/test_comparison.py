"""Tests of evaluation files, their summary, and the comparison of two evaluations pair by pair."""

import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from rich.console import Console

from dpo_engine.errors import ConfigError, DataError
from dpo_engine.reporting.comparison import compare, report, show, show_comparison
from dpo_engine.reporting.pair_file import KEY, SCHEMA, read_evaluation, write_evaluation, write_json
from support.evaluations import FACTS, evaluation


class TestFile:
    def test_file_round_trips_and_is_a_plain_parquet_table(self, tmp_path):
        path = tmp_path / "eval/a.parquet"
        written = evaluation([1.0, -2.0, 0.0], ref_chosen_logps=[math.nan] * 3, weight=[1, 2, 0.5])
        write_evaluation(path, written)
        found = read_evaluation(path)
        assert found.facts == FACTS and found.columns.keys() == written.columns.keys()
        for name, values in written.columns.items():
            np.testing.assert_array_equal(found.columns[name], values, err_msg=name)
        rows = pyarrow.parquet.read_table(path).to_pylist()
        assert [row["ref_chosen_logps"] for row in rows] == [None] * 3, (
            "without a reference, the value must be null, not nan"
        )
        assert [path.name for path in path.parent.iterdir()] == ["a.parquet"]

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda path: path.unlink(), "no such file; give a file written by `dpo-engine eval` or `train`"),
            (lambda path: path.write_bytes(b"PAR1 and then nothing"), "cannot be read as Parquet ("),
            (lambda path: path.write_bytes(path.read_bytes()[:900]), "check that the file is complete"),
            (lambda path: pa.parquet.write_table(pa.table({"id": ["a"]}), path), "is not an evaluation; give a file"),
            (lambda path: rewrite(path, {KEY: b"{}"}), "is not an evaluation; give a file"),
            (
                lambda path: rewrite(path, {KEY: b'{"format": 9}'}),
                "has format 9, but this version of dpo-engine reads format 1; run",
            ),
            (lambda path: rewrite(path, drop="loss"), "is empty or has the wrong columns; run the evaluation again"),
            (lambda path: rewrite(path, rows=0), "is empty or has the wrong columns; run the evaluation again"),
        ],
    )
    def test_invalid_files_are_refused(self, change, says, tmp_path):
        path = tmp_path / "a.parquet"
        write_evaluation(path, evaluation([1.0, -2.0]))
        change(path)
        with pytest.raises(DataError) as error:
            read_evaluation(path)
        (line,) = error.value.problems
        assert line.startswith(f"{path}: ") and says in line and "\n" not in line

    def test_non_finite_values_are_written_but_not_compared(self, tmp_path):
        write_evaluation(tmp_path / "a.parquet", evaluation([1.0, math.nan, math.inf]))
        with pytest.raises(
            DataError, match="values are not finite in 2 of 3 pairs, so the evaluation cannot be compared"
        ):
            read_evaluation(tmp_path / "a.parquet")

    def test_unwritable_path_is_an_error(self, tmp_path):
        (tmp_path / "a.parquet").mkdir()
        with pytest.raises(ConfigError, match=r"a\.parquet: cannot be written \(Is a directory\); choose another path"):
            write_evaluation(tmp_path / "a.parquet", evaluation([1.0]))
        assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]

    def test_failed_write_keeps_the_old_file(self, tmp_path):
        write_json(tmp_path / "a.json", {"a": 1})
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "a.json", {"a": math.nan})
        assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def rewrite(path, metadata=None, drop=None, rows=None):
    table = pa.parquet.read_table(path)
    assert table.schema.equals(SCHEMA)
    table = table.drop_columns([drop]) if drop else table.slice(0, rows)
    pa.parquet.write_table(table.replace_schema_metadata(metadata or table.schema.metadata), path)


class TestReport:
    def test_weighted_means(self):
        found = report(evaluation([1.0, -2.0, 0.0], weight=[1.0, 2.0, 1.0]))
        (group, _) = found["groups"]
        assert (group["by"], group["pairs"], group["prompts"]) == ("all", 3, 3)
        assert group["accuracy"]["mean"] == pytest.approx((1 + 0 + 0.5) / 4)
        assert group["margin"]["mean"] == pytest.approx((1 - 4) / 4)
        losses = [math.log1p(math.exp(-margin)) for margin in (1, -2, 0)]
        assert group["loss"] == pytest.approx((losses[0] + 2 * losses[1] + losses[2]) / 4)
        assert found["run"] == FACTS and found["interval"]["resamples"] == 2000
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def test_groups_by_source_and_response_length(self):
        made = evaluation(
            [1.0, -1.0, 1.0, 1.0, -1.0],
            source=["b", "a", "b", "a", "b"],
            chosen_tokens=[16, 2, 17, 64, 5000],
            rejected_tokens=[1, 16, 3, 64, 4097],
        )
        groups = report(made)["groups"]
        found = [(group["by"], group["name"], group["pairs"], group["accuracy"]["mean"]) for group in groups]
        assert found == [
            ("all", "all pairs", 5, 0.6),
            ("source", "b", 3, pytest.approx(2 / 3)),
            ("source", "a", 2, 0.5),
            ("length", "1 to 16 tokens", 2, 0.5),
            ("length", "17 to 64 tokens", 2, 1.0),
            ("length", "4097 or more tokens", 1, 0.0),
        ]

    def test_table(self):
        console = Console(file=io.StringIO(), width=1000)
        facts = {"loss": {"name": "simpo", "beta": 2.0, "gamma": 0.5}, "reference": None}
        show(report(evaluation([2.0, -1.0], facts=facts, source=["[a].jsonl", "b.jsonl"])), console)
        lines = [line.split() for line in console.file.getvalue().splitlines()]
        assert lines[0] == "step 4: loss simpo, beta 2.0, gamma 0.5; no reference".split()
        assert lines[1] == "pairs loss accuracy 95 % margin 95 %".split()
        assert lines[2] == "all pairs 2 0.7201 0.500 0.000 to 1.000 +0.5000 -1.0000 to +2.0000".split()
        assert [line[0] for line in lines[3:5]] == ["[a].jsonl", "b.jsonl"]
        assert lines[5][:7] == "longer response 1 to 16 tokens 2".split()
        likely = "likelihood accuracy (chosen more likely than rejected): 0.500 (0.000 to 1.000); per token 0.500 "
        assert lines[6] == f"{likely}(0.000 to 1.000)".split()
        exact = "for accuracies, widened to contain the exact (Clopper-Pearson) intervals; means are weighted"
        assert lines[7] == f"intervals: 2,000 bootstrap resamples of prompts, seed 0; {exact}".split()

    def test_likelihood_accuracies(self):
        """The chosen response is more likely in pair 1, equally likely in pair 3, and less likely in pairs 2 and 4.

        Per token, it is less likely in pair 1, and equally likely in the other three pairs.
        """
        chosen, rejected = [-6.0, -9.0, -4.0, -8.0], [-7.0, -8.0, -4.0, -6.0]
        tokens = {"chosen_tokens": [2, 9, 4, 4], "rejected_tokens": [7, 8, 4, 3]}
        found = evaluation([0.0] * 4, weight=[1, 2, 4, 1], chosen_logps=chosen, rejected_logps=rejected, **tokens)
        group = report(found)["groups"][0]
        assert group["likelihood_accuracy"]["mean"] == pytest.approx((1 * 1 + 2 * 0 + 4 * 0.5 + 1 * 0) / 8)
        # Per token, the pairs (chosen, rejected) are (-3, -1), (-1, -1), (-1, -1) and (-2, -2).
        assert group["likelihood_accuracy_per_token"]["mean"] == pytest.approx((1 * 0 + 2 * 0.5 + 4 * 0.5 + 0.5) / 8)
        shifted = evaluation([1.0] * 4, chosen_logps=[-6.0] * 4, rejected_logps=[-7.0] * 4)
        compared = compare(shifted, found, names=("a", "b"))["likelihood_accuracy"]
        assert (compared["first"], compared["second"]) == (1.0, pytest.approx(1.5 / 4))


class TestCompare:
    names = ("first.parquet", "second.parquet")

    def test_known_differences(self):
        ids = ["a", "b", "c", "d", "e"]
        second = evaluation([-1.0, 1.0, 1.0, 0.0, 2.0], ids=ids)
        first = evaluation([1.0, -1.0, 3.0, 1.0, 5.0], ids=[*ids[:4], "x"], weight=[1, 1, 2, 1, 1])
        found = compare(first, second, names=self.names)
        assert (found["common"], found["only"]) == (4, [1, 1])
        assert (found["won"], found["lost"], found["tied"]) == (2, 1, 1)
        assert found["accuracy"]["mean"] == pytest.approx((1 - 1 + 0 + 0.5) / 5)
        assert found["margin"]["mean"] == pytest.approx((2 - 2 + 2 * 2 + 1) / 5)
        assert found["margin"]["first"] == pytest.approx((1 - 1 + 6 + 1) / 5)
        assert found["margin"]["second"] == pytest.approx((-1 + 1 + 2 + 0) / 5)
        assert found["other_weights"] == 1 and found["other_units"] == []

    def test_file_order_changes_only_the_sign(self):
        rng = np.random.default_rng(0)
        ids = [f"{i}" for i in range(40)]
        one, two = rng.normal(size=40), rng.normal(size=40)
        order = rng.permutation(40)
        straight = compare(evaluation(one, ids=ids), evaluation(two, ids=ids), names=self.names)
        shuffled = evaluation(two[order], ids=[ids[i] for i in order])
        assert compare(evaluation(one, ids=ids), shuffled, names=self.names) == straight
        back = compare(shuffled, evaluation(one, ids=ids), names=self.names)
        assert (back["won"], back["lost"]) == (straight["lost"], straight["won"])
        assert back["margin"]["mean"] == pytest.approx(-straight["margin"]["mean"])

    def test_pairing_removes_shared_variation(self):
        """The values vary widely, but all differences are nearly equal, so the interval must be narrow."""
        rng = np.random.default_rng(1)
        shared = rng.normal(0, 10, size=400)
        gain = rng.normal(0.5, 0.1, size=400)
        found = compare(evaluation(shared + gain), evaluation(shared), names=self.names)["margin"]
        error = gain.std() / math.sqrt(400)
        assert found["low"] == pytest.approx(gain.mean() - 1.96 * error, abs=0.3 * error)
        assert found["high"] == pytest.approx(gain.mean() + 1.96 * error, abs=0.3 * error)

    def test_repeated_pair_is_matched_as_often_as_it_occurs_in_both_evaluations(self):
        first, second = evaluation([1, 1, 1.0], ids=["a", "a", "b"]), evaluation([0, 0, 0.0], ids=["a", "c", "a"])
        found = compare(first, second, names=self.names)
        assert (found["common"], found["only"]) == (2, [1, 1])

    def test_evaluations_without_common_pairs_are_refused(self):
        with pytest.raises(
            DataError, match="first.parquet and second.parquet: have no pair in common; pairs are matched"
        ):
            compare(evaluation([1.0], ids=["a"]), evaluation([1.0], ids=["b"]), names=self.names)

    def test_printed_lines(self):
        console = Console(file=io.StringIO(), width=1000)
        first = evaluation([1.0, 1.0], weight=[1, 2])
        second = evaluation([-1.0, 1.0], facts={"step": 0, "loss": {"name": "ipo"}, "reference": None})
        show_comparison(compare(first, second, names=self.names), console)
        lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
        assert lines == [
            "first: first.parquet (step 4)",
            "second: second.parquet (step 0)",
            "2 pairs in common, 0 only in the first, 0 only in the second",
            "first second difference 95 %",
            "accuracy +1.000 +0.667 +0.333 -0.317 to +1.000",
            "margin +1.0000 +0.3333 +0.6667 +0.0000 to +2.0000",
            "likelihood accuracy +1.000 +0.667 +0.333 -0.317 to +1.000",
            "likelihood accuracy per token +1.000 +0.667 +0.333 -0.317 to +1.000",
            "pairs that the first evaluation ranks better: 1, worse: 0, equally well: 1; sign test of prompts: p = 1",
            "intervals: 2,000 paired resamples of prompts; for accuracies, widened to contain the exact "
            "(Clopper-Pearson) intervals",
            "the two evaluations differ in loss and reference, so their margins have different units",
            "weights differ between the two evaluations for 1 pair; the weights of the first evaluation are used",
        ]
