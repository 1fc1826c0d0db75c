"""Tests of contradictions between keys and of invalid loss options.

They check the messages, and that a rule is skipped if it depends on a key with an invalid value. Other tests check
which losses need a reference, and the default values that complete the options of a loss.
"""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from dpo_engine.config.rules import contradictions, facts_of, is_broken, loss_problems, with_loss_options
from dpo_engine.config.run import Config
from dpo_engine.config.sections import LossConfig
from dpo_engine.objective.losses import LOSSES

SMALLEST = {"model": {"path": "m"}, "data": {"train": "a"}, "train": {"output_dir": "o"}}


def configured(**changes) -> Config:
    """Return the config of a minimal run, changed by `section__key=value` arguments."""
    raw = {name: dict(section) for name, section in SMALLEST.items()}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        raw.setdefault(section, {})[key] = value
    return Config.parse(raw)


CONTRADICTIONS = [
    (
        {"bad_steps__spike_window": 64},
        "bad_steps.spike_window=64: has no effect without bad_steps.spike_sigma; set "
        "bad_steps.spike_sigma, or remove bad_steps.spike_window",
    ),
    (
        {"checkpoint__keep_best": {"metric": "loss"}},
        "checkpoint.keep_best.metric=eval/loss: needs held-out pairs; set data.validation or "
        "data.validation_fraction, or remove checkpoint.keep_best",
    ),
    (
        {"checkpoint__keep_best": {"metric": "loss"}, "data__validation": "v.jsonl"},
        "checkpoint.keep_best.metric=eval/loss: compares evaluated steps, but with train.eval_interval=0 only the last "
        "step is evaluated; set train.eval_interval, for example to 0.1epoch, or remove checkpoint.keep_best",
    ),
    (
        {"reference__mode": "shared"},
        "reference.mode=shared: requires an adapter, because the reference is the policy's model without its trained "
        "adapter; set adapter, or reference.mode=resident",
    ),
    (
        {"reference__adapter": "none"},
        "reference.adapter=none: applies only with adapter.path; remove reference.adapter",
    ),
    (
        {"adapter__rank": 4, "reference__adapter": "none"},
        "reference.adapter=none: applies only with adapter.path; remove reference.adapter",
    ),
    (
        {"adapter__path": "a", "reference__adapter": "none", "reference__path": "r", "reference__mode": "resident"},
        "reference.adapter=none: has no effect with reference.path, whose model is used without an adapter; "
        "remove reference.adapter",
    ),
    (
        {"adapter__rank": 4, "reference__mode": "offloaded"},
        "reference.mode=offloaded: is not supported with an adapter, because the policy and the reference then share "
        "the base weights; set reference.mode=shared, which needs no extra memory",
    ),
    (
        {"adapter__rank": 4, "reference__mode": "offloaded", "reference__path": "r"},
        "reference.mode=offloaded: is not supported with an adapter; set reference.mode=resident or stored",
    ),
    (
        {"adapter__rank": 4, "reference__mode": "resident", "reference__sync_every": 2},
        "reference.sync_every=2: with an adapter, reference.mode must be shared, but it is resident; set "
        "reference.mode=shared",
    ),
    (
        {"adapter__rank": 4, "reference__path": "r"},
        "reference.path=r: requires a second model, but reference.mode is shared; set reference.mode to resident, "
        "stored or dataset",
    ),
    (
        {"adapter__rank": 4, "reference__sync_every": 2, "reference__sync_alpha": 0.5},
        "reference.sync_alpha=0.5: must be 1 with an adapter, because averaging the matrices A and B of two adapters "
        "does not average the two models; set reference.sync_alpha=1",
    ),
    (
        {
            "adapter__path": "a",
            "reference__adapter": "none",
            "reference__sync_every": 2,
            "reference__sync_alpha": 1.0,
        },
        "reference.adapter=none: cannot be combined with reference.sync_every; remove one of them",
    ),
    (
        {"adapter__rank": 4, "optim__freeze": ["x"]},
        "optim.freeze=[x]: has no effect with an adapter, because only the adapter is trained; remove optim.freeze",
    ),
    (
        {"adapter__rank": 4, "optim__gradients": "bf16", "model__dtype": "bf16"},
        "optim.gradients=bf16: has no effect with an adapter, whose parameters and gradients are fp32; "
        "remove optim.gradients",
    ),
    (
        {"optim__gradients": "bf16", "model__dtype": "fp32"},
        "optim.gradients=bf16: requires model.dtype=bf16, but it is fp32; remove optim.gradients",
    ),
    (
        {"optim__states": "host", "parallel__distributed_optimizer": False},
        "optim.states=host: requires parallel.distributed_optimizer=true, but it is false; set it to true, or remove "
        "optim.states",
    ),
    (
        {"checkpoint__export": "best"},
        "checkpoint.export=best: requires checkpoint.keep_best, but it is null; set checkpoint.keep_best, for example "
        "to {metric: eval/loss}, or set checkpoint.export=true",
    ),
    (
        {"train__stop_after_no_gain": 2},
        "train.stop_after_no_gain=2: requires validation data; set data.validation or data.validation_fraction, "
        "or remove this key",
    ),
    (
        {"train__stop_after_no_gain": 2, "data__validation_fraction": 0.1},
        "train.stop_after_no_gain=2: requires evaluations before the end of the run, but train.eval_interval is 0; set "
        "train.eval_interval, for example to 0.1epoch",
    ),
    ({"parallel__vpp": 2}, "parallel.vpp=2: requires parallel.pp >= 2, but it is 1; remove parallel.vpp"),
    (
        {"model__attention": "te", "model__spec": "native", "train__deterministic": False},
        "model.attention=te: requires Transformer Engine's layers; set model.spec=te",
    ),
    (
        {"model__attention": "te"},
        "model.attention=te: Transformer Engine has deterministic kernels for small micro-batches only; set "
        "train.deterministic=false or model.attention=auto",
    ),
    (
        {"model__flash_attention": 3, "model__dtype": "fp32"},
        "model.flash_attention=3: requires model.dtype=bf16; set model.flash_attention=2",
    ),
    (
        {"parallel__sequence_parallel": True},
        "parallel.sequence_parallel=true: requires parallel.tp >= 2, but it is 1; remove parallel.sequence_parallel",
    ),
    (
        {"loss__name": "free", "reference__mode": "none", "reference__path": "r"},
        "reference.path=r: is not used when reference.mode is none; remove reference.path, or set "
        "reference.mode=resident",
    ),
    (
        {"reference__mode": "none"},
        "reference.mode=none: loss sigmoid needs a reference; set reference.mode=resident or loss.reference_free=true",
    ),
    (
        {"loss__name": "aot", "reference__mode": "none"},
        "reference.mode=none: loss aot needs a reference; set reference.mode=resident",
    ),
    (
        {"reference__sync_every": 4, "reference__mode": "offloaded"},
        "reference.sync_every=4: applies only when reference.mode is resident or shared, but this run's mode is "
        "offloaded; remove reference.sync_every",
    ),
    (
        {"reference__sync_alpha": 0.5},
        "reference.sync_alpha=0.5: has no effect without reference.sync_every; set reference.sync_every, or "
        "remove reference.sync_alpha",
    ),
    (
        {"reference__ahead": 2},
        "reference.ahead=2: applies only when reference.mode is offloaded, but this run's mode is resident; remove "
        "reference.ahead",
    ),
    (
        {"reference__store": "s"},
        "reference.store=s: applies only when reference.mode is stored, but this run's mode is resident; remove "
        "reference.store",
    ),
    (
        {"reference__missing": "error", "reference__mode": "dataset"},
        "reference.missing=error: applies only when reference.mode is stored, but this run's mode is dataset; remove "
        "reference.missing",
    ),
    (
        {"reference__verify": 0},
        "reference.verify=0: applies only when reference.mode is stored or dataset, but this run's mode is resident; "
        "remove reference.verify",
    ),
    (
        {"reference__mode": "dataset", "reference__verify": 0, "reference__path": "r"},
        "reference.path=r: is not used, because reference.verify=0 turns off the check of the records' "
        "log-probabilities; remove reference.path",
    ),
    (
        {"loss__name": "simpo", "reference__mode": "stored"},
        "reference.mode=stored: loss simpo does not use a reference; remove reference.mode, or set reference.mode=none",
    ),
    (
        {"loss__ld_alpha": 0.5, "reference__mode": "dataset"},
        "loss.ld_alpha=0.5: requires the reference's log-probability of each token, but with reference.mode=dataset, "
        "the records contain only sums; remove loss.ld_alpha, or set reference.mode=stored",
    ),
    (
        {"loss__name": "simpo", "reference__sync_every": 3},
        "reference.sync_every=3: loss simpo does not use a reference; remove reference.sync_every",
    ),
    (
        {"batch__layout": "stacked", "batch__share": False},
        "batch.share=false: applies only when batch.layout is tree or auto, but it is stacked; remove batch.share",
    ),
    (
        {"batch__tokens_per_micro_batch": 900, "train__micro_batch_size": 1},
        "train.micro_batch_size=1: cannot be combined with batch.tokens_per_micro_batch=900; keep one of them",
    ),
    (
        {"data__validation": "v", "data__validation_fraction": 0.1},
        "data.validation_fraction=0.1: cannot be combined with data.validation; keep one of them",
    ),
    (
        {"data__max_length": 64, "data__max_prompt_length": 64},
        "data.max_prompt_length=64: has an effect only if it is less than data.max_length=64; lower or remove this key",
    ),
    (
        {"data__seed": 3, "data__shuffle": False},
        "data.seed=3: has no effect when data.shuffle is false; remove data.seed",
    ),
    (
        {"data__train": [{"path": "a", "weight": 2}]},
        "data.train[0].weight=2.0: has no effect with a single data source; remove the weight",
    ),
    (
        {"loss__name": "sft", "loss__ld_alpha": 0.5},
        "loss.ld_alpha=0.5: loss sft has a likelihood term, in which all tokens have equal weight; remove "
        "loss.ld_alpha, or use a loss without that term",
    ),
    (
        {"loss__name": "mix", "loss__losses": [{"name": "sigmoid"}, {"name": "orpo"}], "loss__ld_alpha": 0.0},
        "loss.ld_alpha=0.0: loss mix has a likelihood term, in which all tokens have equal weight; remove "
        "loss.ld_alpha, or use a loss without that term",
    ),
    (
        {"loss__name": "cpo", "loss__ld_alpha": 0.5, "reference__mode": "none"},
        "loss.ld_alpha=0.5: loss cpo has a likelihood term, in which all tokens have equal weight; remove "
        "loss.ld_alpha, or use a loss without that term",
    ),
    (
        {"loss__name": "aot", "loss__use_weighting": True},
        "loss.use_weighting=true: requires a separate loss for each pair, but loss aot couples all pairs of a step; "
        "remove loss.use_weighting",
    ),
    (
        {"optim__warmup_steps": 3, "optim__warmup_ratio": 0.1},
        "optim.warmup_steps=3: cannot be combined with optim.warmup_ratio=0.1; keep one of them",
    ),
    (
        {"optim__decay_steps": 3},
        "optim.decay_steps=3: applies only to schedule wsd, but optim.schedule is cosine; remove optim.decay_steps",
    ),
    (
        {"optim__schedule": "constant", "optim__min_lr": 1e-7},
        "optim.min_lr=1e-07: has no effect with the constant schedule; remove optim.min_lr",
    ),
    (
        {"optim__lr": 1e-6, "optim__min_lr": 1e-5},
        "optim.min_lr=1e-05: must be at most optim.lr=1e-06; lower optim.min_lr",
    ),
    (
        {"optim__warmup_steps": 10, "train__max_steps": 10},
        "optim.warmup_steps=10: must be less than train.max_steps=10, or the run ends during warmup; use fewer "
        "warmup steps",
    ),
    (
        {"optim__schedule": "wsd", "optim__warmup_steps": 4, "optim__decay_steps": 8, "train__max_steps": 10},
        "optim.decay_steps=8: optim.warmup_steps + optim.decay_steps must be at most train.max_steps=10; lower "
        "optim.decay_steps to at most 6",
    ),
    (
        {"train__micro_batch_size": 8, "train__global_batch_size": 4},
        "train.micro_batch_size=8: must be at most train.global_batch_size=4; lower train.micro_batch_size",
    ),
    (
        {"train__eval_interval": 5},
        "train.eval_interval=5: requires validation data; set data.validation or data.validation_fraction, "
        "or remove this key",
    ),
    (
        {"train__eval_at_start": True},
        "train.eval_at_start=true: requires validation data; set data.validation or data.validation_fraction, "
        "or remove this key",
    ),
]


@pytest.fixture(autouse=True)
def losses(monkeypatch):
    """Register losses as a plugin would, for the duration of a test."""
    for name in ("free", "rich", "strange"):
        monkeypatch.setitem(LOSSES, name, None)
        del LOSSES[name]

    @LOSSES.register("free", needs_reference=False)
    def free(policy, reference):
        return policy.chosen

    @LOSSES.register("rich")
    def rich(
        policy,
        reference,
        *,
        gamma: Annotated[float, Field(gt=0, le=1)],
        kind: Literal["a", "b"] = "a",
        steps: int = 3,
        on: bool = False,
        pair: tuple[float, float] = (1.0, 2.0),
        bare=0.5,
        anything=None,
    ):
        return policy.chosen

    class Own:
        pass

    @LOSSES.register("strange")
    def strange(policy, reference, *, own: Own = None, later: "NotHere" = 1.0):  # noqa: F821  undefined on purpose
        return policy.chosen


@pytest.mark.parametrize(
    ("changes", "expected"), CONTRADICTIONS, ids=[line.split("=")[0] for _, line in CONTRADICTIONS]
)
def test_contradiction_is_reported_in_one_line_with_a_way_out(changes, expected):
    assert contradictions(configured(**changes)) == [expected]


def test_smallest_run_has_no_contradictions():
    assert contradictions(configured()) == []


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "cpo", "nll_weight": 0.0, "ld_alpha": 0.5},
        {"name": "simpo", "ld_alpha": 0.5},
        {"name": "aot", "ld_alpha": 0.5},
        {"name": "bco_pair", "use_weighting": True, "ld_alpha": 0.5},
        {"name": "mix", "losses": [{"name": "sigmoid"}, {"name": "sft"}], "use_weighting": True},
    ],
    ids=str,
)
def test_losses_that_accept_ld_alpha_or_use_weighting(loss):
    assert contradictions(Config.parse({**SMALLEST, "loss": loss})) == []


@pytest.mark.parametrize("layout", ["auto", "tree"])
def test_tree_keys_are_accepted_with_trees_and_auto(layout):
    assert contradictions(configured(batch__layout=layout, batch__share=False)) == []


@pytest.mark.parametrize("layout", ["auto", "tree", "stacked"])
@pytest.mark.parametrize("size", [{"batch__tokens_per_micro_batch": 9}, {"train__micro_batch_size": 9}, {}], ids=str)
def test_every_layout_accepts_one_micro_batch_size_or_none(layout, size):
    assert contradictions(configured(batch__layout=layout, **size)) == []


def test_contradictions_are_reported_together():
    changes = {"parallel__vpp": 2, "optim__decay_steps": 3, "train__eval_interval": 5}
    assert len(contradictions(configured(**changes))) == 3


def test_broken_keys_suppress_dependent_contradictions():
    config = configured(parallel__vpp=2, train__eval_interval=5)
    assert len(contradictions(config)) == 2
    assert contradictions(config, frozenset({"parallel.pp", "data.validation[0].path"})) == []


@pytest.mark.parametrize(
    ("key", "bad", "expected"),
    [
        ("parallel.tp", "parallel.tp", True),
        ("parallel", "parallel.tp", True),
        ("parallel.tp", "parallel", True),
        ("data.train", "data.train[0].weight", True),
        ("parallel.tp", "parallel.tpx", False),
        ("train", "data.train", False),
    ],
)
def test_key_is_broken_by_its_parents_and_children(key, bad, expected):
    assert is_broken(key, frozenset({bad})) is expected


LOSS_PROBLEMS = [
    ({"name": "sigmoid", "beta": 0.2, "label_smoothing": 0}, []),
    (
        {"name": "sigmoyd"},
        [
            "loss.name=sigmoyd: no such loss; did you mean sigmoid? Registered losses: {all} (add more with plugins: "
            "[my.module])"
        ],
    ),
    ({"name": "sigmoid", "bta": 0.2}, ["loss.bta=0.2: loss sigmoid has no such option; did you mean loss.beta?"]),
    (
        {"name": "robust", "xyz": 1},
        [
            "loss.xyz=1: loss robust has no such option; its options: beta, label_smoothing, divergence, alpha and "
            "reference_free"
        ],
    ),
    (
        {"name": "free", "beta": 1},
        ["loss.beta=1: loss free has no such option; this loss has no options; remove loss.beta"],
    ),
    (
        {"name": "sigmoid", "beta": "high", "label_smoothing": True},
        [
            "loss.beta=high: must be a number greater than 0; the default is 0.1",
            "loss.label_smoothing=true: must be a number of at least 0 and less than 0.5; the default is 0.0",
        ],
    ),
    (
        {"name": "sigmoid", "beta": float("inf")},
        ["loss.beta=inf: must be a number greater than 0; the default is 0.1"],
    ),
    ({"name": "rich", "gamma": 0.5, "pair": [1, 2], "bare": 2, "anything": [1], "on": True}, []),
    ({"name": "rich"}, ["loss.gamma: is required by loss rich; give a number greater than 0 and at most 1"]),
    (
        {"name": "rich", "gamma": 2, "kind": "c", "steps": 1.5, "on": 1, "pair": [1], "bare": "x"},
        [
            "loss.gamma=2: must be a number greater than 0 and at most 1; fix the value",
            "loss.kind=c: must be a or b; the default is a",
            "loss.steps=1.5: must be a whole number; the default is 3",
            "loss.on=1: must be true or false; the default is false",
            "loss.pair=[1]: must be a list of 2 items (each item is a number); the default is [1.0, 2.0]",
            "loss.bare=x: must be a number; the default is 0.5",
        ],
    ),
    ({"name": "strange", "own": 3, "later": 2.0}, []),
    ({"name": "sigmoid", "divergence": "alpha", "alpha": 0.5}, []),
    (
        {"name": "hinge", "alpha": 0.5},
        ["loss.alpha=0.5: applies only to divergence alpha, but divergence is reverse_kl; remove alpha"],
    ),
    (
        {"name": "ipo", "divergence": "alpha"},
        ["loss.alpha=null: divergence alpha needs an order; set alpha to a number, usually 0.5"],
    ),
    (
        {"name": "sigmoid", "divergence": "js", "reference_free": True},
        ["loss.divergence=js: needs a reference, but reference_free is true; remove one of the two"],
    ),
    (
        {"name": "nca_pair", "divergence": "js"},
        ["loss.divergence=js: loss nca_pair has no such option; its options: beta"],
    ),
    (
        {"name": "cpo", "kind": "ipo", "label_smoothing": 0.1, "nll_weight": 0, "nll": "sum"},
        [
            "loss.label_smoothing=0.1: applies only to kind sigmoid, but kind is ipo; remove label_smoothing",
            "loss.nll=sum: has no effect when nll_weight is 0; remove nll",
        ],
    ),
    (
        {"name": "ipo", "loss_type": "hinge", "rpo_alpha": 1.0},
        [
            "loss.loss_type=hinge: loss ipo has no such option; called loss.name here (the losses have the same names)",
            "loss.rpo_alpha=1.0: loss ipo has no such option; called loss.losses here "
            "(use loss.name=mix with the losses sigmoid and sft, where sft has the weight rpo_alpha)",
        ],
    ),
    ({"name": "mix"}, ["loss.losses: is required by loss mix; give a list (each item is a mapping)"]),
    ({"name": "mix", "losses": "sft"}, ["loss.losses=sft: must be a list (each item is a mapping); fix the value"]),
    (
        {"name": "mix", "losses": []},
        ["loss.losses=[]: must not be empty; give at least one loss, with its name, weight and options"],
    ),
    ({"name": "mix", "losses": [{"name": "sigmoid", "weight": 0.8, "beta": 0.2}, {"name": "sft"}]}, []),
    (
        {
            "name": "mix",
            "losses": [
                {"name": "sigmoyd"},
                {"name": "mix", "losses": []},
                {"weight": 1},
                {"name": "sft", "weight": 0, "beta": 1},
                {"name": "ipo", "alpha": 2, "weight": True},
            ],
        },
        [
            "loss.losses[0].name=sigmoyd: must be a registered loss other than mix; did you mean sigmoid?",
            "loss.losses[1].name=mix: must be a registered loss other than mix; for example sigmoid",
            "loss.losses[2].name=null: must be a registered loss other than mix; for example sigmoid",
            "loss.losses[3].weight=0: must be a number greater than 0; the default is 1.0",
            "loss.losses[3].beta=1: loss sft has no such option; its options: nll",
            "loss.losses[4].weight=true: must be a number greater than 0; the default is 1.0",
            "loss.losses[4].alpha=2: applies only to divergence alpha, but divergence is reverse_kl; remove alpha",
        ],
    ),
    (
        {"name": "mix", "losses": [{"name": "sigmoid", "ld_alpha": 0.5, "use_weighting": True}]},
        [
            "loss.losses[0].ld_alpha=0.5: loss sigmoid has no such option; set loss.ld_alpha, which applies to all "
            "losses",
            "loss.losses[0].use_weighting=true: loss sigmoid has no such option; set loss.use_weighting, which applies "
            "to all losses",
        ],
    ),
    ({"name": "sigmoid", "beta": 0}, ["loss.beta=0: must be a number greater than 0; the default is 0.1"]),
]


@pytest.mark.parametrize(("loss", "expected"), LOSS_PROBLEMS)
def test_options_are_checked_against_the_losss_signature(loss, expected):
    *_, all_but_last, last = sorted(LOSSES)
    names = ", ".join([*sorted(LOSSES)[:-2], all_but_last]) + f" and {last}"
    assert loss_problems(Config.parse({**SMALLEST, "loss": loss})) == [line.format(all=names) for line in expected]


def test_a_loss_needs_a_reference_unless_it_declares_otherwise():
    def needs(**loss):
        return facts_of(LossConfig(**loss)).needs_reference

    assert needs(name="rich", gamma=1.0) and needs(name="sigmoid") and not needs(name="free")
    assert not needs(name="sigmoid", reference_free=True)
    assert facts_of(LossConfig(name="rich")) is None and facts_of(LossConfig(name="unheard of")) is None


@pytest.mark.parametrize("name", sorted({loss.__name__ for loss in LOSSES.values()} & set(LOSSES)))
def test_complete_options_are_those_of_the_signature(name):
    import inspect

    parts = [{"name": "sigmoid", "beta": 0.3}, {"name": "sft", "weight": 0.5}]
    given = configured(loss__name=name, **({"loss__losses": parts} if name == "mix" else {}))
    whole = with_loss_options(given)
    defaults = {
        option: parameter.default
        for option, parameter in inspect.signature(LOSSES[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and option not in ("data", "losses")
    }
    written = dict(whole.loss.options)
    if name == "mix":
        first, second = written.pop("losses")
        assert first == {"name": "sigmoid", "weight": 1.0, **with_loss_options(configured()).loss.options, "beta": 0.3}
        assert second == {"name": "sft", "weight": 0.5, "nll": "batch_mean"}
    assert written == defaults
    assert loss_problems(whole) == [] and Config.parse(whole.model_dump(mode="json")) == whole
    assert whole.train == given.train and (whole.loss.name, whole.loss.ld_alpha) == (name, None)


def test_defaults_that_yaml_cannot_hold_are_left_out(monkeypatch):
    def odd(policy, reference, *, beta: float = 0.5, table=Config, steps=(1, 2)):
        raise NotImplementedError

    monkeypatch.setitem(LOSSES, "odd", odd)
    assert with_loss_options(configured(loss__name="odd")).loss.options == {"beta": 0.5, "steps": (1, 2)}
