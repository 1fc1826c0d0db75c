"""Tests of tokenizing in worker processes: cache and errors are the same as with one process, and all workers end."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_engine.data import workers as workers_module
from dpo_engine.data.formats import FORMATS
from dpo_engine.data.workers import AHEAD, Unsuited, Workers, cores, default_count
from dpo_engine.errors import ConfigError, DataError
from dpo_engine.reporting.progress import Progress
from support.built import Builder, write
from support.malformed import RIGHT, SYSTEM, USER, WRONG
from support.tiny_tokenizers import byte_level

PLUGIN = """
import os, signal, time
from dpo_engine.data.formats import FORMATS
from dpo_engine.data.pair import Pair

@FORMATS.register("{name}")
def read(row):
    if row["prompt"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if row["prompt"] == "sleep":
        time.sleep(600)
    if row["prompt"] == "bug":
        raise ZeroDivisionError("a bug in a format")
    return Pair("plugin: " + row["prompt"], row["chosen"], row["rejected"])
"""


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def build(tmp_path, tokenizer_path):
    return Builder(tmp_path, tokenizer_path)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Import a module that registers a data format. Return the module's name, which is also the format's name."""
    name = f"plugin_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(PLUGIN.format(name=name))
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__(name)
    yield name
    del FORMATS[name], sys.modules[name]


def text_rows(count):
    return [
        {"prompt": f"which is larger {n} ?", "chosen": f"the first {n}", "rejected": f"second {n}"}
        for n in range(count)
    ]


def file_digest(folder):
    (cache,) = folder.glob("*.arrow")
    return hashlib.sha256(cache.read_bytes()).hexdigest()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, within_s=10.0):
    deadline = time.monotonic() + within_s
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# Workers import the functions `double`, `settings` and `sleep` from this module.


def double(number):
    if number < 0:
        raise DataError(f"{number} is negative")
    if number == 1000:
        raise SystemError("1000")
    return 2 * number


def settings(_):
    names = ("TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")
    handlers = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGTERM, signal.SIGINT)]
    return [os.environ[name] for name in names], handlers, os.getppid(), sys.path


def sleep(_):
    time.sleep(600)


class TestMap:
    def test_results_come_in_the_order_of_the_tasks(self):
        taken = []

        def tasks():
            for number in range(50):
                taken.append(number)
                yield number

        with Workers(2) as pool:
            pool.load(double)
            results = pool.map(tasks())
            for number, result in enumerate(results):
                assert result == 2 * number
                assert len(taken) - number <= 2 * AHEAD + 1
            pool.load(settings)
            (found,) = pool.map([0])
        assert found == (["false", "1"], [True, True], os.getpid(), sys.path)

    def test_errors_come_in_the_place_of_their_results(self):
        def tasks():
            yield from (1, 2)
            raise DataError("the reader failed")

        with Workers(2) as pool:
            pool.load(double)
            results = pool.map(tasks())
            assert [next(results), next(results)] == [2, 4]
            with pytest.raises(DataError, match="the reader failed"):
                next(results)
            results = pool.map([5, -1, -2])
            assert next(results) == 10
            with pytest.raises(DataError, match="-1 is negative"):
                next(results)

    def test_other_exceptions_keep_their_type(self):
        with Workers(1) as pool:
            pool.load(double)
            with pytest.raises(SystemError, match="1000"):
                list(pool.map([1000]))

    def test_function_that_no_worker_can_load_is_refused(self):
        with Workers(1) as pool:
            with pytest.raises(Unsuited, match="[Pp]ickl"):
                pool.load(lambda task: task)

    def test_process_that_cannot_be_started_is_refused(self, monkeypatch):
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(Unsuited, match="No such file"):
            Workers(1)


class TestTheSameDataSet:
    def sources(self, tmp_path, plugin):
        text = text_rows(700)
        text[300] = {**text[300], "chosen": " "}
        text[400] = {**text[400], "chosen": "same", "rejected": "same"}
        talk = [
            {"prompt": [SYSTEM, {**USER, "content": f"{n} ?"}], "chosen": [RIGHT], "rejected": [WRONG]}
            for n in range(300)
        ]
        packed = tmp_path / "talk.jsonl.gz"
        packed.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in talk)))
        table = tmp_path / "rows.parquet"
        pa.parquet.write_table(pa.Table.from_pylist(text_rows(600)), table)
        broken = tmp_path / "broken.jsonl"
        lines = [json.dumps(row) for row in text_rows(600)]
        lines[0], lines[1], lines[520] = "{", "", "[1]"
        broken.write_text("\n".join(lines))
        own = write(tmp_path / "own.jsonl", text_rows(300))
        return [text, str(packed), str(table), str(broken), {"path": str(own), "format": plugin}]

    def test_bytes_and_report_do_not_depend_on_the_number_of_workers(self, build, tmp_path, plugin):
        sources = self.sources(tmp_path, plugin)
        shared = {"on_bad_line": "skip", "max_length": 60, "truncation": "drop"}
        made = [build(*sources, cache=f"cache{count}", workers=count, **shared) for count in (1, 2)]
        (one, report), (two, other) = made
        assert file_digest(tmp_path / "cache1") == file_digest(tmp_path / "cache2")
        assert report == other and str(report) == str(other)
        assert (report.read, report.bad, one.digest) == (2499, 4, two.digest)
        assert [line.split("/")[-1].split(": ")[0] for line in report.bad_lines] == [
            "0.jsonl:301",
            "0.jsonl:401",
            "broken.jsonl:1",
            "broken.jsonl:521",
        ]
        assert two.place(len(two) - 1).endswith("own.jsonl:300")

    @pytest.mark.slow
    def test_50_000_lines(self, build, tmp_path):
        path = write(tmp_path / "long.jsonl", text_rows(50_000))
        for count in (1, 2):
            dataset, report = build(path, cache=f"cache{count}", workers=count)
            assert len(dataset) == report.read == 50_000
        assert file_digest(tmp_path / "cache1") == file_digest(tmp_path / "cache2")


class TestErrors:
    @pytest.mark.parametrize("count", [1, 2])
    def test_first_bad_record_of_the_file_is_named(self, count, build, tmp_path):
        """Check that the error names line 601, although the error in line 602 of the same block is found first.

        Line 602 is not valid JSON. A block is parsed before it is tokenized, and only tokenizing shows that line 601 is
        bad.
        """
        rows = text_rows(1200)
        rows[600] = {**rows[600], "chosen": "<|im_end|>"}
        path = write(tmp_path / "bad.jsonl", rows)
        lines = path.read_text().splitlines()
        lines[601] = lines[1100] = "{"
        path.write_text("\n".join(lines))
        with pytest.raises(
            DataError, match=r"bad\.jsonl:601: chosen has no tokens apart from the EOS; to skip"
        ) as error:
            build(path, workers=count)
        assert "\n" not in str(error.value) and not list((tmp_path / "cache").iterdir())

    @pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_truncated_file_is_reported_after_earlier_bad_records(self, count, build, tmp_path):
        rows = [json.dumps({**row, "prompt": os.urandom(30).hex()}) for row in text_rows(1000)]
        whole = gzip.compress("\n".join(rows).encode())
        path = tmp_path / "cut.jsonl.gz"
        path.write_bytes(whole[: len(whole) * 3 // 4])
        with pytest.raises(DataError, match=r"cut\.jsonl\.gz:\d+: cannot read further"):
            build(path, workers=count)
        rows[500] = "{"
        whole = gzip.compress("\n".join(rows).encode())
        path.write_bytes(whole[: len(whole) * 3 // 4])
        with pytest.raises(DataError, match=r"cut\.jsonl\.gz:501: invalid JSON"):
            build(path, workers=count)

    def test_killed_worker_is_reported(self, build, plugin, tmp_path):
        rows = text_rows(600)
        rows[500]["prompt"] = "die"
        path = write(tmp_path / "d.jsonl", rows)
        message = (
            r"data\.workers=2: a worker process was killed by SIGKILL; if the machine ran out of memory, set data\."
        )
        with pytest.raises(ConfigError, match=message):
            build({"path": str(path), "format": plugin}, workers=2)
        assert not list((tmp_path / "cache").iterdir())

    def test_bug_in_a_format_is_raised(self, build, plugin, tmp_path):
        rows = text_rows(600)
        rows[500]["prompt"] = "bug"
        path = write(tmp_path / "d.jsonl", rows)
        with pytest.raises(ZeroDivisionError, match="a bug in a format"):
            build({"path": str(path), "format": plugin}, workers=2)

    def test_format_that_no_worker_can_import(self, build, tmp_path, monkeypatch):
        """With `data.workers=2`, the format is refused. Without `data.workers`, the main process tokenizes the data."""
        monkeypatch.setitem(FORMATS, "local", lambda row: FORMATS["text"](row))
        source = {"path": str(write(tmp_path / "d.jsonl", text_rows(300))), "format": "local"}
        message = r"data\.workers=2: .*d\.jsonl cannot be tokenized in worker processes \(.*[Pp]ickl.*\); set data\."
        with pytest.raises(ConfigError, match=message):
            build(source, workers=2)
        monkeypatch.setattr("dpo_engine.data.tokenize.default_count", lambda size: 2)
        assert build(source)[1].kept == 300

    def test_processes_that_cannot_be_started(self, build, monkeypatch):
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(ConfigError, match=r"data\.workers=2: worker processes cannot be started \(.*No such file"):
            build(text_rows(300), workers=2)
        monkeypatch.setattr("dpo_engine.data.tokenize.default_count", lambda size: 2)
        assert build(text_rows(300))[1].kept == 300

    def test_progress_can_stop_the_work(self, build, tmp_path, tokenizer_path):
        from dpo_engine.data.tokenize import build_dataset
        from dpo_engine.data.tokenizer import load_tokenizer
        from support.built import data_config

        def stop():
            raise KeyboardInterrupt

        config = data_config(write(tmp_path / "d.jsonl", text_rows(600)), workers=2)
        with pytest.raises(KeyboardInterrupt):
            build_dataset(
                config.train, load_tokenizer(tokenizer_path), config, tmp_path / "cache", progress=Progress(stop)
            )
        assert not list((tmp_path / "cache").iterdir())


PARENT = """
    import signal
    import sys
    from dpo_engine.data.workers import Workers
    from test_workers import sleep

    signal.signal(signal.SIGINT, signal.default_int_handler)  # without this, a background job ignores SIGINT

    pool = Workers(2)
    pool.load(sleep)
    print(*(worker.process.pid for worker in pool._workers), flush=True)
    list(pool.map([1, 2, 3, 4]))
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT))]
)
def test_workers_end_with_their_parent(number):
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    with parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        if number == signal.SIGKILL:
            parent.send_signal(number)
        else:  # send the signal to the whole process group, as a terminal or a scheduler does
            os.killpg(parent.pid, number)
        parent.wait(timeout=10)
    assert gone(pids)


class TestDefaultNumber:
    def test_cores_of_this_process(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
        monkeypatch.setattr(workers_module, "QUOTA", "/nowhere")
        assert cores() == 12

    @pytest.mark.parametrize(("quota", "count"), [("max 100000", 12), ("400000 100000", 4), ("50000 100000", 1)])
    def test_quota_of_the_container(self, quota, count, tmp_path, monkeypatch):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
        monkeypatch.setattr(workers_module, "QUOTA", str(tmp_path / "cpu.max"))
        assert cores() == count

    @pytest.mark.parametrize(("megabytes", "count"), [(1, 1), (17, 2), (30, 3), (10_000, 32)])
    def test_small_files_need_no_workers(self, megabytes, count, monkeypatch):
        monkeypatch.setattr(workers_module, "cores", lambda: 96)
        assert default_count(megabytes * 2**20) == count
