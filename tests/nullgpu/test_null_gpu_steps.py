"""Tests of how a training step uses a GPU: the host's waits, cuDNN plans, launches, and deterministic kernels."""

import pytest

from runs import requires_null_gpu, requires_transformer_engine, run

pytestmark = requires_null_gpu

SMALL = ("--model", "llama3_1b", "--layers", "4")
SHORT_TREES = (*SMALL, "--pairs", "8", "--lengths", "200,288,288", "--vary", "batch.layout=tree")
OTHER = ("--layers", "2", "--vary", "--lengths", "256,128,128")
LAYOUTS = {
    "olmo2 tp2": ("--model", "olmo2_1b", *OTHER, "--world", "2", "parallel.tp=2"),
    "gemma3": ("--model", "gemma3_1b", *OTHER),
    "command r tp2": ("--model", "cohere_35b", *OTHER, "--world", "4", "parallel.tp=2"),
    "stacked": (*SMALL, "--vary", "--steps", "3"),
    "tp2": (*SMALL, "--vary", "--world", "4", "parallel.tp=2"),
    "tp2 cp2": (*SMALL, "--vary", "--world", "8", "parallel.tp=2", "parallel.cp=2"),
    "overlap": (*SMALL, "--vary", "--world", "4", "parallel.overlap=true"),
    "stored reference": (*SMALL, "--vary", "reference.mode=stored"),
    "dataset reference": (*SMALL, "--vary", "reference.mode=dataset"),
    "first stage": (*SMALL, "--vary", "--pairs", "4", "--world", "4", "parallel.tp=2", "parallel.pp=2"),
    "last stage": (*SMALL, "--vary", "--pairs", "4", "--world", "4", "--rank", "3", "parallel.tp=2", "parallel.pp=2"),
    "interleaved": (*SMALL, "--vary", "--pairs", "4", "--world", "2", "parallel.pp=2", "parallel.vpp=2"),
    "recompute mlp": (*SMALL, "--vary", "model.recompute=selective"),
    "recompute full": (*SMALL, "--vary", "model.recompute=full"),
    "trees": (*SHORT_TREES, "batch.tokens_per_micro_batch=2048"),
    "trees tp2 cp2": (*SHORT_TREES, "--world", "4", "parallel.tp=2", "parallel.cp=2"),
    "trees triton": (*SHORT_TREES, "model.attention=triton", "batch.tokens_per_micro_batch=2048"),
    "trees triton cp2": (*SHORT_TREES, "--world", "2", "parallel.cp=2", "model.attention=triton"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_need_no_waits_and_no_plans(layout):
    """This test also fails if an operation has no deterministic kernel, because train.deterministic is true."""
    report = run(*LAYOUTS[layout])
    last = report["last"]
    assert last["micro_batches"] >= 2 or "cp2" in layout
    assert last["waits_in_micro_batches"] == 0, last["phases"]
    # One wait each for the metrics, the gradient norm, the bad-step flag and the stop flag.
    assert last["waits_besides"] <= 4, last["phases"]
    assert last["counts"]["cudnn_plans"] == 0
    for phase in ("pipeline", "reference"):
        assert last["phases"].get(phase, {}).get("pageable_copies", 0) == 0


def test_the_counters_see_what_a_step_does():
    """Check lower bounds, because counters that always stay zero would pass the upper bounds of the other tests."""
    last = run(*LAYOUTS["tp2"])["last"]
    assert last["waits_besides"] >= 3 and last["waits_of_the_clock"] == 1
    # 2 micro-batches x 4 layers x (2 forward passes x 4 products + 8 products in the backward pass) = 128 products.
    # Require most of them.
    assert last["counts"]["products"] > 4 * 4 * 7
    assert last["attention_launches"] > 0
    assert any(name.startswith("all_gather") and name.endswith("over 2") for name in last["collectives"])


def test_cudnn_plans_are_counted():
    """If kernels need not be deterministic, torch uses cuDNN's attention, which builds plans for each new length."""
    assert run(*SMALL, "--vary", "train.deterministic=false")["last"]["counts"]["cudnn_plans"] > 0


def test_every_loss_has_deterministic_kernels():
    results = run("--model", "llama3_1b", "--layers", "2", "--lengths", "64,32,32", "--losses")["losses"]
    assert len(results) > 20
    assert {name: why for name, why in results.items() if why} == {}


@requires_transformer_engine
def test_transformer_engine_has_deterministic_kernels():
    last = run(*SMALL, "--vary", "model.spec=te")["last"]
    assert last["waits_in_micro_batches"] == 0


@requires_transformer_engine
@pytest.mark.parametrize("more", [(), ("--world", "4", "parallel.tp=2", "parallel.cp=2"), ("model.recompute=full",)])
def test_trees_with_attention_of_transformer_engine(more):
    """Transformer Engine rounds sizes up for cuDNN, so later steps rarely need new plans for new lengths."""
    keys = ("model.spec=te", "model.attention=te", "train.deterministic=false", "batch.tokens_per_micro_batch=2048")
    steps = run(*SHORT_TREES, *keys, *more, "--steps", "8")["steps"]
    plans = [step["counts"]["cudnn_plans"] for step in steps]
    assert plans[0] > 0 and sum(plans[4:]) <= 2, plans
    last, passes = steps[-1], 4 if "model.recompute=full" in more else 3
    assert last["counts"]["cudnn_calls"] == 4 * passes * last["micro_batches"]
    assert last["waits_in_micro_batches"] == 0, last["phases"]


def launches_per_layer(*keys):
    """Return the launches per layer and micro-batch, without products and attention.

    The number is the sum over three passes: the reference's forward pass, and the policy's forward and backward pass.
    """
    few, many = (run("--layers", layers, "--world", "8", *keys)["last"] for layers in "24")
    counts = [figures["model_launches"] - figures["attention_launches"] for figures in (few, many)]
    return (counts[1] - counts[0]) / 2 / many["micro_batches"]


@pytest.mark.parametrize("model, most", [("llama3_8b", 31), ("qwen3_4b", 37)])
def test_launches_per_layer(model, most):
    assert launches_per_layer("--model", model) <= most


@requires_transformer_engine
def test_launches_per_layer_with_transformer_engine():
    assert launches_per_layer("--model", "llama3_8b", "model.spec=te") <= 20


@requires_transformer_engine
@pytest.mark.parametrize(
    "keys", [("model.recompute=full",), ("adapter.kind=dora", "parallel.tp=2", "batch.layout=tree")], ids=" ".join
)
def test_transformer_engine_with_adapters(keys):
    """Test adapters on Transformer Engine's linear layers, which differ from native layers in two ways.

    A layer of Transformer Engine rejects submodules whose parameters do not have the dtype of the layer's input. Such
    a layer can also include the normalization layer that precedes it.
    """
    world = ("--world", "2") if "parallel.tp=2" in keys else ()
    last = run("--model", "llama3_8b", "--layers", "2", *world, "model.spec=te", "adapter.rank=16", *keys)["last"]
    assert last["waits_in_micro_batches"] == 0


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_kernels_compile_in_a_step(capability):
    """Compile the kernels for the arguments of a real step; tests/kernels checks their registers and shared memory."""
    arguments = ("--model", "llama3_8b", "--layers", "1", "--lengths", "64,32,32", "batch.layout=tree")
    last = run(*arguments, "model.attention=triton", "model.head=triton", capability=capability)["last"]
    names = {name.removeprefix("triton:") for name in last["kernels"] if name.startswith("triton:")}
    assert {"_forward", "_backward_query", "_backward_key"} <= names
    assert names & {"_stats_of_logits", "_stats_of_linear"} and names & {"_grad_of_logits", "_grad_of_linear"}
