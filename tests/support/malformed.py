"""Unusual and malformed records, as they occur in real preference data. Each record is in a small file of its own,
usually between two good records."""

import codecs
import json
from dataclasses import dataclass

GOOD = {"prompt": "Which is larger, 3 or 5?", "chosen": "5 is larger.", "rejected": "3 is larger."}
ALSO_GOOD = {"prompt": "Which is smaller, 3 or 5?", "chosen": "3 is smaller.", "rejected": "5 is smaller."}
USER = {"role": "user", "content": "Which is larger?"}
RIGHT = {"role": "assistant", "content": "The second."}
WRONG = {"role": "assistant", "content": "The first."}
SYSTEM = {"role": "system", "content": "Be brief."}
LIMIT = 4096
"""Limit on a line's length in bytes, for tests of the kind "endless line". Only the malformed line is longer."""


@dataclass(frozen=True)
class Malformed:
    """A file with one unusual or malformed record.

    says  text that the error message must contain; None if the record is accepted
    line  line number of the record
    kept  number of pairs that remain if bad lines are skipped
    """

    kind: str
    content: bytes
    says: str | None
    line: int = 2
    kept: int = 2


def dump(row: object) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def between(line: bytes, good: dict = GOOD, also_good: dict = ALSO_GOOD) -> bytes:
    """Return a three-line file whose second line is `line`."""
    return dump(good) + b"\n" + line + b"\n" + dump(also_good) + b"\n"


def _record(kind: str, says: str | None, **changes: object) -> Malformed:
    """Return a file whose second record is a text pair with some changed fields. The value `...` removes a field."""
    row = {**GOOD, "prompt": "And now?", **changes}
    row = {name: value for name, value in row.items() if value is not ...}
    return Malformed(kind, between(dump(row)), says, kept=3 if says is None else 2)


def _talk(kind: str, says: str, chosen: list, rejected: list) -> Malformed:
    """Return a file whose second record consists of two complete conversations, without a separate prompt."""
    other = {**USER, "content": "Which is smaller?"}
    good, also_good = ({"chosen": [user, RIGHT], "rejected": [user, WRONG]} for user in (USER, other))
    return Malformed(kind, between(dump({"chosen": chosen, "rejected": rejected}), good, also_good), says)


TEXT = dump(GOOD).decode()

JSON = [
    Malformed("not JSON", between(b"prompt: hello"), "invalid JSON at column 1"),
    Malformed("cut line", between(dump(GOOD)[:60]), "the text ends inside a value; is it truncated?"),
    Malformed("two objects in one line", between(dump(GOOD) * 2), "the end of the value; write one record per line"),
    Malformed("trailing comma", between(TEXT.replace("}", ",}").encode()), "there is a comma after the last item"),
    Malformed("single quotes", between(TEXT.replace('"', "'").encode()), "keys and strings need double quotes"),
    Malformed("NaN literal", between(TEXT.replace("}", ', "margin": NaN}').encode()), "NaN is not valid JSON"),
    Malformed("array", between(dump(list(GOOD.values()))), "is a list, not an object"),
    Malformed("bare string", between(b'"hello"'), "is text, not an object"),
    Malformed("duplicate key", between(TEXT.replace("}", ', "chosen": "3"}').encode()), "key 'chosen' occurs twice"),
    Malformed("deep nesting", between(b"[" * 100_000 + b"]" * 100_000), "is nested deeper than 64 levels"),
]
BYTES = [
    Malformed("BOM", codecs.BOM_UTF8 + between(dump(GOOD)), "starts with a byte-order mark", line=1),
    Malformed("invalid UTF-8", between(dump(GOOD).replace(b"larger.", b"l\xe4rger.")), "is not UTF-8"),
    Malformed("UTF-16", between(dump(GOOD)).decode().encode("utf-16"), "is UTF-16", line=1, kept=0),
    Malformed("lone surrogate", between(TEXT.replace("5 is", "\\ud83d is").encode()), "contains an unpaired surrogate"),
    Malformed("NUL byte", between(dump(GOOD).replace(b"5 is", b"5\0is")), "contains a NUL byte"),
    Malformed("CRLF", between(dump({**GOOD, "prompt": "And now?"})).replace(b"\n", b"\r\n"), None, kept=3),
    Malformed("endless line", between(b"x" * 3 * LIMIT), "the line is longer than"),
]
FIELDS = [
    _record("prompt missing", "missing field 'prompt' (found chosen, rejected)", prompt=...),
    _record("chosen missing", "missing field 'chosen'", chosen=...),
    _record("rejected missing", "missing field 'rejected'", rejected=...),
    _record("null", "chosen must be text, not null", chosen=None),
    _record("number", "rejected must be text, not a number", rejected=3),
    _record("empty string", "rejected is empty", rejected=""),
    _record("only blanks", "chosen contains only whitespace", chosen=" \n\t"),
    _record("unknown extra key", None, annotator="A7", score=3),
    _record(
        "different field name",
        "(found 'chosen_response'); set data.columns={chosen: chosen_response}",
        chosen=...,
        chosen_response="5 is larger.",
    ),
]
CONVERSATIONS = [
    _talk("empty list", "chosen is an empty list", [], [USER, WRONG]),
    _talk("not alternating", "starting with user; found user after", [USER, USER, RIGHT], [USER, WRONG]),
    _talk("unknown role", "has the unknown role 'bot'", [USER, {**RIGHT, "role": "bot"}], [USER, WRONG]),
    _talk("no user turn", "has no user turn, so there is no prompt", [SYSTEM, RIGHT], [SYSTEM, WRONG]),
    _talk("last turn not assistant", "chosen must end with an assistant turn", [USER, RIGHT, USER], [USER, WRONG]),
    _talk(
        "different prompts",
        "chosen and rejected have different prompts (first difference at turn 1)",
        [USER, RIGHT],
        [{**USER, "content": "Which is smaller?"}, WRONG],
    ),
    _talk("content not text", "chosen[1].content must be text, not", [USER, {**RIGHT, "content": [{}]}], [USER, WRONG]),
    _talk("system not first", "a system turn after the first turn", [USER, SYSTEM, RIGHT], [USER, SYSTEM, WRONG]),
]
MEANING = [
    _record("same responses", "chosen and rejected are identical", chosen="5.", rejected="5."),
    _record("same after strip", "differ only in surrounding whitespace", chosen="5.", rejected=" 5.\n"),
]
KINDS = [*JSON, *BYTES, *FIELDS, *CONVERSATIONS, *MEANING]
