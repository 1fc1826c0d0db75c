"""Tests of attention from packages besides torch.

Only the tests with the mark ``gpu`` use the packages. In the other tests, stand-ins replace the packages. The stand-ins
behave as the documentation of the packages says.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import attention

from dpo_engine.errors import ConfigError
from dpo_engine.model import attention_packages
from dpo_engine.model.kernels import choose_kernels, require_effect
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.training.engine import Engine
from dpo_kernels import Tree, dispatch, eager, varlen
from support.small_run import config_of

GPU, CPU = (SimpleNamespace(gpu=gpu, device=torch.device("cpu")) for gpu in (True, False))
ARCH = SimpleNamespace(head_dim=8, num_attention_heads=4, num_kv_heads=2, has_windows=True, model_type="mistral")
TE = {"attention": "te", "head": "auto"}
AUTO = {"attention": "auto", "head": "auto"}
TREES = {
    "pair": ([3, 2, 4], [-1, 0, 0], None),
    "forest": ([2, 3, 1, 2, 4], [-1, 0, 0, -1, 3], None),
    "some queries": ([5, 3, 4], [-1, 0, 0], [1, 4, 6, 9, 10, 11]),
}


class DotProductAttention:
    """A stand-in for Transformer Engine's attention that behaves as documented for rows in the format ``thd``.

    The stand-in computes one row after another.
    """

    def __init__(self, heads, head_dim, *, num_gqa_groups, window_size, softmax_scale, **options):
        assert options == {
            "attention_dropout": 0.0,
            "qkv_format": "thd",
            "attn_mask_type": "padding_causal_bottom_right",
        }
        self.shape, self.groups = (heads, head_dim), num_gqa_groups
        self.window, self.scale = window_size, softmax_scale

    def __call__(self, query, key, value, *, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv):
        assert query.shape[1:] == self.shape and key.shape[1:] == value.shape[1:] == (self.groups, self.shape[1])
        rows, lengths = [], (cu_seqlens_q.diff().tolist(), cu_seqlens_kv.diff().tolist())
        assert (max_seqlen_q, max_seqlen_kv) == (max(lengths[0]), max(lengths[1]))
        parts = (query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]))
        for q, k, v in zip(*parts, strict=True):
            k, v = (tensor.repeat_interleave(len(q[0]) // self.groups, dim=1) for tensor in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            behind = torch.arange(len(k)) - (torch.arange(len(q))[:, None] + len(k) - len(q))  # 0: the query's own key
            hidden = behind > self.window[1]
            if self.window[0] >= 0:
                hidden |= behind < -self.window[0]
            rows.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
        return torch.cat(rows).flatten(1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", dict(dispatch.BACKENDS))
    monkeypatch.setattr(attention_packages, "BACKENDS", dispatch.BACKENDS)
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_defaults", dict(dispatch._defaults))
    monkeypatch.delenv("DPO_KERNELS", raising=False)
    attention_packages._te_module.cache_clear()
    yield
    attention_packages._te_module.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """Make a stand-in importable as ``transformer_engine.pytorch``, and return it."""
    package = SimpleNamespace(DotProductAttention=DotProductAttention)
    monkeypatch.setitem(__import__("sys").modules, "transformer_engine", SimpleNamespace(pytorch=package))
    monkeypatch.setitem(__import__("sys").modules, "transformer_engine.pytorch", package)
    return package


@pytest.mark.parametrize("value_width", [8, 6])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", TREES)
def test_transformer_engine_gets_the_rows_of_a_tree(name, window, value_width, installed):
    tree = Tree.of(*TREES[name])
    shapes = ((len(tree.rows), 4, 8), (tree.n, 2, 8), (tree.n, 2, value_width))
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    results = []
    for function in (attention_packages.tree_attention, eager.tree_attention):
        out = function(*inputs, tree, 0.3, window=window)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_te_is_registered_after_it_has_computed_a_tree(installed):
    for _ in range(2):  # the verb `parity` opens the engine several times in one process
        choose_kernels(TE, ARCH, GPU, torch.bfloat16, ["window"], tp=2, spec="te")
    assert dispatch.backend_name("attention") == "te"


@pytest.mark.parametrize(
    "needs, spec, says",
    [
        ([], "native", "model.attention=te: requires Transformer Engine's layers, but this run uses native layers; "),
        (["softcap"], "te", "model.attention=te: the backend's tree_attention has no argument named softcap, which"),
        (["sinks"], "te", "model.attention=te: the backend's tree_attention has no argument named sinks, which"),
    ],
)
def test_te_is_refused_where_it_cannot_run(needs, spec, says, installed):
    with pytest.raises(ConfigError) as refused:
        choose_kernels(TE, ARCH, GPU, torch.bfloat16, needs, spec=spec)
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize("unfused", [False, True])
def test_te_is_refused_if_it_has_no_fused_kernel(unfused, installed):
    class Unable(DotProductAttention):
        def __call__(self, *args, **options):
            if unfused:
                return self.unfused_attention(*args, **options)
            raise ValueError("No dot product attention backend is available.\nRun with NVTE_DEBUG=1")

    installed.DotProductAttention = Unable
    with pytest.raises(ConfigError) as refused:
        choose_kernels(TE, ARCH, GPU, torch.bfloat16, spec="te")
    reason = "there is no fused kernel for it" if unfused else "No dot product attention backend is available"
    assert str(refused.value) == (
        f"model.attention=te: Transformer Engine cannot compute this model's attention: {reason}; set the key to "
        "another value"
    )
    assert "te" not in dispatch.BACKENDS


@pytest.fixture
def loaded(monkeypatch):
    """Return a list that records the versions of FlashAttention that the engine activates.

    torch's function for the activation is replaced, so no version is loaded.
    """
    monkeypatch.setattr(attention, "list_flash_attention_impls", lambda: ["FA3", "FA4"], raising=False)
    found, enabled = [], torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(attention, "activate_flash_attention_impl", found.append, raising=False)
    yield found
    torch.backends.cuda.enable_cudnn_sdp(enabled)


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("asked, spec", [("varlen", "te"), ("varlen", "native"), ("sdpa", "native")])
def test_flash_attention_is_activated(version, asked, spec, loaded):
    choose_kernels({**AUTO, "attention": asked}, ARCH, GPU, torch.bfloat16, spec=spec, flash=version)
    assert loaded == [f"FA{version}"]


def test_flash_attention_2_needs_no_activation(loaded):
    choose_kernels(AUTO, ARCH, GPU, torch.bfloat16, flash=2)
    assert loaded == []


def test_flash_attention_needs_a_gpu(loaded):
    with pytest.raises(
        ConfigError, match="^model.flash_attention=3: requires a GPU, but this machine has none; set the"
    ):
        choose_kernels(AUTO, ARCH, CPU, torch.bfloat16, flash=3)
    assert loaded == []


def test_flash_attention_needs_bf16(loaded):
    with pytest.raises(ConfigError, match="^model.flash_attention=3: requires weights in bf16, but they are in torch"):
        choose_kernels(AUTO, ARCH, GPU, torch.float32, flash=3)
    assert loaded == []


# Each key consists of the attention backend for rows of trees (prompts, each followed by its responses), the layer
# spec, the layout, and a flag. The flag is True if the model's attention is plain, without a window, a soft cap or
# sinks. Each value consists of two flags. The first is True if model.flash_attention=3 has an effect. The second is
# True if model.attention=te has an effect, and None if the test does not check that effect.
USED = {
    ("varlen", "native", "tree", True): (True, None),
    ("sdpa", "te", "tree", True): (True, None),
    ("triton", "native", "tree", True): (False, None),
    ("eager", "native", "tree", False): (False, None),
    ("te", "te", "tree", True): (False, True),
    ("eager", "native", "stacked", True): (True, None),
    ("varlen", "te", "stacked", True): (False, None),
    ("varlen", "te", "stacked", False): (True, None),
    ("te", "te", "stacked", True): (False, False),
    ("te", "te", "stacked", False): (True, True),
}


@pytest.mark.parametrize("case", USED)
def test_kernels_without_effect_are_refused(case, monkeypatch):
    (name, spec, layout, plain), (flash, te) = case, USED[case]
    monkeypatch.setattr("dpo_engine.model.kernels.backend_name", lambda group: name)
    arch = SimpleNamespace(plain_attention=plain, model_type="llama")

    def refusal(attention, version):
        model = SimpleNamespace(attention=attention, flash_attention=version)
        try:
            require_effect(model, arch, spec, layout)
        except ConfigError as error:
            return str(error)
        return None

    assert refusal("auto", 2) is None
    said = refusal("auto", 3)
    kernels = f"model.attention={name}" if layout == "tree" else "model.spec=te"
    expected = (
        f"model.flash_attention=3: has no effect with {kernels} in {layout} rows of llama models; remove the key "
        "model.flash_attention"
    )
    assert said == (None if flash else expected)
    if te is not None:
        expected = (
            "model.attention=te: has no effect in stacked rows of llama models, because te layers compute these rows "
            "with Transformer Engine's attention anyway; remove the key"
        )
        assert refusal("te", 2) == (None if te else expected)


def test_the_trial_has_the_heads_dtype_and_options_of_the_run(loaded, monkeypatch):
    tried = []

    def compute(query, key, value, *tree, **options):
        tried.append((query.shape[-2], key.shape[-2], query.dtype, options.get("window"), "sinks" in options))
        out = query * 1
        out.register_hook(lambda grad: tried.append("gradient"))
        return out + key.sum() + value.sum() + (options["sinks"].sum() if "sinks" in options else 0)

    monkeypatch.setattr(attention_packages, "tree_attention_in_varlen", compute)
    monkeypatch.setattr(attention_packages, "causal", lambda *inputs, scale: inputs[0] * inputs[1].sum())
    asked = {**AUTO, "attention": "varlen"}
    choose_kernels(asked, ARCH, GPU, torch.bfloat16, ["window", "sinks"], tp=2, flash=3)
    layer = (2, 1, torch.bfloat16)
    assert tried == [(*layer, None, True), "gradient", (*layer, 2, True), "gradient"]
    tried.clear()
    choose_kernels(asked, ARCH, GPU, torch.bfloat16, flash=3)
    assert tried == [(4, 2, torch.bfloat16, None, False), "gradient"], (
        "if no row is longer than the window, the window must not be tried"
    )
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_flash_attention_refuses_heads_that_are_too_wide(loaded):
    arch = SimpleNamespace(**vars(ARCH) | {"head_dim": 320})
    with pytest.raises(
        ConfigError, match="^model.flash_attention=3: flash attention supports heads of at most 256 dim"
    ):
        choose_kernels(AUTO, arch, GPU, torch.bfloat16, flash=3)


def test_the_engine_passes_the_version_on(files, tiny_hf, tmp_path):
    config = config_of(files, tiny_hf("llama"), tmp_path, model={"path": str(tiny_hf("llama")), "flash_attention": 3})
    with pytest.raises(AssertionError, match="model.flash_attention=3: requires a GPU, but this machine has none"):
        run_ranks(Engine.open, 1, config=config)


def test_flash_attention_that_torch_does_not_know(monkeypatch):
    monkeypatch.setattr(attention, "list_flash_attention_impls", lambda: ["FA3"], raising=False)
    with pytest.raises(ConfigError, match=r"^model.flash_attention=4: torch .* does not support this version of"):
        choose_kernels(AUTO, ARCH, GPU, torch.bfloat16, flash=4)


@pytest.mark.skipif(
    not hasattr(attention, "list_flash_attention_impls"), reason="requires a torch that supports FlashAttention 3 and 4"
)
@pytest.mark.parametrize("version, module", [(3, "flash_attn_interface"), (4, "flash_attn")])
def test_flash_attention_that_is_not_installed(version, module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError) as refused:
        choose_kernels(AUTO, ARCH, GPU, torch.bfloat16, flash=version)
    assert str(refused.value).startswith(
        f"model.flash_attention={version}: the package of FlashAttention {version} cannot be loaded: "
    )
    assert str(refused.value).endswith("; install the package, or set the key to 2")


@pytest.mark.parametrize("function", ["causal", "tree_attention_in_varlen"])
def test_flash_attention_that_cannot_compute_the_heads(function, loaded, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("FA4 flash_attention backward unsupported: windowed attention not supported")

    monkeypatch.setattr(f"dpo_engine.model.attention_packages.{function}", fails)
    with pytest.raises(ConfigError) as refused:
        choose_kernels({**AUTO, "attention": "varlen"}, ARCH, GPU, torch.bfloat16, flash=4)
    assert str(refused.value) == (
        "model.flash_attention=4: FlashAttention 4 cannot compute this model's attention: FA4 flash_attention backward "
        "unsupported: windowed attention not supported; set the key to another value"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA device")
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", TREES)
def test_transformer_engine_on_a_gpu(name, window, d):
    pytest.importorskip("transformer_engine.pytorch")
    tree = Tree.of(*TREES[name])
    torch.manual_seed(0)
    wide = [
        torch.randn(n, heads, d, device="cuda").bfloat16()
        for n, heads in ((len(tree.rows), 4), (tree.n, 2), (tree.n, 2))
    ]
    inputs = [tensor.clone().requires_grad_() for tensor in wide]
    wide = [tensor.double().requires_grad_() for tensor in wide]
    results = []
    for function, tensors in ((attention_packages.tree_attention, inputs), (eager.tree_attention, wide)):
        out = function(*tensors, tree, window=window)
        results.append([out, *torch.autograd.grad(out.sum(), tensors)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=6e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA device")
@pytest.mark.parametrize("version, module", [(3, "flash_attn_interface"), (4, "flash_attn.cute")])
def test_newer_flash_attention_on_a_gpu(version, module):
    pytest.importorskip(module)
    arch = SimpleNamespace(**vars(ARCH) | {"head_dim": 64})
    platform = SimpleNamespace(gpu=True, device=torch.device("cuda"))
    tree, shapes = Tree.of(*TREES["forest"]), ((12, 4, 64), (12, 2, 64), (12, 2, 64))
    inputs = [torch.randn(*shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    expected = eager.tree_attention(*(tensor.double() for tensor in inputs), tree)
    expected = [expected, *torch.autograd.grad(expected.sum(), inputs)]
    try:
        choose_kernels({**AUTO, "attention": "varlen"}, arch, platform, torch.bfloat16, flash=version)
        got = varlen.tree_attention(*inputs, tree)
        got = [got, *torch.autograd.grad(got.sum(), inputs)]
    finally:
        attention.restore_flash_attention_impl()
    for result, want in zip(got, expected, strict=True):
        torch.testing.assert_close(result.double(), want.double(), rtol=1e-2, atol=6e-2)
