"""Tests of losses against the formulas in the papers, and of properties that every registered loss must have."""

import functools
import math
from math import exp, log
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from dpo_engine.objective.losses import (
    LOSSES,
    PairData,
    PairLogps,
    accuracies,
    apply_loss,
    loss_coefficients,
    loss_facts,
    loss_options,
    rewards,
    with_defaults,
)

COUNT = 5
MPO = [{"name": "sigmoid", "weight": 0.8, "beta": 0.3}, {"name": "bco_pair", "weight": 0.2}, {"name": "sft"}]
REQUIRED = {"mix": {"losses": MPO}, "mpo": {"losses": MPO}}
COUPLED = [
    ("aot", {}),
    ("aot_unpaired", {"label_smoothing": 0.1}),
    ("bco_pair", {"shift": "batch"}),
    ("mix", {"losses": [{"name": "aot", "weight": 0.5}, {"name": "sft"}]}),
]


def pairs(seed: int = 0, count: int = COUNT) -> tuple[PairLogps, PairLogps]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 12, (2, count), generator=generator).double()

    def record() -> PairLogps:
        chosen, rejected = -12 * torch.rand(2, count, dtype=torch.float64, generator=generator)
        return PairLogps(chosen, rejected, *tokens)

    return record(), record()


def columns(policy: PairLogps, weights: list[float] | None = None) -> PairData:
    count = len(policy.chosen)
    generator = torch.Generator().manual_seed(count)
    weights = torch.ones(count, dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
    mean = (weights * policy.chosen_tokens).sum() / weights.sum()
    margins, worse = torch.rand(2, count, dtype=torch.float64, generator=generator) + 0.1
    return PairData(weights, margins, worse + 2 * margins, worse, mean.expand(count))


def options_of(name: str, **given) -> dict:
    return with_defaults(LOSSES[name], {**REQUIRED.get(name, {}), **given})


def losses_of(name: str, policy: PairLogps, reference: PairLogps | None, weights=None, **given) -> torch.Tensor:
    return apply_loss(LOSSES[name], policy, reference, columns(policy, weights), options_of(name, **given))


class Scalars:
    """The values of one pair, with the short names that ``FORMULAS`` uses."""

    def __init__(self, policy: PairLogps, reference: PairLogps, data: PairData, i: int):
        self.pc, self.pr, self.lc, self.lr = (tensor[i].item() for tensor in policy[:4])
        self.rc, self.rr = reference.chosen[i].item(), reference.rejected[i].item()
        _, self.margin, self.gc, self.gr, self.tokens = (tensor[i].item() for tensor in data)
        self.a, self.b = self.pc - self.rc, self.pr - self.rr
        self.d = self.a - self.b


def s(x: float) -> float:
    return 1 / (1 + exp(-x))


def kl(p: float, q: float) -> float:
    return p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))


def score_forward(r: float) -> float:
    return 1 - 1 / exp(r)


def score_js(r: float) -> float:
    return log(2 * exp(r) / (1 + exp(r)))


def score_alpha(r: float, order: float) -> float:
    return (exp(r) ** (order - 1) - 1) / (order - 1)


def odds(mean: float) -> float:
    return exp(mean) / (1 - exp(mean))


FORMULAS = [
    ("sigmoid", {}, lambda x: -log(s(0.1 * x.d))),
    ("sigmoid", {"beta": 0.5}, lambda x: -log(s(0.5 * x.d))),
    ("sigmoid", {"label_smoothing": 0.2}, lambda x: -0.8 * log(s(0.1 * x.d)) - 0.2 * log(1 - s(0.1 * x.d))),
    ("sigmoid", {"gamma": 1.4}, lambda x: -log(s(0.1 * (x.d - 1.4 / 0.1)))),
    ("sigmoid", {"margin_scale": 2.0, "gamma": 0.1}, lambda x: -log(s(0.1 * x.d - 0.1 - 2 * x.margin))),
    ("sigmoid", {"average": True}, lambda x: -log(s(0.1 * (x.a / x.lc - x.b / x.lr)))),
    ("sigmoid", {"reference_free": True}, lambda x: -log(s(0.1 * (x.pc - x.pr)))),
    (
        "sigmoid",
        {"divergence": "forward_kl"},
        lambda x: log(1 + exp(-0.1 * (score_forward(x.a) - score_forward(x.b)))),
    ),
    ("sigmoid", {"divergence": "js"}, lambda x: -log(s(0.1 * (score_js(x.a) - score_js(x.b))))),
    (
        "sigmoid",
        {"divergence": "alpha", "alpha": 0.7},
        lambda x: -log(s(0.1 * (score_alpha(x.a, 0.7) - score_alpha(x.b, 0.7)))),
    ),
    ("sigmoid", {"divergence": "alpha", "alpha": 1.0}, lambda x: -log(s(0.1 * x.d))),
    ("sigmoid_norm", {"beta": 5.0}, lambda x: -log(s(5 * (x.a / x.lc - x.b / x.lr)))),
    (
        "sigmoid_norm",
        {"divergence": "js"},
        lambda x: -log(s(0.1 * (score_js(x.a) / x.lc - score_js(x.b) / x.lr))),
    ),
    ("simpo_reference", {}, lambda x: -log(s(0.1 * (x.a / (x.lc + 0.01) - x.b / (x.lr + 0.01) - 1.4 / 0.1)))),
    ("hinge", {"beta": 0.2}, lambda x: max(0, 1 - 0.2 * x.d)),
    ("hinge", {"divergence": "js"}, lambda x: max(0, 1 - 0.1 * (score_js(x.a) - score_js(x.b)))),
    ("ipo", {"beta": 0.3}, lambda x: (x.a / x.lc - x.b / x.lr - 1 / 0.6) ** 2),
    ("ipo", {"beta": 0.3, "average": False}, lambda x: (x.d - 1 / 0.6) ** 2),
    ("ipo", {"reference_free": True}, lambda x: (x.pc / x.lc - x.pr / x.lr - 5) ** 2),
    (
        "robust",
        {"label_smoothing": 0.1},
        lambda x: (-0.9 * log(s(0.1 * x.d)) + 0.1 * log(1 - s(0.1 * x.d))) / 0.8,
    ),
    ("robust", {"divergence": "js"}, lambda x: -log(s(0.1 * (score_js(x.a) - score_js(x.b))))),
    ("exo_pair", {"label_smoothing": 0.05}, lambda x: kl(s(0.1 * x.d), 0.95)),
    ("exo_pair", {"divergence": "js"}, lambda x: kl(s(0.1 * (score_js(x.a) - score_js(x.b))), 0.999)),
    (
        "discopop",
        {"tau": 0.5},
        lambda x: -(1 - s(0.2 * x.d)) * log(s(0.1 * x.d)) + s(0.2 * x.d) * exp(-0.1 * x.d),
    ),
    (
        "discopop",
        {"tau": 1.0, "reference_free": True},
        lambda x: (1 - s((x.pc - x.pr) / 10)) * -log(s((x.pc - x.pr) / 10))
        + s((x.pc - x.pr) / 10) * exp((x.pr - x.pc) / 10),
    ),
    ("dpop", {"dpop_lambda": 3.0}, lambda x: -log(s(0.1 * (x.d - 3 * max(0, x.rc - x.pc))))),
    ("nca_pair", {}, lambda x: -log(s(0.1 * x.a)) - 0.5 * log(s(-0.1 * x.a)) - 0.5 * log(s(-0.1 * x.b))),
    ("bco_pair", {}, lambda x: -log(s(0.1 * x.a)) - log(1 - s(0.1 * x.b))),
    ("sppo_hard", {"beta": 0.2}, lambda x: (x.a - 2.5) ** 2 + (x.b + 2.5) ** 2),
    ("apo_zero", {}, lambda x: 1 - s(0.1 * x.a) + s(0.1 * x.b)),
    ("apo_down", {}, lambda x: s(0.1 * x.a) + 1 - s(0.1 * x.d)),
    ("rpo_sq", {"scale": 2.0}, lambda x: (0.1 * x.d - 2 * (x.gc - x.gr)) ** 2),
    ("rpo_sq", {"average": True}, lambda x: (0.1 * (x.a / x.lc - x.b / x.lr) - (x.gc - x.gr)) ** 2),
    ("rpo_bwd_kl", {"scale": 2.0}, lambda x: kl(s(2 * (x.gc - x.gr)), s(0.1 * x.d))),
    ("rpo_fwd_kl", {"scale": 2.0}, lambda x: kl(s(0.1 * x.d), s(2 * (x.gc - x.gr)))),
    ("sft", {}, lambda x: -x.pc / x.tokens),
    ("sft", {"nll": "response_mean"}, lambda x: -x.pc / x.lc),
    ("sft", {"nll": "sum"}, lambda x: -x.pc),
    ("simpo", {}, lambda x: -log(s(2 * (x.pc / x.lc - x.pr / x.lr) - 0.5))),
    (
        "simpo",
        {"label_smoothing": 0.1},
        lambda x: -0.9 * log(s(2 * (x.pc / x.lc - x.pr / x.lr) - 0.5))
        - 0.1 * log(s(0.5 - 2 * (x.pc / x.lc - x.pr / x.lr))),
    ),
    (
        "simpo",
        {"alpha": 0.25, "gamma": 0.0},
        lambda x: log(1 + exp(2 * (exp(x.pc / x.lc) ** -0.25 - exp(x.pr / x.lr) ** -0.25) / 0.25)),
    ),
    ("cpo", {}, lambda x: -log(s(0.1 * (x.pc - x.pr))) - x.pc / x.tokens),
    (
        "cpo",
        {"nll_weight": 0.0, "label_smoothing": 0.1, "beta": 0.2},
        lambda x: -0.9 * log(s(0.2 * (x.pc - x.pr))) - 0.1 * log(s(0.2 * (x.pr - x.pc))),
    ),
    ("cpo", {"kind": "hinge", "nll": "sum"}, lambda x: max(0, 1 - 0.1 * (x.pc - x.pr)) - x.pc),
    ("cpo", {"kind": "ipo", "nll_weight": 0.0}, lambda x: (x.pc / x.lc - x.pr / x.lr - 5) ** 2),
    ("orpo", {"beta": 0.2}, lambda x: -x.pc / x.lc - 0.2 * log(s(log(odds(x.pc / x.lc) / odds(x.pr / x.lr))))),
    (
        "mix",
        {"losses": MPO},
        lambda x: -0.8 * log(s(0.3 * x.d)) - 0.2 * (log(s(0.1 * x.a)) + log(s(-0.1 * x.b))) - x.pc / x.tokens,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "formula"), FORMULAS, ids=[f"{n}-{sorted(g)}" for n, g, _ in FORMULAS])
def test_values_match_the_formula(name, given, formula):
    policy, reference = pairs()
    got = losses_of(name, policy, reference, **given)
    data = columns(policy)
    expected = [formula(Scalars(policy, reference, data, i)) for i in range(COUNT)]
    assert got.tolist() == pytest.approx(expected, rel=1e-10)


def test_all_losses_except_the_aot_losses_have_a_formula_here():
    here = {LOSSES[name] for name, *_ in FORMULAS}
    own = {loss for loss in LOSSES.values() if loss.__module__.startswith("dpo_engine.")}
    assert {loss.__name__ for loss in own - here} == {"aot", "aot_unpaired"}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_transport_compares_sorted_lists(smoothing):
    policy, reference = pairs(6, 9)
    a, b = (policy.chosen - reference.chosen).tolist(), (policy.rejected - reference.rejected).tolist()
    ratios = (policy.chosen - policy.rejected).tolist(), (reference.chosen - reference.rejected).tolist()
    for name, (first, second) in {"aot": ratios, "aot_unpaired": (a, b)}.items():
        expected = [0.0] * 9
        for x, y in zip(sorted(first), sorted(second), strict=True):
            m = 0.1 * (x - y)
            expected[first.index(x)] = -(1 - smoothing) * log(s(m)) - smoothing * log(s(-m))
        got = losses_of(name, policy, reference, label_smoothing=smoothing)
        assert got.tolist() == pytest.approx(expected, rel=1e-10)


def repeated(times: list[int], *records):
    index = torch.tensor([i for i, n in enumerate(times) for _ in range(n)])
    return [record.map(lambda tensor: tensor[index]) for record in records]


@pytest.mark.parametrize(("name", "given"), COUPLED)
def test_weight_counts_as_repetition_of_the_pair(name, given):
    policy, reference = pairs(7)
    times = [2, 0, 1, 3, 1]
    got = losses_of(name, policy, reference, weights=[float(n) for n in times], **given)
    many_policy, many_reference = repeated(times, policy, reference)
    expected = losses_of(name, many_policy, many_reference, **given).mean().item()
    weights = torch.tensor(times, dtype=torch.float64)
    assert (got * weights).sum().item() / sum(times) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_transport_assigns_each_pair_its_own_quantiles(name):
    policy, reference = pairs(7)
    times = [2, 0, 1, 3, 1]
    got = losses_of(name, policy, reference, weights=[float(n) for n in times])
    copies = losses_of(name, *repeated(times, policy, reference)).split(times)
    assert got.tolist() == pytest.approx([float(part.mean()) if len(part) else 0.0 for part in copies], rel=1e-12)


@pytest.mark.parametrize(("name", "given"), COUPLED)
def test_coupled_losses_do_not_depend_on_the_order_of_pairs(name, given):
    policy, reference = pairs(8)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = losses_of(name, *(record.map(lambda tensor: tensor[order]) for record in (policy, reference)), **given)
    expected = losses_of(name, policy, reference, **given)[order]
    torch.testing.assert_close(shuffled, expected, rtol=1e-12, atol=0)


def test_bco_shift_is_the_mean_reward_with_or_without_gradient():
    policy, reference = pairs(9)
    chosen, rejected = (0.1 * (policy[k] - reference[k]) for k in (0, 1))
    delta = sum((chosen + rejected).tolist()) / (2 * COUNT)
    expected = [-log(s(c - delta)) - log(s(delta - r)) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    gradients = {}
    for shift in ("batch", "batch_detached"):
        got, gradients[shift], _ = loss_coefficients(
            LOSSES["bco_pair"], policy, reference, columns(policy), options_of("bco_pair", shift=shift)
        )
        assert got.tolist() == pytest.approx(expected, rel=1e-12)
    held = [-0.1 * (1 - s(c - delta)) / COUNT for c in chosen.tolist()]
    assert gradients["batch_detached"].tolist() == pytest.approx(held, rel=1e-12)
    assert not torch.allclose(gradients["batch"], gradients["batch_detached"])


def test_token_mean_does_not_depend_on_micro_batches():
    policy, _ = pairs(10)
    data = columns(policy, [1.0, 2.0, 1.0, 1.0, 0.5])
    expected = -(data.weights @ policy.chosen) / (data.weights @ policy.chosen_tokens)
    parts = []
    for rows in ([0], [1, 2, 3], [4]):
        part, own = (record.map(lambda tensor, rows=rows: tensor[rows]) for record in (policy, data))
        parts.append((LOSSES["sft"](part, None, data=own) * own.weights).sum())
    assert (sum(parts) / data.weights.sum()).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_coefficients_are_the_derivatives_of_the_weighted_mean(name):
    policy, reference = pairs(11)
    data = columns(policy, [1.0, 0.0, 2.0, 0.5, 1.0])
    options = options_of(name)
    logps = [tensor.clone().requires_grad_() for tensor in policy[:2]]
    losses = apply_loss(LOSSES[name], PairLogps(*logps, *policy[2:]), reference, data, options)
    ((losses * data.weights).sum() / 4.5).backward()
    with torch.no_grad():
        got, *coefficients = loss_coefficients(LOSSES[name], policy, reference, data, options)
    expected = torch.where(data.weights > 0, losses.detach(), 0)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for coefficient, tensor in zip(coefficients, logps, strict=True):
        gradient = torch.zeros(COUNT, dtype=torch.float64) if tensor.grad is None else tensor.grad
        torch.testing.assert_close(coefficient, gradient, rtol=1e-12, atol=1e-15)


def test_pair_of_weight_0_does_not_affect_the_coefficients_of_other_pairs():
    policy, reference = pairs(12)
    policy.chosen[1] = float("nan")
    data = columns(policy, [1.0, 0.0, 1.0, 1.0, 1.0])
    for name in ("sigmoid", "simpo"):
        losses, chosen, _ = loss_coefficients(LOSSES[name], policy, reference, data, options_of(name))
        assert losses.isfinite().all() and losses[1] == 0 and chosen[[0, 2, 3, 4]].isfinite().all()


def variants(name: str) -> list[dict]:
    """Return, for each option of a loss, values other than the default, with the options that these values require."""
    found = []
    hints = get_type_hints(LOSSES[name])
    for option, parameter in loss_options(LOSSES[name]).items():
        default, kind = parameter.default, hints[option]
        if option == "losses":
            found.append({"losses": [{"name": "sigmoid"}]})
        elif default is None:
            found.append({"divergence": "alpha", option: 0.5})
        elif get_origin(kind) is Literal:
            found += [{option: value} for value in get_args(kind) if value not in (default, "alpha")]
        else:
            found.append({option: not default if isinstance(default, bool) else default + 0.3})
    return found


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_option_changes_the_loss(name):
    policy, reference = pairs(4)
    before = losses_of(name, policy, reference)
    changed = [before, *(losses_of(name, policy, reference, **variant) for variant in variants(name))]
    for variant, after in zip(variants(name), changed[1:], strict=True):
        assert not torch.allclose(before, after), variant
    if "alpha" in loss_options(LOSSES[name]) and name != "simpo":
        values = [losses_of(name, policy, reference, divergence="alpha", alpha=alpha) for alpha in (0.3, 0.5)]
        assert not torch.allclose(*values)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_matches_finite_differences(name):
    policy, reference = pairs(1)
    chosen, rejected = policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    data = columns(policy.map(torch.Tensor.detach))
    for given in [{}, *variants(name)]:
        if given.get("shift") == "batch_detached":
            continue

        def loss(chosen, rejected, options):
            logps = PairLogps(chosen, rejected, policy.chosen_tokens, policy.rejected_tokens)
            return apply_loss(LOSSES[name], logps, reference, data, options)

        of_logps = functools.partial(loss, options=options_of(name, **given))
        assert torch.autograd.gradcheck(of_logps, (chosen, rejected), rtol=1e-3), given


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_shape_and_value_at_initialization(name):
    _, reference = pairs(2)
    for given in [{}, *variants(name)]:
        options = options_of(name, **given)
        got = losses_of(name, reference, reference, **given)
        assert got.shape == (COUNT,)
        expected = loss_facts(LOSSES[name], options).at_init
        if expected is not None:
            torch.testing.assert_close(got, torch.full_like(got, expected), rtol=1e-12, atol=1e-15)
        else:
            assert len(set(got.tolist())) > 1, (
                "the loss at initialization does not depend on the data, so the registration should state at_init"
            )


AT_INIT = {
    "sigmoid": 0.693147, "sigmoid_norm": 0.693147, "robust": 0.693147, "aot": 0.693147, "aot_unpaired": 0.693147,
    "dpop": 0.693147, "hinge": 1, "ipo": 25, "exo_pair": 2.761230, "nca_pair": 1.386294, "bco_pair": 1.386294,
    "sppo_hard": 50, "apo_zero": 1, "apo_down": 1, "discopop": 0.846574, "simpo_reference": 1.620417,
}  # fmt: skip


def test_known_values_at_initialization_with_default_options():
    got = {
        loss.__name__: value
        for loss in LOSSES.values()
        if loss.__module__.startswith("dpo_engine.") and loss is not LOSSES["mix"]
        if (value := loss_facts(loss, with_defaults(loss, {})).at_init) is not None
    }
    assert got == pytest.approx(AT_INIT, rel=1e-6)
    mixed = {"losses": [{"name": "ipo", "weight": 0.5}, {"name": "hinge", "weight": 2}]}
    assert loss_facts(LOSSES["mix"], mixed).at_init == pytest.approx(14.5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_falls_if_chosen_rises_and_rejected_falls(name):
    _, reference = pairs(3)
    before = losses_of(name, reference, reference)
    step = reference._replace(chosen=reference.chosen + 1, rejected=reference.rejected - 1)
    assert (losses_of(name, step, reference) < before).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_extreme_logps_give_finite_losses_in_fp32(name):
    far = torch.tensor([-3000.0, -0.0, -3000.0, -0.0, -1500.0])
    counts = torch.full((5,), 400.0)
    policy, reference = PairLogps(far, far.flip(0), counts, counts), PairLogps(far.flip(0), far, counts, counts)
    data = columns(policy.map(torch.Tensor.double)).map(torch.Tensor.float)
    for given in [{}, *variants(name)]:
        if name == "ipo" and given.get("divergence") in ("forward_kl", "alpha"):
            continue  # the loss squares an exponential, which overflows
        losses, *gradients = loss_coefficients(LOSSES[name], policy, reference, data, options_of(name, **given))
        assert losses.isfinite().all() and all(g.isfinite().all() for g in gradients), given


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_facts_match_what_the_loss_reads(name):
    policy, reference = pairs(5)
    for given in [{}, *variants(name)]:
        options = options_of(name, **given)
        facts = loss_facts(LOSSES[name], options)
        if not facts.needs_reference:
            apply_loss(LOSSES[name], policy, None, columns(policy), options)
        else:
            with pytest.raises((AttributeError, TypeError)):
                apply_loss(LOSSES[name], policy, None, columns(policy), options)
        unknown = torch.full((COUNT,), float("nan"), dtype=torch.float64)
        unread = {column: unknown for column in PairData._fields[1:] if column not in facts.needs_data}
        data = columns(policy)._replace(**unread)
        whole = apply_loss(LOSSES[name], policy, reference, data, options)
        assert whole.isfinite().all()
        for column in facts.needs_data:
            spoilt = apply_loss(LOSSES[name], policy, reference, data._replace(**{column: unknown}), options)
            assert spoilt.isnan().all()
        halves = [slice(0, 2), slice(2, COUNT)]
        apart = [
            apply_loss(LOSSES[name], *(r.map(lambda t, h=h: t[h]) for r in (policy, reference, data)), options)
            for h in halves
        ]
        assert torch.allclose(torch.cat(apart), whole) is not facts.couples_pairs


ALIASES = {
    "dpo": "sigmoid", "dpo_loss": "sigmoid", "dpo_norm": "sigmoid_norm", "simpo_loss": "simpo_reference",
    "smaug": "dpop", "aot_pair": "aot_unpaired", "mpo": "mix",
}  # fmt: skip


def test_aliases():
    own = {name: loss.__name__ for name, loss in LOSSES.items() if loss.__module__.startswith("dpo_engine.")}
    assert {name: to for name, to in own.items() if name != to} == ALIASES


def test_reward_scale_is_beta_and_a_mix_uses_its_first_loss_that_has_beta():
    def scale(name, **given):
        facts = loss_facts(LOSSES[name], options_of(name, **given))
        return facts.reward_scale, facts.averages

    assert scale("sigmoid", beta=0.3) == (0.3, False)
    assert scale("sft") == (1.0, False)
    assert scale("simpo") == (2.0, True)
    assert scale("cpo", kind="ipo") == (0.1, True)
    assert scale("mix", losses=[{"name": "sft"}, {"name": "simpo", "beta": 2.5}]) == (2.5, True)
    assert scale("mix", losses=[{"name": "sft"}]) == (1.0, False)


def test_ties_count_as_half():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0])
    assert accuracies(chosen - rejected).tolist() == [0.0, 0.5, 1.0]
    assert accuracies(chosen - rejected, torch.tensor([1.0, 0.0, 0.9])).tolist() == [0.5, 0.5, 1.0]


def test_rewards_are_scaled_log_ratios():
    policy, reference = pairs(5)
    chosen, rejected = rewards(policy, reference, beta=0.3)
    torch.testing.assert_close(chosen, 0.3 * (policy.chosen - reference.chosen))
    torch.testing.assert_close(rejected, 0.3 * (policy.rejected - reference.rejected))
    chosen, _ = rewards(policy, None, beta=0.3)
    torch.testing.assert_close(chosen, 0.3 * policy.chosen)


def test_reference_free_loss_needs_no_reference():
    policy, reference = pairs(13)
    expected = losses_of("hinge", policy, reference.map(torch.zeros_like))
    torch.testing.assert_close(losses_of("hinge", policy, None, reference_free=True), expected)
    assert math.isfinite(expected.sum())
