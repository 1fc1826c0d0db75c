"""Tests of tokenizing records.

Some tests compare token ids with those of transformers. Others cover length limits, counts, malformed lines and real
data.
"""

import collections
import gzip
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import transformers

from dpo_engine.data import json_files
from dpo_engine.data.encode import LEFT_OUT, LONG_PAIR, LONG_PROMPT, LONG_RESPONSE, Limits, dropped_text, encode_pairs
from dpo_engine.data.formats import read_pairs
from dpo_engine.data.pair import Pair
from dpo_engine.data.tokenizer import load_tokenizer
from dpo_engine.errors import ConfigError, DataError
from support.built import ids
from support.malformed import ALSO_GOOD, GOOD, KINDS, LIMIT, RIGHT, SYSTEM, USER, WRONG, between, dump
from support.tiny_tokenizers import CHATML, TURNS, byte_level, piece_model

REAL = Path(os.environ.get("DPO_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
TALK = {"prompt": [SYSTEM, USER], "chosen": [RIGHT], "rejected": [WRONG]}


class TestIds:
    def test_text_ids_match_the_library(self, build, tokenizer_path):
        library = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
        dataset, report = build([GOOD, {**ALSO_GOOD, "weight": 2, "margin": 0.25}])
        for pair, row in zip(dataset, [GOOD, ALSO_GOOD], strict=True):
            expected = [
                library(row["prompt"])["input_ids"],  # starts with the BOS
                library(row["chosen"] + "<|im_end|>", add_special_tokens=False)["input_ids"],
                library(row["rejected"] + "<|im_end|>", add_special_tokens=False)["input_ids"],
            ]
            assert ids(pair) == expected
        assert (dataset[1].weight, dataset[1].margin, dataset[1].source) == (2.0, 0.25, 0)
        assert dataset[0].weight == 1.0 and np.isnan(dataset[0].margin)
        assert dataset.lengths.tolist() == [list(map(len, ids(pair))) for pair in dataset]
        assert dataset.weights.tolist() == [1.0, 2.0] and report.kept == report.read == 2

    def test_conversation_ids_match_the_library(self, build, tokenizer_path):
        library = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
        dataset, report = build([TALK])
        prompt, chosen, rejected = ids(dataset[0])
        rendered = {"tokenize": True, "return_dict": False}
        assert prompt == library.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, **rendered)
        for response, message in ((chosen, RIGHT), (rejected, WRONG)):
            # The rendered conversation ends with a line feed after the EOS. Responses exclude this line feed, because
            # no model should generate it.
            expected = library.apply_chat_template([SYSTEM, USER, message], **rendered)[:-1]
            assert prompt + response == expected
            assert response[-1] == library.eos_token_id and response.count(library.eos_token_id) == 1
        assert report.merged == 0

    def test_eos_is_added_once(self, build, tokenizer_path):
        eos = load_tokenizer(tokenizer_path).eos_id
        rows = [{**GOOD, "chosen": "yes<|im_end|>", "rejected": "no<|im_end|>\n"}]
        dataset, _ = build(rows)
        for response in ids(dataset[0])[1:]:
            assert response.count(eos) == 1 and response[-1] == eos
        dataset, _ = build([GOOD], add_eos=False)
        assert all(eos not in part for part in ids(dataset[0]))

    def test_bos_is_added_once(self, build, tokenizer_path):
        assert load_tokenizer(tokenizer_path).prefix == [0]
        dataset, _ = build([{**GOOD, "prompt": "<|bos|>" + GOOD["prompt"]}, GOOD])
        assert ids(dataset[0]) == ids(dataset[1]) and ids(dataset[0])[0].count(0) == 1

    def test_eos_is_added_if_the_template_has_none(self, build, tokenizer_path, tmp_path):
        header = "{% if add_generation_prompt %}[assistant]{% endif %}"
        (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + header)
        tokenizer = load_tokenizer(tokenizer_path, tmp_path / "t.jinja")
        dataset, _ = build([TALK], tokenizer=tokenizer)
        assert tokenizer.decode(dataset[0].prompt) == "[system]Be brief.[user]Which is larger?[assistant]"
        assert tokenizer.decode(dataset[0].chosen) == "The second.<|im_end|>"

    def test_prompt_that_is_not_a_prefix_is_shortened(self, build, tokenizer_path, tmp_path):
        # As in the templates of reasoning models, the generation prompt ends with the tag <think>. A finished
        # conversation does not contain this tag.
        (tmp_path / "t.jinja").write_text(CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
        tokenizer = load_tokenizer(tokenizer_path, tmp_path / "t.jinja")
        dataset, report = build([TALK], tokenizer=tokenizer)
        assert tokenizer.decode(dataset[0].prompt).endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(dataset[0].chosen) == "The second.<|im_end|>"
        assert report.merged == 1 and "1 prompt lost the last tokens, which change if a response follows" in str(report)

    def test_prompt_ends_where_either_response_changes_its_tokens(self, tmp_path):
        """The prompt's last letter merges with the response only in the chosen text: "xy" + "z" has a token "yz"."""

        class Letters:
            prefix, eos_id, bos_id, rows = [], 0, None, None
            end_ids, end_names = {0}, {"</s>": 0}

            def encode_all(self, texts, *, rendered):
                known = {"xy": [1, 2], "xyz": [1, 9], "xyw": [1, 2, 4]}
                return [known[text] for text in texts]

            def decode(self, ids):
                return "".join(map(str, ids))

            def name_of(self, token):
                return str(token)

        limits = Limits(20, None, "left", True)
        (found,) = encode_pairs([Pair("xy", "z", "w")], Letters(), limits, source=0)
        assert ids(found.pair) == [[1], [9, 0], [2, 4, 0]] and found.merged

    def test_sentencepiece_ids(self, build, tmp_path):
        (tmp_path / "t.jinja").write_text(TURNS)
        tokenizer = load_tokenizer(piece_model(tmp_path / "t.model"), tmp_path / "t.jinja")
        dataset, _ = build([GOOD], [TALK], tokenizer=tokenizer)
        text, talk = dataset
        prompt, chosen, rejected = ids(text)
        assert prompt == tokenizer.encode(GOOD["prompt"])
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            assert prompt + response == [*tokenizer.encode(GOOD["prompt"] + GOOD[name]), 2]
        whole = tokenizer.encode("system: Be brief. user: Which is larger? assistant: The second. ")
        prompt, chosen, _ = ids(talk)
        assert prompt + chosen == [1, *whole, 2] and talk.source == 1


class TestLimits:
    """Tests of length limits. In the pair `ROW`, each letter is a token.

    The prompt has 30 tokens with its BOS. With the EOS, the chosen response has 10 tokens, and the rejected one has 20.
    """

    ROW = {"prompt": "X" * 28 + "Y", "chosen": "B" * 9, "rejected": "C" * 19}

    def test_pairs_with_long_responses_are_dropped(self, build):
        rows = [self.ROW, {**self.ROW, "rejected": "C" * 18}]
        dataset, report = build(rows, max_completion_length=19)
        assert [len(pair.rejected) for pair in dataset] == [19]
        assert report.dropped == {"a response longer than data.max_completion_length": 1}

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
    def test_prompt_is_truncated_on_the_left(self, settings, length, build, tokenizer_path):
        tokenizer = load_tokenizer(tokenizer_path)
        dataset, report = build([self.ROW], **settings)
        prompt, chosen, rejected = ids(dataset[0])
        assert prompt == tokenizer.prefix + tokenizer.encode("X" * (length - 2) + "Y")
        assert (len(chosen), len(rejected)) == (10, 20)
        assert report.cut == (length < 30) and ("1 prompt truncated on the left" in str(report)) == (length < 30)

    def test_prompt_cut_to_one_token_keeps_its_last_token(self, build, tokenizer_path):
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
    def test_pairs_over_a_limit_are_dropped_and_counted(self, settings, reason, build):
        dataset, report = build([self.ROW, {"prompt": "a", "chosen": "b", "rejected": "c"}], **settings)
        assert len(dataset) == report.kept == 1 and report.read == 2
        assert report.dropped == {reason: 1} and f"  1 dropped: {reason}" in str(report)
        assert dataset.lengths.sum(1).max() < 20

    def test_file_without_usable_pairs_is_refused(self, build):
        with pytest.raises(DataError, match=f"no usable pair in 1 record; 1 dropped: {LONG_RESPONSE}; raise the"):
            build([self.ROW], max_length=4)

    def test_each_reason_has_its_way_out(self):
        limit, change = "raise the limit or shorten the records", "change the records or the data format"
        long, left_out = f"; 1 dropped: {LONG_RESPONSE}", f"; 9 dropped: {LEFT_OUT}"
        assert dropped_text({}) == ""
        assert dropped_text({LONG_RESPONSE: 1}) == f"{long}; {limit}"
        assert dropped_text({LEFT_OUT: 9}) == f"{left_out}; {change}"
        assert dropped_text({LONG_RESPONSE: 1, LEFT_OUT: 9}) == f"{long}{left_out}; {limit}, or {change}"


class TestBadLines:
    @pytest.mark.parametrize("bad", KINDS, ids=lambda bad: bad.kind)
    def test_every_kind_of_malformed_record(self, bad, build, tmp_path, monkeypatch):
        if bad.kind == "endless line":
            monkeypatch.setattr(json_files, "MAX_RECORD_BYTES", LIMIT)
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(bad.content)
        if bad.says is not None:
            with pytest.raises(DataError) as error:
                build(path)
            assert str(error.value).startswith(f"{path}:{bad.line}: ") and bad.says in str(error.value)
            assert not list((tmp_path / "cache").iterdir())  # no partial file remains
        if bad.kept:
            dataset, report = build(path, on_bad_line="skip")
            assert len(dataset) == bad.kept and report.bad == (bad.says is not None)
            again = build(path, on_bad_line="skip")[1]
            assert again.cached and again.bad_lines == report.bad_lines
        else:
            with pytest.raises(DataError, match="no usable pair in"):
                build(path, on_bad_line="skip")

    def test_responses_equal_after_tokenization_are_refused(self, build, tmp_path):
        tokenizer = load_tokenizer(byte_level(tmp_path / "lower", lowercase=True))
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(between(dump({**GOOD, "chosen": "The Second", "rejected": "the second"})))
        with pytest.raises(DataError, match=r"pairs\.jsonl:2: chosen and rejected have identical tokens"):
            build(path, tokenizer=tokenizer)
        _, report = build(path, tokenizer=tokenizer, on_bad_line="skip")
        assert (report.read, report.kept, report.bad) == (3, 2, 1)
        assert "  1 bad line skipped:" in str(report) and f"{path}:2: " in str(report)

    def test_template_that_raises_is_reported(self, build, tokenizer_path, tmp_path):
        (tmp_path / "t.jinja").write_text(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
        )
        tokenizer = load_tokenizer(tokenizer_path, tmp_path / "t.jinja")
        with pytest.raises(DataError, match=r"0\.jsonl:1: the chat template rejects this conversation: no system turn"):
            build([TALK], tokenizer=tokenizer)

    def test_template_without_a_shared_prefix_is_refused(self, build, tokenizer_path, tmp_path):
        (tmp_path / "t.jinja").write_text("{{ messages | length }}" + CHATML)
        with pytest.raises(DataError, match="renders the prompt and the conversations without a common prefix"):
            build([TALK], tokenizer=load_tokenizer(tokenizer_path, tmp_path / "t.jinja"), on_template_fault="allow")

    def test_response_without_tokens_is_refused(self, build, tmp_path):
        tokenizer = load_tokenizer(byte_level(tmp_path / "t"))
        with pytest.raises(DataError, match="0.jsonl:1: chosen has no tokens"):
            build([{**GOOD, "chosen": "<|im_end|>"}], tokenizer=tokenizer)

    def test_conversation_without_a_template_is_refused(self, build, tmp_path):
        tokenizer = load_tokenizer(byte_level(tmp_path / "t", template=None))
        with pytest.raises(ConfigError, match=r"data\.chat_template=null"):
            build([TALK], tokenizer=tokenizer)

    def test_tokenizer_without_eos_is_refused(self, build, tmp_path):
        tokenizer = load_tokenizer(byte_level(tmp_path / "t", eos=False))
        with pytest.raises(ConfigError, match=r"data\.add_eos=auto: the tokenizer of .* has no EOS"):
            build([GOOD], tokenizer=tokenizer)
        assert len(build([GOOD], tokenizer=tokenizer, add_eos=False)[0]) == 1


@pytest.mark.skipif(
    not REAL.is_dir(), reason=f"no preference data in {REAL}; set DPO_TEST_DATA to use another directory"
)
class TestRealData:
    @pytest.mark.parametrize(
        ("name", "count", "repeated"), [("hh_harmless/harmless-base", 2000, 2), ("qa_feedback/qa-feedback", 2366, 6)]
    )
    def test_every_record_is_read(self, name, count, repeated):
        text = [pair for _, (pair,) in read_pairs(REAL / f"{name}.train.text.jsonl.gz")]
        talk = [pair for _, (pair,) in read_pairs(REAL / f"{name}.train.messages.jsonl.gz")]
        assert len(text) == len(talk) == count
        assert [pair.chosen.strip() for pair in text] == [pair.chosen for pair in talk]
        assert {pair.prompt[-1]["role"] for pair in talk} == {"user"}
        assert max(collections.Counter(pair.prompt for pair in text).values()) == repeated

    @pytest.mark.parametrize("name", ["hh_harmless/harmless-base", "qa_feedback/qa-feedback"])
    def test_text_and_messages_files_agree(self, name, build, tmp_path):
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
