"""Tests of reading data records: accepted and rejected input, error messages, and the resulting pairs."""

import gzip
import json
import tracemalloc
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_engine.data import json_files
from dpo_engine.data.formats import FORMATS, BadRecord, Pair, checked, read_pairs, read_rows
from dpo_engine.data.records import BadLines, parse_record
from dpo_engine.errors import DataError
from support.malformed import (
    ALSO_GOOD,
    BYTES,
    CONVERSATIONS,
    FIELDS,
    GOOD,
    JSON,
    KINDS,
    LIMIT,
    MEANING,
    RIGHT,
    SYSTEM,
    USER,
    WRONG,
    between,
    dump,
)

OTHER = {"role": "user", "content": "Which is smaller?"}


def pairs(path, name="auto"):
    return [pair for _, found in read_pairs(path, name) for pair in found]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make(name, row):
    return checked(FORMATS[name](row))


def written(bad, path, monkeypatch):
    """Write the content of the case `bad` to `path`, and return `path`.

    For the kind "endless line", also lower the limit on line length.
    """
    if bad.kind == "endless line":
        monkeypatch.setattr(json_files, "MAX_RECORD_BYTES", LIMIT)
    path.write_bytes(bad.content)
    return path


class TestMalformed:
    def test_every_kind_of_malformed_record_is_covered(self):
        # test_tokenize.py covers responses that become equal only after tokenization.
        assert [len(group) for group in (JSON, BYTES, FIELDS, CONVERSATIONS, MEANING)] == [10, 7, 9, 8, 2]

    @pytest.mark.parametrize("bad", KINDS, ids=lambda bad: bad.kind)
    def test_malformed_record_is_reported_with_file_line_and_reason(self, bad, tmp_path, monkeypatch):
        path = written(bad, tmp_path / "pairs.jsonl", monkeypatch)
        if bad.says is None:
            assert len(pairs(path)) == bad.kept
            return
        with pytest.raises(DataError) as error:
            pairs(path)
        message = str(error.value)
        assert message.startswith(f"{path}:{bad.line}: ") and bad.says in message and "\n" not in message
        assert message.endswith("; to skip bad records, set data.on_bad_line=skip")

    @pytest.mark.parametrize("bad", KINDS, ids=lambda bad: bad.kind)
    def test_malformed_record_is_skipped_and_counted(self, bad, tmp_path, monkeypatch):
        path = written(bad, tmp_path / "pairs.jsonl", monkeypatch)
        lines = BadLines(skip=True)
        kept = list(read_pairs(path, "auto", lines))
        assert len(kept) == bad.kept
        if bad.says is None:
            assert lines.count == 0
        elif bad.kind != "UTF-16":  # in a UTF-16 file, every line is malformed
            assert lines.count == 1 and bad.says in lines.first[0]
            assert lines.first[0].startswith(f"{path}:{bad.line}: ")

    def test_messages_of_the_first_five_bad_lines_are_kept(self, tmp_path):
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(dump(GOOD) + b"\n" + b"no\n" * 9)
        lines = BadLines(skip=True)
        assert len(list(read_pairs(path, "auto", lines))) == 1
        assert lines.count == 9 and [text.split(":")[1] for text in lines.first] == ["2", "3", "4", "5", "6"]

    @pytest.mark.slow
    def test_gigabyte_line_is_not_held_in_memory(self, tmp_path):
        path = tmp_path / "pairs.jsonl"
        with path.open("wb") as stream:
            stream.truncate(2**30)
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=r":1: the line is longer than 16 MiB"):
                next(read_rows(path))
            assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            (b'{"a": -Infinity}', "-Infinity is not valid JSON"),
            (b'{"a": 1e999}', "number 1e999 is out of range"),
            (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
            (b'{"a": {"b": 1, "b": 2}}', "key 'b' occurs twice"),
            (b'{"a": "\xed\xa0\x80"}', "byte 8 is not UTF-8"),
            (b'{"a": ' + b'{"a": ' * 64 + b"1" + b"}" * 65, "nested deeper"),
            (b'{"a": "b}', "the text ends inside a value"),
            (b'{"a": tru', "invalid JSON at column 7"),
        ],
    )
    def test_invalid_json_is_refused(self, line, says):
        with pytest.raises(BadRecord, match=says.replace("(", r"\(")):
            parse_record(line)

    def test_brackets_in_text_do_not_count_as_nesting(self):
        code = '[{"\\' * 100
        assert parse_record(json.dumps({"a": code}).encode()) == {"a": code}
        wide = b'{"a": [' + b"[{}], " * 100 + b"[]]}"
        assert parse_record(wide) == json.loads(wide)
        deep = b"[" * 63 + b"]" * 63
        assert parse_record(b'{"a": ' + deep + b"}")["a"] == json.loads(deep)

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({**GOOD, "weight": 0}, "weight must be > 0, not 0"),
            ({**GOOD, "weight": -1.5}, "weight must be > 0, not -1.5"),
            ({**GOOD, "weight": "2"}, "weight must be a number, not text"),
            ({**GOOD, "weight": True}, "weight must be a number, not true or false"),
            ({**GOOD, "weight": 10**400}, "weight must be a finite number, not 1000"),
            ({**GOOD, "margin": [1]}, "margin must be a number, not a list"),
            (
                {**GOOD, "tools": [{"type": "function"}]},
                "tools needs a conversation; set data.columns={tools: null} to leave out this field",
            ),
            ({**GOOD, "chosen": "a\0b"}, "chosen contains a NUL character"),
        ],
    )
    def test_invalid_pair_fields_are_refused(self, row, says):
        with pytest.raises(BadRecord, match=says):
            make("text", row)

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({"prompt": [USER, RIGHT], "chosen": [RIGHT], "rejected": [WRONG]}, "the last turn of prompt must be from"),
            (
                {"prompt": [USER], "chosen": [OTHER, RIGHT], "rejected": [WRONG]},
                "does not start with the turns of prompt",
            ),
            ({"prompt": "no", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, "no user turn of chosen is equal"),
            ({"prompt": [], "chosen": [RIGHT], "rejected": [WRONG]}, "prompt is an empty list"),
            ({"prompt": [USER], "chosen": ["yes"], "rejected": [WRONG]}, r"chosen\[0\] must be a message"),
            ({"prompt": [USER], "chosen": [{"from": "gpt", "value": "a"}], "rejected": []}, "no role .found from"),
            ({"prompt": [USER], "chosen": [{**RIGHT, "tool_calls": [1]}], "rejected": []}, "tool_calls must be a li"),
            ({"prompt": [USER], "chosen": [{**RIGHT, "content": ""}], "rejected": []}, r"chosen\[0\].content is empty"),
            ({"prompt": [RIGHT, USER], "chosen": [RIGHT], "rejected": [WRONG]}, "found assistant at the start"),
            ({"prompt": 3, "chosen": [RIGHT], "rejected": [WRONG]}, "must be text or a list of messages, not a n"),
            ({"chosen": [USER, RIGHT], "rejected": [OTHER, RIGHT]}, "different prompts .first difference at turn 1"),
            ({"chosen": [USER, RIGHT], "rejected": [USER, RIGHT]}, "chosen and rejected are identical"),
        ],
    )
    def test_invalid_conversations_are_refused(self, row, says):
        with pytest.raises(BadRecord, match=says):
            make("messages", row)

    @pytest.mark.parametrize(
        ("chosen", "rejected", "says"),
        [
            ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d", "different prompts"),
            ("\n\nHuman: a\n\nHuman: a\n\nAssistant: b", "", r"two Human turns in a row \(turns 1 and 2\)"),
            ("\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b", "chosen is empty"),
            ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "", "chosen must end with an Assistant turn"),
            ("\n\nAssistant: a\n\nHuman: b\n\nAssistant: c", "", "must start with '.*Human:'"),
        ],
    )
    def test_invalid_hh_dialogues_are_refused(self, chosen, rejected, says):
        with pytest.raises(BadRecord, match=says):
            make("hh", {"chosen": chosen, "rejected": rejected})

    def test_misnamed_fields_get_a_hint(self, tmp_path):
        for row, says in [
            (
                {"question": "a", "chosen": "b", "rejected": "c"},
                "found 'question'.; set data.columns={prompt: question}",
            ),
            (
                {"prompt": "a", "accepted": "b", "rejected": "c"},
                "found 'accepted'.; set data.columns={chosen: accepted}",
            ),
            ({"prompt": "a", "chosen": "b", "rejectd": "c"}, "found 'rejectd'.; set data.columns={rejected: rejectd}"),
        ]:
            with pytest.raises(BadRecord, match=says):
                FORMATS["text"](row)


class TestFiles:
    def test_every_file_type_gives_the_same_rows(self, tmp_path):
        rows = [{**GOOD, "weight": 2.0, "margin": None}, {**ALSO_GOOD, "weight": 0.5, "margin": 1.5}]
        plain = write(tmp_path / "a.jsonl", rows)
        zipped = tmp_path / "a.jsonl.gz"
        zipped.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        table = tmp_path / "a.parquet"
        pa.parquet.write_table(pa.Table.from_pylist(rows), table)
        expected = [(1, rows[0]), (2, rows[1])]
        for path in (plain, zipped, table):
            assert list(read_rows(path)) == expected
            assert [(pair.weight, pair.margin) for pair in pairs(path)] == [(2.0, None), (0.5, 1.5)]

    def test_messages_in_parquet(self, tmp_path):
        row = {"prompt": [SYSTEM, USER], "chosen": [RIGHT], "rejected": [WRONG]}
        path = tmp_path / "a.parquet"
        pa.parquet.write_table(pa.Table.from_pylist([row]), path)
        assert pairs(path) == [Pair((SYSTEM, USER), RIGHT["content"], WRONG["content"])]

    def test_decimal_numbers_in_parquet(self, tmp_path):
        path = tmp_path / "a.parquet"
        rows = [{**GOOD, "weight": Decimal("0.5"), "margin": Decimal("1.25")}]
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        assert pairs(path) == [Pair(**GOOD, weight=0.5, margin=1.25)]

    def test_bad_parquet_rows_are_numbered(self, tmp_path):
        path = tmp_path / "a.parquet"
        pa.parquet.write_table(pa.Table.from_pylist([GOOD] * 300 + [{**GOOD, "chosen": None}]), path)
        with pytest.raises(DataError, match=r"a\.parquet:301: chosen must be text, not null"):
            pairs(path)
        broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
        table = pa.table({"prompt": ["a"], "chosen": broken, "rejected": ["c"]})
        pa.parquet.write_table(table, path)
        with pytest.raises(
            DataError, match=r"a\.parquet:1: 'chosen' cannot be read \(byte 1 of a text value is not UTF-8\)"
        ):
            pairs(path)

    def test_blank_lines_are_numbered_but_skipped(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"\n" + dump(GOOD) + b"\n \t\r\n" + dump(ALSO_GOOD))
        assert [line for line, _ in read_rows(path)] == [2, 4]

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("absent.jsonl", None, "no such file"),
            ("pairs.csv", b"a,b", "use .jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet or .arrow"),
            ("pairs.jsonl.gz", b"not gzip", ":1: cannot read further"),
            ("cut.jsonl.gz", gzip.compress(between(dump(GOOD)), mtime=0)[:-12], "cannot read further"),
            ("pairs.parquet", b"PAR1 and then nothing", "cannot be read as Parquet"),
        ],
    )
    def test_unreadable_files_are_refused(self, name, content, says, tmp_path):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError) as error:
            list(read_rows(path))
        assert str(error.value).startswith(str(path)) and says in str(error.value)


class TestFormats:
    def test_text_is_kept_verbatim(self):
        row = {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " Hello. ", "rejected": " No.\n"}
        assert make("text", row) == Pair("\n\nHuman: hi\n\nAssistant:", " Hello. ", " No.\n")

    @pytest.mark.parametrize(
        ("prompt", "chosen", "rejected"),
        [
            ([SYSTEM, USER], [RIGHT], [WRONG]),
            ([SYSTEM, USER], [SYSTEM, USER, RIGHT], [SYSTEM, USER, WRONG]),
            ([SYSTEM, USER], [SYSTEM, USER, RIGHT], [WRONG]),
            ([SYSTEM, USER], RIGHT["content"], WRONG["content"]),
            (..., [SYSTEM, USER, RIGHT], [SYSTEM, USER, WRONG]),
            (USER["content"], [SYSTEM, USER, RIGHT], [SYSTEM, USER, WRONG]),
        ],
    )
    def test_every_shape_of_messages_gives_the_same_pair(self, prompt, chosen, rejected):
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        row = {name: value for name, value in row.items() if value is not ...}
        expected = Pair((SYSTEM, USER), RIGHT["content"], WRONG["content"])
        assert make("messages", row) == make("auto", row) == expected

    def test_text_prompt_before_messages_becomes_a_user_turn(self):
        row = {"prompt": USER["content"], "chosen": [RIGHT], "rejected": [WRONG]}
        assert make("auto", row).prompt == (USER,)

    def test_turns_shared_by_both_responses_join_the_prompt(self):
        more = {"role": "user", "content": "Why?"}
        row = {"prompt": [USER], "chosen": [RIGHT, more, RIGHT], "rejected": [RIGHT, more, WRONG]}
        assert make("messages", row) == Pair((USER, RIGHT, more), RIGHT["content"], WRONG["content"])

    def test_hh_prompt_is_the_shared_dialogue(self):
        row = {
            "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant: See you.",
            "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant: See.",
        }
        expected = Pair("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:", " See you.", " See.")
        assert make("hh", row) == make("auto", row) == expected

    @pytest.mark.parametrize(
        ("chosen", "rejected", "expected"),
        [
            ("2 + 2 = 4", "2 + 2 = 5", ("2 + 2 =", " 4", " 5")),
            ("see the cat", "see the car", ("see the", " cat", " car")),
            ("Q: a?  A: b", "Q: a?  c", ("Q: a?", "  A: b", "  c")),
            ("Yes or no? Yes", "Yes or no? Yes.", ("Yes or no?", " Yes", " Yes.")),
            (" 2 + 2 = 4", " 2 + 2 = 5", (" 2 + 2 =", " 4", " 5")),
            ("  see the cat", "  see the car", ("  see the", " cat", " car")),
            (" yes, a", " yes! b", (" yes", ", a", "! b")),
            ("\u4eca\u5929\u597d", "\u4eca\u5929\u574f", ("\u4eca\u5929", "\u597d", "\u574f")),
        ],
    )
    def test_shared_text_becomes_the_prompt(self, chosen, rejected, expected):
        row = {"chosen": chosen, "rejected": rejected}
        assert make("implicit", row) == make("auto", row) == Pair(*expected)

    def test_responses_without_shared_text_are_refused(self):
        with pytest.raises(BadRecord, match="no common prefix"):
            make("implicit", {"chosen": "yes", "rejected": "no"})

    def test_first_usable_record_decides_the_format_of_a_file(self, tmp_path):
        path = write(tmp_path / "a.jsonl", [3, {"chosen": "is 1", "rejected": "is 2"}, GOOD])
        lines = BadLines(skip=True)
        assert [pair.prompt for _, (pair,) in read_pairs(path, "auto", lines)] == ["is"]
        assert "unexpected field 'prompt': the format takes the prompt from chosen" in lines.first[1]

    def test_unknown_format_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="unknown data format 'txt'; did you mean text"):
            pairs(write(tmp_path / "a.jsonl", [GOOD]), "txt")

    def test_plugin_format(self, tmp_path, monkeypatch):
        def scored(row):
            ranked = sorted(row["answers"], key=lambda answer: answer["score"])
            return Pair(row["question"], ranked[-1]["text"], ranked[0]["text"]) if len(ranked) > 1 else None

        monkeypatch.setitem(FORMATS, "scored", scored)
        answers = [{"text": "4", "score": 1.0}, {"text": "5", "score": 0.0}]
        rows = [
            {"question": "2 + 2", "answers": answers},
            {"question": "2 + 2", "answers": answers[:1]},
            {"question": "2 + 2"},
        ]
        lines = BadLines(skip=True)
        made = list(read_pairs(write(tmp_path / "a.jsonl", rows), "scored", lines))
        assert made == [(1, [Pair("2 + 2", "4", "5")]), (2, [])]
        assert lines.first[0].endswith(":3: data format 'scored' failed on this record (KeyError: 'answers')")
