"""Strict parser for untrusted JSON in UTF-8: it rejects duplicate keys, and limits size, depth and number of values."""

from __future__ import annotations

import codecs
import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

from dpo_engine.errors import quoted

MAX_DEPTH = 64
MAX_VALUES = 2**18
"""Limit on the number of values, because a few bytes in a file can become a value of about 200 bytes in memory."""
MAX_BYTES = 32 * 2**20

TOO_MANY = f"contains more than {MAX_VALUES:,} values"
KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


class BadJson(ValueError):
    """Invalid JSON; the message states the problem, and the caller adds the file and line."""


def kind(value: Any) -> str:
    """Return the type of a JSON value in words, such as "a list"."""
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


def read_object(path: str | Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises :class:`BadJson` if the content is invalid or too large, and `OSError` if
    the file cannot be read."""
    with open(path, "rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise BadJson(f"is larger than {MAX_BYTES >> 20} MiB")
    return parse_object(content)


MORE_TEXT = "there is more text after the end of the value"


def parse_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises :class:`BadJson` if the value is not an object, and whenever :func:`parse_value` raises it.
    """
    value = parse_value(content)
    if not isinstance(value, dict):
        raise BadJson(f"is {kind(value)}, not an object")
    return value


def parse_value(content: bytes) -> Any:
    """Parse a JSON value.

    Raises :class:`BadJson` for text that is not a single JSON value in UTF-8, and for duplicate keys, NaN, Infinity,
    numbers that are out of range, too many values, or too many levels.
    """
    if content.startswith(codecs.BOM_UTF8):
        raise BadJson("starts with a byte-order mark; save the file as UTF-8 without one")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadJson("is UTF-16; save the file as UTF-8")
    if b"\0" in content:
        raise BadJson("contains a NUL byte; is the file UTF-16 or damaged?")
    try:
        text = content.rstrip().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadJson(f"byte {error.start + 1} is not UTF-8") from error
    if len(text) > MAX_VALUES or text.count("[") + text.count("{") > MAX_DEPTH:
        _check_size(text)
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadJson(_what_is_wrong(text, error)) from error
    except BadJson:
        raise
    except ValueError as error:
        raise BadJson("contains a number with too many digits") from error


def _check_size(text: str) -> None:
    """Check the number of values and the nesting depth before parsing, without recursion.

    Commas and brackets inside strings are not counted.
    """
    plain = text.replace("\\\\", "").replace('\\"', "")
    if plain.count('"') > 4 * MAX_VALUES:  # a value has at most 4 quotes: 2 of its own and 2 of its key
        raise BadJson(TOO_MANY)
    outside = "".join(plain.split('"')[::2])
    if sum(map(outside.count, ",[{")) > MAX_VALUES:
        raise BadJson(TOO_MANY)
    brackets = re.sub(r"[^][{}]+", "", outside)
    if max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0) > MAX_DEPTH:
        raise BadJson(f"is nested deeper than {MAX_DEPTH} levels")


def _what_is_wrong(text: str, error: json.JSONDecodeError) -> str:
    """Describe a decoding error.

    The descriptions of common errors do not use the decoder's messages, which differ between Python versions.
    """
    rest = text[error.pos :].lstrip()
    if error.msg.startswith("Extra data"):
        what = MORE_TEXT
    elif error.msg.startswith("Unterminated string") or not rest:
        what = "the text ends inside a value; is it truncated?"
    elif rest[0] == "'":
        what = "keys and strings need double quotes"
    elif error.msg.startswith("Illegal trailing comma") or (rest[0] in "]}" and text[: error.pos].rstrip()[-1:] == ","):
        what = "there is a comma after the last item"
    else:
        what = error.msg
    place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
    return f"invalid JSON at {place}: {what}"


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(items)
    if len(row) < len(items):
        seen: set[str] = set()
        twice = next(key for key, _ in items if key in seen or seen.add(key))
        raise BadJson(f"key {quoted(twice)} occurs twice")
    return row


def _refuse_constant(name: str) -> float:
    raise BadJson(f"{name} is not valid JSON; remove the field")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise BadJson(f"number {digits[:20]} is out of range")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
