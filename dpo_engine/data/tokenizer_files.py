"""Load a tokenizer directory with transformers, and compare the tokenizer with the directory's tokenizer.json."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from dpo_engine.errors import ConfigError, shorten
from dpo_engine.strict_json import BadJson, read_object

# Files that affect the ids, in addition to the vocabulary files of the tokenizer class.
SETTINGS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

SAMPLES = (
    "what is 7 + 4, says the heron; 1234 and so  on",
    "def f(x):\n    return x\n\nI'll",
    "na\u00efve \u4f60\u597d \U0001f642",
)
"""Texts on which the tokenizer that transformers loads is compared with the directory's tokenizer.json."""


def read_directory(path: Path) -> tuple[PreTrainedTokenizerBase, set[str], str | None]:
    """Load a tokenizer directory. Python code in the directory is never run.

    `AutoTokenizer` may use the tokenizer class of the model family, and this class may ignore parts of tokenizer.json.
    If the loaded tokenizer and tokenizer.json tokenize `SAMPLES` differently, tokenizer.json is used unchanged.
    Inference servers also use tokenizer.json unchanged.

    Returns  the tokenizer, the names of its vocabulary files, and a line for the log, which is None unless
             `AutoTokenizer` disagrees with tokenizer.json

    Raises :class:`ConfigError` if a settings file is not a JSON object, if transformers cannot load the directory, if
    the directory contains no tokenizer, or if transformers cannot use tokenizer.json unchanged.
    """
    own_code = _check_settings(path)
    try:
        inner = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # a bad directory can fail in any of transformers' parsers
        # A panic in a Rust library raises PanicException, which is not a subclass of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = shorten((str(error).strip() or type(error).__name__).splitlines()[0], 80)
        if own_code:
            what = "auto_map names custom code, which is never run"
        raise ConfigError(
            f"model.tokenizer={path}: cannot be loaded by transformers ({what}); set it to a tokenizer directory "
            "or a *.model file"
        ) from error
    names = {name for name in inner.vocab_files_names.values() if isinstance(name, str)}
    # Without a vocabulary file, transformers may create an empty tokenizer of the model family's class.
    if not any((path / name).is_file() for name in names):
        raise ConfigError(
            f"model.tokenizer={path}: contains no tokenizer (looked for {', '.join(sorted(names))}); set it "
            "to a tokenizer directory or a sentencepiece *.model file"
        )
    if (difference := different_reading(path, inner)) is None:
        return inner, names, None
    literal = transformers.PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    if different_reading(path, literal) is not None:
        raise ConfigError(f"model.tokenizer={path}: {difference}; use another transformers release")
    literal.chat_template = inner.chat_template
    return literal, names | {"tokenizer.json"}, f"tokenizer: {difference}; using tokenizer.json"


def different_reading(path: Path, inner: PreTrainedTokenizerBase) -> str | None:
    """Describe the first difference, on `SAMPLES`, between a tokenizer and the tokenizer.json in its directory.

    Returns None if both give the same ids for all samples, or if the directory has no tokenizer.json that the
    tokenizers library can load.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        own = tokenizers.Tokenizer.from_file(str(file))
    except Exception:  # the file has another format, which only transformers can convert
        return None
    own.no_truncation()
    own.no_padding()
    for text in SAMPLES:
        meant, read = own.encode(text, add_special_tokens=False).ids, inner.encode(text, add_special_tokens=False)
        if read != meant:
            shorter = min(len(read), len(meant))
            place = next((i for i in range(shorter) if read[i] != meant[i]), shorter)
            tokens = [inner.convert_ids_to_tokens(ids[place : place + 4]) for ids in (read, meant)]
            shown = [" ".join(map(repr, names)) or "nothing" for names in tokens]
            return (
                f"{type(inner).__name__} of transformers {transformers.__version__} tokenizes {text!r} differently "
                f"than tokenizer.json does: from token {place} on, the tokens are {shown[0]} instead of {shown[1]}"
            )
    return None


def _check_settings(directory: Path) -> bool:
    """Parse config.json and the JSON files of `SETTINGS`, except tokenizer.json, before a library reads them.

    The parser is strict. Returns whether any of these files refers to custom code.

    Raises :class:`ConfigError` if one of these files is not a JSON object.
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


def content_digest(words: Sequence[str], files: Sequence[Path]) -> str:
    """Hash words and files. Files that do not exist are left out."""
    digest = hashlib.blake2b(digest_size=16)
    for word in words:
        digest.update(f"{len(word)}:{word}".encode())
    for file in files:
        if file.is_file():
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
