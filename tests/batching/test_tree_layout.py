"""Tests of tree rows (layout `tree`, in which pairs can share prompts): their contents, and training with them.

In every parallel layout, the metrics, the values of each evaluated pair, and the trained weights must match those of
training with padded rows. On one rank, log-probabilities and gradients are also compared.
"""

import doctest
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_engine.batching import batches, blocks, trees
from dpo_engine.batching.shares import share_columns
from dpo_engine.batching.trees import needed_columns, plant
from dpo_engine.scoring import logps
from dpo_engine.testing.comparison import assert_same_numbers, assert_same_weights
from dpo_engine.testing.pairs import RandomPairs
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import run_config, train_steps
from support.layouts import LAYOUTS, SIZES, world

FEW = RandomPairs(12, 50, few=3)
MANY = RandomPairs(12, 50)


def visible(segments: torch.Tensor) -> torch.Tensor:
    """Return the attention mask [n, n], computed by following the tree from each token's segment to the root."""
    lengths, parents = segments.tolist()
    segment = [number for number, length in enumerate(lengths) for _ in range(length)]
    above = {number: {number} for number in range(len(lengths))}
    for number, parent in enumerate(parents):
        above[number] |= above[parent] if parent >= 0 else set()
    n = len(segment)
    return torch.tensor([[k <= q and segment[k] in above[segment[q]] for k in range(n)] for q in range(n)])


class TestPlant:
    def test_docstring_examples(self):
        result = doctest.testmod(trees)
        assert result.attempted >= 8 and result.failed == 0

    @settings(max_examples=60)
    @given(
        places=st.lists(st.integers(-1, 11), min_size=1, max_size=6),
        few=st.booleans(),
        share=st.booleans(),
        multiple=st.integers(1, 4),
        cp_size=st.integers(1, 3),
    )
    def test_each_token_sees_only_its_own_sequence(self, places, few, share, multiple, cp_size):
        pairs = FEW if few else MANY
        places = sorted(places, key=lambda place: (place < 0, place >= 0 and pairs[place].prompt.tobytes()))
        chosen = [None if place < 0 else pairs[place] for place in places]
        batch = plant(chosen, places, pad_id=99, share=share, multiple=multiple, cp_size=cp_size)
        tokens, sees = batch.tokens[0], visible(batch.segments)
        assert batch.positions.tolist() == (sees.sum(1) - 1).tolist()
        b = len(places)
        for owner in range(2 * b):
            pair = chosen[owner % b]
            mine = batch.scored.take[batch.scored.owner == owner]
            if pair is None:
                assert not len(mine)
                continue
            response, other = (pair.chosen, pair.rejected) if owner < b else (pair.rejected, pair.chosen)
            assert batch.scored.targets[mine].tolist() == response.tolist()
            # A site is a position whose output predicts a response token. The site that predicts token i of a response
            # attends to the prompt and the response's first i tokens.
            for i, site in enumerate(batch.scored.sites[mine].tolist()):
                expected = [*pair.prompt.tolist(), *response[:i].tolist()]
                assert tokens[sees[site]].tolist() == expected
            expected = [i < len(other) for i in range(len(response))]
            assert batch.scored.shared[batch.scored.owner == owner].tolist() == expected

    def test_prompts_and_equal_responses_are_stored_once(self):
        order = sorted(range(12), key=lambda i: FEW[i].prompt.tobytes())
        batch = plant([FEW[i] for i in order], order, pad_id=0)
        prompts = {FEW[i].prompt.tobytes(): len(FEW[i].prompt) for i in order}
        leaves = {(FEW[i].prompt.tobytes(), r.tobytes()): len(r) for i in order for r in FEW[i][1:3]}
        expected = sum(prompts.values()) + sum(leaves.values())
        assert batch.tokens.shape[1] == expected
        plain = plant([FEW[i] for i in order], order, pad_id=0, share=False)
        assert plain.tokens.shape[1] == sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in FEW.pairs)
        assert (plain.segments[1] == -1).all()

    def test_equal_responses_with_other_masks_are_scored_separately(self):
        """Both pairs have the same chosen response, but in the second pair, a mask selects one token for scoring.

        The two pairs therefore cannot share the scored tokens of this response: the first pair scores tokens 5, 6 and
        7, and the second pair scores only token 6.
        """
        pair = MANY[0]._replace(chosen=np.array([5, 6, 7], dtype=np.int32), chosen_mask=None)
        masked = pair._replace(chosen_mask=np.array([False, True, False]))
        batch = plant([pair, masked], [0, 1], pad_id=99)
        targets = [batch.scored.targets[batch.scored.take[batch.scored.owner == owner]].tolist() for owner in (0, 1)]
        assert targets == [[5, 6, 7], [6]]

    @pytest.mark.parametrize("limit", [1, 30, 60, 90, 1000])
    def test_chunks_hold_as_many_whole_trees_as_fit(self, limit, monkeypatch):
        monkeypatch.setattr(batches, "CHUNK_SITES", limit)
        pairs = sorted(RandomPairs(30, 50, few=6).pairs, key=lambda pair: pair.prompt.tobytes())
        batch = plant(pairs, range(30), pad_id=0)
        trees = [list(tree) for _, tree in groupby(pairs, key=lambda pair: pair.prompt.tobytes())]
        sites = [sum(map(len, {r.tobytes(): r for pair in tree for r in pair[1:3]}.values())) for tree in trees]
        expected, filled = [], 0
        for tree, count in zip(trees, sites, strict=True):
            if not expected or filled + count > limit:
                expected, filled = [*expected, (0, 0, 0)], 0
            filled += count
            entries = sum(len(pair.chosen) + len(pair.rejected) for pair in tree)
            expected[-1] = tuple(np.add(expected[-1], (count, entries, len(tree))).tolist())
        assert batch.scored.chunks == tuple(tuple(stop) for stop in np.cumsum(expected, axis=0).tolist())


class TestShares:
    @settings(max_examples=60)
    @given(cp_size=st.integers(2, 8), multiple=st.integers(1, 4), few=st.booleans())
    def test_shards_add_up_to_the_whole_batch(self, cp_size, multiple, few):
        pairs = FEW if few else MANY
        whole = plant(pairs.pairs[:5], range(5), pad_id=0, cp_size=cp_size, multiple=multiple)
        shares = [whole.shard(rank, cp_size) for rank in range(cp_size)]
        columns = share_columns(whole.tokens.shape[1], cp_size, whole.positions.numpy())
        assert sorted(np.concatenate(columns)) == list(range(whole.tokens.shape[1]))
        sizes = {share.tokens.shape[1] for share in shares}
        assert len(sizes) == 1 and sizes.pop() % multiple == 0
        found = sorted(
            (owner, int(columns[rank][site]), target)
            for rank, share in enumerate(shares)
            for owner, site, target in zip(
                share.scored.owner.tolist(),
                share.scored.sites[share.scored.take].tolist(),
                share.scored.targets[share.scored.take].tolist(),
                strict=True,
            )
        )
        scored = whole.scored
        expected = sorted(
            zip(
                scored.owner.tolist(),
                scored.sites[scored.take].tolist(),
                scored.targets[scored.take].tolist(),
                strict=True,
            )
        )
        assert found == expected

    @settings(max_examples=40)
    @given(places=st.lists(st.integers(-1, 11), min_size=1, max_size=4), cp=st.integers(1, 4), tp=st.integers(1, 4))
    def test_columns_kept_for_the_last_layer(self, places, cp, tp):
        places = sorted(places, reverse=True)
        chosen = [None if place < 0 else FEW[place] for place in places]
        whole = plant(chosen, places, pad_id=0, cp_size=cp, multiple=tp)
        for share in (whole.shard(rank, cp) for rank in range(cp)):
            scored = set(share.scored.sites.tolist())
            columns = needed_columns(share, tp).tolist()
            assert columns == sorted(set(columns)) and scored <= set(columns) <= set(range(share.tokens.shape[1]))
            expected = (
                -(-max(len(scored), 1) // tp) * tp
            )  # a rank without scored tokens keeps one column per tp rank, to run the same operations as other ranks
            assert len(columns) == expected

    def test_length_that_does_not_split_into_blocks_is_refused(self):
        says = "131 tokens cannot be split into equal blocks for 2 context-parallel ranks"
        with pytest.raises(ValueError, match=says):
            share_columns(131, 2, np.arange(131))


DEFAULT = ("one", "tp2 pp2", "cp2 dp2", "pp2 vpp2")


def reads_margins(sections) -> bool:
    return "margin_scale" in sections.get("loss", {})


@pytest.fixture(scope="module")
def stacked(tiny_hf, tmp_path_factory):
    """Return a function that trains with padded rows on one rank.

    Calls with equal arguments train only once: the function caches the results.
    """
    known = {}

    def run(few=None, **sections):
        key = repr((few, sorted(sections.items())))
        if key not in known:
            out = tmp_path_factory.mktemp("stacked")
            config = run_config(tiny_hf("llama"), out, **sections)
            facts = {"sizes": SIZES, "export": str(out / "hf"), "few": few, "judged": reads_margins(sections)}
            known[key] = run_ranks(train_steps, 1, config=config, **facts)[0], out
        return known[key]

    return run


def check(stacked, tiny_hf, tmp_path, name, few, batch, **sections):
    expected, out = stacked(few, **sections)
    batch = {"layout": "tree", "tokens_per_micro_batch": 80, **batch}
    config = run_config(tiny_hf("llama"), tmp_path, parallel=LAYOUTS[name], batch=batch, **sections)
    facts = {"sizes": SIZES, "export": str(tmp_path / "hf"), "few": few, "judged": reads_margins(sections)}
    results = run_ranks(train_steps, world(name, LAYOUTS[name]), config=config, **facts)
    for result in results:
        assert_same_numbers(result, expected, 1e-5)
    assert_same_weights(tmp_path / "hf", out / "hf", tiny_hf("llama"), 1e-5)


@pytest.mark.parametrize("few", [None, 3], ids=["one prompt per pair", "shared prompts"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in LAYOUTS])
def test_trees_match_padded_rows(name, few, stacked, tiny_hf, tmp_path):
    check(stacked, tiny_hf, tmp_path, name, few, {})


@pytest.mark.parametrize(
    "name, sections",
    [
        ("tp2 pp2", {"batch": {"share": False}}),
        pytest.param("tp2 cp2", {"batch": {"tokens_per_micro_batch": "auto"}}, marks=pytest.mark.slow),
        ("cp2 dp2", {"model": {"recompute": "full"}}),
        pytest.param("tp2 pp2", {"model": {"recompute": "selective"}}, marks=pytest.mark.slow),
        pytest.param("cp2 dp2", {"loss": {"name": "aot"}}, marks=pytest.mark.slow),
        ("tp2 pp2", {"loss": {"ld_alpha": 0.4, "use_weighting": True}, "logging": {"entropy": True}}),
        ("cp2 dp2", {"chunk": 20, "loss": {"ld_alpha": 0.4, "margin_scale": 0.3}, "logging": {"entropy": True}}),
        ("dp2", {"chunk": 20, "loss": {"name": "bco_pair", "shift": "batch"}}),
        ("dp2", {"parallel_overlap": True}),
        ("cp2 dp2", {"block": 8}),
        pytest.param("tp2 cp2", {"block": 8}, marks=pytest.mark.slow),
    ],
    ids=[
        "packing",
        "a derived budget",
        "full recompute",
        "selective recompute",
        "aot",
        "token weights",
        "ld_alpha, many chunks",
        "bco, many chunks",
        "overlap",
        "many blocks per rank",
        "many blocks, sequence parallelism",
    ],
)
def test_trees_match_padded_rows_with_other_settings(name, sections, stacked, tiny_hf, tmp_path, monkeypatch):
    sections = dict(sections)
    batch = sections.pop("batch", {})
    if chunk := sections.pop("chunk", None):
        monkeypatch.setattr(batches, "CHUNK_SITES", chunk)
        monkeypatch.setattr(logps, "CHUNK_SITES", chunk)
        batch = {"tokens_per_micro_batch": 200}
    if block := sections.pop("block", None):  # with full-size blocks, these short rows would have one block per rank
        monkeypatch.setattr(blocks, "BLOCK", block)
        monkeypatch.setattr(blocks, "SMALLEST", block // 2)
    if sections.pop("parallel_overlap", False):
        monkeypatch.setitem(LAYOUTS, name, {**LAYOUTS[name], "overlap": True})
    check(stacked, tiny_hf, tmp_path, name, 3, batch, **sections)


ODD = ((1, 1, 1), (1, 40, 1), (1, 1, 300), (300, 2, 1), (127, 300, 290), (64, 64, 64), (65, 63, 128), (5, 1, 200))


def odd_step(config, kept, fp64):
    """Run one step on pairs whose lengths are `ODD`, and save the gradients to the file `kept`.

    Returns the metrics, the log-probabilities, the number of elements in the largest tensor that the step computes, and
    the number of scored sites.
    """
    from dpo_engine.model.weights.table import placed_parameters
    from dpo_engine.scoring.reference import score
    from dpo_engine.training.engine import Engine, batch_facts
    from dpo_engine.training.references import open_reference
    from dpo_engine.training.step import train_step
    from kernels.test_linear_logps import Work

    engine, pairs = Engine.open(config, fp64=fp64), RandomPairs(len(ODD), 4099, sizes=ODD)
    everyone = np.arange(len(pairs))
    trained = engine.load_policy(total_steps=1)
    reference = open_reference(engine, trained.chunks, pairs=[pairs])
    made = engine.batches(pairs, everyone)
    size, groups = engine.arch.vocab_size, engine.groups
    found = {}
    for batch, record in zip(made, score(trained.chunks, made, vocab_size=size, groups=groups), strict=True):
        for place, index in enumerate(batch.index.tolist()):
            found[index] = (float(record.chosen[place]), float(record.rejected[place]))
    known = batch_facts(pairs, everyone)
    with Work() as work:
        metrics = train_step(trained, reference, made, engine.objective, known=known, vocab_size=size, groups=groups)
    gradients = {
        placed.rule.parameter.format(l=placed.layer): placed.parameter.main_grad.clone()
        for placed in placed_parameters([chunk.module for chunk in trained.chunks], engine.arch, engine.groups)
    }
    torch.save(gradients, kept)
    sites = sum(len(batch.scored.sites) for batch in made)
    engine.close()
    return metrics, [found[index] for index in everyone], work.largest, sites


@pytest.mark.parametrize(
    "fp64, rel", [pytest.param(False, 1e-5, id="fp32", marks=pytest.mark.slow), pytest.param(True, 1e-10, id="fp64")]
)
def test_odd_lengths_match_padded_rows_without_full_logits(tiny_hf, tmp_path, monkeypatch, fp64, rel):
    """Compare log-probabilities and all gradients with those of padded rows.

    Also check that no tensor holds all logits.
    """
    monkeypatch.setattr(batches, "CHUNK_SITES", 64)
    monkeypatch.setattr(logps, "CHUNK_SITES", 64)
    model = tiny_hf("llama", max_position_embeddings=1024, vocab_size=4099, hidden_size=32)
    found = {}
    for layout in ("stacked", "tree"):
        batch = {"layout": layout, **({"tokens_per_micro_batch": 4000} if layout == "tree" else {})}
        sections = {"batch": batch, "optim": {"clip_grad": 0.0}, "parallel": {"distributed_optimizer": not fp64}}
        config = run_config(model, tmp_path / layout, **sections)
        found[layout] = run_ranks(odd_step, 1, config=config, kept=str(tmp_path / f"{layout}.pt"), fp64=fp64)[0]
    metrics, got, largest, sites = found["tree"]
    assert metrics["loss"] == pytest.approx(found["stacked"][0]["loss"], rel=rel)
    assert metrics["grad_norm"] == pytest.approx(found["stacked"][0]["grad_norm"], rel=rel)
    np.testing.assert_allclose(got, found["stacked"][1], rtol=rel)
    expected = torch.load(tmp_path / "stacked.pt")
    for name, gradient in torch.load(tmp_path / "tree.pt").items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < rel, f"{name}: {error:.1e}"
    # The logits of 64 sites have 0.26 million elements, and the largest activation has 0.39 million. All logits of a
    # pair would have 0.75 million elements on average, and 2.4 million for the longest pair.
    assert largest < 0.5e6 < sites * 4099 / 8
