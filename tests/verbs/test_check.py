"""Tests of `check`: it reports the problems of files, layout and data all at once, and does not import Megatron."""

import gzip
import json
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from dpo_engine import cli
from dpo_engine.config.run import Config, draft
from dpo_engine.verbs.check import check, examine, torchrun
from dpo_engine.verbs.summary import summarize

WORDS = [f"w{i}" for i in range(500)]


@pytest.fixture(scope="session")
def checkpoint(tiny_hf, tmp_path_factory):
    """Save a tiny model with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    shutil.copytree(tiny_hf("llama"), directory)
    words = ["<unk>", "<s>", "</s>", "<pad>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture
def raw(checkpoint, tmp_path):
    """Return the configuration of a valid run as nested dictionaries."""
    rows = [{"prompt": f"w{i} w1", "chosen": "w2", "rejected": "w3 w4"} for i in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(checkpoint)},
        "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 128},
        "train": {"output_dir": str(tmp_path / "out"), "global_batch_size": 4},
    }


def problems(raw: dict, world_size: int | None = None, **changes) -> list[str]:
    """Change sections (`section=value`) and keys (`section__key=value`) of a run. Return the changed run's problems."""
    return check(changed(raw, **changes), world_size)


def changed(raw: dict, **changes) -> Config:
    raw = {name: dict(section) for name, section in raw.items()}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            raw.setdefault(section, {})[key] = value
        else:
            raw[section] = value
    return Config.parse(raw)


def test_valid_run_has_no_problems(raw):
    assert problems(raw) == []
    assert problems(raw, 4, parallel__tp=2) == []


def test_metric_that_no_evaluation_reports(raw):
    held_out = {"data__validation_fraction": 0.3, "train__eval_interval": 1}
    best = {"checkpoint__keep_best": {"metric": "loss_margin/mean", "mode": "max"}}
    assert problems(raw, **held_out, **best, loss__name="ipo") == []
    assert problems(raw, **held_out, **best) == [
        "checkpoint.keep_best.metric=eval/loss_margin/mean: no evaluation of this run reports this metric; the "
        "documentation of metrics says when it is reported"
    ]
    config = changed(raw, **held_out, **best)
    assert examine(config, broken=frozenset({"loss.beta"})).config == [], "a broken loss has no known metrics"


@pytest.mark.parametrize(
    ("world", "parallel", "expected"),
    [
        (
            1,
            {"tp": 2, "pp": 2},
            "parallel.tp=2 x parallel.pp=2 x parallel.cp=1: the number of ranks must be a multiple of 4, but is 1; "
            "start 4 ranks, for example: torchrun --nproc-per-node 4 -m dpo_engine train RUN.yaml",
        ),
        (
            6,
            {"tp": 2, "cp": 2},
            "parallel.tp=2 x parallel.pp=1 x parallel.cp=2: the number of ranks must be a multiple of 4, but is 6; "
            "start 4 or 8 ranks, for example: torchrun --nproc-per-node 4 -m dpo_engine train RUN.yaml",
        ),
        (2, {"tp": 2, "overlap": True}, "parallel.overlap=true: requires dp x cp >= 2, but dp x cp is 1 with 2 ranks; "
         "remove parallel.overlap, or use at least 4 ranks"),
        (None, {"tp": 3}, "parallel.tp=3: must divide model.num_attention_heads=8; use 1, 2, 4 or 8"),
        (None, {"pp": 3}, "parallel.pp=3: must divide model.num_layers=4; use 1, 2 or 4, or set parallel.layers=auto"),
        (None, {"vpp": 2}, "parallel.vpp=2: requires parallel.pp >= 2, but it is 1; remove parallel.vpp"),
        (None, {"ep": 2}, "parallel.ep=2: model type llama has no experts; use 1"),
    ],
)  # fmt: skip
def test_impossible_layout_is_refused(raw, world, parallel, expected):
    assert expected in problems(raw, world, parallel=parallel)


def test_instances_of_the_optimizer_must_divide_the_ranks(raw):
    asked = {"ddp": {"num_distributed_optimizer_instances": 4}}
    expected = "megatron.ddp.num_distributed_optimizer_instances=4: must divide dp x cp, which is 6; use 1, 2, 3 or 6"
    assert problems(raw, 6, megatron=asked) == [expected]
    assert problems(raw, 8, megatron=asked) == problems(raw, None, megatron=asked) == []
    (line,) = problems(raw, 8, megatron={"ddp": {"num_distributed_optimizer_instances": "4"}})
    assert line == "megatron.ddp.num_distributed_optimizer_instances=4: must be a whole number; correct it"


def test_overlap_is_accepted_if_ranks_share_gradients(raw):
    assert problems(raw, 2, parallel__overlap=True) == []
    assert problems(raw, None, parallel__overlap=True) == []


@pytest.mark.parametrize(
    ("world", "expected"),
    [(4, "torchrun --nproc-per-node 4"), (64, "torchrun --nnodes 8 --nproc-per-node 8")],
)
def test_torchrun_command(world, expected):
    assert torchrun(world) == expected


def test_missing_model_is_refused(raw, tmp_path):
    assert problems(raw, model__path=str(tmp_path / "no"), model__tokenizer=raw["model"]["path"]) == [
        f"model.path={tmp_path}/no: no such directory; set it to the directory of a Hugging Face checkpoint"
    ]


def test_weight_files_are_checked_against_the_architecture(raw, tmp_path):
    """`check` must read the headers of the weight files. test_weight_files.py tests problems in these headers."""
    directory = tmp_path / "bare"
    shutil.copytree(raw["model"]["path"], directory)
    raw["model"] = {"path": str(directory)}
    weights = directory / "model.safetensors"
    assert problems(raw) == []
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    (line,) = problems(raw)
    assert line.startswith(f"model.path={directory}: model.safetensors cannot be read")
    weights.unlink()
    (line,) = problems(raw)
    assert line.startswith(f"model.path={directory}: has neither model.safetensors nor model.safetensors.index.json")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {str(i): f"model-{i}.safetensors" for i in range(6)}}))
    assert all(line.startswith(f"model.path={directory}: ") for line in problems(raw)) and problems(raw)


def test_reference_of_another_architecture_is_refused(raw, tiny_hf):
    other = str(tiny_hf("llama", num_hidden_layers=2))
    (line,) = problems(raw, reference__path=other)
    assert line == (
        f"reference.path={other}: must have the policy's architecture, but has num_layers=2 instead of 4; use a "
        "checkpoint with the same architecture"
    )
    (line,) = problems(raw, reference__path=other + "x")
    assert line.startswith(f"reference.path={other}x: no such directory")


def test_max_length_beyond_the_model_is_refused(raw, tiny_hf, checkpoint):
    (line,) = problems(raw, data__max_length=300)
    rule = "must be at most 256, the model's maximum number of positions"
    assert line == f"data.max_length=300: {rule}; lower data.max_length"
    windowed = str(tiny_hf("mistral", sliding_window=64))
    assert problems(raw, model={"path": windowed, "tokenizer": str(checkpoint)}) == []


def test_impossible_directories_are_refused(raw, tmp_path):
    (tmp_path / "file").touch()
    assert problems(raw, train__output_dir=str(tmp_path / "file" / "out"), data__cache_dir=str(tmp_path / "file")) == [
        f"train.output_dir={tmp_path}/file/out: {tmp_path}/file is not a directory; set another path",
        f"data.cache_dir={tmp_path}/file: {tmp_path}/file is not a directory; set another path",
    ]


def test_unwritable_directories_are_refused(raw, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    (line,) = problems(raw, train__output_dir="/no-such-place")
    assert line == "train.output_dir=/no-such-place: / is not writable; change its permissions, or set another path"


def test_occupied_export_directory_is_refused(raw, tmp_path):
    place = tmp_path / "out/hf"
    place.mkdir(parents=True)
    assert problems(raw) == []
    (place / "notes.txt").write_text("mine")
    says = f"{place} is occupied by notes.txt, which was not written by an export"
    way_out = "change train.output_dir, or set checkpoint.export=false"
    assert problems(raw) == [f"checkpoint.export=true: {says}; {way_out}"]
    assert problems(raw, checkpoint__export=False) == []
    assert not examine(changed(raw), broken=frozenset({"checkpoint.export"})).config


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("wandb", {"project": "p"}, "wandb.project=p"),
        ("mlflow", {"experiment": "e"}, "mlflow.experiment=e"),
        ("tensorboard", True, "tensorboard=true"),
    ],
)
def test_missing_tracker_package_is_refused(raw, monkeypatch, name, value, key):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = problems(raw, logging={name: value})
    assert line == (
        f"logging.{key}: the package {name} is not installed; run pip install 'dpo-engine[{name}]', or remove "
        f"logging.{name}"
    )


def test_unusable_tokenizers_and_templates_are_refused(raw, tmp_path, tiny_hf):
    missing = str(tmp_path / "no.model")
    assert problems(raw, model__tokenizer=missing) == [
        f"model.tokenizer={missing}: no such file or directory; set it to a tokenizer directory or a sentencepiece "
        "*.model file"
    ]
    assert problems(raw, data__chat_template=missing) == [
        f"data.chat_template={missing}: no such file; set the path of a Jinja template"
    ]
    small = str(tiny_hf("llama", vocab_size=100))
    assert problems(raw, model={"path": small, "tokenizer": raw["model"]["path"]}) == [
        f"model.tokenizer={raw['model']['path']}: has 504 tokens, but the model has only 100 embedding "
        "rows, and no row for 'w96', 'w97', 'w98', ...; use the tokenizer with which the model was trained"
    ]


def test_plugins_are_imported_before_names_are_resolved(raw, tmp_path, monkeypatch):
    (tmp_path / "loss_plugin_of_check.py").write_text(
        "from dpo_engine.objective.losses import LOSSES\n"
        "@LOSSES.register('loss_of_check', needs_reference=False)\n"
        "def loss(policy, reference, *, gamma: float = 1.0):\n    return policy.chosen\n"
    )
    monkeypatch.chdir(tmp_path)
    loss = {"name": "loss_of_check", "gamma": 2.0}
    assert problems(raw, loss=loss)[0].startswith("loss.name=loss_of_check: no such loss; ")
    assert problems(raw, loss=loss, plugins=["loss_plugin_of_check"]) == []
    (line,) = problems(raw, loss={"name": "other"}, plugins=["no_such_plugin_of_check"])
    assert line.startswith("plugins[0]=no_such_plugin_of_check: cannot be imported")


def test_valid_keys_are_checked_next_to_broken_ones(raw, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    read = draft(path, ["parallel.pp=0", "optim.decay_steps=2", "loss.bta=1", "data.max_length=9999"])
    found = examine(read.config, 3, broken=read.broken)
    assert [line.split("=")[0] for line in read.problems] == ["parallel.pp"]
    # The number of ranks, 3, is not checked, because the layout is unknown.
    assert [line.split("=")[0] for line in found.config] == ["optim.decay_steps", "loss.bta", "data.max_length"]


@pytest.mark.slow
def test_check_never_imports_megatron(raw, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    code = (
        "import sys; sys.modules['megatron'] = None\n"  # importing megatron raises an error
        "from dpo_engine.cli import main\n"
        f"sys.exit(main(['check', {str(path)!r}, 'parallel.tp=2', '--world-size', '4']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tp 2 x pp 1 x cp 1 x dp 2 = 4 ranks" in done.stdout


def test_summary_of_a_run(raw):
    layout = {"parallel": {"tp": 2, "pp": 2}, "train__micro_batch_size": 1}
    config = changed(raw, **layout, loss={"beta": 0.3}, model__dtype="bf16", train__epochs=3)
    text = "\n".join(summarize(config, 12))
    assert "llama, " in text and "4 layers, hidden size 64, vocabulary 515 (padded to 528)" in text
    assert "tp 2 x pp 2 x cp 1 x dp 3 = 12 ranks, optimizer state sharded over 3 ranks" in text
    config = changed(raw, **layout, megatron={"ddp": {"num_distributed_optimizer_instances": 2}})
    assert "optimizer state sharded over 3 ranks" in "\n".join(summarize(config, 24))
    assert "4 pairs per step = dp 3 x 2 micro-batches x 1 pair, 2 of 6 slots empty" in text
    assert "train.jsonl: 10 records, format text (auto)" in text
    assert "checked the first 8 records of each source; training reads all records before its first step" in text
    assert "at most 9 steps (3 per epoch) over 10 pairs; " in text
    assert "sigmoid, beta 0.3; reference " in text
    assert "parallel.sequence_parallel: on, because parallel.tp is 2" in text
    assert (
        "bf16: " in text
        and "per rank of stage 1 (the largest) = weights " in text
        and " parameters x (2 weight" in text
    )


@pytest.mark.parametrize(
    "budget, size, room",
    [("auto", 2, "the total length of the 2 longest pairs"), (9000, None, "9,000 tokens")],
    ids=str,
)
def test_summary_of_tree_micro_batches(budget, size, room, raw):
    batch = {"layout": "tree", "tokens_per_micro_batch": budget}
    config = changed(raw, batch=batch, train__micro_batch_size=size, parallel={"tp": 2})
    text = "\n".join(summarize(config, 4))
    assert f"4 pairs per step as trees, dp 2, micro-batches of at most {room}\n" in text


def test_summary_of_micro_batches_whose_size_is_chosen(raw, monkeypatch):
    text = "\n".join(summarize(changed(raw, parallel={"cp": 2}), 4))
    assert "4 pairs per step, dp 2, micro-batches of a size that fits the device\n" in text
    assert (
        "batch.tokens_per_micro_batch: 16,384 on a GPU with enough memory, 4,096 on a CPU; fewer if pipeline "
        "stages would be idle otherwise, but enough for the longest pair; this machine has no GPU\n"
    ) in text
    # The longest possible pair has 2 x 128 tokens. If the GPU is unknown, a micro-batch has room for at least one such
    # pair. On a CPU, a micro-batch has room for two such pairs, because a rank has two pairs in a step.
    assert "bf16: " in text and "; largest micro-batch: at least 256 tokens; " in text
    assert "fp32: " in text and "; largest micro-batch: 512 tokens; " in text
    monkeypatch.setattr("dpo_engine.verbs.summary.gpu_present", lambda: True)
    monkeypatch.setattr("dpo_engine.verbs.summary.gpu_memory", lambda: 80 * 2**30)
    text = "\n".join(summarize(changed(raw, parallel={"cp": 2}), 4))
    assert "bf16: " in text and "; largest micro-batch: 512 tokens; " in text and "fp32: " not in text


def test_summary_names_the_assumed_number_of_ranks(raw):
    assert "tp 1 x pp 1 x cp 1 x dp 1 = 1 rank (the minimum; pass --world-size N to change it)" in "\n".join(
        summarize(changed(raw), None)
    )


def test_summary_counts_only_what_is_cheap(raw, tmp_path, monkeypatch):
    first = raw["data"]["train"]
    rows = [json.loads(line) for line in open(first)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:7]), tmp_path / "b.parquet")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write("\n\n".join(json.dumps(row) for row in rows[:3]))
    sources = [first, {"path": str(tmp_path / "b.parquet"), "weight": 2}, str(tmp_path / "c.jsonl.gz")]
    changes = {"data__train": sources, "data__validation_fraction": 0.1, "optim__warmup_ratio": 0.5}
    text = "\n".join(summarize(changed(raw, **changes), 1))
    assert "b.parquet: 7 records, format text (auto), weight 2" in text and "c.jsonl.gz: 3 records" in text
    assert "validation: about 0.1 of the prompts in data.train are held out" in text
    assert "about 5 steps (5 per epoch) over 18 pairs, 3 warmup steps" in text
    monkeypatch.setattr("dpo_engine.verbs.summary.COUNTED_BYTES", 1)
    assert "unknown until the pairs are counted" in "\n".join(summarize(changed(raw), 1))
    assert "at most 3\n" in "\n".join(summarize(changed(raw, train__max_steps=3), 1))


@pytest.mark.parametrize(("name", "expected"), [("auto", "at most 2 steps"), ("ranked_all", "unknown until the pairs")])
def test_number_of_pairs_is_unknown_if_a_ranked_list_gives_several_pairs(raw, tmp_path, name, expected):
    path = tmp_path / "ranked.jsonl"
    path.write_text('{"prompt": "w1", "responses": [" w2", " w3", " w4"], "scores": [1, 2, 3]}\n' * 5)
    config = changed(raw, data__train=[{"path": str(path), "format": name}])
    assert problems(raw, data__train=[{"path": str(path), "format": name}]) == []
    assert expected in "\n".join(summarize(config, 1))


def test_missing_files_and_unknown_formats_are_refused(raw, tmp_path):
    missing = str(tmp_path / "no.jsonl")
    sources = [missing, {"path": raw["data"]["train"], "format": "txt"}, {"path": missing, "format": "zzz"}]
    way_out = "no such file; set the path of a .jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet or .arrow file"
    names = (
        "alpaca, auto, colossalchat, helpsteer3, hh, implicit, messages, nemo_aligner, nemo_rl, orca, ranked, "
        "ranked_adjacent, ranked_all, sharegpt, swift and text (add more with plugins: [my.module])"
    )
    assert problems(raw, data__train=sources[:2], data__validation=sources[2:]) == [
        f"data.train[0].path={missing}: {way_out}",
        f"data.train[1].format=txt: no such data format; did you mean text? Registered data formats: {names}",
        f"data.validation[0].path={missing}: {way_out}",
        f"data.validation[0].format=zzz: no such data format; registered data formats: {names}",
    ]


def test_first_records_are_read_and_tokenized(raw, tmp_path):
    def written(name: str, *lines: str) -> str:
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return str(tmp_path / name)

    good = '{"prompt": "w1", "chosen": " w2", "rejected": " w3"}'
    cut = written("cut.jsonl", good, '{"prompt": "w1", ')
    found = examine(changed(raw, data__train=cut))
    assert found.config == []
    (line,) = found.data
    assert line.startswith(f"{cut}:2: invalid JSON at column ")
    assert problems(raw, data__train=cut, data__on_bad_line="skip") == []
    unknown = written("same.jsonl", '{"prompt": "w1", "chosen": " xyz", "rejected": " xyy"}')
    (line,) = problems(raw, data__train=unknown)
    assert line.startswith(f"{unknown}:1: chosen and rejected have identical tokens")
    (line,) = problems(raw, data__train=unknown, data__on_bad_line="skip")
    assert line == f"{unknown}: contains no usable pair; line 1: chosen and rejected have identical tokens"
    empty = written("empty.jsonl")
    assert problems(raw, data__train=empty) == [f"{empty}: contains no usable pair"]
    long = written("long.jsonl", '{"prompt": "w1 w2", "chosen": " w2 w4", "rejected": " w3"}')
    assert problems(raw, data__train=long, data__max_length=3) == [
        f"{long}: contains no usable pair; 1 dropped: a response too long for data.max_length; raise the limit "
        "or shorten the records"
    ]
    assert problems(raw, data__train=long, data__max_length=8) == []
    many = written("many.jsonl", *['{"prompt": "w1 w2", "chosen": " w2 w4", "rejected": " w3"}'] * 20)
    assert problems(raw, data__train=many, data__max_length=3)[0].startswith(
        f"{many}: contains no usable pair; 20 dropped: a response too long for data.max_length; raise the limit"
    )
    late = written("late.jsonl", *[json.dumps({"prompt": "w1", "chosen": " w2 w4", "rejected": " w3"})] * 20, good)
    assert problems(raw, data__train=late, data__max_length=3) == []
    assert problems(raw, data__train=written("more.jsonl", *[good] * 3), data__max_length=8) == []
    assert problems(raw, data__train=written("wrong.txt", good))[0].startswith(
        f"data.train[0].path={tmp_path}/wrong.txt: unsupported file type"
    )


def test_records_that_are_dropped_or_repeat_their_prompts_are_shown(raw, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_engine.verbs.first_records.MOST_RECORDS", 10)
    rows = [{"prompt": f"w{i}", "chosen": f" w{i} w2 w4", "rejected": f" w{i} w3"} for i in range(12)]
    path = tmp_path / "repeated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for length, says in (
        (
            3,
            "the first 8 records would be dropped; 8 dropped: a response too long for data.max_length; raise the",
        ),
        (9, "the first 8 records would give pairs whose responses begin with the whole prompt, so the loss also"),
    ):
        config = changed(raw, data__train=str(path), data__max_length=length)
        assert check(config) == []
        (line,) = [line for line in summarize(config, 1) if line.startswith("  warning")]
        assert line.startswith(f"  warning data.train: {path}: {says}")


def test_eval_names_its_option_for_other_data(raw, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    assert cli.main(["eval", str(tmp_path / "run.yaml"), "--data", f"{raw['data']['train']},none.jsonl"]) == 2
    errors = capsys.readouterr().err
    assert "--data=none.jsonl: no such file; set the path of a " in errors and "data.validation" not in errors


def test_names_of_columns_are_checked(raw):
    columns = {"promt": "question"}
    sources = [{"path": raw["data"]["train"], "format": "text", "columns": columns}]
    rule = (
        "format text has no field 'promt'; in data.columns, the key is the format's field name and the value is the "
        "field name in your records; did you mean prompt?"
    )
    assert problems(raw, data__train=sources) == [f"data.train[0].columns.promt=question: {rule}"]


def test_conversations_without_a_template_are_refused(raw, tmp_path):
    path = tmp_path / "chat.jsonl"
    turns = [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": word}] for word in ("w2", "w3")]
    path.write_text(json.dumps({"chosen": turns[0], "rejected": turns[1]}) + "\n")
    (line,) = problems(raw, data__train=[str(path), str(path)])
    start = f"data.chat_template=null: {path} is read as conversations (format messages: 'chosen' and 'rejected'), but"
    end = "; set data.chat_template to a file with a Jinja template, or use text records"
    assert line.startswith(start) and line.endswith(end)
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    assert problems(raw, data__train=str(path), data__chat_template=str(template)) == []


def test_tokenizer_without_eos_is_refused(raw, tmp_path, checkpoint):
    directory = tmp_path / "no_eos"
    shutil.copytree(checkpoint, directory)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).exists():
            facts = json.loads((directory / name).read_text())
            facts.pop("eos_token", None)
            (directory / name).write_text(json.dumps(facts))
    assert problems(raw, model__tokenizer=str(directory)) == [
        f"data.add_eos=auto: the tokenizer in {directory} has no EOS token; use a tokenizer that has an EOS token, or "
        "set data.add_eos=false"
    ]
    assert problems(raw, model__tokenizer=str(directory), data__add_eos=False) == []


def test_missing_columns_of_the_loss_are_refused(raw):
    raw["loss"] = {"name": "rpo_sq"}
    (file,) = {source if isinstance(source, str) else source["path"] for source in [raw["data"]["train"]]}
    lines = problems(raw)
    assert f"{file}:1: missing field 'chosen_reward', required by loss rpo_sq; add it to every record" in lines
    assert f"{file}:1: missing field 'rejected_reward', required by loss rpo_sq; add it to every record" in lines
