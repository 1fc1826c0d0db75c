"""Tests of `.json` files, which contain one array or JSON lines.

The records that are read must equal those that the json module returns. An error message about an array must give the
number of the faulty record.
"""

import json

import pytest

from dpo_engine.data import json_files
from dpo_engine.data.formats import read_pairs
from dpo_engine.data.json_files import count_records_of
from dpo_engine.data.records import BadLines, count_records, read_blocks, read_rows
from dpo_engine.data.sources import find_shards
from dpo_engine.errors import DataError
from support.built import ids, write

HARD = [
    {
        "prompt": 'a "quoted" [list], {of} \\ things\\',
        "chosen": '\\"]},[{',
        "rejected": "\u2028 caf\u00e9 \U0001f642\n",
    },
    {"prompt": "b", "chosen": {"c": [[], {}, [1, -2.5e3, None, True]]}, "rejected": ["\\", "\\\\", ""]},
    {},
    {"prompt": "c\n" * 5000 + "\\", "chosen": "x", "rejected": "y"},
]
FORMS = [
    lambda rows: json.dumps(rows),
    lambda rows: "\n \t" + json.dumps(rows, indent=4, ensure_ascii=False) + "\n\n",
    lambda rows: json.dumps(rows, separators=(",", ":")),
    lambda rows: "\n".join(map(json.dumps, rows)),
    lambda rows: "".join(json.dumps(row) + "\n\n" for row in rows),
]
DEMO = [  # the form of LLaMA-Factory's data/dpo_en_demo.json
    {
        "conversations": [{"from": "human", "value": f"Where is heron {number}?"}],
        "chosen": {"from": "gpt", "value": "By the water."},
        "rejected": {"from": "gpt", "value": "In the [sky], perhaps."},
    }
    for number in range(5)
]


def save(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_records_are_those_of_the_json_module(form, tmp_path):
    path = save(tmp_path / "a.json", FORMS[form](HARD))
    found = list(read_rows(path))
    assert [row for _, row in found] == HARD
    array = form < 3
    assert not array or json.loads(path.read_text(encoding="utf-8")) == HARD
    assert [place for place, _ in found] == ([1, 3, 5, 7] if form == 4 else [1, 2, 3, 4])
    assert count_records(find_shards(path)) == 4
    assert [row for _, row in read_rows(f"{path}[1:3]")] == [row for _, row in read_rows(f"{path}[-3:-1]")] == HARD[1:3]
    assert [row for block in read_blocks(path, most=3) for _, row in block.records(BadLines())] == HARD


def test_an_array_its_shards_and_json_lines_give_the_same_pairs(tmp_path, build):
    array = save(tmp_path / "demo.json", json.dumps(DEMO, indent=2))
    template = save(
        tmp_path / "t.jinja", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    )
    settings = {"chat_template": str(template), "on_template_fault": "allow"}
    expected = [ids(pair) for pair in build(DEMO, **settings)[0]]
    (tmp_path / "many").mkdir()
    for number, rows in enumerate((DEMO[:2], [], DEMO[2:])):
        save(tmp_path / f"many/part-{number}.json", json.dumps(rows))
    (tmp_path / "many/dataset_info.json").write_text("{}")
    for source in (array, tmp_path / "many", tmp_path / "many/part-*.json"):
        dataset, report = build(str(source), **settings)
        assert [ids(pair) for pair in dataset] == expected and report.read == 5
    assert dataset.place(4) == f"{tmp_path}/many/part-2.json:3"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1}, {"a": NaN}]', ":2: NaN is not valid JSON; remove the field"),
        ('[{"a": 1}, {"a": 1, "a": 2}]', ":2: key 'a' occurs twice"),
        ('[{"a": 1}, 5, {}]', ":2: is a number, not an object"),
        ('[{"a": 1}, [{}]]', ":2: is a list, not an object"),
        ('[{"a": 1},\n {"a": 1},]', ":3: there is no record after the last comma"),
        ("[{},, {}]", ":2: there is no record before a comma"),
        ('[{"a": 1} {"b": 2}]', ":1: invalid JSON at column 10: there is more text after the end of the value"),
        ('[{"a": 1], {}', ":1: invalid JSON at column 8: "),
        ('[{"a": 1}, {"a": "b', ":2: the array does not end; check that the file is complete"),
        ('[{"a": 1}, {"a": "b\\', ":2: the array does not end; check that the file is complete"),
        ('[{"a": 1}, {"a": 2}', ":2: the array does not end; check that the file is complete"),
        ('[{"a": 1}}', ":1: a closing brace has no opening brace; correct the brackets and braces"),
        ("[{}, {}] [{}]", ":2: there is more text after the end of the array; write all records as one array"),
        ("\ufeff[{}]", ":1: starts with a byte-order mark; save the file as UTF-8 without one"),
        ('{\n "data": [{}]\n}', ":1: the file is neither an array nor JSON lines; write the records as one array, "),
        ("[" * 100 + "]" * 100, ":1: is nested deeper than 64 levels"),
        ("[" + " " * 40 + '{"a": "' + "b" * 100 + '"}]', ":1: the record is longer than 0 MiB"),
    ],
)
def test_faults_name_the_record(text, says, tmp_path, monkeypatch):
    if "MiB" in says:
        monkeypatch.setattr(json_files, "MAX_RECORD_BYTES", 100)
    path = save(tmp_path / "a.json", text)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}{says}")


def test_records_before_and_after_a_bad_one_are_kept(tmp_path):
    path, bad = save(tmp_path / "a.json", '[{"a": 1}, {"a": NaN}, {"a": 3},]'), BadLines(skip=True)
    assert [(place, row["a"]) for place, row in read_rows(path, bad)] == [(1, 1), (3, 3)] and bad.count == 2
    assert count_records(find_shards(path)) == 4


@pytest.mark.parametrize("text", ["[]", " [\n] ", "", "\n"])
def test_empty_files_have_no_records(text, tmp_path):
    path = save(tmp_path / "a.json", text)
    assert list(read_rows(path)) == [] and count_records(find_shards(path)) == 0


def test_large_files_are_not_counted(tmp_path):
    path = save(tmp_path / "a.json", json.dumps(HARD))
    assert count_records_of(path, 100) is None and count_records_of(path, 10**6) == (4, path.stat().st_size)


@pytest.mark.parametrize("text", [json.dumps(DEMO), json.dumps(DEMO, indent=2)])
def test_an_array_in_a_jsonl_file_is_explained(text, tmp_path):
    path = save(tmp_path / "a.jsonl", text)
    with pytest.raises(DataError) as caught:
        list(read_pairs(path))
    says = "is a list, not an object; if the file is one array, its name must end with .json"
    assert str(caught.value).startswith(f"{path}:1: {says}")


def test_kinds_of_files_are_not_mixed(tmp_path):
    save(tmp_path / "a.json", "[]")
    write(tmp_path / "b.jsonl", DEMO)
    with pytest.raises(
        DataError, match=r"contains files of several types \(.json and .jsonl\); use one type per source"
    ):
        find_shards(tmp_path)
