"""Tests of the division of layers among model chunks: the best division is chosen, and impossible ones are refused."""

from itertools import combinations

import pytest

from dpo_engine.config.rules import contradictions
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.stages import balanced_layers, parallel_dims
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.verbs.plan import plan

SMALLEST = {"model": {"path": "m"}, "data": {"train": "a", "max_length": 64}, "train": {"output_dir": "o"}}


def config_of(**parallel):
    return Config.parse({**SMALLEST, "parallel": parallel})


def divisions(layers, chunks):
    """Yield all ways to divide layers into chunks that are not empty."""
    for cuts in combinations(range(1, layers), chunks - 1):
        yield tuple(b - a for a, b in zip((0, *cuts), (*cuts, layers), strict=True))


@pytest.mark.parametrize("vocabulary", [64, 515, 5000])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_balanced_division_is_the_best_of_all(vocabulary, chunks, tiny_hf):
    arch = read_architecture(tiny_hf("llama", num_hidden_layers=7, vocab_size=vocabulary))
    hidden, ffn, kv = 64, 96, arch.num_kv_heads * arch.head_dim
    # The last term is attention: in a row of 64 tokens, a query sees about 32 keys on average.
    layer = 2 * (hidden * (2 * hidden + 2 * kv) + 3 * hidden * ffn + hidden * 64)

    def worst_and_spread(division):
        work = [layer * count for count in division]
        work[-1] += hidden * vocabulary  # half of the tokens are scored
        return round(max(work)), sum(one**2 for one in work)

    assert worst_and_spread(balanced_layers(arch, chunks, 64)) == min(map(worst_and_spread, divisions(7, chunks)))


def test_output_layer_makes_the_last_stage_shorter(tiny_hf):
    arch = read_architecture(tiny_hf("llama", num_hidden_layers=8, vocab_size=3000))
    first, *_, last = parallel_dims(config_of(pp=4, layers="auto"), arch, 4).layers
    assert first > last


def test_layers_of_chunks():
    dims = ParallelDims(pp=2, vpp=2, world=2, layers=(1, 2, 3, 1))
    assert [list(chunk) for chunk in dims.chunk_layers(7)] == [[0], [1, 2], [3, 4, 5], [6]]
    assert dims.layers_of(0, 7) == [0, 3, 4, 5] and dims.layers_of(1, 7) == [1, 2, 6]
    assert ParallelDims(pp=2, vpp=2, world=2).layers_of(1, 8) == [2, 3, 6, 7]


def test_impossible_divisions_are_refused(tiny_hf):
    arch = read_architecture(tiny_hf("llama", num_hidden_layers=7))

    def problems(**parallel):
        return parallel_dims(config_of(**parallel), arch, parallel["pp"]).problems(arch)

    assert problems(pp=2) == ["parallel.pp=2: must divide model.num_layers=7; use 1 or 7, or set parallel.layers=auto"]
    assert problems(pp=2, layers=[3, 3]) == [
        "parallel.layers=[3, 3]: must sum to model.num_layers=7, but the sum is 6; correct the list"
    ]
    assert problems(pp=4, vpp=2, layers="auto") == [
        "parallel.pp=4 x parallel.vpp=2: must be at most model.num_layers=7; use fewer model chunks"
    ]
    assert problems(pp=3, layers="auto") == problems(pp=3, layers=[1, 1, 5]) == []
    assert contradictions(config_of(pp=2, vpp=2, layers=[3, 4])) == [
        "parallel.layers=[3, 4]: must have 4 numbers, one for each model chunk; correct it"
    ]
    assert contradictions(config_of(layers="auto")) == [
        "parallel.layers=auto: requires parallel.pp >= 2, but it is 1; remove parallel.layers"
    ]
    with pytest.raises(ConfigError, match=r"parallel.layers\[0\]"):
        config_of(pp=2, layers=[0, 7])


def test_plan_divides_models_whose_layers_cannot_be_divided_equally(tiny_hf):
    raw = {**SMALLEST, "model": {"path": str(tiny_hf("llama", num_hidden_layers=7))}, "train": {"output_dir": "o"}}
    raw["train"]["global_batch_size"] = 1  # so that dp 3 is not possible
    lines = plan(Config.parse(raw), 3)
    assert any("pp 3, cp 1, dp 1, layers " in line for line in lines), lines
    assert "  layers: auto" in lines
