"""Tokenizers: one interface to transformers tokenizers and bare sentencepiece models."""

from __future__ import annotations

import hashlib
import re
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from jinja2 import TemplateError, TemplateRuntimeError, TemplateSyntaxError
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from dpo_engine.data.hub import model_directory
from dpo_engine.errors import ConfigError, shorten
from dpo_engine.strict_json import BadJson, read_object

# Files that affect the ids, in addition to the vocabulary files that the tokenizer class names.
SETTINGS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


TEMPLATE_S = 2
"""CPU time limit for rendering one conversation: a template is a program that came with the weights."""
TEMPLATE_CHARACTERS = 2**26


class Tokenizer(ABC):
    """The tokenizer interface that the engine uses.

    path           file or directory it was loaded from
    bos_id         first token of a text; None if the tokenizer has no such token
    eos_id         last token of a response; None if the tokenizer has no such token
    pad_id         padding after the end of a row; its value has no effect on results
    vocab_size     upper bound of the ids, exclusive
    prefix         ids that the tokenizer itself prepends to a text (its BOS, or none)
    chat_template  Jinja source, or None
    template_file  file of the chat template; None if it is the tokenizer's own
    content        digest of the tokenizer's files and of the chat template that replaces its own
    digest         digest of everything that affects the ids, including the library's version
    """

    path: str
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    vocab_size: int
    prefix: list[int]
    chat_template: str | None
    template_file: str | Path | None = None
    content: str
    digest: str

    @abstractmethod
    def encode_all(self, texts: Sequence[str], *, rendered: bool = False) -> list[list[int]]:
        """Tokenize each text without adding special tokens.

        rendered  the texts are the output of a chat template, so the names of control tokens stand for those tokens
        """

    def encode(self, text: str) -> list[int]:
        """Tokenize one text without adding special tokens."""
        return self.encode_all([text])[0]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text. The names of control tokens are kept if the tokenizer supports it."""

    def chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """Render a conversation with the chat template. Encode the result with `rendered=True`.

        Raises :class:`ConfigError` if there is no template, or if it leaves its sandbox, runs for too long or produces
        too much text; `jinja2.TemplateError` if it rejects the conversation.
        """
        if self.chat_template is None:
            raise ConfigError(
                f"data.chat_template=null: the records are conversations, but the tokenizer of {self.path} has no chat "
                "template; set it to a file with a Jinja template, or use text records"
            )
        try:
            with _seconds(TEMPLATE_S):
                text = self._render(list(messages), add_generation_prompt)
        except (SecurityError, OverflowError) as error:  # raised by the sandbox, and by its limit on loops
            raise self._unfit(f"performs a forbidden operation ({error})") from error
        except TimeoutError as error:
            raise self._unfit(f"takes more than {TEMPLATE_S} s for one conversation") from error
        except TemplateError:
            raise
        except Exception as error:
            raise TemplateRuntimeError(str(error) or type(error).__name__) from error
        if len(text) > TEMPLATE_CHARACTERS:
            raise self._unfit(f"produces {len(text):,} characters for one conversation")
        return text

    def _unfit(self, what: str) -> ConfigError:
        which = "null" if self.template_file is None else self.template_file
        whose = f"the template of {self.path} " if self.template_file is None else ""
        return ConfigError(f"data.chat_template={which}: {whose}{what}; set it to a file with another template")

    @abstractmethod
    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str: ...


class TransformersTokenizer(Tokenizer):
    """A tokenizer directory read by `AutoTokenizer`. Code in the directory is never run."""

    def __init__(self, path: str, chat_template: str | None):
        own_code = _check_settings(Path(path))
        try:
            inner = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except BaseException as error:  # a bad directory can fail in any of transformers' parsers
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # from a Rust library
                raise
            what = shorten((str(error).strip() or type(error).__name__).splitlines()[0], 80)
            if own_code:
                what = "auto_map names custom code, which is never run"
            raise ConfigError(
                f"model.tokenizer={path}: transformers cannot load it ({what}); set it to a tokenizer directory or a "
                "sentencepiece *.model file"
            ) from error
        names = {name for name in inner.vocab_files_names.values() if isinstance(name, str)}
        # Without a vocabulary file, transformers may create an empty tokenizer of the model's class.
        if not any((Path(path) / name).is_file() for name in names):
            raise ConfigError(
                f"model.tokenizer={path}: contains no tokenizer (looked for {', '.join(sorted(names))}); set it "
                "to a tokenizer directory or a sentencepiece *.model file"
            )
        # Truncation happens in encode.py, so the library's warning about long texts would be wrong.
        inner.model_max_length = 2**62
        if chat_template is not None:
            inner.chat_template = chat_template
        self._inner = inner
        self.path = path
        self.bos_id, self.eos_id = inner.bos_token_id, inner.eos_token_id
        self.pad_id = next((i for i in (inner.pad_token_id, inner.eos_token_id) if i is not None), 0)
        self.vocab_size = len(inner)
        self.chat_template = inner.chat_template
        plain, whole = self.encode("a"), inner("a")["input_ids"]
        starts = [i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain]
        self.prefix = list(whole[: starts[0]]) if starts else []
        self.content = _digest([chat_template or ""], [Path(path) / name for name in sorted({*names, *SETTINGS})])
        self.digest = _digest([transformers.__version__, self.content], [])

    def encode_all(self, texts: Sequence[str], *, rendered: bool = False) -> list[list[int]]:
        if not texts:
            return []
        only_ids = {"return_attention_mask": False, "return_token_type_ids": False}
        return self._inner(list(texts), add_special_tokens=False, **only_ids)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode([int(i) for i in ids])

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self._inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


class SentencePieceTokenizer(Tokenizer):
    """A bare sentencepiece model. It has no prefix; control tokens occur only in rendered conversations."""

    prefix: list[int] = []

    def __init__(self, path: str, chat_template: str | None):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"model.tokenizer={path}: not a sentencepiece model; set it to one, or to a tokenizer directory"
            ) from error
        self.path = path
        self.chat_template = chat_template
        ids = (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        self.bos_id, self.eos_id, pad_id = (None if i < 0 else i for i in ids)
        self.pad_id = next((i for i in (pad_id, self.eos_id) if i is not None), 0)
        self.vocab_size = self._model.get_piece_size()
        # A model that prepends a space to every text and keeps all spaces would double a leading space.
        pieces = [self._model.encode(text, out_type=str) for text in ("a", " a")]
        self._doubles_space = pieces[0][:1] == pieces[1][1:2] and pieces[0] != pieces[1]
        self.content = _digest([chat_template or ""], [Path(path)])
        self.digest = _digest([sentencepiece.__version__, self.content], [])

    def encode_all(self, texts: Sequence[str], *, rendered: bool = False) -> list[list[int]]:
        if rendered:
            return [self._encode_rendered(text) for text in texts]
        return self._model.encode([self._without_space(text) for text in texts]) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

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

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        names: dict[str, Any] = {
            f"{name}_token": "" if i is None else self._model.id_to_piece(i)
            for name, i in (("bos", self.bos_id), ("eos", self.eos_id))
        }
        out = render_jinja_template(
            [messages], chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, **names
        )
        return out[0][0]


def load_tokenizer(path: str | Path, chat_template: str | Path | None = None) -> Tokenizer:
    """Load the tokenizer at `path`: a sentencepiece model if it is a file, else a directory that transformers reads.

    path           a file, a directory, or a Hub id `org/name[@revision]`
    chat_template  file with a Jinja chat template that replaces the tokenizer's own

    Raises :class:`ConfigError` if the tokenizer cannot be loaded, or if the template has a syntax error.
    """
    path, template = model_directory(path, "model.tokenizer"), None
    if not path.exists():
        raise ConfigError(
            f"model.tokenizer={path}: no such file or directory; set it to a tokenizer directory or a sentencepiece "
            "*.model file"
        )
    if chat_template is not None:
        try:
            template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = f"data.chat_template={chat_template}: cannot be read ({error}); set it to a text file"
            raise ConfigError(what) from error
    kind = SentencePieceTokenizer if path.is_file() else TransformersTokenizer
    tokenizer = kind(str(path), template)
    tokenizer.template_file = chat_template
    if tokenizer.chat_template is not None:
        _try_template(tokenizer, chat_template)
    return tokenizer


def _try_template(tokenizer: Tokenizer, file: str | Path | None) -> None:
    try:
        tokenizer.chat([{"role": "user", "content": "a"}], add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"data.chat_template={file or 'null'}: line {error.lineno} is not valid Jinja ({error.message}); fix it"
        ) from error
    except TemplateError:
        pass  # a template may reject this conversation and still render those of the records


def _check_settings(directory: Path) -> bool:
    """Parse a tokenizer's settings strictly before a library reads them. Returns whether they name custom code.

    Raises :class:`ConfigError` for a file that is not a JSON object.
    """
    own_code = False
    for name in ("config.json", *SETTINGS):
        file = directory / name
        if name == "tokenizer.json" or not name.endswith(".json") or not file.is_file():
            continue
        try:
            own_code |= "auto_map" in read_object(file)
        except (OSError, BadJson) as error:
            raise ConfigError(
                f"model.tokenizer={directory}: {name} cannot be read ({error}); download it again"
            ) from error
    return own_code


@contextmanager
def _seconds(limit: float) -> Iterator[None]:
    """Raise `TimeoutError` in the body once it has used `limit` seconds of CPU time. Works in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _digest(words: Sequence[str], files: Sequence[Path]) -> str:
    """Hash some words and those of the files that exist."""
    digest = hashlib.blake2b(digest_size=16)
    for word in words:
        digest.update(f"{len(word)}:{word}".encode())
    for file in files:
        if file.is_file():
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
