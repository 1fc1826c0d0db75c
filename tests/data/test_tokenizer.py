"""Tests of both kinds of tokenizers: those of transformers, and bare SentencePiece models.

They compare token ids and rendered conversations with those of the libraries, and cover files that cannot be loaded.
"""

import json
import shutil

import jinja2
import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer

from dpo_engine.data.tokenizer import load_tokenizer
from dpo_engine.errors import ConfigError
from support.tiny_tokenizers import CHATML, TURNS, byte_level, piece_model

TEXTS = ["which number is larger", " the second", "  two blanks", "line\nbreak \u4eca\u5929 \U0001f642", "a"]
TALK = [{"role": "user", "content": "which ?"}, {"role": "assistant", "content": "the second"}]


class TestTransformers:
    @pytest.mark.parametrize("bos", [False, True])
    def test_ids_match_the_library(self, bos, tmp_path):
        path = byte_level(tmp_path / "t", bos=bos)
        ours, theirs = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
        expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        assert ours.encode_all(TEXTS) == [ours.encode(text) for text in TEXTS] == expected
        assert [ours.prefix + ids for ids in expected] == [theirs(text)["input_ids"] for text in TEXTS]
        assert ours.prefix == ([theirs.bos_token_id] if bos else [])
        assert [ours.decode(ids) for ids in expected] == TEXTS
        assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (0, theirs.eos_token_id, len(theirs))
        assert ours.encode_all([]) == []

    def test_truncation_and_padding_in_tokenizer_json_have_no_effect(self, tmp_path):
        path = byte_level(tmp_path / "t")
        expected = load_tokenizer(path).encode_all(TEXTS)
        inner = Tokenizer.from_file(str(path / "tokenizer.json"))
        inner.enable_truncation(2)
        inner.enable_padding(length=8)
        inner.save(str(path / "tokenizer.json"))
        assert load_tokenizer(path).encode_all(TEXTS) == expected

    def test_class_that_changes_ids_is_used(self, tmp_path, monkeypatch):
        """A class can change ids by overriding `_encode_plus`, as CodeLlama's class does."""

        class Reversed(transformers.PreTrainedTokenizerFast):
            def _encode_plus(self, text, **options):
                found = super()._encode_plus(text, **options)
                found["input_ids"] = [ids[::-1] if isinstance(ids, list) else ids for ids in found["input_ids"]]
                return found

        path = byte_level(tmp_path / "t")
        plain = load_tokenizer(path).encode_all(TEXTS)
        inner = Reversed.from_pretrained(path)
        monkeypatch.setattr("dpo_engine.data.tokenizer.read_directory", lambda path: (inner, ["tokenizer.json"], None))
        assert load_tokenizer(path).encode_all(TEXTS) == [ids[::-1] for ids in plain]

    def test_chat_matches_the_library(self, tmp_path):
        path = byte_level(tmp_path / "t")
        ours, theirs = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
        for generate in (False, True):
            rendered = ours.chat(TALK[: 2 - generate], add_generation_prompt=generate)
            expected = theirs.apply_chat_template(
                TALK[: 2 - generate], add_generation_prompt=generate, tokenize=True, return_dict=False
            )
            assert ours.encode_all([rendered], rendered=True) == [expected]

    def test_template_file_takes_precedence(self, tmp_path):
        path = byte_level(tmp_path / "t")
        (tmp_path / "turns.jinja").write_text(TURNS)
        rendered = load_tokenizer(path, tmp_path / "turns.jinja").chat(TALK, add_generation_prompt=False)
        assert rendered == "<|bos|>user: which ? assistant: the second <|im_end|>"

    def test_code_next_to_a_tokenizer_is_not_run(self, tmp_path):
        path = byte_level(tmp_path / "t")
        (path / "own.py").write_text("raise SystemExit('this was run')")
        settings = json.loads((path / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(ConfigError, match="cannot be loaded by transformers"):
            load_tokenizer(path)

    def test_model_without_a_tokenizer_is_refused(self, tiny_hf):
        with pytest.raises(ConfigError, match=r"model\.tokenizer=.*; set it to a tokenizer directory"):
            load_tokenizer(tiny_hf())


class TestSentencePiece:
    def test_ids_match_the_library(self, tmp_path):
        path = piece_model(tmp_path / "t.model")
        ours, theirs = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
        expected = [theirs.encode(text) for text in TEXTS]
        assert ours.encode_all(TEXTS) == [ours.encode(text) for text in TEXTS] == expected
        assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.prefix) == (1, 2, 2, [])
        assert ours.vocab_size == theirs.vocab_size() and ours.decode(expected[0]) == TEXTS[0]

    def test_leading_blank_is_not_doubled(self, tmp_path):
        path = piece_model(
            tmp_path / "tokenizer.model", remove_extra_whitespaces=False, normalization_rule_name="identity"
        )
        (tmp_path / "hf").mkdir()
        shutil.copy(path, tmp_path / "hf" / "tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
        bare, converted = load_tokenizer(path), load_tokenizer(tmp_path / "hf")
        assert bare.encode(" the second") == bare.encode("the second") != bare.encode("  the second")
        assert bare.encode_all(TEXTS) == converted.encode_all(TEXTS)

    def test_control_tokens_are_recognized_only_in_conversations(self, tmp_path):
        path = piece_model(tmp_path / "t.model")
        (tmp_path / "turns.jinja").write_text(TURNS)
        tokenizer = load_tokenizer(path, tmp_path / "turns.jinja")
        rendered = tokenizer.chat(TALK, add_generation_prompt=False)
        assert rendered == "<s>user: which ? assistant: the second </s>"
        expected = [1, *tokenizer.encode("user: which ? assistant: the second "), 2]
        assert tokenizer.encode_all([rendered], rendered=True) == [expected]
        assert not {1, 2} & set(tokenizer.encode(rendered))

    def test_file_that_is_not_a_sentencepiece_model_is_refused(self, tmp_path):
        (tmp_path / "t.model").write_text("hello")
        with pytest.raises(ConfigError, match="not a sentencepiece model"):
            load_tokenizer(tmp_path / "t.model")


class TestErrors:
    def test_missing_files_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=r"model\.tokenizer=.*nowhere: no such file or directory"):
            load_tokenizer(tmp_path / "nowhere")
        with pytest.raises(ConfigError, match=r"data\.chat_template=.*nowhere: cannot be read"):
            load_tokenizer(byte_level(tmp_path / "t"), tmp_path / "nowhere")

    @pytest.mark.parametrize("kind", ["transformers", "sentencepiece"])
    def test_missing_and_invalid_templates_are_refused(self, kind, tmp_path):
        path = byte_level(tmp_path / "t", template=None) if kind == "transformers" else piece_model(tmp_path / "m")
        with pytest.raises(ConfigError, match=r"data\.chat_template=null: the records are conversations, but the"):
            load_tokenizer(path).chat(TALK, add_generation_prompt=True)
        template = tmp_path / "t.jinja"
        template.write_text("hello\n{% for %}")
        with pytest.raises(ConfigError, match=r"data\.chat_template=.*t\.jinja: line 2 is not valid Jinja"):
            load_tokenizer(path, template)
        template.write_text("{{ raise_exception('only songs') }}")
        with pytest.raises(jinja2.TemplateError, match="only songs"):
            load_tokenizer(path, template).chat(TALK, add_generation_prompt=True)

    def test_template_output_is_bounded(self, tmp_path, monkeypatch):
        monkeypatch.setattr("dpo_engine.data.template.TEMPLATE_CHARACTERS", 100)
        template = tmp_path / "t.jinja"
        template.write_text("{{ 'a' * 101 }}")
        with pytest.raises(
            ConfigError, match=r"t\.jinja: produces 101 characters for one conversation, more than 100; set data"
        ):
            load_tokenizer(piece_model(tmp_path / "m"), template)

    def test_digest_depends_on_everything_that_affects_ids(self, tmp_path):
        path = byte_level(tmp_path / "t")
        (tmp_path / "a.jinja").write_text(CHATML)
        copy = shutil.copytree(path, tmp_path / "copy")
        lower = byte_level(tmp_path / "lower", lowercase=True)
        digests = [load_tokenizer(*args).digest for args in [(path,), (copy,), (lower,), (path, tmp_path / "a.jinja")]]
        assert digests[0] == digests[1] and len(set(digests)) == 3
