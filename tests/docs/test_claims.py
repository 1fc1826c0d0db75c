"""Tests that the README and the pages are right about losses, metrics, exit codes, keys, signatures, files and memory.

Some tests in this file also check links, spelling and the length of the README.
"""

import ast
import inspect
import json
import math
import re
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

import dpo_engine
from dpo_engine.config.keys import keys
from dpo_engine.config.run import Config, draft
from dpo_engine.errors import EngineError
from dpo_engine.model import router_losses
from dpo_engine.model.architecture import FAMILIES, read_architecture
from dpo_engine.model.megatron_options import ACCEPTED
from dpo_engine.model.memory import GIB, memory
from dpo_engine.objective.losses import LOSSES, loss_facts, loss_options, with_defaults
from dpo_engine.objective.options import option_problems
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.training import step, trainer, work
from dpo_engine.training.metrics import METRICS, Reported, means

ROOT = Path(__file__).parents[2]
NAMES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README = TEXTS["README.md"]
OURS = [name for name in TEXTS if name != "docs/migrating.md"]  # this page also names other systems' keys
REQUIRED = ["model.path=m", "data.train=a.jsonl", "train.output_dir=o"]
KEYS = {key.path for key in keys()} | set(Config.model_fields)
KEYS |= {f"loss.{option}" for loss in LOSSES.values() for option in loss_options(loss)}


def prose(text: str) -> str:
    """Return the text without fenced code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def table(text: str, heading: str) -> list[list[str]]:
    """Return the rows of a table, each row as a list of cells. The header begins with the text ``heading``."""
    rows = text[text.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


AT_STEP_1 = {
    "ln 2": lambda o: math.log(2),
    "ln 2 for `gamma` and `margin_scale` 0": lambda o: None if o["gamma"] or o["margin_scale"] else math.log(2),
    "1": lambda o: 1.0,
    "2 ln 2": lambda o: 2 * math.log(2),
    "(1 + ln 2)/2": lambda o: (1 + math.log(2)) / 2,
    "1/(4 beta^2)": lambda o: 1 / (4 * o["beta"] ** 2),
    "1/(2 beta^2)": lambda o: 1 / (2 * o["beta"] ** 2),
    "ln(1 + e^gamma)": lambda o: math.log(1 + math.exp(o["gamma"])),
    "-ln 2 - ln(e(1-e))/2": lambda o: -math.log(2) - math.log(o["label_smoothing"] * (1 - o["label_smoothing"])) / 2,
}
"""For each text in the column "at step 1", a function that computes the value from the options of a loss.

If the function returns None, the text states no value for these options, and the test does not check the loss.
"""


@pytest.mark.parametrize("changed", [{}, {"beta": 0.5, "label_smoothing": 0.2, "gamma": 0.6, "margin_scale": 0.2}])
def test_losses_declare_the_values_in_the_table(changed):
    for names, _, said, *_ in table(TEXTS["docs/losses.md"], "`loss.name` | per pair"):
        name = re.findall(r"`(\w+)`", names)[0]
        if name == "mix":
            assert said == "weighted sum of the values of its terms, if these are known"
            continue
        defaults = with_defaults(LOSSES[name], {})
        options = defaults | {key: value for key, value in changed.items() if key in defaults}
        facts = loss_facts(LOSSES[name], options)
        if not facts.needs_reference:
            assert said == "no reference", name
        elif said == "from the data":
            assert facts.at_init is None, name
        elif (expected := AT_STEP_1[said](options)) is not None:
            assert facts.at_init == pytest.approx(expected), name


def test_the_readme_counts_the_losses():
    ours = {id(loss) for loss in LOSSES.values() if loss.__module__.startswith("dpo_engine.")}
    assert f", {len(ours)} in all" in README


def test_the_table_of_metrics_is_what_is_reported():
    """`METRICS` has exactly the metrics that `means` returns, and the metrics that other functions of a step add."""
    reported = Reported(reference=True, entropy=True, sources=("NAME", "other"), averages=True, parts=("NAME",))
    sums = means(torch.ones(sum(reported.sizes), dtype=torch.float64), reported, 1.0)
    names = {name for name in sums if "other" not in name}
    for function in (step.train_step, trainer.Trainer.train_one, work.speed, router_losses.router_metrics):
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            found = node.keys if isinstance(node, ast.Dict) else [node.slice] if isinstance(node, ast.Subscript) else []
            names |= {key.value for key in found if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    assert names == set(METRICS)


def test_exit_codes():
    codes = {int(row[0]) for row in table(TEXTS["docs/troubleshooting.md"], "exit code")}
    from_outside = {0, 130, 134}  # success, Ctrl-C, and an abort by NCCL's watchdog
    assert codes == {kind.exit_code for kind in (EngineError, *EngineError.__subclasses__())} | from_outside


@pytest.mark.parametrize("name", OURS)
def test_keys_in_prose_exist_and_take_the_values_given(name, tmp_path):
    """Check text in backticks that starts with the name of a section of the run file, such as `model.`.

    The text must be a valid `key`, `key: value` or `key=value`. The test skips file names. The following values are
    not checked: values of loss options, values of Megatron options, and values that contain `...`.
    """
    run = tmp_path / "run.yaml"
    run.write_text("{}")
    sections = "|".join(Config.model_fields)
    for key, value in re.findall(rf"`((?:{sections})\.[\w.]+)(?:(?:: |=)([^`]*))?`", prose(TEXTS[name])):
        if key.endswith((".py", ".md", ".yaml", ".sbatch", ".KEY")):
            continue
        if field := re.fullmatch(r"megatron\.(transformer|ddp)\.(\w+)", key):
            assert field[2] in ACCEPTED[field[1]], key
            continue
        assert key in KEYS, key
        if value and "..." not in value and key.partition(".")[0] != "loss":
            overrides = re.split(r" (?=\w+\.[\w.]+=)", f"{key}={value}")
            assert draft(run, [*REQUIRED, *overrides]).problems == [], overrides


@pytest.mark.parametrize("name", OURS)
def test_losses_in_yaml_take_their_options(name):
    for block in re.findall(r"^```yaml\n(.*?)^```$", TEXTS[name], re.DOTALL | re.MULTILINE):
        loss = dict(yaml.safe_load(block).get("loss", {}))
        chosen = loss.pop("name", "sigmoid")
        if chosen not in LOSSES:  # a loss of a plugin that is not imported here
            assert f'"{chosen}"' in (ROOT / "examples/extend/loss.py").read_text(encoding="utf-8")
            continue
        options = {key: value for key, value in loss.items() if key not in ("ld_alpha", "use_weighting")}
        assert option_problems(chosen, options, "loss") == []


def test_the_python_page_has_every_function_with_its_parameters():
    def shown(value: object) -> str:
        return f'"{value}"' if isinstance(value, str) else str(value)

    rows = [row[0].strip("`") for row in table(TEXTS["docs/python.md"], "name")]
    functions = {row.partition("(")[0]: row for row in rows if not row.lower().startswith("config.")}
    assert set(functions) == {name for name in dpo_engine.__all__ if name.islower()}
    for name, row in functions.items():
        said = dict(re.findall(r"[(,] ?(\w+)(?:=([^,)]+))?", row))
        parameters = inspect.signature(getattr(dpo_engine, name)).parameters
        declared = {key: "" if p.default is p.empty else shown(p.default) for key, p in parameters.items()}
        assert said == {key: value for key, value in declared.items() if key not in ("say", "interruption")}, name


def test_the_readme_counts_the_families():
    own = [name for name in FAMILIES if FAMILIES[name].__module__.startswith("dpo_engine.")]
    assert f"| {len(own)} families," in README


def test_the_readme_lists_every_file_under_its_wing():
    listing = README[README.index("```\ncli.py ") + 4 :].split("```")[0]
    listed, folders = [], []
    for line in listing.splitlines():
        if head := re.match(r"( *)(\w+)/ ", line):
            folders[len(head[1]) // 2 :] = [head[2]]
        elif line.startswith(("cli.py", "(root)")):
            folders = []
        listed += ["/".join([*folders, name]) for name in re.findall(r"\w+\.py", line)]
    package = ROOT / "dpo_engine"
    files = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name[:2] != "__"]
    # docs/models.md lists the families, so the README names only the files of families/ that several families use.
    families = {f"model/families/{name}" for name in ("blocks.py", "mixtures.py", "rule.py", "rope.py")}
    files = [name for name in files if not name.startswith("model/families/") or name in families]
    assert sorted(listed) == sorted(files)


def test_the_readme_shows_what_the_quickstart_prints():
    """The transcript in the README has the labels that ``show.py`` prints, in the same order.

    The picture of the quickstart has at most 150,000 bytes.
    """
    script = (ROOT / "examples/quickstart/show.py").read_text(encoding="utf-8")
    rows = re.findall(r"^  (\D+?) +[\d.]+% +[\d.]+%$", README, re.MULTILINE)
    assert len(rows) == 3
    places = [script.index(f'"{row}"') for row in rows]
    assert places == sorted(places)
    assert (ROOT / "docs/images/quickstart.png").stat().st_size <= 150_000


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_outside_of_the_site_lead_to_files(name):
    """mkdocs does not check the links in these two files, because the files are not pages of the site."""
    targets = {target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(TEXTS[name])) if "://" not in target}
    assert targets and not [target for target in targets if not (ROOT / target).exists()]
    if name == "README.md":
        assert {page for page in TEXTS if page.startswith("docs/")} <= targets


def test_the_readme_is_short():
    text, _, files = README.partition("## The files")
    assert len(text.split()) <= 1250 and len(files.split()) <= 550 and len(README.splitlines()) <= 200


@pytest.mark.parametrize("name", TEXTS)
def test_spelling_is_american(name):
    stems = "optimis|tokenis|initialis|normalis|serialis|recognis|summaris|organis|behaviour|colour|labelled|cancelled"
    assert not re.findall(rf"\b\w*(?:{stems})\w*|\b(?:licence|centre|judgement|favour)\b", TEXTS[name], re.IGNORECASE)


LLAMA_3_1 = {
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
}


def test_starting_layouts_have_the_memory_that_check_prints(tmp_path):
    rows = table(TEXTS["docs/parallelism.md"], "model | GPUs")
    for model, gpus, layout, *said in rows:
        shape = dict(model_type="llama", vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072)
        (tmp_path / "config.json").write_text(json.dumps({**shape, **LLAMA_3_1[model], "rms_norm_eps": 1e-5}))
        arch = read_architecture(tmp_path)
        sizes = {name: int(size) for name, size in re.findall(r"(\w+) (\d+)", layout)}
        split = {name: sizes[name] for name in ("tp", "pp", "vpp") if name in sizes}
        dims = ParallelDims(world=int(gpus), **split)
        assert dims.dp == sizes.get("dp", 1) and dims.problems(arch) == [], layout
        for mode, expected in zip(("resident", "stored"), said, strict=True):
            config = draft(None, [*REQUIRED, f"reference.mode={mode}", "data.max_length=4096"]).config
            peak = memory(config, arch, dims, dtype="bf16", tokens=2 * 4096).peak
            assert f"{peak / GIB:.1f}" == expected, (model, layout, mode)
        for file in re.findall(r"`(.*?)`", layout):
            asked = Config.load(ROOT / file).parallel
            assert {name: getattr(asked, name) or 1 for name in ("tp", "pp", "vpp")} == {
                name: split.get(name, 1) for name in ("tp", "pp", "vpp")
            }


ADAPTED = {
    "none": [],
    "LoRA, all projections": ["adapter.rank=16"],
    "LoRA, `q_proj` and `v_proj`": ["adapter.targets=[q_proj, v_proj]"],
    "DoRA, all projections": ["adapter.kind=dora"],
}


def test_adapters_need_the_memory_that_the_page_says(tmp_path):
    shape = dict(model_type="llama", vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072)
    (tmp_path / "config.json").write_text(json.dumps({**shape, **LLAMA_3_1["8B"], "rms_norm_eps": 1e-5}))
    arch = read_architecture(tmp_path)
    rows = table(TEXTS["docs/adapters.md"], "adapter | `model.recompute`")
    assert {name.partition(" (")[0] for name, *_ in rows} == set(ADAPTED)
    for name, recompute, kept, _, estimated in rows:
        keys = [*ADAPTED[name.partition(" (")[0]], f"model.recompute={recompute.strip('`')}", "data.max_length=3072"]
        found = memory(draft(None, [*REQUIRED, *keys]).config, arch, ParallelDims(world=8), dtype="bf16", tokens=6144)
        state = found.weights + found.gradients + found.optimizer + found.reference
        assert (f"{state / GIB:.1f}", f"{found.peak / GIB:.1f}") == (kept, estimated), name


def test_only_one_page_says_that_no_gpu_has_run_the_engine():
    """Only one sentence, in docs/gpu.md, says that the engine has not run on a GPU. The README links to this page.

    Therefore, no other sentence has to change after the engine has run on a GPU.
    """
    said = re.compile(r"(not\s+run\s+on\s+a\s+GPU|No\s+GPU\s+has|on\s+a\s+GPU,?\s+yet)")
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*"), *ROOT.glob("*/README.md")]
    found = {
        path.name: len(said.findall(path.read_text())) for path in pages if path.is_file() and path.suffix != ".pyc"
    }
    assert {name: times for name, times in found.items() if times} == {"gpu.md": 1}
    assert "(docs/gpu.md)" in (ROOT / "README.md").read_text()
