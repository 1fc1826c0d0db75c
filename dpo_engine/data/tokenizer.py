"""Tokenizers: one interface to transformers tokenizers and bare sentencepiece models."""

from __future__ import annotations

import datetime
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import transformers
from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from dpo_engine.data.conversation import Message
from dpo_engine.data.hub import model_directory
from dpo_engine.data.template import CLOCK, read_template, render_within_limits, sources, stop_clock
from dpo_engine.data.tokenizer_files import SETTINGS, content_digest, read_directory
from dpo_engine.errors import ConfigError


class Tokenizer(ABC):
    """The tokenizer interface that the engine uses.

    path           file or directory from which the tokenizer was loaded
    bos_id         id of the token that starts a text; None if the tokenizer has no such token
    eos_id         id of the token that ends a response; None if the tokenizer has no such token
    pad_id         id that pads the end of a row; its value has no effect on results
    vocab_size     upper bound of the ids, exclusive
    prefix         ids that the tokenizer itself prepends to a text, such as its BOS; empty if there are none
    end_ids        ids of the control tokens and added tokens. Most chat templates end a turn with one of these tokens
    chat_template  Jinja source, or a mapping from names to sources; None if there is no template
    template_file  file of the chat template; None if the template is the tokenizer's own
    date           the date that chat templates read; None means the current date
    rows           number of embedding rows of the model, or None if unknown; ids must be smaller than this number
    note           a line for the log about how the tokenizer was read, or None
    content        digest of the tokenizer's files, of a chat template that replaces the tokenizer's own, and of a fixed
                   date that the template reads
    digest         digest of everything that affects the ids, including the version of the tokenizer library
    """

    path: str
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    vocab_size: int
    prefix: list[int]
    end_ids: frozenset[int]
    chat_template: str | Mapping[str, str] | None
    template_file: str | Path | None = None
    date: datetime.date | None = None
    rows: int | None = None
    note: str | None = None
    content: str
    digest: str

    @abstractmethod
    def encode_all(self, texts: Sequence[str], *, rendered: bool = False) -> list[list[int]]:
        """Tokenize each text without adding special tokens.

        rendered  whether the texts are the output of a chat template, in which the name of a control token stands for
                  this token
        """

    def encode(self, text: str) -> list[int]:
        """Tokenize one text without adding special tokens."""
        return self.encode_all([text])[0]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Convert ids to text. A transformers tokenizer keeps the names of control tokens; sentencepiece drops them."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a tokenizer that another process sent. Its template must read the same date in both processes."""
        self.__dict__.update(state)
        self._stop_clock()

    def _stop_clock(self) -> None:
        if self.date is not None:
            for source in sources(self.chat_template):
                stop_clock(source, self.date)

    @property
    def reads_clock(self) -> bool:
        """Whether the chat template can read the date."""
        return any(CLOCK in source for source in sources(self.chat_template))

    @cached_property
    def has_generation_prompt(self) -> bool:
        """Whether the chat template has a generation prompt: a header for the response, which ends the rendered prompt.

        The template is tested on a short conversation. If the template rejects this conversation, the value is True.
        """
        asked = [{"role": "user", "content": "a"}]
        try:
            return self.chat(asked, add_generation_prompt=True) != self.chat(asked, add_generation_prompt=False)
        except TemplateError:
            return True

    @cached_property
    def end_names(self) -> dict[str, int]:
        """A mapping from the names of the tokens in `end_ids` to their ids, without names that are only whitespace."""
        return {name: token for token in sorted(self.end_ids) if (name := self.name_of(token)).strip()}

    @abstractmethod
    def name_of(self, token: int) -> str:
        """Return the text by which the vocabulary names a token."""

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation with the chat template. Encode the result with `rendered=True`.

        tools    JSON schemas of the functions that the assistant can call
        options  further variables for the template

        Raises :class:`ConfigError` if there is no template, or if the template violates its sandbox, runs for too long
        or produces too much text. Raises `jinja2.TemplateError` if the template rejects the conversation or fails.
        """
        if self.chat_template is None:
            raise ConfigError(
                f"data.chat_template=null: the records are conversations, but the tokenizer of {self.path} has no chat "
                "template; set data.chat_template to a file with a Jinja template, or use text records"
            )
        own = self.template_file is None
        key = f"data.chat_template={'null' if own else self.template_file}: "
        key += f"the template of {self.path} " if own else ""
        given = {**(options or {}), "add_generation_prompt": add_generation_prompt}
        given |= {"tools": list(tools)} if tools else {}
        return render_within_limits(lambda: self._render(list(messages), given), key)

    @abstractmethod
    def _render(self, messages: list[Message], options: dict[str, Any]) -> str: ...


class TransformersTokenizer(Tokenizer):
    """A tokenizer directory that transformers reads (:mod:`dpo_engine.data.tokenizer_files`)."""

    def __init__(self, path: str, chat_template: str | None):
        inner, names, self.note = read_directory(Path(path))
        # Truncation happens in encode.py, so the library's warning about long texts would be wrong.
        inner.model_max_length = 2**62
        if chat_template is not None:
            inner.chat_template = chat_template
        self._inner, self._backend = inner, _backend(inner)
        self.path = path
        self.bos_id, self.eos_id = inner.bos_token_id, inner.eos_token_id
        self.pad_id = next((i for i in (inner.pad_token_id, inner.eos_token_id) if i is not None), 0)
        self.vocab_size = len(inner)
        self.end_ids = frozenset(inner.added_tokens_decoder)
        self.chat_template = inner.chat_template
        plain, whole = self.encode("a"), inner("a")["input_ids"]
        starts = [i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain]
        self.prefix = list(whole[: starts[0]]) if starts else []
        self.content = content_digest(
            [chat_template or ""], [Path(path) / name for name in sorted({*names, *SETTINGS})]
        )
        self.digest = content_digest([transformers.__version__, self.content], [])

    def encode_all(self, texts: Sequence[str], *, rendered: bool = False) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        only_ids = {"return_attention_mask": False, "return_token_type_ids": False}
        return self._inner(list(texts), add_special_tokens=False, **only_ids)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode([int(i) for i in ids])

    def name_of(self, token: int) -> str:
        return str(self._inner.convert_ids_to_tokens(int(token)))

    def _render(self, messages: list[Message], options: dict[str, Any]) -> str:
        return self._inner.apply_chat_template(messages, tokenize=False, **options)


def _backend(inner: Any) -> tokenizers.Tokenizer | None:
    """Return the Rust tokenizer of ``inner``, which encodes faster.

    Returns None if ``inner`` has no Rust tokenizer, or if the class of ``inner`` overrides the encoding.
    """
    plain = transformers.PreTrainedTokenizerFast
    if not isinstance(inner, plain) or any(
        getattr(type(inner), name) is not getattr(plain, name) for name in ("__call__", "_encode_plus")
    ):
        return None
    backend = inner.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = inner.split_special_tokens
    return backend


class SentencePieceTokenizer(Tokenizer):
    """A bare sentencepiece model.

    The tokenizer prepends no ids to a text. It produces control tokens only for the output of a chat template.
    """

    prefix: list[int] = []

    def __init__(self, path: str, chat_template: str | None):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"model.tokenizer={path}: not a sentencepiece model; set it to a tokenizer directory or a "
                "sentencepiece *.model file"
            ) from error
        self.path = path
        self.chat_template = chat_template
        ids = (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        self.bos_id, self.eos_id, pad_id = (None if i < 0 else i for i in ids)
        self.pad_id = next((i for i in (pad_id, self.eos_id) if i is not None), 0)
        self.vocab_size = self._model.get_piece_size()
        self.end_ids = frozenset(self._controls.values())
        # A model that prepends a space to every text and keeps all spaces would double a leading space of the text. The
        # text's leading space is therefore removed before the model reads the text.
        pieces = [self._model.encode(text, out_type=str) for text in ("a", " a")]
        self._doubles_space = pieces[0][:1] == pieces[1][1:2] and pieces[0] != pieces[1]
        self.content = content_digest([chat_template or ""], [Path(path)])
        self.digest = content_digest([sentencepiece.__version__, self.content], [])

    def encode_all(self, texts: Sequence[str], *, rendered: bool = False) -> list[list[int]]:
        if rendered:
            return [self._encode_rendered(text) for text in texts]
        return self._model.encode([self._without_space(text) for text in texts]) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def name_of(self, token: int) -> str:
        return self._model.id_to_piece(int(token))

    def _without_space(self, text: str) -> str:
        return text.removeprefix(" ") if self._doubles_space else text

    def _encode_rendered(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split(text):
            if part in self._controls:
                ids.append(self._controls[part])
            elif part:
                ids += self._model.encode(self._without_space(part))
        return ids

    @cached_property
    def _controls(self) -> dict[str, int]:
        model = self._model
        return {model.id_to_piece(i): i for i in range(self.vocab_size) if model.is_control(i)}

    def _split(self, text: str) -> list[str]:
        if not self._controls:
            return [text]
        return re.split("(" + "|".join(map(re.escape, self._controls)) + ")", text)

    def _render(self, messages: list[Message], options: dict[str, Any]) -> str:
        names: dict[str, Any] = {
            f"{name}_token": "" if i is None else self._model.id_to_piece(i)
            for name, i in (("bos", self.bos_id), ("eos", self.eos_id))
        }
        out = render_jinja_template([messages], chat_template=self.chat_template, **{**names, **options})
        return out[0][0]


def load_tokenizer(
    path: str | Path, chat_template: str | Path | None = None, date: datetime.date | None = None
) -> Tokenizer:
    """Load the tokenizer at `path`. A file must be a sentencepiece model; a directory is read by transformers.

    path           a file, a directory, or a Hub id `org/name[@revision]`
    chat_template  file with a Jinja chat template that replaces the tokenizer's own
    date           the date for a chat template that reads the date; None means the current date

    Raises :class:`ConfigError` if the tokenizer cannot be loaded, or if the template cannot be read, has a syntax error
    or exceeds the limits of :mod:`dpo_engine.data.template`.
    """
    path, template = model_directory(path, "model.tokenizer"), None
    if not path.exists():
        raise ConfigError(
            f"model.tokenizer={path}: no such file or directory; set it to a tokenizer directory or a sentencepiece "
            "*.model file"
        )
    if chat_template is not None:
        template = read_template(chat_template)
    kind = SentencePieceTokenizer if path.is_file() else TransformersTokenizer
    tokenizer = kind(str(path), template)
    tokenizer.template_file = chat_template
    if tokenizer.chat_template is not None:
        _try_template(tokenizer, chat_template)
    if tokenizer.reads_clock and date is not None:
        tokenizer.date = date
        tokenizer._stop_clock()
        tokenizer.content, tokenizer.digest = (
            content_digest([digest, date.isoformat()], []) for digest in (tokenizer.content, tokenizer.digest)
        )
    return tokenizer


def _try_template(tokenizer: Tokenizer, file: str | Path | None) -> None:
    try:
        tokenizer.chat([{"role": "user", "content": "a"}], add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"data.chat_template={file or 'null'}: line {error.lineno} is not valid Jinja ({error.message}); fix it"
        ) from error
    except TemplateError:
        pass  # a template may reject this conversation and still render the conversations of the records
