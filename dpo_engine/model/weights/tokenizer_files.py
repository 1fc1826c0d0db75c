"""Export tokenizer files from which transformers reproduces the training tokenizer: its ids and its chat template.

The problem: transformers picks a tokenizer class from the `config.json` next to the tokenizer's files. If the run read
its tokenizer from a directory without that file, or from a bare sentencepiece model, the exported tokenizer can
therefore produce different ids. To detect this, the engine lets transformers load the exported files from a directory
that also contains the export's `config.json`. The loaded tokenizer is compared with the run's tokenizer: the ids of a
few texts, the special tokens, and the chat template. If these differ, other forms of the tokenizer are tried: files
that transformers has loaded and saved again, or a converted `tokenizer.json`. If `AutoTokenizer` cannot reproduce the
run's tokenizer from any of these forms, the log describes the first difference. The export then has the first form from
which `PreTrainedTokenizerFast` reproduces the tokenizer, or the tokenizer's own files if there is no such form.
"""

import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from jinja2 import TemplateError

from dpo_engine.data.piece_json import conversions
from dpo_engine.data.tokenizer import Tokenizer
from dpo_engine.errors import ConfigError, shorten
from dpo_engine.strict_json import BadJson, read_object

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
NAMED = "additional_chat_templates"
LEGACY_TEMPLATE = "chat_template.json"
FOR_TOOLS = "tool_use"
"""The named template that transformers prefers to the default template when a conversation has tools."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
AUTO, FAST = "AutoTokenizer", "PreTrainedTokenizerFast"

Files = dict[str, bytes | Path]
"""Files of an export, by name: either the content or the path of a file to copy."""

TEXTS = (
    "Which number is larger, 9.11 or 9.9?\n",
    " a leading space, two  spaces and three   more \n\n\tA tab. ",
    "def add(first, second=12_345):\n    return first + second  # comment\n",
    "It's naïve: “façade”, 你好吗, привет, ﬁne, e\u0301, 👩\u200d🔬 and 0123456789.",
)
"""Texts that tokenizers split differently: numbers, spaces, code, and characters with several Unicode forms."""


class Exported(NamedTuple):
    """The tokenizer files of an export.

    files   the files, by name
    loader  name of the transformers class that must load the files: `AutoTokenizer` or `PreTrainedTokenizerFast`. If
            neither class reproduces the training tokenizer, the name is `AutoTokenizer`
    notes   lines to log
    """

    files: Files
    loader: str
    notes: list[str]


def exported_tokenizer(files: Mapping[str, Path], config: str, tokenizer: Tokenizer) -> Exported:
    """Return the files of the run's tokenizer, in a form from which transformers reproduces the tokenizer.

    If there is no such form, return the tokenizer's own files. If `AutoTokenizer` cannot reproduce the tokenizer from
    any form, a note describes the first difference.

    files      the tokenizer's own files, by their name in the export
    config     content of the export's config.json
    tokenizer  the tokenizer that the run used, with its chat template
    """
    own: Files = dict(files)
    notes: list[str] = []
    if tokenizer.template_file is not None:
        own, notes = with_template(own, tokenizer.chat_template)
    sample = Sample(tokenizer)
    difference, fallback = None, None
    for form in _forms(own, tokenizer):
        with tempfile.TemporaryDirectory() as folder:
            place(form, Path(folder))
            (Path(folder) / "config.json").write_text(config, encoding="utf-8")
            found = sample.difference(AUTO, folder)
            if found is None:
                return Exported(form, AUTO, notes)
            difference = difference or found
            if fallback is None and sample.difference(FAST, folder) is None:
                fallback = form
    way_out = f"load the exported tokenizer with {FAST}" if fallback else "load the tokenizer that the run used"
    notes.append(
        f"{AUTO} of transformers {transformers.__version__} does not reproduce the training tokenizer from the "
        f"exported files: {difference}; {way_out}"
    )
    return Exported(fallback or own, FAST if fallback else AUTO, notes)


def with_template(files: Files, template: str) -> tuple[Files, list[str]]:
    """Replace the default chat template of tokenizer files. Returns the files, and lines to log.

    The named templates become files, except invalid templates and the template for tools, which are not exported. In
    conversations with tools, transformers would prefer the template for tools to the template used in training.
    """
    files = {name: content for name, content in files.items() if name != LEGACY_TEMPLATE}
    notes = []
    settings = _settings(files)
    listed = settings.pop("chat_template", None)
    if listed is not None:
        files[CONFIG] = _json(settings)
    for entry in listed if isinstance(listed, list) else []:
        name = entry.get("name") if isinstance(entry, dict) else None
        if name == "default":
            continue
        if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(entry.get("template"), str):
            notes.append(
                f"the chat template named {name!r} in {CONFIG} is not exported: its name is not a valid file name, or "
                "it has no text"
            )
            continue
        files.setdefault(f"{NAMED}/{name}.jinja", entry["template"].encode())
    if files.pop(f"{NAMED}/{FOR_TOOLS}.jinja", None) is not None:
        notes.append(
            f"the chat template named {FOR_TOOLS} is not exported: conversations with tools would use it instead of "
            "data.chat_template"
        )
    files[TEMPLATE] = template.encode()
    return files, notes


def place(files: Files, directory: Path) -> None:
    """Write ``files`` into ``directory``; create symbolic links for files that are given as paths."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content.absolute())
        else:
            path.write_bytes(content)


def _forms(own: Files, tokenizer: Tokenizer) -> Iterator[Files]:
    """Yield the forms of the tokenizer to try, the tokenizer's own files first."""
    yield own
    with suppress(Exception):  # an export must not fail because a library cannot convert the tokenizer
        yield from _other_forms(own, tokenizer)


def _other_forms(own: Files, tokenizer: Tokenizer) -> Iterator[Files]:
    """Yield the tokenizer converted to `tokenizer.json`, or saved again by transformers."""
    if Path(tokenizer.path).is_file():
        for converted in conversions(tokenizer.path):
            settings = {"tokenizer_class": FAST, "clean_up_tokenization_spaces": False, **converted.names}
            text = converted.tokenizer.to_str(pretty=True)
            yield {**own, "tokenizer.json": text.encode(), CONFIG: _json(settings)}
        return
    with tempfile.TemporaryDirectory() as folder:
        _read(AUTO, tokenizer.path).save_pretrained(folder)
        found = {name: Path(folder) / name for name in ("tokenizer.json", CONFIG)}
        saved = {name: path.read_bytes() for name, path in found.items() if path.is_file()}
    if len(saved) < 2:
        return
    settings = json.loads(saved[CONFIG])
    settings.pop("chat_template", None)
    settings |= {key: value for key, value in _settings(own).items() if key == "chat_template"}
    # Older versions of transformers lack the class TokenizersBackend; they load its files with PreTrainedTokenizerFast.
    for name in dict.fromkeys([settings["tokenizer_class"].replace("TokenizersBackend", FAST), FAST]):
        yield {**own, "tokenizer.json": saved["tokenizer.json"], CONFIG: _json({**settings, "tokenizer_class": name})}


class Sample:
    """A few texts, with the token ids that the run's tokenizer produces for them."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        size = tokenizer.vocab_size
        texts = [*TEXTS, *(tokenizer.decode([*range(start, size, 97)]) for start in (11, 53))]
        self.ids = list(zip(texts, tokenizer.encode_all(texts), strict=True))
        if tokenizer.chat_template is not None:
            self.ids += self._rendered()

    def _rendered(self) -> list[tuple[str, list[int]]]:
        turns = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[1]}]
        try:
            text = self.tokenizer.chat(turns, add_generation_prompt=False)
        except (TemplateError, ConfigError):  # a template can reject this conversation but accept the records
            return []
        return [(text, self.tokenizer.encode_all([text], rendered=True)[0])]

    def difference(self, loader: str, folder: str) -> str | None:
        """Describe the first difference between the run's tokenizer and the one that ``loader`` loads from ``folder``.

        Returns None if there is no difference.
        """
        try:
            return self._difference(_read(loader, folder))
        except Exception as error:  # files in a wrong form can fail in any of transformers' parsers
            return f"it cannot be loaded ({shorten((str(error).strip() or type(error).__name__).splitlines()[0], 80)})"

    def _difference(self, other: Any) -> str | None:
        mine = self.tokenizer
        for text, ids in self.ids:
            found = other(text, add_special_tokens=False)["input_ids"]
            if found != ids:
                return _apart(text, ids, found, mine, other)
        start = [*mine.prefix, *mine.encode("a")]
        if (found := other("a")["input_ids"][: len(start)]) != start:
            return f"with special tokens, the ids of 'a' begin with {found}, but began with {start} in training"
        for name in ("bos", "eos"):
            if (wanted := getattr(mine, f"{name}_id")) != (found := getattr(other, f"{name}_token_id")):
                return f"the id of its {name} token is {found}, but was {wanted} in training"
        own = mine.template_file is not None
        if mine.chat_template != (_default(other.chat_template) if own else other.chat_template):
            return "its chat template is not the one used in training"
        return None


def _read(loader: str, folder: str) -> Any:
    """Load the tokenizer in ``folder`` with the transformers class ``loader``. Warnings are hidden."""
    options = {"trust_remote_code": False} if loader == AUTO else {}
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(transformers, loader).from_pretrained(folder, local_files_only=True, **options)
    finally:
        transformers.logging.set_verbosity(level)


def _default(template: str | Mapping[str, str] | None) -> str | None:
    return template.get("default") if isinstance(template, Mapping) else template


def _apart(text: str, ids: Sequence[int], found: Sequence[int], mine: Tokenizer, other: Any) -> str:
    """Describe the first difference between two tokenizations of a text."""
    at = next((i for i, (a, b) in enumerate(zip(ids, found, strict=False)) if a != b), min(len(ids), len(found)))
    was, now = (list(part[at : at + 3]) for part in (ids, found))
    return (
        f"{shorten(repr(text), 60)} is tokenized as {now} ({other.decode(now)!r}) at position {at}, but training used "
        f"{was} ({mine.decode(was)!r})"
    )


def _settings(files: Mapping[str, bytes | Path]) -> dict[str, Any]:
    """Return the content of tokenizer_config.json; empty if the file is missing or cannot be read."""
    content = files.get(CONFIG)
    try:
        return {} if content is None else json.loads(content) if isinstance(content, bytes) else read_object(content)
    except (OSError, BadJson, ValueError):
        return {}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
