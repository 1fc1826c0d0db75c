"""Tests that compare losses with TRL's own loss code on the same values. A fake model gives TRL these values."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from dpo_engine.objective.losses import LOSSES, PairData, PairLogps, apply_loss, with_defaults
from dpo_engine.training.objective import Objective

pytest.importorskip("trl")

PAIRS, LENGTH, PROMPT, VOCABULARY = 6, 9, 3, 11
THEIRS = {"divergence": "f_divergence_type", "alpha": "f_alpha_divergence_coef", "tau": "discopop_tau"}
DIVERGENCES = {"js": "js_divergence", "alpha": "alpha_divergence"}
DIFFERENCES = [
    ("sigmoid", {}),
    ("sigmoid_norm", {}),
    ("hinge", {}),
    ("ipo", {}),
    ("robust", {"label_smoothing": 0.1}),
    ("exo_pair", {"label_smoothing": 0.01}),
    ("discopop", {}),
]
CASES = [
    *DIFFERENCES,
    *((name, {**given, "divergence": "forward_kl"}) for name, given in DIFFERENCES),
    *((name, {**given, "divergence": "js"}) for name, given in DIFFERENCES),
    *((name, {**given, "divergence": "alpha", "alpha": 0.5}) for name, given in DIFFERENCES),
    *((name, {**given, "beta": 0.4}) for name, given in DIFFERENCES),
    ("sigmoid", {"divergence": "alpha", "alpha": 1.0}),
    ("discopop", {"tau": 0.5}),
    ("nca_pair", {}),
    ("bco_pair", {}),
    ("sppo_hard", {"beta": 0.3}),
    ("aot", {}),
    ("aot", {"label_smoothing": 0.1}),
    ("aot_unpaired", {}),
    ("aot_unpaired", {"label_smoothing": 0.1}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("sft", {}),
]


def scored(seed: int = 0):
    """Return the policy's log-probabilities, the response masks, and the reference's sums, all for random responses.

    Returns  [2 PAIRS, LENGTH - 1]  the policy's log-probability of each token
             [2 PAIRS, LENGTH]      1 for the tokens of responses, and 0 for all other tokens
             [2 PAIRS]              the reference's log-probabilities, summed over each response
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(PROMPT + 1, LENGTH + 1, (2 * PAIRS, 1), generator=generator)
    places = torch.arange(LENGTH)
    mask = ((places >= PROMPT) & (places < lengths)).long()
    logps = -3 * torch.rand(2 * PAIRS, LENGTH - 1, generator=generator) * mask[:, 1:]
    return logps, mask, -3 * mask.sum(1) * torch.rand(2 * PAIRS, generator=generator)


def records(logps, mask, reference_sums) -> tuple[PairLogps, PairLogps, PairData]:
    tokens = mask.sum(1).float().chunk(2)
    policy = PairLogps(*logps.sum(1).chunk(2), *tokens)
    unread = torch.full((PAIRS,), float("nan"))
    data = PairData(torch.ones(PAIRS), unread, unread, unread, tokens[0].mean().expand(PAIRS))
    return policy, PairLogps(*reference_sums.chunk(2), *tokens), data


class Model(torch.nn.Module):
    """A policy with only the attributes that TRL reads."""

    training = True
    is_gradient_checkpointing = False


def trl_loss(
    logps,
    mask,
    reference_sums,
    names: list[str],
    weights: list[float],
    *,
    reference_logps=None,
    log_sum_sq=None,
    ld_alpha=None,
    precomputed=True,
    **options,
) -> torch.Tensor:
    """Return the loss of TRL's ``DPOTrainer``. ``logps`` and ``log_sum_sq`` replace outputs of the policy's fused head.

    reference_logps  the reference's log-probability of each token, instead of ``reference_sums``
    precomputed      whether the trainer gets the reference's sums of log-probabilities, as with TRL's
                     ``precompute_ref_log_probs``; if not, the trainer gets ``reference_logps``
    log_sum_sq       for each token, the log of the sum of the squared probabilities of all vocabulary entries; if this
                     argument is given, ``use_weighting`` is on
    """
    from collections import defaultdict

    from trl import DPOConfig, DPOTrainer

    defaults = {
        name: DPOConfig.__dataclass_fields__[name].default
        for name in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau")
    }
    own = {THEIRS.get(name, name): DIVERGENCES.get(value, value) for name, value in options.items()}
    assert own.keys() <= defaults.keys()
    args = SimpleNamespace(**{**defaults, **own}, gradient_checkpointing_kwargs=None)
    trainer = SimpleNamespace(
        args=args,
        model=Model(),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, autocast=contextlib.nullcontext
        ),
        aux_loss_enabled=False,
        ld_alpha=ld_alpha,
        ref_model=lambda **_: SimpleNamespace(log_probs=reference_logps),
        precompute_ref_logps=precomputed,
        use_weighting=log_sum_sq is not None,
        loss_types=names,
        loss_weights=weights,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{name: getattr(args, name) for name in defaults if name != "discopop_tau"},
    )
    empty = torch.zeros_like(logps)
    outputs = SimpleNamespace(
        log_probs=logps, entropy=empty, mean_logits=empty, is_top1=empty.bool(), log_sum_sq_probs=log_sum_sq
    )
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    if precomputed:
        if reference_logps is None:
            sums = reference_sums.chunk(2)
        else:
            sums = DPOTrainer.compute_ref_log_probs(trainer, trainer.ref_model, inputs)
        inputs |= zip(("ref_chosen_logps", "ref_rejected_logps"), sums, strict=True)
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)


@pytest.mark.parametrize(("name", "given"), CASES, ids=[f"{name}-{given}" for name, given in CASES])
def test_values_and_gradients_match_trls_trainer(name, given):
    logps, mask, reference_sums = scored()
    found = []
    for engine in (True, False):
        logps = logps.detach().clone().requires_grad_()
        if engine:
            policy, reference, data = records(logps, mask, reference_sums)
            loss = apply_loss(LOSSES[name], policy, reference, data, with_defaults(LOSSES[name], given)).mean()
        else:
            loss = trl_loss(logps, mask, reference_sums, [LOSSES[name].trl], [1.0], **given)
        loss.backward()
        found.append((loss.detach(), logps.grad * mask[:, 1:]))
    (got, got_gradient), (expected, expected_gradient) = found
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(got_gradient, expected_gradient, rtol=1e-5, atol=1e-6 * expected_gradient.abs().max())


def by_response(tokens, mask) -> list[list[torch.Tensor]]:
    """For each pair, return the values at the tokens of the chosen response and of the rejected response."""
    rows = [row[own.bool()] for row, own in zip(tokens, mask[:, 1:], strict=True)]
    return [list(pair) for pair in zip(rows[:PAIRS], rows[PAIRS:], strict=True)]


def token_records(logps, mask, log_sum_sq=None) -> PairLogps:
    """Return the sums that the engine's scoring would compute for each pair from ``logps`` and ``log_sum_sq``."""
    pairs = by_response(logps, mask)
    shared = [[response[: min(map(len, pair))] for response in pair] for pair in pairs]
    columns = [[[response.sum() for response in pair] for pair in kind] for kind in (pairs, shared)]
    tokens = [[torch.tensor(float(len(response))) for response in pair] for pair in pairs]
    collision = [] if log_sum_sq is None else [[-r.sum() for r in pair] for pair in by_response(log_sum_sq, mask)]

    def both(column):
        return [torch.stack(list(side)) for side in zip(*column, strict=True)]

    extra = [None, None, *both(collision)] if collision else []
    return PairLogps(*both(columns[0]), *both(tokens), *both(columns[1]), *extra)


# Each loss except sft is tested with the options of its last entry in CASES. Weighting requires a separate loss for
# each pair, so it cannot be used with the aot losses.
LAST_CASES = {name: (name, given) for name, given in CASES if name != "sft"}
TOKEN_CASES = [
    *((*case, False, False) for case in LAST_CASES.values()),
    *((*case, False, True) for name, case in LAST_CASES.items() if not name.startswith("aot")),
    ("sigmoid", {}, True, False),
    ("ipo", {}, True, True),
]


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.4], ids="ld_alpha={}".format)
@pytest.mark.parametrize(("name", "given", "precomputed", "weighted"), TOKEN_CASES, ids=str)
def test_token_weights_match_trls_trainer(name, given, precomputed, ld_alpha, weighted):
    logps, mask, _ = scored(3)
    other, generator = scored(4)[0], torch.Generator().manual_seed(5)
    reference_logps = torch.where(other < 0, other, -1.0) * mask[:, 1:]
    log_sum_sq = -2 * torch.rand(logps.shape, generator=generator) if weighted else None
    found = []
    for engine in (True, False):
        logps = logps.detach().clone().requires_grad_()
        if engine:
            policy, reference = token_records(logps, mask, log_sum_sq), token_records(reference_logps, mask)
            _, _, data = records(logps, mask, reference_logps.sum(1))
            objective = Objective(LOSSES[name], given, ld_alpha=ld_alpha, use_weighting=weighted)
            loss = objective.losses(policy, reference, data).mean()
        else:
            known = {"reference_logps": reference_logps, "log_sum_sq": log_sum_sq, "ld_alpha": ld_alpha}
            loss = trl_loss(logps, mask, None, [LOSSES[name].trl], [1.0], precomputed=precomputed, **known, **given)
        found.append([loss.detach()])
        # With weighting, TRL's own backward pass of hinge fails, because TRL multiplies the output of relu in place.
        if not (weighted and name == "hinge"):
            loss.backward()
            found[-1].append(logps.grad * mask[:, 1:])
    (got, *got_gradients), (expected, *expected_gradients) = found
    torch.testing.assert_close(got, expected, rtol=5e-6, atol=0)
    for gradient, wanted in zip(got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=2e-6 * wanted.abs().max())


def test_weighting_in_a_mix_applies_to_the_whole_mix():
    logps, mask, _ = scored(3)
    log_sum_sq = -2 * torch.rand(logps.shape, generator=torch.Generator().manual_seed(5))
    reference_logps = 0.9 * logps
    policy, reference = token_records(logps, mask, log_sum_sq), token_records(reference_logps, mask)
    _, _, data = records(logps, mask, reference_logps.sum(1))
    losses = [{"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}]
    got = Objective(LOSSES["mix"], {"losses": losses}, use_weighting=True).losses(policy, reference, data).mean()
    known = {"reference_logps": reference_logps, "log_sum_sq": log_sum_sq}
    expected = trl_loss(logps, mask, None, ["sigmoid", "bco_pair"], [0.8, 0.2], **known)
    torch.testing.assert_close(got, expected, rtol=5e-6, atol=0)


def test_every_loss_of_trl_is_compared():
    from trl import DPOConfig

    compared = {LOSSES[name].trl for name, _ in CASES}
    assert {loss.trl for loss in LOSSES.values() if hasattr(loss, "trl")} == compared | {"simpo", "cpo"}
    words = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"].partition("Possible values are: ")[2]
    assert compared == {word.strip("`' ") for word in words.partition(". If")[0].split(",")}


def test_weighted_mix_matches_trl():
    numbers = scored(1)
    expected = trl_loss(*numbers, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], beta=0.3)
    policy, reference, data = records(*numbers)
    losses = [
        {"name": "sigmoid", "weight": 0.8, "beta": 0.3},
        {"name": "bco_pair", "weight": 0.2, "beta": 0.3},
        {"name": "sft"},
    ]
    got = LOSSES["mix"](policy, reference, data=data, losses=losses).mean()
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)


def padded_batch(seed: int = 0) -> tuple[dict, torch.Tensor]:
    """Return a batch like those of TRL's collator, and random logits [2 PAIRS, LENGTH, VOCABULARY] for the batch."""
    generator = torch.Generator().manual_seed(seed)
    _, mask, _ = scored(seed)
    ids = torch.randint(0, VOCABULARY, mask.shape, generator=generator)
    present = torch.arange(LENGTH) < PROMPT + mask.sum(1, keepdim=True)
    batch = {}
    for side, rows in (("chosen", slice(0, PAIRS)), ("rejected", slice(PAIRS, None))):
        batch[f"{side}_input_ids"] = ids[rows]
        batch[f"{side}_attention_mask"] = present[rows].long()
        batch[f"{side}_labels"] = torch.where(mask[rows] == 1, ids[rows], -100)
    return batch, 2 * torch.randn(2 * PAIRS, LENGTH, VOCABULARY, generator=generator)


def summed(batch: dict, logits: torch.Tensor) -> tuple[PairLogps, PairData]:
    labels = torch.cat([batch["chosen_labels"], batch["rejected_labels"]])[:, 1:]
    scored_here = labels != -100
    every = logits[:, :-1].log_softmax(-1)
    logps = every.gather(2, labels.clamp(min=0)[..., None])[..., 0] * scored_here
    tokens = scored_here.sum(1).float().chunk(2)
    unread = torch.full((PAIRS,), float("nan"))
    data = PairData(torch.ones(PAIRS), unread, unread, unread, tokens[0].mean().expand(PAIRS))
    return PairLogps(*logps.sum(1).chunk(2), *tokens), data


def trainer_of(kind, batch: dict, logits: torch.Tensor, **attributes):
    """Run the loss function of the trainer class ``kind`` with a fake model that returns ``logits``.

    The trainer's constructor is not called. Instead, a plain object replaces the trainer. It has only the attributes
    that the loss function reads.
    """
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        is_encoder_decoder=False,
        aux_loss_enabled=False,
        pad_token_id=0,
        padding_value=0,
        concatenated_inputs=kind.concatenated_inputs,
        get_batch_logps=kind.get_batch_logps,
        **attributes,
    )
    for method in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(kind, method):
            setattr(trainer, method, getattr(kind, method).__get__(trainer))
    return kind.get_batch_loss_metrics(trainer, lambda *_, **__: SimpleNamespace(logits=logits), batch)


CPO_CASES = [
    ("cpo", {}, {"loss_type": "sigmoid"}),
    ("cpo", {"label_smoothing": 0.1, "beta": 0.3}, {"loss_type": "sigmoid", "label_smoothing": 0.1, "beta": 0.3}),
    ("cpo", {"kind": "hinge", "nll_weight": 0.0}, {"loss_type": "hinge", "cpo_alpha": 0.0}),
    ("cpo", {"kind": "ipo", "nll_weight": 0.5}, {"loss_type": "ipo", "cpo_alpha": 0.5}),
    ("simpo", {}, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}),
    (
        "simpo",
        {"gamma": 1.0, "alpha": 0.25, "label_smoothing": 0.1},
        {
            "loss_type": "simpo",
            "cpo_alpha": 0.0,
            "beta": 2.0,
            "simpo_gamma": 1.0,
            "alpha": 0.25,
            "label_smoothing": 0.1,
        },
    ),
]


@pytest.mark.parametrize(("name", "given", "theirs"), CPO_CASES, ids=[f"{n}-{g}" for n, g, _ in CPO_CASES])
def test_values_match_trls_cpo_trainer(name, given, theirs, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    names = ("beta", "label_smoothing", "loss_type", "cpo_alpha", "simpo_gamma", "alpha")
    options = {option: CPOConfig.__dataclass_fields__[option].default for option in names}
    batch, logits = padded_batch()
    expected, metrics = trainer_of(CPOTrainer, batch, logits, **{**options, **theirs})
    policy, data = summed(batch, logits)
    got = apply_loss(LOSSES[name], policy, None, data, with_defaults(LOSSES[name], given)).mean()
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)


def test_odds_ratio_matches_trls_orpo_trainer(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    batch, logits = padded_batch(2)
    expected, metrics = trainer_of(ORPOTrainer, batch, logits, beta=0.2)
    policy, data = summed(batch, logits)
    got = LOSSES["orpo"](policy, None, data=data, beta=0.2)
    # Compare only the odds-ratio terms, because TRL's likelihood term includes prompts, but the engine's does not.
    ratio = got - LOSSES["sft"](policy, None, nll="response_mean")
    torch.testing.assert_close(ratio.mean(), expected - metrics["nll_loss"], rtol=1e-5, atol=1e-6)
