"""Tests of rotary embedding, head splitting, norms and gated activations: every backend must match formulas in fp64."""

import math

import pytest
import torch

from dpo_kernels import HeadNorms, eager
from support.interpreter import mend


@pytest.fixture(params=["eager", "triton"])
def backend(request):
    if request.param == "eager":
        return eager
    pytest.importorskip("triton")
    mend()
    from dpo_kernels import triton_backend

    return triton_backend


def dtype_of(backend):
    return torch.float64 if backend is eager else torch.float32


def close(backend, got, expected):
    tolerance = 1e-12 if backend is eager else 2e-6
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def turned(states, angles, interleaved):
    """Multiply pairs of dimensions, as complex numbers, by exp(i angle). `angles` is [s, number of pairs]."""
    half = angles.shape[-1]
    first, second = (
        (states[..., 0 : 2 * half : 2], states[..., 1 : 2 * half : 2])
        if interleaved
        else (states[..., :half], states[..., half : 2 * half])
    )
    numbers = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    parts = (numbers.real, numbers.imag)
    whole = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat([whole, states[..., 2 * half :]], dim=-1)


def table_of(angles, dtype):
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


WIDTHS = {"whole": (8, 4, False), "neighbors": (8, 4, True), "part": (12, 3, False), "part, neighbors": (12, 3, True)}


@pytest.mark.parametrize("case", WIDTHS)
def test_rotation_multiplies_pairs_as_complex_numbers(case, backend):
    width, half, interleaved = WIDTHS[case]
    angles = random(21, half, seed=1) * 4
    states = random(21, 2, 6, width).requires_grad_()
    given = states.detach().to(dtype_of(backend))[..., ::2, :].requires_grad_()  # a view that is not contiguous
    got = backend.rotate(given, table_of(angles, given.dtype), interleaved)
    expected = turned(states[..., ::2, :], angles, interleaved)
    close(backend, got, expected)
    grad = random(21, 3, 2, width, seed=2).transpose(1, 2)
    close(
        backend,
        torch.autograd.grad(got, given, grad.to(got.dtype))[0],
        torch.autograd.grad(expected, states, grad)[0][..., ::2, :],
    )


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("case", [*WIDTHS, None])
def test_heads_are_split_and_rotated(case, queries, backend):
    width, half, interleaved = WIDTHS[case or "whole"]
    angles = random(19, half, seed=1) * 4
    mixed = random(19, 2, 2, queries + 2, width).requires_grad_()
    given = mixed.detach().to(dtype_of(backend)).requires_grad_()
    table = table_of(angles, given.dtype) if case else None
    got = backend.split_heads(given, table, interleaved)
    parts = (mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :])
    expected = [turned(part, angles, interleaved) if case else part for part in parts[:2]] + [parts[2]]
    grads = [random(2, *part.shape[:1], *part.shape[2:], seed=3).transpose(0, 1) for part in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.is_contiguous()
        close(backend, ours, theirs)
    close(
        backend,
        torch.autograd.grad(got, given, [grad.to(given.dtype) for grad in grads])[0],
        torch.autograd.grad(expected, mixed, grads)[0],
    )


@pytest.mark.parametrize(
    "case, frozen", [*((case, ()) for case in [*WIDTHS, None]), ("whole", ("query",)), ("whole", ("query", "key"))]
)
def test_heads_are_normalized_before_they_are_rotated(case, frozen, backend):
    width, half, interleaved = WIDTHS[case or "whole"]
    angles = random(19, half, seed=1) * 4
    mixed = random(19, 2, 2, 5, width).requires_grad_()
    weights = {name: random(width, seed=seed).requires_grad_() for seed, name in enumerate(("query", "key"), 4)}
    dtype = dtype_of(backend)
    given = mixed.detach().to(dtype).requires_grad_()
    own = {name: weight.detach().to(dtype).requires_grad_(name not in frozen) for name, weight in weights.items()}
    table = table_of(angles, dtype) if case else None
    got = backend.split_heads(given, table, interleaved, HeadNorms(**own, offset=0.5, eps=0.1))
    expected = []
    for weight, part in zip(weights.values(), (mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :]), strict=True):
        normed = part * (weight + 0.5) / torch.sqrt((part**2).mean(-1, keepdim=True) + 0.1)
        expected.append(turned(normed, angles, interleaved) if case else normed)
    expected.append(mixed[..., -1, :])
    grads = [random(2, *part.shape[:1], *part.shape[2:], seed=3).transpose(0, 1) for part in expected]
    trained = [name for name in weights if name not in frozen]
    theirs = torch.autograd.grad(expected, [mixed, *(weights[name] for name in trained)], grads)
    ours = torch.autograd.grad(got, [given, *(own[name] for name in trained)], [grad.to(dtype) for grad in grads])
    for mine, other in zip((*got, *ours), (*expected, *theirs), strict=True):
        close(backend, mine / 10, other / 10)


@pytest.mark.parametrize("width, offset", [(12, 0.5), pytest.param(70, 0.0, marks=pytest.mark.slow)])
def test_root_mean_square_norm(width, offset, backend):
    """There are more rows than Triton's backward pass has programs."""
    states, weight = random(3, 91, width).requires_grad_(), random(width, seed=1).requires_grad_()
    given = states.detach().to(dtype_of(backend)).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    own = weight.detach().to(dtype_of(backend)).requires_grad_()
    got = backend.rms_norm(given, own, 0.1, offset)
    expected = states * (weight + offset) / torch.sqrt((states**2).mean(-1, keepdim=True) + 0.1)
    grad = random(91, 3, width, seed=2).transpose(0, 1)
    theirs = torch.autograd.grad(expected, [states, weight], grad)
    ours = torch.autograd.grad(got, [given, own], grad.to(got.dtype))
    for mine, other, size in zip((got, *ours), (expected, *theirs), (10, 10, 100), strict=True):
        close(backend, mine / size, other / size)
    assert backend.rms_norm(given[:0], own, 0.1).shape == (0, 91, width)
    frozen = backend.rms_norm(given, own.detach(), 0.1, offset)
    close(backend, torch.autograd.grad(frozen, given, grad.to(got.dtype))[0], ours[0])


FORMULAS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_gates(activation, backend):
    both = (3 * random(5, 2, 2 * 1030)).requires_grad_()
    given = both.detach().to(dtype_of(backend)).requires_grad_()
    got = backend.gated(given, activation)
    gate, up = both.chunk(2, dim=-1)
    expected = FORMULAS[activation](gate) * up
    grad = random(5, 2, 1030, seed=1)
    close(backend, got / 10, expected / 10)
    close(
        backend,
        torch.autograd.grad(got, given, grad.to(got.dtype))[0] / 10,
        torch.autograd.grad(expected, both, grad)[0] / 10,
    )
    assert backend.gated(given[:0], activation).shape == (0, 2, 1030)


def test_dtype_is_kept():
    states = random(5, 2, 3, 8).bfloat16()
    angles = random(5, 4, seed=1)
    got = eager.rotate(states, table_of(angles, torch.bfloat16))
    assert got.dtype is eager.gated(states).dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), turned(states.double(), angles, False), rtol=2e-2, atol=4e-2)


def test_rms_norm_and_its_gradients():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 10, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.rand(10, dtype=torch.float64, generator=generator, requires_grad=True)
    got = eager.rms_norm(x, weight, 1e-3)
    expected = x * weight / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *given: eager.rms_norm(*given, 1e-3), (x, weight))
    half = x.detach().bfloat16()
    got = eager.rms_norm(half, weight.detach().bfloat16(), 1e-3)
    expected = torch.nn.functional.rms_norm(half, (10,), weight.detach().bfloat16(), 1e-3)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def test_fp64_is_refused_in_triton():
    pytest.importorskip("triton")
    from dpo_kernels import triton_backend

    wide = random(2, 1, 1, 3, 8)
    table = table_of(random(2, 4), torch.float64)
    for name, call in {
        "rotate": lambda: triton_backend.rotate(wide[:, :, 0], table),
        "split_heads": lambda: triton_backend.split_heads(wide, table),
        "gated": lambda: triton_backend.gated(wide),
        "rms_norm": lambda: triton_backend.rms_norm(wide, wide[0, 0, 0, 0], 1e-6),
    }.items():
        with pytest.raises(ValueError, match=f"triton {name}: does not support fp64, because it computes in fp32"):
            call()
