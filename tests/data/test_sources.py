"""Tests of data sources: directories, globs, saved data sets, slices, and tables written by other tools.

Other tests check `data.max_pairs`, and that the error about a source names its key.
"""

import gzip
import itertools
import json
import pickle
import re
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets.arrow_reader import ReadInstruction

from dpo_engine.data import records
from dpo_engine.data.formats import read_pairs
from dpo_engine.data.records import BadLines, count_records, read_blocks, read_rows
from dpo_engine.data.sources import find_shards, locate
from dpo_engine.errors import ConfigError, DataError
from dpo_engine.verbs.summary import count
from support.built import data_config, ids, write
from support.malformed import GOOD, dump

datasets.disable_progress_bars()
ROWS = [{"prompt": f"question {n}", "chosen": f"right {n}", "rejected": f"wrong {n}"} for n in range(7)]


def write_as(path, rows):
    """Write rows in the format of the path's extension, and return the path. Tables are written without `datasets`."""
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines, mtime=0))
    elif path.name.endswith(".zst"):
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as stream:
            stream.write(lines)
    elif path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_bytes(lines)
    return path


def rows_of(source):
    return [row for _, row in read_rows(source)]


def refusal(source):
    with pytest.raises(DataError) as error:
        list(read_rows(source))
    return str(error.value)


class TestShards:
    @pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
    def test_directory_and_glob_are_one_source(self, suffix, tmp_path):
        for shard, part in (("b", ROWS[3:]), ("a", ROWS[:3])):
            write_as(tmp_path / "set" / f"part-{shard}.{suffix}", part)
        (tmp_path / "set" / "_SUCCESS").write_text("")
        (tmp_path / "set" / "README.md").write_text("# pairs")
        for source in (tmp_path / "set", f"{tmp_path}/set/part-*.{suffix}", f"{tmp_path}/**/*.{suffix}"):
            assert rows_of(source) == ROWS
            places = [locate(source, place) for place, _ in read_rows(source)]
            assert places == [
                f"{tmp_path}/set/part-{s}.{suffix}:{n}"
                for s, n in [*(("a", n) for n in (1, 2, 3)), *(("b", n) for n in (1, 2, 3, 4))]
            ]
            assert count_records(find_shards(source)) == 7

    def test_errors_and_places_name_the_shard(self, build, tmp_path):
        write_as(tmp_path / "set" / "a.jsonl", ROWS[:3])
        write_as(tmp_path / "set" / "b.jsonl", [ROWS[3], {"prompt": "p", "chosen": "c"}, ROWS[4]])
        with pytest.raises(DataError, match=rf"^{tmp_path}/set/b\.jsonl:2: missing field 'rejected'"):
            build(tmp_path / "set")
        dataset, report = build(tmp_path / "set", on_bad_line="skip")
        assert [dataset.place(n) for n in (0, 2, 3, 4)] == [
            f"{tmp_path}/set/{line}" for line in ("a.jsonl:1", "a.jsonl:3", "b.jsonl:1", "b.jsonl:3")
        ]
        assert dataset.subset([4]).place(0) == f"{tmp_path}/set/b.jsonl:3"
        assert report.bad_lines[0].startswith(f"{tmp_path}/set/b.jsonl:2: missing field 'rejected'")
        assert report.sources == [(str(tmp_path / "set"), 5)] and set(dataset.source_ids) == {0}

    def test_cache_depends_on_every_shard(self, build, tmp_path):
        for name, part in (("a", ROWS[:3]), ("b", ROWS[3:])):
            write_as(tmp_path / "set" / f"{name}.jsonl", part)
        source = tmp_path / "set"
        one = write_as(tmp_path / "whole.jsonl", ROWS)
        assert not build(source)[1].cached and build(source)[1].cached
        assert [ids(pair) for pair in build(source)[0]] == [ids(pair) for pair in build(one)[0]]
        for change in (
            lambda: write_as(source / "b.jsonl", ROWS[2:]),
            lambda: write_as(source / "c.jsonl", ROWS[:1]),
            lambda: (source / "a.jsonl").rename(source / "d.jsonl"),
        ):
            change()
            assert not build(source)[1].cached
        assert not build(f"{source}[:2]")[1].cached

    def test_shard_that_appears_while_read_is_refused(self, build, tmp_path, monkeypatch):
        from dpo_engine.data import encode_block

        write_as(tmp_path / "set" / "a.jsonl", ROWS)
        encode = encode_block.encode_pairs

        def grow(*args, **kwargs):
            write_as(tmp_path / "set" / "b.jsonl", ROWS)
            return encode(*args, **kwargs)

        monkeypatch.setattr(encode_block, "encode_pairs", grow)
        with pytest.raises(DataError, match=r"set: changed while it was being read"):
            build(tmp_path / "set")

    @pytest.mark.parametrize(
        ("files", "source", "says"),
        [
            (
                [],
                "set",
                "set: contains no data files; use a directory with .jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet ",
            ),
            (
                [],
                "set/*.jsonl",
                "set/*.jsonl: no such file, and the glob pattern matches no file; correct",
            ),
            (
                ["a.jsonl", "b.parquet"],
                "set",
                "set: contains files of several types (.jsonl and .parquet); use one type",
            ),
            (
                ["a.jsonl", "b.csv"],
                "set",
                "set: contains 'b.csv', which is not a data file; name the files with a glob",
            ),
            (["a.jsonl", "b.csv"], "set/*", "set/*: unsupported file type of "),
            (["a.jsonl", "deep/b.jsonl"], "set", "set: contains 'deep', which is not a data file; name the files with"),
            (["a.jsonl", "deep/b.jsonl"], "set/*", "deep, which is not a file; use a pattern that matches only files"),
            (
                ["train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"],
                "set",
                "set: its file names suggest several splits (test and train); select the files of one split with a",
            ),
        ],
    )
    def test_unclear_sources_are_refused(self, files, source, says, tmp_path):
        (tmp_path / "set").mkdir()
        for name in files:
            (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "set" / name).write_text("")
        assert says in refusal(f"{tmp_path}/{source}")

    def test_file_named_like_a_pattern_is_that_file(self, tmp_path):
        for name, row in (("a[b].jsonl", ROWS[0]), ("ab.jsonl", ROWS[1]), ("a.jsonl[:1]", ROWS[2])):
            write(tmp_path / name, [row])
        assert rows_of(tmp_path / "a[b].jsonl") == ROWS[:1]
        (tmp_path / "a[b].jsonl").unlink()
        assert rows_of(tmp_path / "a[b].jsonl") == ROWS[1:2]
        assert "a.jsonl[:1]: unsupported file type" in refusal(tmp_path / "a.jsonl[:1]")


class TestSaved:
    def test_saved_data_set_is_read_as_datasets_reads_it(self, tmp_path):
        whole = datasets.Dataset.from_list(ROWS)
        whole.select([5, 1, 3]).save_to_disk(tmp_path / "some", num_shards=2)
        assert rows_of(tmp_path / "some") == datasets.load_from_disk(str(tmp_path / "some")).to_list()
        assert [row["prompt"] for row in rows_of(f"{tmp_path}/some[1:]")] == ["question 1", "question 3"]
        write_as(tmp_path / "some" / "cache-0123.arrow", ROWS)  # Dataset.map leaves such files
        assert len(rows_of(tmp_path / "some")) == 3

    def test_splits_are_named(self, tmp_path):
        one = datasets.Dataset.from_list(ROWS)
        datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk(tmp_path / "both")
        assert f"both: contains several splits (test and train); name one, for example {tmp_path}/both/test" in refusal(
            tmp_path / "both"
        )
        assert rows_of(tmp_path / "both" / "test") == ROWS[:1]

    @pytest.mark.parametrize(
        ("state", "says"),
        [
            ({"_data_files": [{"filename": "../a.arrow"}]}, "state.json lists '../a.arrow'; it must list .arrow files"),
            ({"_data_files": [{"filename": "b.arrow"}]}, "state.json lists b.arrow, which is missing; copy the data"),
            ({"_data_files": []}, "contains no data files; save the data set again"),
            (
                {"_data_files": [{"filename": "a.arrow"}], "_indices_files": [{}]},
                "with a selection of rows that is not",
            ),
            (
                {"a": 1},
                "not the state file of a saved data set (_data_files is missing); save the data set again",
            ),
            ("{", "state.json is not the state file of a saved data set ("),
        ],
    )
    def test_damaged_states_are_refused(self, state, says, tmp_path):
        write_as(tmp_path / "a.arrow", ROWS)
        (tmp_path / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))
        assert says in refusal(tmp_path)


def test_rows_that_need_checks_are_parsed_before_they_are_sent(tmp_path):
    write_as(tmp_path / "a.arrow", ROWS)
    (block,) = read_blocks(tmp_path / "a.arrow")
    sent = replace(block, validate=True).to_send()
    assert sent.rows is None and block.to_send() is block
    assert list(pickle.loads(pickle.dumps(sent)).records(BadLines())) == list(block.records(BadLines()))


class TestSlices:
    @pytest.mark.parametrize("total", [1, 7, 30, 99, 250])
    def test_bounds_are_those_of_datasets(self, total, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(f'{{"n": {n}}}\n' for n in range(total)))
        bounds = ["", "0", "2", "1_0", "-3", "400", "-400", "5%", "33%", "50%", "100%", "-5%", "-50%", "-100%"]
        for start, stop in itertools.product(bounds, bounds):
            if start and stop and ("%" in start) != ("%" in stop):
                continue
            if any(
                b.startswith("-") and b.endswith("%") and round(int(b[:-1]) * total / 100) == 0 for b in (start, stop)
            ):
                # A negative percentage that rounds to 0 records is the end of the data in the engine, but the start in
                # datasets. See test_a_rounded_end_is_the_end.
                continue
            told = ReadInstruction.from_spec(f"train[{start}:{stop}]").to_absolute({"train": total})[0]
            expected = list(range(told.from_, told.to))
            source = f"{path}[{start}:{stop}]"
            if expected:
                assert [row["n"] for row in rows_of(source)] == expected, source
            else:
                wanted = rf"the slice selects (no|0 of {total}) records; change its bounds"
                assert re.search(wanted, refusal(source))

    def test_a_rounded_end_is_the_end(self, tmp_path):
        path = write(tmp_path / "a.jsonl", ROWS)
        assert rows_of(f"{path}[:-1%]") == ROWS
        assert "[-1%:]: the slice selects 0 of 7 records; change its bounds" in refusal(f"{path}[-1%:]")

    @pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
    def test_training_and_validation_slices_are_disjoint_over_shards(self, suffix, tmp_path, monkeypatch):
        monkeypatch.setattr(records, "BLOCK_LINES", 2)
        rows = [{"n": n} for n in range(23)]
        for shard, (start, stop) in enumerate([(0, 9), (9, 10), (10, 23)]):
            write_as(tmp_path / "set" / f"{shard}.{suffix}", rows[start:stop])
        for cut in range(0, 24):
            source = f"{tmp_path}/set[:{cut}]", f"{tmp_path}/set[{cut}:]"
            parts = [rows_of(one) if n else [] for one, n in zip(source, (cut, 23 - cut), strict=True)]
            assert parts == [rows[:cut], rows[cut:]]
        assert rows_of(f"{tmp_path}/set[:-20%]") + rows_of(f"{tmp_path}/set[-20%:]") == rows
        assert locate(f"{tmp_path}/set[9:11]", next(read_rows(f"{tmp_path}/set[9:11]"))[0]).endswith(f"1.{suffix}:1")

    def test_slice_of_an_empty_file(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"")
        assert refusal(f"{path}[:5]") == f"{path}[:5]: the slice selects 0 of 0 records; change its bounds"

    def test_bad_lines_count_as_records_and_are_errors_only_inside_the_slice(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"\n".join([dump(ROWS[0]), b"{", b"", dump(ROWS[1]), dump(ROWS[2])]))
        assert rows_of(f"{path}[2:3]") == ROWS[1:2] and rows_of(f"{path}[-2:]") == ROWS[1:3]
        assert refusal(f"{path}[1:]").startswith(f"{path}:2: invalid JSON")

    @pytest.mark.parametrize(
        ("part", "says"),
        [
            ("[a:5]", "is not a valid slice; write [start:stop] with whole numbers or percentages, such as [:1000]"),
            ("[:1.5%]", "is not a valid slice"),
            ("[10:20%]", "the slice has one bound in records and one in percent; use one unit for both"),
            ("[:101%]", "the slice has a bound beyond 100%; use percentages from -100% to 100%"),
            ("[5:5]", "the slice selects no records; change its bounds"),
            ("[9:]", "the slice selects 0 of 7 records; change its bounds"),
        ],
    )
    def test_invalid_slices_are_refused(self, part, says, tmp_path):
        path = write(tmp_path / "a.jsonl", ROWS)
        assert f"{path}{part}: {says}" in refusal(f"{path}{part}")

    def test_summary_counts_the_slice(self, tmp_path):
        path = write(tmp_path / "a.jsonl", ROWS)
        counts = [count(data_config(f"{path}{part}").train[0]) for part in ("", "[:3]", "[5:100]", "[-30%:]")]
        assert counts == [7, 3, 2, 2]

    def test_summary_reads_a_file_once_unless_it_changes(self, tmp_path, monkeypatch):
        from dpo_engine.verbs import summary

        read = []
        monkeypatch.setattr(summary, "count_records", lambda *given: read.append(1) or count_records(*given))
        source = data_config(write_as(tmp_path / "rows.jsonl", ROWS)).train[0]
        assert [count(source), count(source), len(read)] == [7, 7, 1]
        write_as(tmp_path / "rows.jsonl", ROWS[:3])
        assert [count(source), count(source), len(read)] == [3, 3, 2]


class TestMaxPairs:
    def test_first_usable_pairs_are_kept(self, tmp_path, tokenizer_path):
        from dpo_engine.data.tokenize import build_dataset
        from dpo_engine.data.tokenizer import load_tokenizer

        rows = [ROWS[0], {"prompt": "p"}, *ROWS[1:]]
        config = data_config(write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", ROWS), on_bad_line="skip")
        tokenizer = load_tokenizer(tokenizer_path)

        def build(limit):
            return build_dataset(config.train, tokenizer, config, tmp_path / "cache", max_pairs=limit)

        whole, report = build(None)
        assert len(whole) == 14 and "max_pairs" not in str(report)
        for limit in (1, 3, 9, 13):
            dataset, report = build(limit)
            assert [ids(pair) for pair in dataset] == [ids(whole[n]) for n in range(limit)]
            assert f"stopped after {limit} pair" in str(report) and report.kept == limit
            assert (report.read, report.bad) == (limit + 1, 1)  # the second record is bad
            assert build(limit)[1].cached and f"stopped after {limit} pair" in str(build(limit)[1])
        dataset, report = build(14)
        assert dataset.digest == whole.digest and "stopped" not in str(report)


class TestTables:
    def test_arrow_file_and_stream_formats(self, tmp_path):
        table = pa.Table.from_pylist(ROWS)
        for name, writer in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
            with pa.OSFile(f"{tmp_path}/{name}.arrow", "wb") as file, writer(file, table.schema) as sink:
                sink.write_table(table, max_chunksize=2)
            path = tmp_path / f"{name}.arrow"
            assert rows_of(path) == ROWS and [place for place, _ in read_rows(path)] == list(range(1, 8))
            path.write_bytes(path.read_bytes()[:-200])
            assert f"{name}.arrow: cannot be read as Arrow (" in refusal(path)

    def test_arrow_offsets_beyond_the_file_are_refused(self, tmp_path):
        table = pa.table({"prompt": ["a" * 1000, "b" * 1000], "chosen": ["b"] * 2, "rejected": ["c"] * 2})
        path = tmp_path / "a.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as sink:
            sink.write_table(table)
        whole, offsets = path.read_bytes(), np.array([0, 1000, 2000], dtype="<i4").tobytes()
        assert whole.count(offsets) == 1
        path.write_bytes(whole.replace(offsets, np.array([0, 10**9, 2000], dtype="<i4").tobytes()))
        with pytest.raises(DataError, match=r"a\.arrow:1: 'prompt' cannot be read \("):
            list(read_pairs(path))

    @pytest.mark.parametrize("damage", ["cut", "trailing", "other"])
    def test_damaged_zstd_is_refused(self, damage, tmp_path):
        path = write_as(tmp_path / "a.jsonl.zst", ROWS)
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-4], "trailing": whole + b"junk", "other": b"plain\n"}[damage])
        assert "cannot read further (" in refusal(path) and f"{path}:" in refusal(path)

    UNREADABLE = {
        "a date after the year 9999": pa.array([0, 253402300800000000], pa.timestamp("us")),
        "text that is not UTF-8": pa.StringArray.from_buffers(
            2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xff\xfe")
        ),
        "an unknown time zone": pa.array([None, 1], pa.timestamp("us", "Mars/Olympus")),
        "two fields with the same name": pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], ["x", "x"]),
    }

    @pytest.mark.parametrize(
        ("name", "suffix"),
        [(name, "arrow") for name in UNREADABLE] + [(name, "parquet") for name in list(UNREADABLE)[:3]],
    )  # pyarrow does not write two fields with the same name to Parquet
    def test_column_that_python_cannot_hold(self, name, suffix, tmp_path):
        table = pa.table({**{key: [row[key] for row in ROWS[:2]] for key in ROWS[0]}, "other": self.UNREADABLE[name]})
        path = tmp_path / f"a.{suffix}"

        def save(table):
            if suffix == "parquet":
                pa.parquet.write_table(table, path)
            else:
                with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as sink:
                    sink.write_table(table)

        save(table)
        assert [pairs[0].prompt for _, pairs in read_pairs(path)] == ["question 0", "question 1"]
        save(table.rename_columns(["prompt", "chosen", "rejected", "weight"]))
        bad = BadLines(skip=True)
        kept = [line for line, _ in read_pairs(path, "auto", bad)]
        assert 2 not in kept and f"a.{suffix}:2: 'weight' cannot be read (" in "\n".join(bad.first)

    def test_two_columns_of_one_name_are_refused(self, tmp_path):
        table = pa.table([["a"], ["b"], ["c"], ["d"]], names=["prompt", "chosen", "rejected", "chosen"])
        with pa.OSFile(f"{tmp_path}/a.arrow", "wb") as file, pa.ipc.new_file(file, table.schema) as sink:
            sink.write_table(table)
        pa.parquet.write_table(table, tmp_path / "a.parquet")
        for name in ("a.arrow", "a.parquet"):
            assert (
                refusal(tmp_path / name) == f"{tmp_path}/{name}: has two columns named 'chosen'; rename or remove one"
            )


def test_check_names_the_key_of_a_source(tmp_path):
    from dpo_engine.config.run import Config
    from dpo_engine.verbs.check import check

    write(tmp_path / "a.jsonl", [GOOD])
    raw = {"model": {"path": "m"}, "train": {"output_dir": "o"}, "data": {"train": f"{tmp_path}/b*.jsonl"}}
    assert (
        f"data.train[0].path={tmp_path}/b*.jsonl: no such file, and the glob pattern matches no file; "
        "correct the path" in check(Config.parse(raw))
    )
    with pytest.raises(ConfigError, match=r"data\.max_pairs=0: must be null, or a whole number of at least 1"):
        Config.parse({**raw, "data": {**raw["data"], "max_pairs": 0}})
