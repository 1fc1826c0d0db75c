"""Tests of what a new user tries first: example runs, quickstart, plugins, and installing next to other packages."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, PretrainedConfig

from dpo_engine import cli
from dpo_engine.data.tokenizer import load_tokenizer
from support.jobs import run_job

ROOT = Path(__file__).parent.parent
RUNS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*.yaml"))

sys.path.insert(0, str(ROOT / "examples/quickstart"))
import make_task  # noqa: E402
import task as language  # noqa: E402

SHAPE_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
SHAPE_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
SHAPE_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "tie_word_embeddings": True}
SHAPE_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
GEMMA_1B = {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912}
GEMMA_1B |= {"num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
GEMMA_1B |= {"sliding_window": 512, "max_position_embeddings": 32768}
OLMO_7B = {"model_type": "olmo3", "vocab_size": 100278, "intermediate_size": 11008, "num_key_value_heads": 32}
OLMO_7B = SHAPE_8B | OLMO_7B | {"sliding_window": 4096, "max_position_embeddings": 65536}
PYTHIA_7B = {"model_type": "gpt_neox", "vocab_size": 50432, "intermediate_size": 16384, "num_key_value_heads": None}
PYTHIA_7B = SHAPE_8B | PYTHIA_7B | {"max_position_embeddings": 2048}
SHAPE_30B = {
    **{"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144},
    **{"num_hidden_layers": 48, "head_dim": 128, "num_key_value_heads": 4, "num_experts": 128},
    **{"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
}
SHAPE_671B = {"model_type": "deepseek_v3", "vocab_size": 129280, "num_attention_heads": 128, "num_key_value_heads": 128}
SHAPE_20B = {
    **{"model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880},
    **{"num_hidden_layers": 24, "num_attention_heads": 64, "num_local_experts": 32, "num_experts_per_tok": 4},
}
PUBLISHED = {
    "examples/llama3_8b.yaml": (8, SHAPE_8B),
    "examples/llama3_8b_lora.yaml": (1, SHAPE_8B),
    "examples/llama3_70b.yaml": (64, SHAPE_70B),
    "examples/llama3_70b_lora.yaml": (8, SHAPE_70B),
    "examples/llama3_70b_2_nodes.yaml": (16, SHAPE_70B),
    "examples/llama3_1b_24gb.yaml": (1, SHAPE_1B | {"head_dim": 64}),
    "examples/gemma3_1b.yaml": (1, GEMMA_1B),
    "examples/olmo3_7b.yaml": (8, OLMO_7B),
    "examples/pythia_6.9b.yaml": (8, PYTHIA_7B),
    "examples/qwen3_4b.yaml": (1, SHAPE_4B | {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128}),
    "examples/qwen3_30b_a3b.yaml": (16, SHAPE_30B),
    "examples/qwen3_30b_a3b_1_node.yaml": (8, SHAPE_30B),
    "examples/gpt_oss_20b.yaml": (8, SHAPE_20B),
    "examples/deepseek_v3_lora.yaml": (64, SHAPE_671B),
}


@pytest.fixture(scope="module")
def small_task(tmp_path_factory):
    """Make the files of the quickstart, with a base model that is trained for only one step. Return the folder."""
    directory = tmp_path_factory.mktemp("task") / "small"
    make_task.make(directory, seed=3, pairs=48, held_out=9, steps=1)
    return directory


def hollow_weights(model: Path) -> None:
    """Write safetensors files with the headers that the architecture needs.

    The weights are zeros in sparse files. Each file has at least 4 GB, except that the last file can be smaller.
    """
    from dpo_engine.model.architecture import FAMILIES, read_architecture
    from dpo_engine.model.families.rule import HFTensor, expected_tensors
    from dpo_engine.model.weights.fused import written_as

    arch = read_architecture(model)
    headers, end, fused = [{}], 0, written_as(arch)
    every = {}
    for tensor, _ in expected_tensors(FAMILIES[arch.model_type].rules, arch):
        name, experts = fused.get(tensor.name), (arch.experts.count,) if tensor.name in fused else ()
        every[name or tensor.name] = HFTensor(name or tensor.name, (*experts, *tensor.shape))
    for tensor in every.values():
        if end > 4e9:
            headers, end = [*headers, {}], 0
        start, end = end, end + 2 * math.prod(tensor.shape)
        headers[-1][tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    weight_map = {}
    for number, header in enumerate(headers):
        name = f"model-{number:05d}.safetensors"
        weight_map |= dict.fromkeys(header, name)
        text = json.dumps(header).encode()
        with open(model / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def published(run: str) -> PretrainedConfig:
    """Return the configuration of the published model that an example trains."""
    shape = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32}
    shape |= {"max_position_embeddings": 131072, **PUBLISHED[run][1]}
    return AutoConfig.for_model(**shape)


@pytest.mark.parametrize("run", PUBLISHED)
def test_example_needs_the_memory_that_it_says(run, tmp_path):
    from dpo_engine.config.run import Config
    from dpo_engine.model.architecture import read_architecture
    from dpo_engine.model.batch_size import largest_micro_batch
    from dpo_engine.model.memory import GIB, memory
    from dpo_engine.platform.dims import ParallelDims
    from dpo_engine.verbs.plan import plan

    published(run).save_pretrained(tmp_path)
    config, world = Config.load(ROOT / run, [f"model.path={tmp_path}"]), PUBLISHED[run][0]
    dims = ParallelDims.of(config.parallel, world)
    needed, has = re.search(r"suffices: ([\d.]+) GiB of (\d+) per GPU", (ROOT / run).read_text()).groups()
    arch, dtype = read_architecture(tmp_path), "bf16"
    tokens = largest_micro_batch(config, arch, dims, dtype=dtype, device_memory=int(has) * GIB)
    assert needed == f"{memory(config, arch, dims, dtype=dtype, tokens=tokens).needed / GIB:.1f}"
    assert float(needed) <= float(has)
    if world <= 8:  # with more GPUs, `plan` would compare hundreds of layouts
        fitting = re.match(rf"{arch.model_type} on {world} x H100 .*: layouts that fit: (\d+);", plan(config, world)[0])
        assert int(fitting[1]) >= 1


@pytest.fixture
def overrides(small_task, tmp_path):
    """Return a function whose argument is the path of an example, such as ``overrides("examples/x.yaml")``.

    The function returns overrides, which replace paths in the example with the paths of the tests' own files.
    """

    def of(run: str) -> list[str]:
        model = small_task / "base"
        if run in PUBLISHED:
            model = tmp_path / "model"
            published(run).save_pretrained(model)
            hollow_weights(model)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(small_task / "base" / name, model)
        given = [
            f"model.path={model}",
            f"data.train={small_task / 'train.jsonl'}",
            f"data.validation={small_task / 'held_out.jsonl'}",
            f"train.output_dir={tmp_path / 'run'}",
        ]
        if "tokenizer:" in (ROOT / run).read_text():
            given.append(f"model.tokenizer={model / 'tokenizer.model'}")
        return given

    return of


def environment(**settings: str) -> dict[str, str]:
    """Return the environment for a subprocess, with the package on PYTHONPATH and without a launcher's variables."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **settings}


@pytest.mark.parametrize("run", RUNS)
def test_every_example_passes_check(run, overrides, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    world = PUBLISHED[run][0] if run in PUBLISHED else 4
    assert cli.main(["check", run, "--world-size", str(world), *overrides(run)]) == 0, capsys.readouterr().err
    assert f"= {world} rank" in capsys.readouterr().out


def test_plugin_loss_runs(overrides, tmp_path):
    run = "examples/extend/loss.yaml"
    train_example(tmp_path, overrides(run))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    expected = 0.5**2  # at first, policy and reference are identical, so all margins are 0
    assert next(line["loss"] for line in lines if "loss" in line) == pytest.approx(expected, abs=1e-6)


def test_plugin_loss_options_are_checked(overrides, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run = "examples/extend/loss.yaml"
    assert cli.main(["check", run, *overrides(run), "loss.taget=1.0"]) == 2
    assert "loss.taget=1.0: loss squared_hinge has no such option; did you mean loss.target?" in capsys.readouterr().err


def train_example(folder: Path, overrides: list[str]) -> str:
    """Train the loss example for two steps with these overrides, in a forked process. Return the output."""
    command = ["train", "examples/extend/loss.yaml", *overrides, "train.max_steps=2"]
    done = run_job(command, 1, folder / "log", before=partial(os.chdir, ROOT))
    assert done.codes == [0], done.said
    return done.output[0]


def test_plugin_format_runs(overrides, small_task, tmp_path):
    rows = [json.loads(line) for line in (small_task / "train.jsonl").read_text().splitlines()]
    scored = tmp_path / "scored.jsonl"
    records = [
        {
            "question": row["prompt"],
            "answers": [{"text": row["rejected"], "score": 1}, {"text": row["chosen"], "score": 4}],
        }
        for row in rows
    ]
    records[0]["answers"].pop()  # a record with a single answer is skipped and counted
    scored.write_text("".join(json.dumps(record) + "\n" for record in records))
    plugins = "plugins=[examples.extend.loss, examples.extend.format]"
    source = f"data.train=[{{path: {scored}, format: scored}}]"
    output = train_example(tmp_path, [*overrides("examples/extend/loss.yaml"), plugins, source])
    assert "47 pairs from 48 records" in output


@pytest.mark.slow
def test_plugin_family_runs(overrides, small_task, tmp_path):
    model = tmp_path / "lab"
    shutil.copytree(small_task / "base", model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "lab_llama", "norm_epsilon": config.pop("rms_norm_eps")}
    (model / "config.json").write_text(json.dumps(config))
    given = [*overrides("examples/extend/loss.yaml"), f"model.path={model}", "checkpoint.export=true"]
    tokenizer = f"model.tokenizer={model / 'tokenizer.model'}"
    train_example(tmp_path, [*given, tokenizer, "plugins=[examples.extend.loss, examples.extend.family]"])
    assert json.loads((tmp_path / "run/hf/config.json").read_text())["model_type"] == "lab_llama"


@pytest.mark.slow
def test_plugin_kernels_give_the_same_metrics(overrides, tmp_path):
    def losses(*plugins: str) -> list[float]:
        given = [*overrides("examples/extend/loss.yaml"), f"plugins=[examples.extend.loss{''.join(plugins)}]"]
        output = tmp_path / f"run{len(plugins)}"
        said = train_example(tmp_path, [*given, f"train.output_dir={output}"])
        assert f"kernels: {'logsumexp' if plugins else 'eager'}" in said
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        return [line["eval/loss"] for line in lines if "eval/loss" in line]

    assert losses(", examples.extend.backend") == pytest.approx(losses(), rel=1e-6)


def answer(prompt: str) -> str:
    """Compute the correct answer from the words in the prompt."""
    items = [word for word in prompt.split() if len(word) == 1 and word != "?"]
    if prompt.startswith("Sort"):
        return " ".join(sorted(items))
    return " ".join(reversed(items)) if prompt.startswith("Reverse") else str(max(map(int, items)))


def test_quickstart_answers_are_right_and_wrong_as_labeled(small_task):
    rows = [json.loads(line) for line in (small_task / "train.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 48
    for row in rows:
        expected = answer(row["prompt"])
        assert row["chosen"] == f" {expected}" and row["rejected"] != row["chosen"]
        # The responses have the same length and differ only in content.
        assert len(row["rejected"]) == len(row["chosen"])


def test_held_out_questions_are_disjoint_from_training(small_task):
    def items(name: str) -> set[frozenset[str]]:
        rows = map(json.loads, (small_task / name).read_text().splitlines())
        return {frozenset(word for word in row["prompt"].split() if len(word) == 1 and word != "?") for row in rows}

    assert not items("train.jsonl") & items("held_out.jsonl")


def test_task_is_determined_by_its_seed(tmp_path):
    # This test does not compare a task with `small_task`. After `small_task` was made, other tests can have changed how
    # this process multiplies matrices. The weights of the base models would then differ despite the same seed.
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        make_task.make(tmp_path / name, seed=seed, pairs=48, held_out=9, steps=1)
    for path in sorted((tmp_path / "first").rglob("*")):
        if path.is_file():
            again = tmp_path / "again" / path.relative_to(tmp_path / "first")
            assert again.read_bytes() == path.read_bytes(), path.name
    assert (tmp_path / "other/train.jsonl").read_bytes() != (tmp_path / "first/train.jsonl").read_bytes()


def test_engine_and_transformers_tokenize_alike(small_task):
    bare = load_tokenizer(small_task / "base/tokenizer.model")
    directory = load_tokenizer(small_task / "base")
    expected = AutoTokenizer.from_pretrained(small_task / "base")
    for line in (small_task / "train.jsonl").read_text().splitlines():
        for text in json.loads(line).values():
            assert bare.encode(text) == directory.encode(text) == expected.encode(text)
            assert bare.decode(bare.encode(text)) == text.strip()
    config = LlamaForCausalLM.from_pretrained(small_task / "base").config
    assert bare.vocab_size == config.vocab_size and bare.eos_id == config.eos_token_id


def test_existing_task_is_kept(tmp_path, monkeypatch, capsys):
    arguments = ["make_task.py", "--pairs", "6", "--held-out", "3", "--warm-up", "1", "--out", str(tmp_path / "task")]
    monkeypatch.setattr(sys, "argv", arguments)
    make_task.main()
    made = (tmp_path / "task/base/model.safetensors").stat().st_mtime_ns
    make_task.main()
    assert "already exists" in capsys.readouterr().out
    assert (tmp_path / "task/base/model.safetensors").stat().st_mtime_ns == made
    monkeypatch.setattr(sys, "argv", [*arguments, "--seed", "1"])
    make_task.main()
    assert (tmp_path / "task/base/model.safetensors").stat().st_mtime_ns != made


def test_question_stream_excludes_given_items():
    import random

    without = {question.items for question in language.take(language.stream(random.Random(0), set()), 30)}
    kept = language.take(language.stream(random.Random(1), without), 300)
    assert not without & {question.items for question in kept}
    assert [question.prompt.split()[0] for question in kept[:3]] == ["Sort", "Reverse", "Largest"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], 4), (["parallel.tp=1", "parallel.pp=1"], 4), (["parallel.cp=2"], 8), (["parallel.tp=3", "parallel.pp=1"], 3)],
)
def test_quickstart_process_count_fits_the_layout(given, expected):
    command = [sys.executable, "examples/quickstart/ranks.py", "examples/quickstart/run.yaml", *given]
    out = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(expected), "runs/quickstart/dpo"]


def check_page(page: Path, ranked: re.Match, rewarded: str) -> None:
    """Check that the page shows its charts, the tokens of a pair, and the accuracies that the quickstart printed.

    ranked     accuracies by likelihood, before and after training
    rewarded   reward accuracy after training

    The page must load nothing from the network, and log nothing to the browser's console.
    """
    from support.browser import browser, check_charts, console, requests, show

    with browser() as driver:
        requests(driver)
        show(driver, page)
        check_charts(driver)
        text = driver.find_element("id", "verdict").text
        assert f"Better on held-out pairs: in {rewarded}% of 255 pairs" in text
        assert f"by likelihood: {ranked[1]}% → {ranked[2]}%." in text
        assert len(driver.find_elements("css selector", "#pair-table tr.pair")) == 15
        driver.find_element("css selector", "#pair-table tr.pair").click()
        assert len(driver.find_elements("css selector", ".opened .token")) >= 4
        assert console(driver) == [] and not [url for url in requests(driver) if url.startswith(("http", "ws"))]


@pytest.mark.long
@pytest.mark.slow
def test_quickstart_runs_twice(tmp_path):
    for name in ("launch", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    settings = environment(VENV="none", PYTHON=sys.executable)

    def quickstart(*given: str) -> str:
        command = ["bash", str(tmp_path / "launch/quickstart.sh"), *given]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "transformers and the engine agree" in done.stdout
        assert (tmp_path / "runs/quickstart/dpo/curves.png").read_bytes().startswith(b"\x89PNG")
        return done.stdout

    out = quickstart()
    ranked = re.search(r"pairs ranked correctly \(by likelihood\)\s+([\d.]+)%\s+([\d.]+)%", out)
    before, after = float(ranked[1]), float(ranked[2])
    assert 40 <= before <= 60 and after >= 90
    samples = re.findall(r"^  (\w.* \?)\s+before: (.*?)\s+after: (.*)$", out, re.MULTILINE)
    assert len(samples) == 2
    for prompt, wrong, right in samples:
        assert wrong != answer(prompt) == right
    if shutil.which("chromedriver"):
        rewarded = re.search(r"reward accuracy \(a tie counts as half\)\s+[\d.]+%\s+([\d.]+)%", out)[1]
        check_page(tmp_path / "runs/quickstart/dpo/report.html", ranked, rewarded)
    again = quickstart("parallel.tp=1", "parallel.pp=4", "train.max_steps=9")
    assert "already exists" in again and "step 9/9" in again


@pytest.mark.slow
def test_package_coexists_with_hugging_faces_kernels(tmp_path):
    base = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(base)], check=True)
    python = base / "bin/python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    # Make the packages of this environment visible in the new one. Then pip needs to install only the tested packages.
    here = [entry for entry in sys.path if entry.endswith("site-packages")]
    (Path(site) / "here.pth").write_text("\n".join(here) + "\n")

    def pip(*arguments: str) -> subprocess.CompletedProcess:
        command = [python, "-m", "pip", "install", "-q", "--no-deps", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    if "No matching distribution" in (theirs := pip("kernels")).stderr:
        pytest.skip("requires access to a package index")
    assert theirs.returncode == 0, theirs.stderr
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "build", "*.egg-info", "__pycache__")
    )
    ours = pip(str(source))
    assert ours.returncode == 0, ours.stderr

    script = (
        "import importlib.util, dpo_kernels, dpo_engine, transformers.models.llama.modeling_llama\n"
        "print(importlib.util.find_spec('kernels').origin, dpo_kernels.__file__, dpo_engine.__file__, sep='\\n')"
    )
    environment_ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run([python, "-c", script], cwd=tmp_path, env=environment_, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    places = found.stdout.split()
    assert all(place.startswith(site) for place in places)
    assert Path(places[0]).parent.name == "kernels"
    files = subprocess.run([python, "-m", "pip", "show", "-f", "dpo-engine"], capture_output=True, text=True).stdout
    assert "dpo_kernels/eager.py" in files and "  kernels/" not in files
    assert all(f"dpo_engine/reporting/page/page.{kind}\n" in files for kind in ("html", "css", "js"))
    assert "dpo_engine/migration.yaml" in files and "dpo_engine/py.typed" in files
    printed = subprocess.run([base / "bin/dpo-engine", "config"], cwd=tmp_path, env=environment_, capture_output=True)
    assert printed.returncode == 0 and b"micro_batch_size: " in printed.stdout
