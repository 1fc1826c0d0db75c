"""Tests of the config schema: accepted files, error messages for rejected files, and reports of several problems."""

import dataclasses
import pickle

import pytest

from dpo_engine.config import run as configuration
from dpo_engine.config.errors import dotted_names, explain
from dpo_engine.config.run import Config, draft, import_plugins
from dpo_engine.errors import CheckpointError, ConfigError, DataError, EngineError, NumbersError, PeerError

WHOLE = "model: {path: m}\ndata: {train: a.jsonl}\ntrain: {output_dir: out}\n"


@pytest.fixture
def run(tmp_path):
    """Return a function that writes a run's YAML file and returns its path."""

    def write(text: str = WHOLE):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config.load(path, overrides)
    return caught.value.problems


def test_smallest_run_has_the_documented_defaults(run):
    config = Config.load(run())
    assert config.model.path == config.tokenizer_path == config.reference_path == "m"
    assert str(config.cache_dir) == "out/cache"
    assert [source.path for source in config.data.train] == ["a.jsonl"]
    assert (config.loss.name, config.loss.options) == ("sigmoid", {})
    assert (config.optim.lr, config.optim.betas, config.train.global_batch_size) == (1e-6, (0.9, 0.999), 64)


def test_to_yaml_round_trips(run):
    text = WHOLE + "loss: {name: other, beta: 0.3, tags: [a, b]}\nlogging: {wandb: {project: p}}\nplugins: [x]\n"
    config = Config.load(run(text))
    assert Config.load(run(config.to_yaml())) == config
    assert config.loss.options == {"beta": 0.3, "tags": ["a", "b"]}


def test_config_is_frozen():
    config = Config.parse({"model": {"path": "m"}, "data": {"train": "a"}, "train": {"output_dir": "o"}})
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0


def test_sources_are_paths_or_mappings(run):
    text = WHOLE.replace("a.jsonl", "[a.jsonl, {path: b.parquet, weight: 2, format: hh}]")
    first, second = Config.load(run(text)).data.train
    assert (first.path, first.weight, first.format) == ("a.jsonl", 1.0, "auto")
    assert (second.path, second.weight, second.format) == ("b.parquet", 2, "hh")


@pytest.mark.parametrize(
    ("written", "expected"),
    [("1e-6", 1e-6), ("5E-7", 5e-7), (".5", 0.5), ("1.", 1.0), ("+2", 2), ("2e0", 2.0), ("0.001", 0.001)],
)
def test_numbers_follow_yaml_1_2(run, written, expected):
    value = Config.load(run(WHOLE + f"optim: {{lr: {written}}}\n")).optim.lr
    assert value == expected


@pytest.mark.parametrize(("written", "expected"), [("010", 10), ("0x10", 16), ("0o10", 8), ("1_000", 1000), ("+7", 7)])
def test_notations_of_whole_numbers(run, written, expected):
    text = WHOLE.replace("a.jsonl}", f"a.jsonl, seed: {written}}}")
    assert Config.load(run(text)).data.seed == expected


@pytest.mark.parametrize("word", ["off", "no", "yes", "2024-01-01", "1:30"])
def test_yaml_1_1_words_stay_text(run, word):
    assert Config.load(run(WHOLE.replace("path: m", f"path: {word}"))).model.path == word


def test_progress_off_needs_no_quotes(run):
    assert Config.load(run(WHOLE + "logging: {progress: off}\n")).logging.progress == "off"


def test_empty_section_has_the_defaults(run):
    assert Config.load(run(WHOLE + "parallel:\noptim: {}\n")).parallel.tp == 1


def test_anchors_and_merge_keys_work(run):
    text = WHOLE.replace("{train: a.jsonl}", "\n  train:\n  - &a {path: a, weight: 3}\n  - {<<: *a, path: b}")
    assert [(s.path, s.weight) for s in Config.load(run(text)).data.train] == [("a", 3), ("b", 3)]


def test_overrides_set_scalars_lists_items_and_sections(run):
    config = Config.load(
        run(WHOLE + "parallel: {tp: 2, pp: 2}\n"),
        [
            "optim.lr=5e-7",
            "optim.betas=[0.8, 0.9]",
            "data.train=[x, {path: y, weight: 2}]",
            "data.train[1].weight=3",
            "data.train.0=z",
            "parallel={cp: 2}",
            "logging.wandb.project=p",
            "loss.beta=0.2",
            "train.seed=1",
            "train.seed=2",
            "data.validation=null",
        ],
    )
    assert config.optim.lr == 5e-7
    assert config.optim.betas == (0.8, 0.9)
    assert [(s.path, s.weight) for s in config.data.train] == [("z", 1.0), ("y", 3)]
    assert (config.parallel.tp, config.parallel.cp) == (1, 2)
    assert config.logging.wandb.project == "p"
    assert config.loss.options == {"beta": 0.2}
    assert config.train.seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("nonsense", "nonsense: is not a valid override; write key.path=value, for example parallel.tp=2"),
        ("a..b=1", "a..b=1: is not a valid override; write key.path=value, for example parallel.tp=2"),
        (
            "model.path.deep=1",
            "model.path.deep=1: model.path=m is a single value and has no keys; override model.path itself",
        ),
        (
            "data.train.0.path.x=1",
            "data.train.0.path.x=1: data.train=a.jsonl is a single value and has no keys; override data.train itself",
        ),
        (
            "optim.betas=[0.9",
            "optim.betas:1: is not valid YAML (expected ',' or ']', but got '<stream end>'); fix it",
        ),
        ("parallel.ttp=2", "parallel.ttp=2: no such key; did you mean parallel.tp?"),
    ],
)
def test_invalid_override_is_refused(run, override, expected):
    assert problems(run(), override) == [expected]


def test_override_past_the_end_of_a_list_is_refused(run):
    path = run(WHOLE.replace("a.jsonl", "[a, b]"))
    assert problems(path, "data.train[2]=c") == [
        "data.train[2]=c: data.train has length 2; use an index from 0 to 1, or set the whole list"
    ]


ONE_KEY = {
    "parallel: {tp: 0}": "parallel.tp=0: must be a whole number of at least 1; the default is 1",
    "parallel: {tp: '2'}": "parallel.tp=2: must be a whole number of at least 1; the default is 1",
    "parallel: {tp: true}": "parallel.tp=true: must be a whole number of at least 1; the default is 1",
    "parallel: {tp: 2.0}": "parallel.tp=2.0: must be a whole number of at least 1; the default is 1",
    "parallel: {vpp: 1}": "parallel.vpp=1: must be null, or a whole number of at least 2; the default is null",
    "parallel: {sequence_parallel: maybe}": "parallel.sequence_parallel=maybe: must be true, false or auto; "
    "the default is auto",
    "parallel: {overlap: 1}": "parallel.overlap=1: must be true or false; the default is false",
    "optim: {schedule: 3}": "optim.schedule=3: must be text; the default is cosine",
    "batch: {layout: trees}": "batch.layout=trees: must be auto, stacked or tree; did you mean tree?",
    "batch: {tokens_per_micro_batch: 0}": "batch.tokens_per_micro_batch=0: must be auto, or a whole number of at least "
    "1; the default is auto",
    "optim: {lr: -1}": "optim.lr=-1: must be a number greater than 0; the default is 1e-06",
    "optim: {lr: .nan}": "optim.lr=nan: must be a finite number; the default is 1e-06",
    "optim: {warmup_ratio: 1.0}": "optim.warmup_ratio=1.0: must be null, or a number of at least 0 and less than 1; "
    "the default is null",
    "optim: {betas: [0.9]}": "optim.betas: must be a list of 2 items (each item is a number of at least 0 and less "
    "than 1); the default is [0.9, 0.999]",
    "optim: {betas: [0.9, 2]}": "optim.betas[1]=2: must be a number of at least 0 and less than 1; fix this item",
    "optim: {betas: 0.9}": "optim.betas=0.9: must be a list of 2 items (each item is a number of at least 0 and less "
    "than 1); the default is [0.9, 0.999]",
    "loss: sigmoid": "loss=sigmoid: must be a mapping with the keys name, ld_alpha, use_weighting, balance and "
    "router_z; write the keys that you want to set, indented below `loss:`",
    "lr: 1e-6": "lr=1e-06: no such key; did you mean optim.lr?",
    "optimm: {lr: 1}": "optimm={lr: 1}: no such key; did you mean optim?",
    "checkpoint: {global_batch_size: 2}": "checkpoint.global_batch_size=2: no such key; "
    "did you mean train.global_batch_size?",
    "checkpoint: {xyzzyplugh: 2}": "checkpoint.xyzzyplugh=2: no such key; the known keys are checkpoint.save_interval, "
    "checkpoint.keep_last, checkpoint.keep_best, checkpoint.async_save, checkpoint.resume, "
    "checkpoint.accept_changes and checkpoint.export",
    "logging: {wandb: {name: x}}": "logging.wandb.project: is required; give the name of the W&B project",
    "logging: {wandb: yes}": "logging.wandb=yes: must be null, or a mapping with the keys project, name and mode; "
    "the default is null",
    "plugins: [1, a]": "plugins[0]=1: must be text; fix this item",
    "plugins: my.module": "plugins=my.module: must be a list (each item is text); the default is []",
}


@pytest.mark.parametrize("text", ONE_KEY)
def test_wrong_key_is_reported_in_one_line_with_a_way_out(run, text):
    assert problems(run(WHOLE + text + "\n")) == [ONE_KEY[text]]


A_SOURCE = "the path of a file or directory, a glob, or a Hub id org/name:split; a slice such as [-5%:] may follow"


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (
            "3",
            "data.train=3: must be a source or a list of sources; a source is a path or a mapping {path, format, "
            "columns, weight}",
        ),
        (
            "[]",
            "data.train=[]: must be a non-empty list; give a source of preference records, or a list of sources; a "
            "source is a path or a mapping {path, format, columns, weight}",
        ),
        ("[a, {path: b, wight: 2}]", "data.train[1].wight=2: no such key; did you mean data.train[1].weight?"),
        ("[a, {path: b, weight: 0}]", "data.train[1].weight=0: must be a number greater than 0; the default is 1.0"),
        ("[{weight: 2}]", f"data.train[0].path: is required; give {A_SOURCE}"),
        ("['']", f"data.train[0].path=: must be non-empty text; give {A_SOURCE}"),
    ],
)
def test_wrong_source_is_named_by_its_index(run, train, expected):
    assert problems(run(WHOLE.replace("a.jsonl", train))) == [expected]


def test_required_keys_are_described(run):
    assert problems(run("{}")) == [
        "model.path: is required; give the Hugging Face checkpoint that the policy starts from: a directory, or a Hub "
        "id org/name[@revision]",
        "data.train: is required; give a source of preference records, or a list of sources; a source is a path "
        "or a mapping {path, format, columns, weight}",
        "train.output_dir: is required; give the directory for everything that the run writes",
    ]


def test_invalid_date_and_empty_mapping_are_described(run):
    assert problems(run(), "data.template_date=soon", "data.columns={}") == [
        "data.template_date=soon: must be a date, YYYY-MM-DD, for example 2026-01-31; the default is null",
        "data.columns={}: must be a non-empty mapping; the default is null",
    ]


def test_all_problems_are_reported_at_once(run):
    text = "model: {path: 3}\nparallel: {tp: 0, ppp: 2}\nlr: 1\ndata: {train: a}\ntrain: {seed: -1}\n"
    found = problems(run(text), "nonsense", "optim.epz=1")
    expected = (
        "nonsense model.path=3 parallel.tp=0 parallel.ppp=2 optim.epz=1 train.output_dir train.seed=-1 lr=1".split()
    )
    assert [line.split(":")[0] for line in found] == expected


def test_draft_keeps_the_valid_keys(run):
    text = "model: {dtype: bf16}\nparallel: {tp: 4, pp: 0}\ndata: {train: [a, {path: 3}]}\ntrain: {output_dir: o}\n"
    found = draft(run(text), ["logging.wandb.name=x"])
    assert len(found.problems) == 4
    assert found.broken == {"model.path", "parallel.pp", "data.train[1].path", "logging.wandb.project"}
    assert (found.config.model.dtype, found.config.parallel.tp, found.config.parallel.pp) == ("bf16", 4, 1)
    assert found.config.logging.wandb is None
    with pytest.raises(ConfigError):
        found.finished()


def test_duplicate_key_is_refused_with_both_lines(run):
    text = "model: {path: m}\ntrain:\n  seed: 1\n  output_dir: o\n  seed: 2\nmodel: {path: n}\ndata: {train: a}\n"
    path = run(text)
    assert problems(path) == [
        f"{path}:5: the key seed was already set on line 3; set it once",
        f"{path}:6: the key model was already set on line 1; set it once",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "is a list, not a mapping; write sections such as `model:` with keys"),
        ("just text\n", "is a single value, not a mapping; write sections such as `model:` with keys"),
    ],
)
def test_file_that_is_not_a_mapping_is_refused(run, text, expected):
    path = run(text)
    assert problems(path) == [f"{path}: {expected}"]


@pytest.mark.parametrize(
    "text", ["a: [1\n", "a: b: c\n", "\tmodel: 1\n", "a: *nobody\n", "{[a]: 1}\n", "a: !!python/x y\n"]
)
def test_broken_yaml_names_its_line(run, text):
    path = run(text)
    (line,) = problems(path)
    assert line.startswith(f"{path}:") and "is not valid YAML (" in line and "\n" not in line


def test_recursive_list_is_refused(run):
    path = run("model: &a [*a]\n")
    (line,) = problems(path)
    assert line == f"{path}:1: is not valid YAML (an alias refers to a node that contains it); fix it"


def test_unreadable_files_are_refused(tmp_path):
    missing = tmp_path / "no.yaml"
    assert problems(missing) == [
        f"{missing}: cannot be read (No such file or directory); pass the path of a run's YAML file"
    ]
    assert problems(tmp_path) == [f"{tmp_path}: cannot be read (Is a directory); pass the path of a run's YAML file"]
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00model")
    assert problems(binary) == [f"{binary}: is not UTF-8 text; pass the path of a run's YAML file"]


def test_every_key_is_documented():
    documented = set()

    def visit(section, above=""):
        for name, field in section.model_fields.items():
            documented.add(above + name)
            inner = [m for m in vars(configuration).values() if m is field.annotation]
            if inner:
                visit(inner[0], f"{above}{name}.")
            else:
                assert field.description, f"{above}{name} has no description"

    visit(Config)
    assert documented <= set(dotted_names(Config))


def test_plugins_are_imported_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_plugin_of_config.py").write_text("LOADED = True\n")
    (tmp_path / "my_broken_of_config.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    found = import_plugins(["my_plugin_of_config", "no_such_module_of_config", "my_broken_of_config"])
    assert len(found) == 2
    assert found[0] == (
        "plugins[1]=no_such_module_of_config: cannot be imported (ModuleNotFoundError: No module named "
        "'no_such_module_of_config'); fix the module, or add its folder to PYTHONPATH"
    )
    assert found[1].startswith("plugins[2]=my_broken_of_config: cannot be imported (SyntaxError: ")


def test_errors_have_exit_codes_and_survive_pickling():
    expected = {EngineError: 1, ConfigError: 2, DataError: 3, CheckpointError: 4, NumbersError: 5, PeerError: 6}
    for kind, code in expected.items():
        error = pickle.loads(pickle.dumps(kind(["a: b", "c: d"])))
        assert (type(error), error.exit_code, error.problems, str(error)) == (
            kind,
            code,
            ["a: b", "c: d"],
            "a: b\nc: d",
        )
        assert kind("one").problems == ["one"]


def test_fields_of_a_draft_and_path_of_a_problem():
    assert {field.name for field in dataclasses.fields(configuration.Draft)} == {"config", "problems", "broken"}
    with pytest.raises(ValueError) as caught:
        Config.model_validate({"model": {}, "data": {"train": "a"}, "train": {"output_dir": "o"}})
    assert [problem.path for problem in explain(Config, caught.value)] == ["model.path"]


@pytest.mark.parametrize(
    "said, expected",
    [
        ("23:50:00", 85800),
        ("0:00:09", 9),
        ("100:00:01", 360001),
        ("1-00:00:30", 86430),
        ("23:50:00 ", None),
        ("1:60:00", None),
        ("soon", None),
    ],
)
def test_time_limit_formats_give_seconds(said, expected, tmp_path):
    """Unquoted and quoted values must give the same result. YAML 1.1 would read some unquoted values as numbers.

    The value with a trailing space is not tested without quotes, because YAML removes the space.
    """
    for text in (said, f'"{said}"'):
        path = tmp_path / "run.yaml"
        path.write_text(f"model: {{path: m}}\ndata: {{train: a}}\ntrain: {{output_dir: o, save_by: {text}}}\n")
        if expected is None and text != "23:50:00 ":
            with pytest.raises(ConfigError, match="train.save_by=.*: must be a "):
                Config.load(path)
        elif expected is not None:
            assert Config.load(path).train.save_by == expected
