"""Fault tests: empty, tiny, changing and otherwise unusual data sets, on two data-parallel ranks."""

import json
import os
import time

import numpy as np
import pyarrow as pa
import pytest

from dpo_engine.data.dataset import PairDataset
from support.jobs import run_job
from support.malformed import ALSO_GOOD, GOOD, dump
from support.outcomes import trajectory

LONG = "number " * 100


def pairs(count, **fields):
    return [{**GOOD, "prompt": f"Which of {n}?", **fields} for n in range(count)]


@pytest.fixture
def job(run_yaml, tmp_path):
    """Return a function: ``job(rows)`` trains on the rows with two ranks and a global batch size of 8.

    ``job(None)`` trains on the ``pairs.jsonl`` that already exists.
    """

    def run(rows, *, before=None, epochs=1, verb="train", **data):
        if rows is not None:
            (tmp_path / "pairs.jsonl").write_bytes(b"".join(dump(row) + b"\n" for row in rows))
        sizes = {"train": ["pairs.jsonl"], "validation": None, **data}
        yaml = run_yaml(data=sizes, train={"output_dir": "out", "global_batch_size": 8, "epochs": epochs})

        def start():
            os.chdir(tmp_path)
            if before:
                before()

        return run_job([verb, yaml.name], 2, tmp_path / "log", before=start)

    return run


def steps(tmp_path):
    return [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]


def refused(found, says, code=3):
    (line,) = found.said.splitlines()
    assert found.codes == [code, code] and says in line and len(line) <= 200


def test_empty_file_is_refused(job):
    refused(job([]), "pairs.jsonl: contains no usable pair")


@pytest.mark.slow
def test_file_of_blank_lines_is_refused(job, tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(b"\n \r\n" * 1000)
    refused(job(None), "pairs.jsonl: contains no usable pair")


@pytest.mark.slow
def test_empty_file_next_to_a_good_one_is_refused(job, tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    refused(job(pairs(3), train=["pairs.jsonl", "empty.jsonl"]), "empty.jsonl: contains no usable pair")


@pytest.mark.parametrize("skip", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["error", "skip"])
def test_file_of_bad_lines_is_refused(skip, job):
    found = job([{"prompt": "a"}] * 30, on_bad_line="skip" if skip else "error")
    says = (
        "pairs.jsonl: contains no usable pair; line 1: missing field 'chosen'"
        if skip
        else "pairs.jsonl:1: missing field 'ch"
    )
    refused(found, says)


@pytest.mark.parametrize(
    "count", [pytest.param(3, id="fewer than a global batch"), pytest.param(1, id="one pair", marks=pytest.mark.slow)]
)
def test_fewer_pairs_than_one_global_batch(count, job, tmp_path):
    found = job(pairs(count), epochs=3)
    assert found.codes == [0, 0], found.said
    assert (
        f"data.train has fewer pairs ({count}) than train.global_batch_size=8, so each step uses all" in found.output[0]
    )
    assert steps(tmp_path) == [1, 2, 3]
    first = trajectory(tmp_path / "out")[0]
    assert float.fromhex(first["loss"]) == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.slow
def test_short_last_batch(job, tmp_path):
    found = job(pairs(11), epochs=2)
    assert found.codes == [0, 0] and steps(tmp_path) == [1, 2, 3, 4] and "fewer pairs" not in found.output[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "data", "says"),
    [
        ({"prompt": LONG}, {"truncation": "drop"}, "1 dropped: prompt and response longer than data.max_length"),
        ({"prompt": LONG}, {}, "1 prompt truncated on the left"),
        ({"prompt": LONG}, {"max_prompt_length": 8, "truncation": "drop"}, "1 dropped: prompt longer than data.max_pr"),
        ({"chosen": LONG}, {}, "1 dropped: a response too long for data.max_length"),
    ],
    ids=["drop", "left", "prompt over max_prompt_length", "response over max_length"],
)
def test_pairs_over_the_limit_are_cut_or_dropped(fields, data, says, job, tmp_path):
    rows = [*pairs(8), {**GOOD, **fields}]
    if data.get("max_prompt_length"):
        rows = [{**row, "prompt": "which ?"} for row in rows[:-1]] + rows[-1:]
    found = job(rows, **data)
    assert found.codes == [0, 0], found.said
    assert says in found.output[0] and steps(tmp_path)


@pytest.mark.slow
def test_data_without_a_fitting_pair_is_refused(job):
    found = job(pairs(4, chosen=LONG))
    refused(found, "pairs.jsonl: contains no usable pair; 4 dropped: a response too long for data.max_length")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"chosen": "</s>"}, "chosen has no tokens"),
        ({"chosen": "5.", "rejected": "5."}, "chosen and rejected are identical"),
        ({"chosen": ""}, "chosen is empty"),
    ],
    ids=["no token to learn from", "chosen equals rejected", "empty chosen"],
)
def test_pair_without_a_preference_is_refused(fields, says, job, tmp_path):
    rows = [*pairs(4), {**GOOD, **fields}]
    template = tmp_path / "turns.jinja"
    template.write_text("{{ messages[0].content }}{% if messages[1] %}{{ messages[1].content }}{% endif %}")
    if fields["chosen"] == "</s>":  # `</s>` becomes the EOS token only in a rendered conversation
        talk = [{"role": "user", "content": "Which?"}]
        rows = [
            {"prompt": talk, **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}}
            for row in rows
        ]
    refused(job(rows, chat_template="turns.jinja"), f"pairs.jsonl:5: {says}")


@pytest.mark.slow
def test_duplicate_rows_are_counted_and_kept(job, tmp_path):
    found = job([*pairs(4), *pairs(3)])
    assert found.codes == [0, 0] and "7 pairs from 7 records" in found.output[0]
    assert "3 duplicate pairs (kept)" in found.output[0]


class TestAFileThatChanges:
    @pytest.mark.slow
    def test_between_start_and_resume(self, job, tmp_path):
        assert job(pairs(16)).codes == [0, 0]
        refused(job(pairs(16, chosen="Neither.")), "train_data.digest was", code=4)

    @pytest.mark.parametrize("how", ["appended", pytest.param("replaced", marks=pytest.mark.slow)])
    def test_while_it_is_tokenized(self, how, job, tmp_path):
        def change():
            from dpo_engine.data import encode_block

            encode = encode_block.encode_pairs

            def slow(*arguments, **options):
                file = tmp_path / "pairs.jsonl"
                if how == "appended":
                    with file.open("ab") as stream:
                        stream.write(dump(ALSO_GOOD) + b"\n")
                else:  # replace the content, but keep size and modification time, as rsync can do
                    state = file.stat()
                    other = tmp_path / "other"
                    other.write_bytes(file.read_bytes().replace(b"Which", b"Whose"))
                    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
                    os.replace(other, file)
                return encode(*arguments, **options)

            encode_block.encode_pairs = slow

        refused(job(pairs(20), before=change), "pairs.jsonl: changed while it was being read; start again")
        assert not list((tmp_path / "out/cache").glob("*"))

    @pytest.mark.slow
    def test_removed_after_the_first_rank_read_it(self, job, tmp_path):
        def vanish():
            from dpo_engine.training import run_data

            build = run_data.build_dataset

            def late(*arguments, **named):
                if os.environ["RANK"] == "1":
                    (tmp_path / "pairs.jsonl").rename(tmp_path / "gone.jsonl")
                return build(*arguments, **named)

            run_data.build_dataset = late

        refused(job(pairs(20), before=vanish), "pairs.jsonl: no such file")


class TestADamagedCache:
    def damage(self, tmp_path, of, by):
        (cache,) = (tmp_path / "out/cache").glob("*.arrow")
        content = bytearray(cache.read_bytes())
        at = content.index(of)
        content[at : at + len(by)] = by
        cache.write_bytes(content)
        return cache

    def test_changed_weight_is_rebuilt(self, job, tmp_path):
        assert job(pairs(4, weight=0.625)).codes == [0, 0]
        before = trajectory(tmp_path / "out")
        cache = self.damage(tmp_path, np.float64(0.625).tobytes(), np.float64(0.5).tobytes())
        found = job(None, train=["pairs.jsonl"])
        assert found.codes == [0, 0] and "from the cache" not in found.output[0], found.said
        assert PairDataset(cache).weights.tolist() == [0.625] * 4 and trajectory(tmp_path / "out") == before

    @pytest.mark.slow
    def test_changed_id_is_rebuilt(self, job, tmp_path):
        assert job(pairs(4)).codes == [0, 0]
        (cache,) = (tmp_path / "out/cache").glob("*.arrow")
        expected = [pair.chosen.tolist() for pair in PairDataset(cache)]
        ids = PairDataset(cache)[2].chosen.astype("<i4").tobytes()
        self.damage(tmp_path, ids, bytes([ids[0] ^ 1]))
        found = job(pairs(4))
        assert found.codes == [0, 0] and "from the cache" not in found.output[0]
        assert [pair.chosen.tolist() for pair in PairDataset(cache)] == expected

    @pytest.mark.slow
    def test_offsets_beyond_the_end_are_rebuilt(self, job, tmp_path):
        assert job(pairs(4)).codes == [0, 0]
        (cache,) = (tmp_path / "out/cache").glob("*.arrow")
        with pa.memory_map(str(cache)) as source:
            offsets = pa.ipc.open_file(source).get_batch(0)["prompt"].offsets.to_numpy().astype("<i8").tobytes()
        started = time.monotonic()
        self.damage(tmp_path, offsets[8:], np.int64(2**40).tobytes())
        found = job(None)
        assert found.codes == [0, 0] and "from the cache" not in found.output[0] and time.monotonic() - started < 30
