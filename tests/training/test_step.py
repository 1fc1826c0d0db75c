"""Tests of complete optimizer steps against transformers and TRL, of evaluation metrics, and of token weighting."""

import math

import pytest
import torch
import torch.nn.functional as F

from dpo_engine.errors import ConfigError
from dpo_engine.objective.losses import LOSSES, PairData, PairLogps
from dpo_engine.testing.hf_training import sequence_logp
from dpo_engine.testing.pairs import EOS, RandomPairs, global_batches
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import VOCAB, load_weights, run_config, train_steps
from dpo_engine.training.objective import Objective

BETA, SMOOTHING, LR, CLIP = 0.2, 0.1, 3e-4, 1.0
SIZES = [4, 4, 4, 4, 3]


def independent_run(directory, masked):
    """Run DPO in one process without the engine.

    Returns the loss, chosen reward, reward accuracy and gradient norm of each step, and the final weights.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=LR, eps=1e-6
    )
    pairs = RandomPairs(sum(SIZES), VOCAB, masked=masked)
    steps = []
    for indices in global_batches(SIZES):
        total = sum(pairs[i].weight for i in indices)
        loss = chosen_reward = accuracy = 0.0
        for i in indices:
            pair = pairs[i]
            responses = ((pair.chosen, pair.chosen_mask), (pair.rejected, pair.rejected_mask))
            chosen, rejected = (sequence_logp(model, pair.prompt, *response) for response in responses)
            with torch.no_grad():
                ref_c, ref_r = (sequence_logp(reference, pair.prompt, *response) for response in responses)
            margin = BETA * ((chosen - ref_c) - (rejected - ref_r))
            value = -(1 - SMOOTHING) * F.logsigmoid(margin) - SMOOTHING * F.logsigmoid(-margin)
            loss = loss + pair.weight * value / total
            chosen_reward += pair.weight * BETA * (chosen - ref_c).item() / total
            accuracy += pair.weight * (0.5 if margin == 0 else float(margin > 0)) / total
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        steps.append({"loss": loss.item(), "rewards/chosen": chosen_reward, "grad_norm": norm.item()})
        steps[-1]["rewards/accuracies"] = accuracy
    return steps, model.state_dict()


@pytest.fixture(scope="module")
def independent(tiny_hf):
    return {masked: independent_run(tiny_hf("llama"), masked) for masked in (False, True)}


@pytest.mark.parametrize(
    "world, layout, batch, masked",
    [
        (1, {}, {"layout": "stacked"}, False),
        (4, {"tp": 2, "pp": 2}, {"layout": "stacked"}, False),
        (4, {"cp": 2}, {"layout": "stacked"}, False),
        (1, {}, {"layout": "stacked"}, True),
        (2, {"tp": 2}, {"layout": "tree"}, True),
        (2, {"cp": 2}, {"layout": "tree", "share": False}, True),
        pytest.param(2, {"cp": 2}, {"layout": "stacked"}, True, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "pp": 2}, {"layout": "tree"}, True, marks=pytest.mark.slow),
    ],
    ids=[
        "one rank",
        "tp2 pp2",
        "cp2 dp2",
        "masked",
        "tp2 masked trees",
        "cp2 masked packing",
        "cp2 masked",
        "tp2 pp2 masked trees",
    ],
)
def test_five_steps_against_transformers_and_autograd(world, layout, batch, masked, tiny_hf, tmp_path, independent):
    model = tiny_hf("llama")
    config = run_config(
        model,
        tmp_path,
        parallel=layout,
        batch=batch,
        loss={"beta": BETA, "label_smoothing": SMOOTHING},
        optim={"lr": LR, "clip_grad": CLIP},
    )
    result = run_ranks(train_steps, world, config=config, sizes=SIZES, export=str(tmp_path / "hf"), masked=masked)[0]
    steps, weights = independent[masked]
    for got, want in zip(result["steps"], steps, strict=True):
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=2e-5, abs=2e-5), name
    exported = load_weights(tmp_path / "hf")
    for name, value in weights.items():
        assert (exported[name] - value).norm() / value.norm() < 1e-5, name


def word_tokenizer():
    """Return a tokenizer that maps ``t7 t9`` to the ids ``[7, 9]``, so that a test can give TRL any ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>" if i == EOS else "<pad>" if i == 1 else f"t{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def trl_run(directory, output):
    """Train five steps of 4 unweighted pairs with TRL's DPOTrainer. Return logged metrics and final weights."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    def text(tokens):
        return " ".join(f"t{token}" for token in tokens if token != EOS)

    pairs = RandomPairs(20, VOCAB, weighted=False)
    rows = [
        {"prompt": text(p.prompt) + " ", "chosen": text(p.chosen), "rejected": text(p.rejected)} for p in pairs.pairs
    ]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    options = DPOConfig(
        output_dir=str(output),
        loss_type="sigmoid",
        beta=BETA,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_epsilon=1e-6,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        max_steps=5,
        logging_steps=1,
        logging_first_step=True,
        max_length=None,
        train_sampling_strategy="sequential",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    data = Dataset.from_list(rows)
    trainer = DPOTrainer(model=model, args=options, train_dataset=data, processing_class=word_tokenizer())
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log], trainer.model.state_dict()


def test_five_steps_against_trl(tiny_hf, tmp_path):
    model = tiny_hf("llama")
    logs, weights = trl_run(model, tmp_path / "trl")
    config = run_config(
        model,
        tmp_path,
        parallel={"tp": 2},
        loss={"beta": BETA},
        optim={"lr": LR, "clip_grad": CLIP, "weight_decay": 0.0},
    )
    result = run_ranks(train_steps, 2, config=config, sizes=[4] * 5, export=str(tmp_path / "hf"), weighted=False)[0]
    assert len(logs) == 5
    for got, expected in zip(result["steps"], logs, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "grad_norm"):
            assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
    exported = load_weights(tmp_path / "hf")
    for name, value in weights.items():
        assert (exported[name] - value).norm() / value.norm() < 1e-5, name


def token_statistics(model, prompt, response) -> torch.Tensor:
    """Return the log-probability, entropy and ``log sum p^2`` of each response token: [3, tokens] in fp64."""
    logits = model(torch.tensor([*prompt, *response])[None]).logits[0, len(prompt) - 1 : -1].double()
    p, targets = logits.softmax(-1), torch.tensor(response).long()[:, None]
    return torch.stack([p.gather(1, targets)[:, 0].log(), -(p * p.log()).sum(1), p.square().sum(1).log()])


def independent_step(directory, reference_directory, name: str, ld_alpha: float, weighted_by_likelihood: bool) -> dict:
    """Return the metrics of a step with a token-weighted loss on 6 pairs from two sources.

    The metrics are computed with transformers and autograd.
    """
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(reference_directory, dtype=torch.float32).requires_grad_(False)
    pairs = RandomPairs(6, VOCAB, weighted=name != "aot").pairs
    counted = torch.empty(2, 2, 6, dtype=torch.float64)  # [model, response, pair]
    moved, factors, entropies = torch.empty(2, 6, dtype=torch.float64), [], [[], []]
    for i, pair in enumerate(pairs):
        shorter = min(len(pair.chosen), len(pair.rejected))
        factor = 1.0
        for side, response in enumerate((pair.chosen, pair.rejected)):
            logps, entropy, log_sum_sq = token_statistics(policy, pair.prompt, response)
            against = token_statistics(reference, pair.prompt, response)[0]
            decay = torch.tensor([1.0 if t < shorter else ld_alpha for t in range(len(response))])
            counted[0, side, i], counted[1, side, i] = (logps * decay).sum(), (against * decay).sum()
            moved[side, i] = (logps - against).sum().detach()
            factor *= (logps - log_sum_sq).mean().exp().item()
            entropies[side] += entropy.tolist()
        factors.append(factor)
    ratios = counted[0] - counted[1]
    if name == "aot":
        (chosen, rejected), (ref_chosen, ref_rejected) = counted
        losses = -F.logsigmoid(BETA * ((chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values))
    else:
        losses = -F.logsigmoid(BETA * (ratios[0] - ratios[1]))
    if weighted_by_likelihood:
        losses = losses * torch.tensor(factors)
    weights = torch.tensor([pair.weight for pair in pairs], dtype=torch.float64)
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9)

    def mean(values, own=slice(None)) -> float:
        return ((values * weights)[own].sum() / weights[own].sum()).item()

    rewards = BETA * ratios.detach()
    margins = rewards[0] - rewards[1]
    expected = {
        "loss": loss.item(),
        "grad_norm": norm.item(),
        "rewards/chosen": mean(rewards[0]),
        "rewards/margins": mean(margins),
        "rewards/chosen_std": mean((rewards[0] - mean(rewards[0])) ** 2) ** 0.5,
        "rewards/margins_std": mean((margins - mean(margins)) ** 2) ** 0.5,
        "displacement/chosen": mean(moved[0]),
        "displacement/rejected": mean(moved[1]),
        "displacement/chosen_fell": mean((moved[0] < 0).double()),
        "entropy/chosen": sum(entropies[0]) / len(entropies[0]),
        "entropy/rejected": sum(entropies[1]) / len(entropies[1]),
    }
    for number, source in enumerate(("first", "second")):
        own = torch.tensor([pair.source == number for pair in pairs])
        expected[f"source/{source}/rewards/margins"] = mean(margins, own)
        expected[f"source/{source}/pairs"] = own.sum().item()
        if name != "aot":  # in aot, the loss of a pair depends on the sort order
            expected[f"source/{source}/loss"] = mean(losses.detach(), own)
    return expected


@pytest.mark.parametrize("name, ld_alpha, use_weighting", [("sigmoid", 0.3, True), ("aot", 0.3, False)])
@pytest.mark.parametrize("world, layout", [(1, {}), (4, {"tp": 2, "cp": 2})], ids=["one rank", "tp2 cp2"])
def test_token_weights_and_metrics_against_transformers(
    world, layout, name, ld_alpha, use_weighting, tiny_hf, tmp_path
):
    model, reference = tiny_hf("llama"), tiny_hf("llama", initializer_range=0.03)
    expected = independent_step(model, reference, name, ld_alpha, use_weighting)
    config = run_config(
        model,
        tmp_path,
        parallel=layout,
        reference={"path": str(reference)},
        loss={"name": name, "beta": BETA, "ld_alpha": ld_alpha, "use_weighting": use_weighting},
        logging={"entropy": True},
    )
    result = run_ranks(train_steps, world, config=config, sizes=[6], weighted=name != "aot")[0]
    (got,) = result["steps"]
    for metric, value in expected.items():
        assert got[metric] == pytest.approx(value, rel=2e-5, abs=2e-5), metric


def evaluate_then_step(config) -> tuple[dict, dict, dict]:
    """Evaluate some pairs, and train a step on the same pairs.

    Returns the evaluation's metrics, the step's metrics, and the weighted means of the evaluation's per-pair values.
    """
    import numpy as np

    from dpo_engine.training.engine import Engine, batch_facts
    from dpo_engine.training.evaluate import Evaluator
    from dpo_engine.training.references import open_reference
    from dpo_engine.training.step import train_step

    engine, pairs = Engine.open(config), RandomPairs(5, VOCAB)
    trained = engine.load_policy(total_steps=1)
    reference = open_reference(engine, trained.chunks)
    batches = engine.batches(pairs, np.arange(5))
    common = {"known": batch_facts(pairs, np.arange(5)), "vocab_size": VOCAB, "groups": engine.groups}
    evaluator = Evaluator(batches, reference, engine.objective, **common)
    evaluated = evaluator.evaluate(trained.chunks)
    by_pair, weights = evaluator.per_pair(), pairs.weights / pairs.weights.sum()
    stepped = train_step(trained, reference, batches, engine.objective, **common)
    engine.close()
    columns = {"chosen_rewards": "chosen", "rejected_rewards": "rejected", "margin": "margins"}
    columns["accuracy"] = "accuracies"
    means = {f"rewards/{metric}": float(by_pair[column] @ weights) for column, metric in columns.items()}
    return evaluated, stepped, means


@pytest.mark.parametrize("name, use_weighting", [("hinge", True), ("aot", False)])
def test_evaluation_and_step_report_the_same_metrics(name, use_weighting, tiny_hf, tmp_path):
    reference = tiny_hf("llama", initializer_range=0.03)
    loss = {"name": name, "ld_alpha": 0.3, "use_weighting": use_weighting}
    config = run_config(
        tiny_hf("llama"), tmp_path, loss=loss, logging={"entropy": True}, reference={"path": str(reference)}
    )
    evaluated, stepped, means = run_ranks(evaluate_then_step, 1, config=config)[0]
    assert {**evaluated, "grad_norm": 0, "learning_rate": 0}.keys() == stepped.keys()
    assert evaluated == pytest.approx({metric: stepped[metric] for metric in evaluated}, rel=1e-6)
    assert means == pytest.approx({metric: evaluated[metric] for metric in means}, rel=1e-5)


def some_pairs(**known) -> PairLogps:
    """Return the summed log-probabilities of two pairs. In each pair, one response is longer than the other."""
    numbers = torch.tensor([[-4.0, -9.0], [-6.0, -2.0], [2.0, 3.0], [4.0, 1.0], [-4.0, -5.0], [-3.5, -2.0]])
    collision = {"chosen_collision": torch.tensor([3.0, 8.0]), "rejected_collision": torch.tensor([5.0, 2.5])}
    return PairLogps(*numbers)._replace(**collision)._replace(**known)


DATA = PairData(torch.ones(2), *[torch.zeros(2)] * 4)


def losses_under(**weighting) -> list[float]:
    reference = some_pairs().map(lambda column: 0.5 * column)
    return Objective(LOSSES["sigmoid"], {}, **weighting).losses(some_pairs(), reference, DATA).tolist()


def test_each_token_weighting_changes_the_loss():
    def expected(chosen, rejected):
        return math.log1p(math.exp(-0.1 * 0.5 * (chosen - rejected)))

    plain = [expected(-4.0, -6.0), expected(-9.0, -2.0)]
    decayed = [expected(-4.0, -3.5 - 0.25 * 2.5), expected(-5.0 - 0.25 * 4.0, -2.0)]
    factors = [math.exp(-1 / 2 - 1 / 4), math.exp(-1 / 3 + 0.5)]
    assert losses_under() == pytest.approx(plain, rel=1e-6)
    assert losses_under(ld_alpha=0.25) == pytest.approx(decayed, rel=1e-6)
    weighted = [loss * factor for loss, factor in zip(plain, factors, strict=True)]
    assert losses_under(use_weighting=True) == pytest.approx(weighted, rel=1e-6)
    both = [loss * factor for loss, factor in zip(decayed, factors, strict=True)]
    assert losses_under(ld_alpha=0.25, use_weighting=True) == pytest.approx(both, rel=1e-6)


def test_first_loss_is_unknown_only_with_policy_weighting():
    ln2 = math.log(2)
    assert Objective(LOSSES["sigmoid"], {}, ld_alpha=0.25).facts.at_init == pytest.approx(ln2)
    assert Objective(LOSSES["sigmoid"], {}, use_weighting=True).facts.at_init is None
    first = Objective(LOSSES["sigmoid"], {}, ld_alpha=0.25).losses(some_pairs(), some_pairs(), DATA)
    assert first.tolist() == pytest.approx([ln2, ln2])


def test_ld_alpha_needs_per_token_reference_logps():
    reference = some_pairs(chosen_shared=None, rejected_shared=None)
    with pytest.raises(ConfigError) as error:
        Objective(LOSSES["sigmoid"], {}, ld_alpha=0.25).losses(some_pairs(), reference, DATA)
    assert str(error.value) == (
        "loss.ld_alpha=0.25: needs the log-probabilities of each response up to the length of the shorter response, "
        "but the reference provides only sums over whole responses; remove loss.ld_alpha, or set "
        "reference.mode=resident"
    )
