"""Records to cached token pairs: ids against the library's own, limits, counts, the cache, and real data."""

import collections
import gzip
import itertools
import json
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import transformers
from malformed import ALSO_GOOD, GOOD, KINDS, LIMIT, RIGHT, SYSTEM, USER, WRONG, between, dump
from tiny_tokenizers import CHATML, TURNS, byte_level, piece_model

from dpo_engine.config import Config
from dpo_engine.data import dataset as dataset_module
from dpo_engine.data import records, tokenize
from dpo_engine.data.dataset import PairDataset, PairWriter, TokenPair
from dpo_engine.data.encode import LONG_PAIR, LONG_PROMPT, LONG_RESPONSE
from dpo_engine.data.formats import FORMATS, Pair, read_pairs
from dpo_engine.data.tokenize import build_dataset, split_validation
from dpo_engine.data.tokenizer import load_tokenizer
from dpo_engine.errors import ConfigError, DataError

REAL = Path(os.environ.get("DPO_TEST_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
TALK = {"prompt": [SYSTEM, USER], "chosen": [RIGHT], "rejected": [WRONG]}


def data_config(*paths, **settings):
    train = [path if isinstance(path, dict) else str(path) for path in paths]
    return Config.parse(
        {"model": {"path": "m"}, "train": {"output_dir": "o"}, "data": {"train": train, **settings}}
    ).data


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("tokenizer"), bos=True)


@pytest.fixture
def build(tmp_path, tokenizer_path):
    """`build(rows or path, ...)` gives data set and report; `tokenizer=` replaces the byte-level one."""

    def run(*sources, tokenizer=None, cache="cache", **settings):
        sources = [
            write(tmp_path / f"{place}.jsonl", source) if isinstance(source, list) else source
            for place, source in enumerate(sources)
        ]
        config = data_config(*sources, **settings)
        tokenizer = load_tokenizer(tokenizer_path) if tokenizer is None else tokenizer
        return build_dataset(config.train, tokenizer, config, tmp_path / cache)

    return run


def ids(pair):
    return [part.tolist() for part in pair[:3]]


class TestIds:
    def test_text(self, build, tokenizer_path):
        library = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
        dataset, report = build([GOOD, {**ALSO_GOOD, "weight": 2, "margin": 0.25}])
        for pair, row in zip(dataset, [GOOD, ALSO_GOOD], strict=True):
            expected = [
                library(row["prompt"])["input_ids"],  # with the BOS
                library(row["chosen"] + "<|im_end|>", add_special_tokens=False)["input_ids"],
                library(row["rejected"] + "<|im_end|>", add_special_tokens=False)["input_ids"],
            ]
            assert ids(pair) == expected
        assert (dataset[1].weight, dataset[1].margin, dataset[1].source) == (2.0, 0.25, 0)
        assert dataset[0].weight == 1.0 and np.isnan(dataset[0].margin)
        assert dataset.lengths.tolist() == [list(map(len, ids(pair))) for pair in dataset]
        assert dataset.weights.tolist() == [1.0, 2.0] and report.kept == report.read == 2

    def test_conversation(self, build, tokenizer_path):
        library = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
        dataset, report = build([TALK])
        prompt, chosen, rejected = ids(dataset[0])
        rendered = {"tokenize": True, "return_dict": False}
        assert prompt == library.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, **rendered)
        for response, message in ((chosen, RIGHT), (rejected, WRONG)):
            # The template ends with a line feed behind the EOS, which no model is asked to write.
            expected = library.apply_chat_template([SYSTEM, USER, message], **rendered)[:-1]
            assert prompt + response == expected
            assert response[-1] == library.eos_token_id and response.count(library.eos_token_id) == 1
        assert report.merged == 0

    def test_eos_once(self, build, tokenizer_path):
        eos = load_tokenizer(tokenizer_path).eos_id
        rows = [{**GOOD, "chosen": "yes<|im_end|>", "rejected": "no<|im_end|>\n"}]
        dataset, _ = build(rows)
        for response in ids(dataset[0])[1:]:
            assert response.count(eos) == 1 and response[-1] == eos
        dataset, _ = build([GOOD], add_eos=False)
        assert all(eos not in part for part in ids(dataset[0]))

    def test_eos_behind_a_template_without_one(self, build, tokenizer_path, tmp_path):
        (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
        tokenizer = load_tokenizer(tokenizer_path, tmp_path / "t.jinja")
        dataset, _ = build([TALK], tokenizer=tokenizer)
        assert tokenizer.decode(dataset[0].prompt) == "[system]Be brief.[user]Which is larger?"
        assert tokenizer.decode(dataset[0].chosen) == "[assistant]The second.<|im_end|>"

    def test_a_prompt_that_is_no_prefix_is_shortened(self, build, tokenizer_path, tmp_path):
        # A reasoning template: the generation prompt opens a thought that the finished conversation does not have.
        (tmp_path / "t.jinja").write_text(CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
        tokenizer = load_tokenizer(tokenizer_path, tmp_path / "t.jinja")
        dataset, report = build([TALK], tokenizer=tokenizer)
        assert tokenizer.decode(dataset[0].prompt).endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(dataset[0].chosen) == "The second.<|im_end|>"
        assert report.merged == 1 and "1 prompts shortened to the tokens that both" in str(report)

    def test_sentencepiece(self, build, tmp_path):
        (tmp_path / "t.jinja").write_text(TURNS)
        tokenizer = load_tokenizer(piece_model(tmp_path / "t.model"), tmp_path / "t.jinja")
        dataset, _ = build([GOOD], [TALK], tokenizer=tokenizer)
        text, talk = dataset
        expected = [tokenizer.encode(GOOD[name]) for name in ("prompt", "chosen", "rejected")]
        assert ids(text) == [expected[0], expected[1] + [2], expected[2] + [2]]
        whole = tokenizer.encode("system: Be brief. user: Which is larger? assistant: The second. ")
        prompt, chosen, _ = ids(talk)
        assert prompt + chosen == [1, *whole, 2] and talk.source == 1


class TestLimits:
    """Prompt 30 tokens with BOS, responses 10 and 20 with EOS: one token per letter."""

    ROW = {"prompt": "X" * 28 + "Y", "chosen": "B" * 9, "rejected": "C" * 19}

    @pytest.mark.parametrize(
        ("settings", "length"),
        [
            ({"max_length": 50}, 30),
            ({"max_length": 49}, 29),
            ({"max_length": 22}, 2),
            ({"max_length": 50, "max_prompt_length": 12}, 12),
            ({"max_length": 25, "max_prompt_length": 12}, 5),
        ],
    )
    def test_the_left_of_the_prompt_goes_first(self, settings, length, build, tokenizer_path):
        tokenizer = load_tokenizer(tokenizer_path)
        dataset, report = build([self.ROW], **settings)
        prompt, chosen, rejected = ids(dataset[0])
        assert prompt == tokenizer.prefix + tokenizer.encode("X" * (length - 2) + "Y")
        assert (len(chosen), len(rejected)) == (10, 20)
        assert report.cut == (length < 30) and ("1 prompts cut on the left" in str(report)) == (length < 30)

    def test_one_place_for_the_prompt_is_its_last_token(self, build, tokenizer_path):
        dataset, _ = build([self.ROW], max_length=21)
        assert load_tokenizer(tokenizer_path).decode(dataset[0].prompt) == "Y"

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"max_length": 20}, LONG_RESPONSE),
            ({"max_length": 49, "truncation": "drop"}, LONG_PAIR),
            ({"max_length": 60, "max_prompt_length": 29, "truncation": "drop"}, LONG_PROMPT),
            ({"max_length": 19, "truncation": "drop"}, LONG_RESPONSE),
        ],
    )
    def test_dropped_and_counted(self, settings, reason, build):
        dataset, report = build([self.ROW, {"prompt": "a", "chosen": "b", "rejected": "c"}], **settings)
        assert len(dataset) == report.kept == 1 and report.read == 2
        assert report.dropped == {reason: 1} and f"  1 dropped: {reason}" in str(report)
        assert dataset.lengths.sum(1).max() < 20

    def test_nothing_left(self, build):
        with pytest.raises(DataError, match=f"no pair is left of 1 records; 1 dropped: {LONG_RESPONSE}"):
            build([self.ROW], max_length=4)


class TestBadLines:
    @pytest.mark.parametrize("bad", KINDS, ids=lambda bad: bad.kind)
    def test_every_kind(self, bad, build, tmp_path, monkeypatch):
        if bad.kind == "endless line":
            monkeypatch.setattr(records, "MAX_LINE_BYTES", LIMIT)
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(bad.content)
        if bad.says is not None:
            with pytest.raises(DataError) as error:
                build(path)
            assert str(error.value).startswith(f"{path}:{bad.line}: ") and bad.says in str(error.value)
            assert not list((tmp_path / "cache").iterdir())  # nothing half-written
        if bad.kept:
            dataset, report = build(path, on_bad_line="skip")
            assert len(dataset) == bad.kept and report.bad == (bad.says is not None)
            again = build(path, on_bad_line="skip")[1]
            assert again.cached and again.bad_lines == report.bad_lines
        else:
            with pytest.raises(DataError, match="no pair is left of"):
                build(path, on_bad_line="skip")

    def test_equal_after_tokenisation(self, build, tmp_path):
        tokenizer = load_tokenizer(byte_level(tmp_path / "lower", lowercase=True))
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(between(dump({**GOOD, "chosen": "The Second", "rejected": "the second"})))
        with pytest.raises(DataError, match=r"pairs\.jsonl:2: chosen and rejected are the same tokens"):
            build(path, tokenizer=tokenizer)
        _, report = build(path, tokenizer=tokenizer, on_bad_line="skip")
        assert (report.read, report.kept, report.bad) == (3, 2, 1)
        assert "  1 bad lines skipped:" in str(report) and f"{path}:2: " in str(report)

    def test_a_template_that_refuses(self, build, tokenizer_path, tmp_path):
        (tmp_path / "t.jinja").write_text(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
        )
        tokenizer = load_tokenizer(tokenizer_path, tmp_path / "t.jinja")
        with pytest.raises(DataError, match=r"0\.jsonl:1: the chat template refuses it: no system turn"):
            build([TALK], tokenizer=tokenizer)

    def test_a_template_with_nothing_in_common(self, build, tokenizer_path, tmp_path):
        (tmp_path / "t.jinja").write_text("{{ messages | length }}" + CHATML)
        with pytest.raises(DataError, match="renders prompt and conversation without a common start"):
            build([TALK], tokenizer=load_tokenizer(tokenizer_path, tmp_path / "t.jinja"))

    def test_no_tokens(self, build, tmp_path):
        tokenizer = load_tokenizer(byte_level(tmp_path / "t"))
        with pytest.raises(DataError, match="0.jsonl:1: chosen has no tokens"):
            build([{**GOOD, "chosen": "<|im_end|>"}], tokenizer=tokenizer)

    def test_conversations_need_a_template(self, build, tmp_path):
        tokenizer = load_tokenizer(byte_level(tmp_path / "t", template=None))
        with pytest.raises(ConfigError, match=r"data\.chat_template=null"):
            build([TALK], tokenizer=tokenizer)

    def test_an_eos_is_needed(self, build, tmp_path):
        tokenizer = load_tokenizer(byte_level(tmp_path / "t", eos=False))
        with pytest.raises(ConfigError, match=r"data\.add_eos=true: the tokenizer of .* has no EOS"):
            build([GOOD], tokenizer=tokenizer)
        assert len(build([GOOD], tokenizer=tokenizer, add_eos=False)[0]) == 1


class TestCache:
    def test_tokenised_once(self, build, tmp_path, monkeypatch):
        first, report = build([GOOD, ALSO_GOOD])
        assert not report.cached
        monkeypatch.setattr(tokenize, "encode_pairs", None)
        second, again = build([GOOD, ALSO_GOOD])
        assert again.cached and "from the cache" in str(again) and again.lengths == report.lengths
        assert first.digest == second.digest and [ids(a) == ids(b) for a, b in zip(first, second, strict=True)]
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_the_key_follows_content_and_settings(self, build, tmp_path, tokenizer_path):
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

    def test_a_format_of_a_fork_that_changed(self, build, tmp_path, monkeypatch):
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

    def test_what_a_format_leaves_out_is_counted(self, build, tmp_path, monkeypatch):
        monkeypatch.setitem(FORMATS, "odd", lambda row: Pair("a", "b", "c") if row["n"] % 2 else None)
        path = {"path": str(write(tmp_path / "rows.jsonl", [{"n": n} for n in range(5)])), "format": "odd"}
        report = build(path)[1]
        assert (report.read, report.kept, report.dropped) == (5, 2, {"left out by the data format": 3})

    def test_a_killed_build_leaves_nothing_that_is_taken_for_a_cache(self, build, tmp_path, monkeypatch):
        monkeypatch.setattr(dataset_module, "ROWS", 2)
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

    def test_a_damaged_cache_is_made_again(self, build, tmp_path):
        expected = build([GOOD])[0].digest
        (path,) = (tmp_path / "cache").iterdir()
        for content in (path.read_bytes()[:-100], b"", b"ARROW1 or not"):
            path.unlink()
            path.write_bytes(content)
            dataset, report = build([GOOD])
            assert dataset.digest == expected and not report.cached

    def test_a_full_or_locked_disk(self, build, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"data\.cache_dir=.*file: cannot be written to"):
            build([GOOD], cache="file")

        def full(fd):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(dataset_module.os, "fsync", full)
        with pytest.raises(ConfigError, match=r"cannot be written to \(No space left on device\); give another"):
            build([GOOD])
        assert not list((tmp_path / "cache").iterdir())

    def test_a_file_that_grows_while_it_is_read(self, build, tmp_path, monkeypatch):
        encode = tokenize.encode_pairs

        def grow(*args, **kwargs):
            with (tmp_path / "0.jsonl").open("ab") as stream:
                stream.write(dump(ALSO_GOOD) + b"\n")
            return encode(*args, **kwargs)

        monkeypatch.setattr(tokenize, "encode_pairs", grow)
        with pytest.raises(DataError, match=r"0\.jsonl: changed while it was read"):
            build([GOOD])
        assert not list((tmp_path / "cache").iterdir())

    def test_absent_files(self, build, tmp_path):
        with pytest.raises(DataError, match=r"nowhere\.jsonl: No such file"):
            build(tmp_path / "nowhere.jsonl")

    def test_memory_is_bounded(self, build, tmp_path, monkeypatch):
        monkeypatch.setattr(tokenize, "CHUNK_PAIRS", 8)
        monkeypatch.setattr(dataset_module, "ROWS", 8)

        def peak(count):
            rows = ({**GOOD, "prompt": f"{n} " + "number " * 2000} for n in range(count))
            path = write(tmp_path / f"{count}.jsonl", rows)
            tracemalloc.start()
            try:
                build(path, max_length=50_000)
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

        peak(8)  # what is loaded once is not counted
        assert peak(400) < 1.2 * peak(100)


class TestDataset:
    def test_digests_are_of_the_content(self, build):
        rows = [GOOD, ALSO_GOOD, {**GOOD, "weight": 3.0}]
        a, b = build(rows)[0], build(rows[::-1])[0]
        assert [pair.digest for pair in a] == [pair.digest for pair in b][::-1]
        assert a[0].digest == a[2].digest != a[1].digest and len(a[0].digest) == 32
        assert a.digest != b.digest and a.digest != build([GOOD, ALSO_GOOD, GOOD])[0].digest
        assert build([GOOD, ALSO_GOOD])[0].digest != build([GOOD], [ALSO_GOOD])[0].digest

    def test_the_boundary_is_part_of_a_digest(self):
        splits = [([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1], [2], [3, 4])]
        digests = {dataset_module.pair_digest(*map(np.array, parts)) for parts in splits}
        assert len(digests) == 3

    def test_many_pairs_over_many_batches_of_the_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dataset_module, "ROWS", 7)
        generator = np.random.default_rng(0)
        expected = []
        with PairWriter(tmp_path / "pairs.arrow") as writer:
            for n in range(50):
                parts = [generator.integers(0, 9, size=generator.integers(1, 5), dtype=np.int32) for _ in range(3)]
                digest = dataset_module.pair_digest(*parts).hex()
                expected.append(TokenPair(*parts, float(n + 1), float(-n), digest, n % 3))
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
            assert pairs.source_ids.tolist() == [pair.source for pair in wanted]
        assert not dataset[0].prompt.flags.owndata and not dataset[0].prompt.flags.writeable
        for index in (-1, 50):
            with pytest.raises(IndexError, match=f"pair {index} of 50"):
                dataset[index]

    def test_held_out_pairs(self, build):
        rows = [{**GOOD, "prompt": f"number {n // 3}", "chosen": f"yes {n}"} for n in range(600)]
        dataset, _ = build(rows)
        train, held = split_validation(dataset, 0.2)
        assert len(train) + len(held) == 600 and 80 < len(held) < 160
        prompts = [{tuple(ids(pair)[0]) for pair in side} for side in (train, held)]
        assert not prompts[0] & prompts[1]
        assert len({train.digest, held.digest, dataset.digest}) == 3
        # Where a pair goes does not depend on the others.
        fewer = split_validation(build(rows[100:])[0], 0.2)[1]
        assert {pair.digest for pair in fewer} == {pair.digest for pair in held} - {
            pair.digest for pair in build(rows[:100])[0]
        }
        with pytest.raises(ConfigError, match=r"data\.validation_fraction=0\.001: holds out 0 of 3 pairs"):
            split_validation(build(rows[:3])[0], 0.001)

    def test_the_report_is_a_few_lines(self, build):
        rows = [{**GOOD, "prompt": "number " * (n + 1)} for n in range(20)]
        report = build(rows, [ALSO_GOOD])[1]
        lines = str(report).splitlines()
        assert lines[0] == "21 pairs of 21 records" and len(lines) == 3
        assert lines[1].endswith("0.jsonl: 20, " + report.sources[1][0] + ": 1")
        assert lines[2].startswith("  tokens (median / p95 / max): prompt ") and report.lengths["row"][2] > 20


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real preference data at {REAL}; set DPO_TEST_DATA")
class TestRealData:
    @pytest.mark.parametrize(
        ("name", "count", "repeated"), [("hh_harmless/harmless-base", 2000, 2), ("qa_feedback/qa-feedback", 2366, 6)]
    )
    def test_every_record_is_read(self, name, count, repeated):
        text = [pair for _, pair in read_pairs(REAL / f"{name}.train.text.jsonl.gz")]
        talk = [pair for _, pair in read_pairs(REAL / f"{name}.train.messages.jsonl.gz")]
        assert len(text) == len(talk) == count
        assert [pair.chosen.strip() for pair in text] == [pair.chosen for pair in talk]
        assert {pair.prompt[-1]["role"] for pair in talk} == {"user"}
        assert max(collections.Counter(pair.prompt for pair in text).values()) == repeated

    @pytest.mark.parametrize("name", ["hh_harmless/harmless-base", "qa_feedback/qa-feedback"])
    def test_text_and_messages(self, name, build, tmp_path):
        tokenizer = load_tokenizer(byte_level(tmp_path / "t"))
        data = {}
        for form in ("text", "messages"):
            with gzip.open(REAL / f"{name}.train.{form}.jsonl.gz") as stream:
                (tmp_path / f"{form}.jsonl").write_bytes(b"".join(itertools.islice(stream, 200)))
            data[form], report = build(tmp_path / f"{form}.jsonl", tokenizer=tokenizer, max_length=100_000)
            assert (report.read, report.kept, report.merged) == (200, 200, 0)
        for text, talk in zip(data["text"], data["messages"], strict=True):
            a, b = (tokenizer.decode(pair.chosen) for pair in (text, talk))
            assert a.strip() == b and a.endswith("<|im_end|>")
            assert tokenizer.decode(text.prompt).endswith("\n\nAssistant:")
            assert tokenizer.decode(talk.prompt).endswith("<|im_start|>assistant\n")
        _, report = build(tmp_path / "text.jsonl", tokenizer=tokenizer, max_length=700, max_prompt_length=600)
        assert report.kept + sum(report.dropped.values()) == 200 and report.lengths["row"][2] <= 700 and report.cut
