"""Tests of the token-pair cache (its key, pairs, digests and files), of the validation split, and of the report.

The files of the cache are also tested after a kill, with damage, and on a full disk.
"""

import os
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from dpo_engine.data import dataset as dataset_module
from dpo_engine.data import encode_block, pair_writer, tokenize
from dpo_engine.data.dataset import PairDataset, TokenPair
from dpo_engine.data.formats import FORMATS, Pair
from dpo_engine.data.pair_writer import PairWriter
from dpo_engine.data.tokenize import split_validation
from dpo_engine.data.tokenizer import load_tokenizer
from dpo_engine.errors import ConfigError, DataError
from support.built import ids, write
from support.malformed import ALSO_GOOD, GOOD, dump
from support.tiny_tokenizers import CHATML, byte_level


class TestCache:
    def test_pairs_are_tokenized_once(self, build, tmp_path, monkeypatch):
        first, report = build([GOOD, ALSO_GOOD])
        assert not report.cached
        monkeypatch.setattr(encode_block, "encode_pairs", None)
        second, again = build([GOOD, ALSO_GOOD])
        assert again.cached and "from the cache" in str(again) and again.lengths == report.lengths
        assert first.digest == second.digest and [ids(a) == ids(b) for a, b in zip(first, second, strict=True)]
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_key_depends_on_contents_and_settings(self, build, tmp_path, tokenizer_path):
        build([GOOD])
        (tmp_path / "moved.jsonl").write_bytes((tmp_path / "0.jsonl").read_bytes())
        assert build(tmp_path / "moved.jsonl")[1].cached
        assert build({"path": str(tmp_path / "moved.jsonl"), "weight": 2.0})[1].cached
        assert build([GOOD], seed=7, shuffle=False)[1].cached
        other = load_tokenizer(byte_level(tmp_path / "t", lowercase=True))
        template = tmp_path / "t.jinja"
        template.write_text(CHATML + " ")
        for case in [
            lambda: build([ALSO_GOOD]),
            lambda: build([GOOD], [ALSO_GOOD]),
            lambda: build([GOOD], max_length=100),
            lambda: build([GOOD], max_prompt_length=100),
            lambda: build([GOOD], truncation="drop"),
            lambda: build([GOOD], add_eos=False),
            lambda: build([GOOD], on_bad_line="skip"),
            lambda: build({"path": str(write(tmp_path / "0.jsonl", [GOOD])), "format": "text"}),
            lambda: build([GOOD], tokenizer=other),
            lambda: build([GOOD], tokenizer=load_tokenizer(tokenizer_path, template)),
        ]:
            assert not case()[1].cached
            assert case()[1].cached

    def test_changed_plugin_format_invalidates_the_cache(self, build, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        source = "from dpo_engine.data.formats import Pair\n\ndef mine(row):\n    return Pair('a', 'b', {!r})\n"
        (tmp_path / "fork_format.py").write_text(source.format("c"))
        import fork_format

        monkeypatch.setitem(FORMATS, "mine", fork_format.mine)
        path = {"path": str(write(tmp_path / "rows.jsonl", [{}])), "format": "mine"}
        build(path)
        assert build(path)[1].cached
        (tmp_path / "fork_format.py").write_text(source.format("d"))
        assert not build(path)[1].cached

    def test_records_left_out_by_a_format_are_counted(self, build, tmp_path, monkeypatch):
        monkeypatch.setitem(FORMATS, "odd", lambda row: Pair("a", "b", "c") if row["n"] % 2 else None)
        path = {"path": str(write(tmp_path / "rows.jsonl", [{"n": n} for n in range(5)])), "format": "odd"}
        report = build(path)[1]
        assert (report.read, report.kept, report.dropped) == (5, 2, {"record left out by the data format": 3})

    def test_killed_build_leaves_no_usable_cache(self, build, tmp_path, monkeypatch):
        monkeypatch.setattr(pair_writer, "ROWS", 2)
        rows = [{**GOOD, "prompt": f"question {n}"} for n in range(9)]
        expected, _ = build(rows)
        (path,) = (tmp_path / "cache").iterdir()
        path.unlink()
        child = os.fork()
        if child == 0:
            writer = PairWriter(path).__enter__()
            for pair in (expected[n] for n in range(7)):
                writer.add(pair)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        (left,) = (tmp_path / "cache").iterdir()
        assert left.suffix == ".tmp"
        dataset, report = build(rows)
        assert dataset.digest == expected.digest and not report.cached and left.exists()
        hours_ago = time.time() - 7200
        os.utime(left, (hours_ago, hours_ago))
        path.unlink()
        build(rows)
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".arrow"]

    def test_damaged_cache_is_rebuilt(self, build, tmp_path):
        expected = build([GOOD])[0].digest
        (path,) = (tmp_path / "cache").iterdir()
        for content in (path.read_bytes()[:-100], b"", b"ARROW1 or not"):
            path.unlink()
            path.write_bytes(content)
            dataset, report = build([GOOD])
            assert dataset.digest == expected and not report.cached

    def test_unwritable_cache_directory_is_refused(self, build, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"data\.cache_dir=.*file: cannot write there"):
            build([GOOD], cache="file")

        def full(fd):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pair_writer.os, "fsync", full)
        with pytest.raises(ConfigError, match=r"cannot write there \(No space left on device\); use a writable"):
            build([GOOD])
        assert not list((tmp_path / "cache").iterdir())

    def test_file_that_changes_while_read_is_refused(self, build, tmp_path, monkeypatch):
        encode = encode_block.encode_pairs

        def grow(*args, **kwargs):
            with (tmp_path / "0.jsonl").open("ab") as stream:
                stream.write(dump(ALSO_GOOD) + b"\n")
            return encode(*args, **kwargs)

        monkeypatch.setattr(encode_block, "encode_pairs", grow)
        with pytest.raises(DataError, match=r"0\.jsonl: changed while it was being read"):
            build([GOOD])
        assert not list((tmp_path / "cache").iterdir())

    def test_missing_file_is_refused(self, build, tmp_path):
        with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
            build(tmp_path / "nowhere.jsonl")

    def test_memory_is_bounded(self, build, tmp_path, monkeypatch):
        monkeypatch.setattr(tokenize, "CHUNK_PAIRS", 8)
        monkeypatch.setattr(pair_writer, "ROWS", 8)

        def peak(count):
            rows = ({**GOOD, "prompt": f"{n} " + "number " * 500} for n in range(count))
            path = write(tmp_path / f"{count}.jsonl", rows)
            tracemalloc.start()
            try:
                build(path, max_length=50_000)
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

        peak(8)  # the first build also loads modules, which the peaks below must not include
        assert peak(400) < 1.2 * peak(100)


class TestDataset:
    def test_digests_depend_on_the_contents(self, build):
        rows = [GOOD, ALSO_GOOD, {**GOOD, "weight": 3.0}]
        a, b = build(rows)[0], build(rows[::-1])[0]
        assert [pair.digest for pair in a] == [pair.digest for pair in b][::-1]
        assert a[0].digest == a[2].digest != a[1].digest and len(a[0].digest) == 32
        assert a.digest != b.digest and a.digest != build([GOOD, ALSO_GOOD, GOOD])[0].digest
        assert build([GOOD, ALSO_GOOD])[0].digest != build([GOOD], [ALSO_GOOD])[0].digest

    def test_digest_includes_the_boundaries(self):
        splits = [([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1], [2], [3, 4])]
        digests = {dataset_module.pair_digest(*map(np.array, parts)) for parts in splits}
        assert len(digests) == 3

    def test_digests_of_prompts_and_responses(self, build):
        pairs = build([GOOD, ALSO_GOOD, {**GOOD, "chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}])[0]
        order = np.array([2, 0, 1, 0])
        digests = dataset_module.part_digests(pairs, order)
        assert digests.shape == (4, 3) and digests.dtype == np.int64
        parts = [tuple(part) for i in order for part in ids(pairs[i])]
        expected = np.array([[a == b for b in parts] for a in parts])
        assert (np.equal.outer(digests.ravel(), digests.ravel()) == expected).all()
        assert dataset_module.part_digests(pairs, order[:0]).shape == (0, 3)
        view = pairs.subset(np.array([1, 2]))
        assert (dataset_module.part_digests(view, np.array([1])) == digests[:1]).all()

    def test_pairs_spread_over_many_record_batches(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pair_writer, "ROWS", 7)
        generator = np.random.default_rng(0)
        expected = []
        with PairWriter(tmp_path / "pairs.arrow") as writer:
            for n in range(50):
                parts = [generator.integers(0, 9, size=generator.integers(1, 5), dtype=np.int32) for _ in range(3)]
                digest = dataset_module.pair_digest(*parts).hex()
                expected.append(
                    TokenPair(*parts, float(n + 1), float(-n), digest, n % 3, float(n), 0.5, -float(n), -1.5, n + 7)
                )
                writer.add(expected[-1])
            writer.finish({"note": "made"})
        dataset = PairDataset(tmp_path / "pairs.arrow", ["a", "b", "c"])
        assert dataset.facts == {"note": "made"} and dataset.sources == ["a", "b", "c"]
        view = dataset.subset(np.arange(40)).subset(np.array([39, 3]))
        for pairs, wanted in [(dataset, expected), (view, [expected[39], expected[3]])]:
            assert len(pairs) == len(wanted)
            for place, (pair, other) in enumerate(zip(pairs, wanted, strict=True)):
                assert ids(pair) == ids(other) and pair[3:] == other[3:]
                assert pairs.lengths[place].tolist() == list(map(len, ids(other)))
            assert pairs.weights.tolist() == [pair.weight for pair in wanted]
            assert [pairs.place(i) for i in range(len(pairs))] == [f"{'abc'[p.source]}:{p.line}" for p in wanted]
            assert pairs.source_ids.tolist() == [pair.source for pair in wanted]
            assert pairs.digests.tobytes().hex() == "".join(pair.digest for pair in wanted)
        assert not dataset[0].prompt.flags.owndata and not dataset[0].prompt.flags.writeable
        for index in (-1, 50):
            with pytest.raises(IndexError, match=f"pair {index} is out of range; there are 50 pairs"):
                dataset[index]

    def test_validation_split_holds_out_whole_prompts(self, build):
        rows = [{**GOOD, "prompt": f"number {n // 3}", "chosen": f"yes {n}"} for n in range(600)]
        dataset, _ = build(rows)
        train, held = split_validation(dataset, 0.2)
        assert len(train) + len(held) == 600 and 80 < len(held) < 160
        prompts = [{tuple(ids(pair)[0]) for pair in side} for side in (train, held)]
        assert not prompts[0] & prompts[1]
        assert len({train.digest, held.digest, dataset.digest}) == 3
        # Whether a pair is held out does not depend on the other pairs.
        fewer = split_validation(build(rows[100:])[0], 0.2)[1]
        assert {pair.digest for pair in fewer} == {pair.digest for pair in held} - {
            pair.digest for pair in build(rows[:100])[0]
        }
        with pytest.raises(ConfigError, match=r"data\.validation_fraction=0\.001: holds out 0 of 3 pairs"):
            split_validation(build(rows[:3])[0], 0.001)

    def test_report_is_a_few_lines(self, build):
        rows = [{**GOOD, "prompt": "number" + " number" * n} for n in range(20)]
        report = build(rows, [ALSO_GOOD])[1]
        lines = str(report).splitlines()
        assert lines[0] == "21 pairs from 21 records" and len(lines) == 4
        assert lines[1].endswith("0.jsonl: 20, " + report.sources[1][0] + ": 1")
        assert lines[3].startswith("  tokens (median / p95 / max): prompt ") and report.lengths["row"][2] > 20

    def test_a_flipped_bit_in_a_cache_is_detected_or_changes_no_pair(self, build, tmp_path):
        expected = build([GOOD, {**ALSO_GOOD, "weight": 2.0}])[0]
        (path,) = (tmp_path / "cache").iterdir()
        whole, rows = path.read_bytes(), [(ids(pair), repr(pair[3:])) for pair in expected]
        for place in range(0, len(whole), 7):
            damaged = bytearray(whole)
            damaged[place] ^= 0x10
            path.unlink()
            path.write_bytes(damaged)
            try:
                found = PairDataset(path)
            except (pa.ArrowException, OSError, LookupError, ValueError):
                continue
            assert [(ids(pair), repr(pair[3:])) for pair in found] == rows
            assert found.prompt_keys.tolist() == expected.prompt_keys.tolist() and found.digest == expected.digest
