"""Tests of the strict JSON parser: limits checked before parsing, error messages, and quoting of a file's contents."""

import json

import pytest

from dpo_engine.errors import printable, quoted, shorten
from dpo_engine.strict_json import MAX_VALUES, BadJson, parse_object, read_object


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": [' + b"1," * MAX_VALUES + b"1]}", "contains more than 262,144 values"),
        (b'{"a": [' + b'"",' * 2 * MAX_VALUES + b'""]}', "contains more than 262,144 values"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "is nested deeper than 64 levels"),
        (b'{"a": 1,\n "a": 2}', "key 'a' occurs twice"),
        (b'{"a": 1,\n "b": }', "invalid JSON at line 2, column 7: Expecting value"),
        (b"[1]", "is a list, not an object"),
    ],
)
def test_invalid_json_is_refused(content, says):
    with pytest.raises(BadJson) as error:
        parse_object(content)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize("text", ['"[{,' * 9, '\\"[{,' * 9, "\\\\", '\\"', '\\\\\\"[' * 40])
def test_brackets_and_commas_in_text_are_not_counted(text):
    expected = {"a": text, text: [text] * 40}
    assert parse_object(json.dumps(expected).encode()) == expected


def test_file_over_the_size_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_engine.strict_json.MAX_BYTES", 2**20)
    (tmp_path / "a.json").write_bytes(b" " * (2**20 - 1) + b"{}")
    with pytest.raises(BadJson, match="is larger than 1 MiB"):
        read_object(tmp_path / "a.json")


def test_file_contents_are_escaped_in_messages():
    assert printable("a b\u00e9\u4eca\U0001f600") == "a b\u00e9\u4eca\U0001f600"
    assert printable("\x1b[1m\n\x9b\u202e\u2028\udce9") == r"\x1b[1m\n\x9b\u202e\u2028\udce9"
    long = "start" + "x" * 1000 + "end"
    assert shorten(long, 60).startswith("start") and shorten(long, 60).endswith("end") and len(shorten(long, 60)) == 60
    assert shorten("x" * 60, 60) == "x" * 60 and quoted("it's\x07") == '"it\'s\\x07"'
    assert len(quoted("\x1b" * 1000)) <= 80
