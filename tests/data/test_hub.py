"""Tests of Hub ids: precedence of local paths, downloads from a local server, offline use of caches, and errors."""

import json
import os
import threading

import pytest

from dpo_engine.data import hub
from dpo_engine.data.hub import Repo, commits, data_repo, model_directory, model_repo, snapshot
from dpo_engine.data.records import read_rows
from dpo_engine.data.sources import find_shards, locate
from dpo_engine.errors import ConfigError, DataError
from support.hub_server import fill_cache, forget, use_hub

ROWS = [{"prompt": f"question {n}", "chosen": f"right {n}", "rejected": f"wrong {n}"} for n in range(4)]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    use_hub(monkeypatch, tmp_path, None)
    yield tmp_path / "hub"
    forget()


def folder_of(path, **files):
    """Write files, and return their folder. In argument names, `__` stands for a dot, and `_in_` for a slash."""
    for name, content in files.items():
        file = path / name.replace("__", ".").replace("_in_", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def go_offline(monkeypatch):
    from huggingface_hub import constants

    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


MODEL = {
    "config__json": "{}",
    "model__safetensors": "weights",
    "tokenizer__json": "{}",
    "merges__txt": "a b",
    "chat_template__jinja": "x",
    "spiece__model": "x",
    "additional_chat_templates_in_rag__jinja": "y",
}
UNWANTED = {
    "pytorch_model__bin": "pickle",
    "modeling_own__py": "import os",
    "onnx_in_config__json": "{}",
    "fp16_in_model__safetensors": "copy",
    "consolidated__safetensors": "copy",
}


class TestIds:
    def test_ids_are_read(self):
        assert model_repo("org/name-1.5B") == Repo("model", "org/name-1.5B")
        assert model_repo("org/name@refs/pr/1") == Repo("model", "org/name", "refs/pr/1")
        assert model_repo("org/name", "model.tokenizer") == Repo("model", "org/name", weights=False)
        assert data_repo("org/name") == (Repo("dataset", "org/name"), None, None)
        assert data_repo("org/name/small@v1.0:train_prefs") == (
            Repo("dataset", "org/name", "v1.0"),
            "small",
            "train_prefs",
        )
        assert data_repo("org/name:test") == (Repo("dataset", "org/name"), None, "test")

    @pytest.mark.parametrize(
        "path",
        [
            "name",
            "/org/name",
            "./org/name",
            "../org/name",
            "org/name/deep",
            "runs/pairs.jsonl",
            "org/name@",
            "a b/c",
            "org/t.model",
        ],
    )
    def test_other_texts_are_paths(self, path):
        assert model_repo(path) is None and model_directory(path) == hub.Path(path)

    def test_data_paths_are_not_ids(self):
        for path in ("data/train.jsonl", "a/b/c/d", "data/*.jsonl", "data/x.csv:train", "data/x.jsonl.gz"):
            assert data_repo(path) is None

    def test_local_path_comes_first(self, offline, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folder_of(tmp_path / "org" / "name", pairs__jsonl=lines(ROWS))
        assert model_directory("org/name") == hub.Path("org/name")
        assert [row for _, row in read_rows("org/name[1:3]")] == ROWS[1:3]


class TestCache:
    def test_cached_model_is_used_offline(self, offline, tmp_path, tiny_hf):
        from dpo_engine.data.tokenizer import load_tokenizer
        from dpo_engine.model.architecture import read_architecture
        from dpo_engine.model.weights.files import CheckpointFiles
        from support.tiny_tokenizers import byte_level

        source = tiny_hf("llama", num_hidden_layers=2)
        directory = fill_cache(offline, "model", "org/tiny", source)
        assert model_directory("org/tiny") == directory
        assert read_architecture("org/tiny") == read_architecture(source)
        name = "model.embed_tokens.weight"
        assert CheckpointFiles("org/tiny").digest(name) == CheckpointFiles(source).digest(name)
        fill_cache(offline, "model", "org/words", byte_level(tmp_path / "tokenizer"), "v2")
        found = load_tokenizer("org/words@v2")
        assert found.content == load_tokenizer(tmp_path / "tokenizer").content
        assert commits()[0] == f"Hub model org/tiny: commit {directory.name}"

    def test_error_of_an_absent_model_names_path_id_and_fetch(self, offline):
        from dpo_engine.model.architecture import read_architecture

        with pytest.raises(ConfigError) as error:
            read_architecture("org/absent", "reference.path")
        assert str(error.value) == (
            "reference.path=org/absent: not an existing directory, and not a usable Hub id: the model is not in the "
            f"cache {offline}, and HF_HUB_OFFLINE is set; run `dpo-engine fetch RUN.yaml` on a machine with a network"
        )

    def test_error_of_absent_data_names_path_id_and_fetch(self, offline):
        with pytest.raises(DataError) as error:
            find_shards("org/absent:train[:5]")
        assert str(error.value).startswith(
            "org/absent:train[:5]: not an existing file or directory, and not a usable Hub id: the data set is not in "
        )
        assert "run `dpo-engine fetch RUN.yaml`" in str(error.value)

    def test_cached_data_set_is_used_offline(self, offline, tmp_path):
        files = {f"data_in_{split}-00000-of-00001__jsonl": lines(ROWS[n:]) for n, split in enumerate(("train", "test"))}
        directory = fill_cache(offline, "dataset", "org/pairs", folder_of(tmp_path / "pairs", **files))
        assert [row for _, row in read_rows("org/pairs:test[:50%]")] == ROWS[
            1:3
        ]  # half of 3 records is 1.5, rounded to 2
        assert locate("org/pairs:test", 2) == f"{directory}/data/test-00000-of-00001.jsonl:2"


class TestDownload:
    def test_only_wanted_files_are_downloaded(self, server, tmp_path):
        commit = server.add("model", "org/m", folder_of(tmp_path / "m", **MODEL, **UNWANTED))
        directory = model_directory("org/m")
        assert directory == tmp_path / "hub" / "models--org--m" / "snapshots" / commit
        names = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
        assert names == {name.replace("__", ".").replace("_in_", "/") for name in MODEL}
        asked = len(server.asked)
        assert model_directory("org/m") == directory and len(server.asked) == asked

    def test_tokenizer_is_downloaded_without_weights(self, server, tmp_path):
        server.add("model", "org/m", folder_of(tmp_path / "m", **MODEL))
        directory = model_directory("org/m", "model.tokenizer")
        assert (directory / "tokenizer.json").exists() and not (directory / "model.safetensors").exists()
        assert (model_directory("org/m") / "model.safetensors").exists()

    def test_revisions_are_kept_apart_offline(self, server, tmp_path, monkeypatch):
        first = server.add("model", "org/m", folder_of(tmp_path / "m", config__json="1"), "main", "v1")
        second = server.add("model", "org/m", folder_of(tmp_path / "m", config__json="2"), "main")
        for path, commit in (("org/m", second), ("org/m@v1", first), (f"org/m@{first}", first)):
            assert model_directory(path).name == commit
        server.add("model", "org/m", folder_of(tmp_path / "m", config__json="3"), "main")
        assert model_directory("org/m").name == second  # a process keeps the snapshot that it used first
        go_offline(monkeypatch)
        for path, commit in (("org/m", second), ("org/m@v1", first), (f"org/m@{first}", first)):
            assert model_directory(path).name == commit
        with pytest.raises(
            ConfigError, match=r"org/m@v2: not an existing directory, and not a usable Hub id: the model is not in the"
        ):
            model_directory("org/m@v2")

    def test_incomplete_snapshot_is_refused_offline(self, server, tmp_path, monkeypatch):
        server.add("model", "org/m", folder_of(tmp_path / "m", **MODEL))
        (model_directory("org/m") / "model.safetensors").unlink()
        go_offline(monkeypatch)
        with pytest.raises(ConfigError, match="the model is not complete in the cache .*, and HF_HUB_OFFLINE is set"):
            model_directory("org/m")

    def test_cache_is_used_if_the_hub_is_unreachable(self, server, tmp_path, monkeypatch):
        commit = server.add("model", "org/m", folder_of(tmp_path / "m", **MODEL))
        model_directory("org/m")
        use_hub(monkeypatch, tmp_path, "http://127.0.0.1:9")
        assert model_directory("org/m").name == commit
        with pytest.raises(ConfigError, match="the model is not in the cache .*, and the Hub cannot be reached; run"):
            model_directory("org/other")

    @pytest.mark.parametrize(
        ("path", "says"),
        [
            ("org/none", "the Hub has no such model, or the model is private; correct the name, or set HF_TOKEN"),
            ("org/m@v9", "the model has no revision v9; correct the revision"),
            ("org/gated", "the model is gated; request access on its page, and set HF_TOKEN"),
        ],
    )
    def test_refusals_of_the_hub(self, path, says, server, tmp_path):
        for name in ("org/m", "org/gated"):
            server.add("model", name, folder_of(tmp_path / "m", **MODEL))
        server.gated.add("org/gated")
        with pytest.raises(ConfigError) as error:
            model_directory(path)
        assert str(error.value) == f"model.path={path}: not an existing directory, and not a usable Hub id: {says}"
        asked = len(server.asked)
        with pytest.raises(ConfigError):
            model_directory(path)
        assert len(server.asked) == asked  # no second request to the Hub

    def test_full_disk_is_an_error_of_one_line(self, server, tmp_path, monkeypatch):
        import huggingface_hub

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
        with pytest.raises(
            ConfigError, match=r"the model cannot be downloaded \(\[Errno 28\] No space left on device\)"
        ):
            model_directory("org/m")

    def test_cache_without_locks_is_read(self, server, tmp_path):
        commit = server.add("model", "org/m", folder_of(tmp_path / "m", **MODEL))
        model_directory("org/m")
        (tmp_path / "hub" / ".locks").rename(tmp_path / "locks")
        (tmp_path / "hub" / ".locks").write_text("not a directory")
        forget()
        assert model_directory("org/m").name == commit

    def test_processes_take_turns(self, server):
        inside, leave, order = os.pipe(), os.pipe(), []
        child = os.fork()
        if child == 0:
            with hub._turn():
                os.write(inside[1], b"x")
                os.read(leave[0], 1)
            os._exit(0)
        os.read(inside[0], 1)

        def wait():
            with hub._turn():
                order.append("second")

        waiting = threading.Thread(target=wait, daemon=True)
        try:
            waiting.start()
            waiting.join(0.5)
            assert not order
        finally:
            os.write(leave[1], b"x")
        waiting.join(20)
        assert order == ["second"] and os.waitpid(child, 0)[1] == 0


class TestData:
    def test_split_slice_and_revision(self, server, tmp_path, monkeypatch):
        old = folder_of(tmp_path / "old", data_in_train__jsonl=lines(ROWS[:2]), own__py="import os")
        server.add("dataset", "org/d", old, "v1")
        server.add(
            "dataset", "org/d", folder_of(tmp_path / "new", train__jsonl=lines(ROWS), test__jsonl=lines(ROWS[3:]))
        )
        for _ in range(2):
            assert [row for _, row in read_rows("org/d:train")] == ROWS
            assert [row for _, row in read_rows("org/d:train[-50%:]")] == ROWS[2:]
            assert [row for _, row in read_rows("org/d@v1")] == ROWS[:2]  # this revision has only one split
            assert not list(tmp_path.rglob("hub/**/own.py"))
            go_offline(monkeypatch)

    def test_configs(self, server, tmp_path, monkeypatch):
        card = "---\nconfigs:\n" + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*\n" for name in ("easy", "hard")
        )
        files = {f"{name}_in_a__jsonl": lines([row]) for name, row in zip(("easy", "hard"), ROWS, strict=False)}
        server.add("dataset", "org/d", folder_of(tmp_path / "d", README__md=card + "---\n", **files))
        assert [row for _, row in read_rows("org/d/hard:train")] == ROWS[1:2]
        for source, says in {
            "org/d:train": "the data set has several configs; name one of its configs (easy and hard), as in "
            "org/d/easy:train",
            "org/d@main:train": "the data set has several configs; name one of its configs (easy and hard), as in "
            "org/d/easy@main:train",
            "org/d/odd": "the data set has no config odd; name one of its configs (easy and hard), as in "
            "org/d/easy:train",
            "org/d/easy:test": "the data set has no split test; name one of its splits (train), as in org/d/easy:train",
        }.items():
            with pytest.raises(DataError) as error:
                find_shards(source)
            assert str(error.value) == f"{source}: not an existing file or directory, and not a usable Hub id: {says}"

    def test_splits_must_be_named_if_there_are_several(self, server, tmp_path):
        server.add("dataset", "org/d", folder_of(tmp_path / "d", train__jsonl=lines(ROWS), test__jsonl=lines(ROWS)))
        with pytest.raises(
            DataError,
            match="the data set has several splits; name one of its splits .test and train., as in org/d:test",
        ):
            find_shards("org/d")
        with pytest.raises(DataError, match="the data set has no config odd; remove /odd"):
            find_shards("org/d/odd:train")

    @pytest.mark.parametrize("suffix", ["json", "csv"])
    def test_other_types_are_converted_by_datasets(self, suffix, server, tmp_path, monkeypatch):
        rows = [ROWS[0], {**ROWS[1], "chosen": 'a "quoted", text'}]
        text = json.dumps(rows)
        if suffix == "csv":
            text = 'prompt,chosen,rejected\nquestion 0,right 0,wrong 0\nquestion 1,"a ""quoted"", text",wrong 1\n'
        server.add("dataset", "org/d", folder_of(tmp_path / "d", **{f"train__{suffix}": text}))
        assert [row for _, row in read_rows("org/d:train")] == rows
        go_offline(monkeypatch)
        assert [row for _, row in read_rows("org/d:train[1:]")] == rows[1:]

    @pytest.mark.parametrize(
        ("files", "says"),
        [
            ({"d__py": "import os"}, "`datasets` finds no records in the data set ("),
            ({"train__json": "{not json"}, "`datasets` cannot read the data set ("),
        ],
    )
    def test_data_sets_without_records(self, files, says, server, tmp_path):
        server.add("dataset", "org/d", folder_of(tmp_path / "d", **files))
        with pytest.raises(DataError) as error:
            find_shards("org/d:train")
        assert says in str(error.value) and "\n" not in str(error.value)

    def test_card_cannot_name_files_of_the_machine(self, server, tmp_path):
        secret = folder_of(tmp_path / "private", secret__jsonl=lines(ROWS)) / "secret.jsonl"
        card = f"---\nconfigs:\n- config_name: x\n  data_files:\n  - split: train\n    path: {secret}\n---\n"
        server.add("dataset", "org/d", folder_of(tmp_path / "d", README__md=card, train__jsonl=lines(ROWS[:1])))
        with pytest.raises(
            DataError, match=r"lists .*secret\.jsonl, which is not one of its own files; use another data set"
        ):
            find_shards("org/d:train")

    def test_missing_data_set(self, server):
        with pytest.raises(
            DataError,
            match="org/none:train: not an existing file or directory, and not a usable Hub id: the Hub has no such",
        ):
            find_shards("org/none:train")


def test_asking_again_follows_the_branch(server, tmp_path):
    server.add("model", "org/m", folder_of(tmp_path / "m", config__json="1"))
    snapshot(Repo("model", "org/m"))
    second = server.add("model", "org/m", folder_of(tmp_path / "m", config__json="2"))
    assert snapshot(Repo("model", "org/m"), again=True).name == second == model_directory("org/m").name
