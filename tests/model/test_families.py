"""Tests of reading config.json, and of the weight tables, which must cover every tensor of transformers' models."""

import json
import math

import pytest
import torch

from dpo_engine.checkpoint.identity import model_identity
from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import FAMILIES, read_architecture
from dpo_engine.model.families.rule import expected_tensors
from dpo_engine.model.rotary import inverse_frequencies
from dpo_engine.testing import check_defaults
from support.family_cases import CASES, checkpoint

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 515,
    "max_position_embeddings": 256,
}
FAMILY_NAMES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def config_dir(tmp_path):
    """Return a function that writes a config.json and returns its directory."""

    def write(model_type="llama", **fields):
        values = {"model_type": model_type, **SHAPE, **fields}
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
        return tmp_path

    return write


def problems(directory, key="model.path") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_architecture(directory, key)
    prefix = f"{key}={directory}: "
    assert all(line.startswith(prefix) for line in caught.value.problems)
    return [line.removeprefix(prefix) for line in caught.value.problems]


VARIANTS = {
    "as written": {},
    "tied": {"tie_word_embeddings": True},
    "own head size": {"head_dim": 32},
    "null head size": {"head_dim": None},
    "no key/value heads": {"num_key_value_heads": "absent", "num_attention_heads": 32, "hidden_size": 128},
    "theta beside": {"rope_theta": 500000.0},
    "theta inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear, old spelling": {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, new spelling": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}},
    "llama3, old spelling": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "llama3 without its original length": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    },
    "both spellings": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e5},
    },
    "window off": {"sliding_window": None, "use_sliding_window": False},
    "window on": {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
}


@pytest.mark.parametrize(
    "family, variant",
    # Qwen3 is left out of one variant, because transformers rejects a Qwen3 config with a null head size.
    [
        (family, variant)
        for family in FAMILY_NAMES
        for variant in VARIANTS
        if (family, variant) != ("qwen3", "null head size")
    ],
)
def test_config_agrees_with_transformers(family, variant, config_dir):
    from transformers import AutoConfig

    directory = config_dir(family, **VARIANTS[variant])
    arch = read_architecture(directory)
    expected = AutoConfig.from_pretrained(directory)
    head_dim = getattr(expected, "head_dim", None) or expected.hidden_size // expected.num_attention_heads
    assert (arch.num_layers, arch.hidden_size, arch.ffn_hidden_size) == (3, expected.hidden_size, 96)
    assert (arch.num_attention_heads, arch.num_kv_heads) == (expected.num_attention_heads, expected.num_key_value_heads)
    assert arch.head_dim == head_dim
    assert (arch.norm_eps, arch.tied_embeddings) == (expected.rms_norm_eps, expected.tie_word_embeddings)
    assert arch.sliding_window == (None if family == "llama" else expected.sliding_window)
    rope = dict(expected.rope_parameters)
    assert arch.rope_theta == rope.pop("rope_theta")
    assert (arch.rope_scaling or {"rope_type": "default"}) == {k: rope[k] for k in rope if k != "type"}
    assert (arch.qkv_bias, arch.qk_norm) == (family == "qwen2", family == "qwen3")


@pytest.mark.parametrize(
    "family, options", [(f, {}) for f in FAMILY_NAMES] + [("llama", {"tie_word_embeddings": True})]
)
def test_table_covers_every_tensor_of_the_model(family, options, config_dir):
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = config_dir(family, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if options:
        del expected["lm_head.weight"]  # tied to the embedding
    arch = read_architecture(directory)
    rows = [tensor for tensor, _ in expected_tensors(FAMILIES[family].rules, arch)]
    assert dict(rows) == expected and len(rows) == len(expected)


def test_llama3_frequencies(config_dir):
    """Compare with Meta's formula. It has three ranges of wavelengths, and interpolates only in the middle range."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    arch = read_architecture(config_dir(head_dim=64, rope_theta=10000.0, rope_scaling=scaling))
    expected, ranges = [], set()
    for place in range(0, 64, 2):
        frequency = 10000.0 ** (-place / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < 64 / 4.0:
            expected.append(frequency)
            ranges.add("kept")
        elif wavelength > 64 / 1.0:
            expected.append(frequency / 8.0)
            ranges.add("divided")
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
            ranges.add("interpolated")
    assert inverse_frequencies(64, *arch.ropes[0])[0].tolist() == pytest.approx(expected, rel=1e-6) and len(ranges) == 3


SCALED = {
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 4096},
    "yarn, exact edges": {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    "yarn, other edges": {"factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 64, "beta_slow": 2},
    "yarn, factor": {"factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 1.25},
    "yarn, two weights": {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "longrope": {"original_max_position_embeddings": 4096},
    "longrope, factor": {"factor": 32.0, "original_max_position_embeddings": 8192},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "linear": {"factor": 4.0},
}


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("width", [48, 128, 256])
@pytest.mark.parametrize("case", SCALED)
def test_scaled_frequencies_equal_those_of_transformers(case, width, theta, config_dir):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = case.partition(",")[0]
    factors = {"short_factor": [1 + i / 9 for i in range(width // 2)], "long_factor": [2.0] * (width // 2)}
    scaling = {"rope_type": kind, "rope_theta": theta, **SCALED[case], **(factors if kind == "longrope" else {})}
    directory = config_dir(head_dim=width, max_position_embeddings=131072, rope_parameters=scaling)
    frequencies, factor = inverse_frequencies(width, *read_architecture(directory).ropes[0])
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](AutoConfig.from_pretrained(directory))
    assert torch.equal(frequencies, expected) and factor == expected_factor


def test_longrope_limits_rows_to_the_original_length(config_dir):
    options = {"rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}
    arch = read_architecture(config_dir("phi3", max_position_embeddings=131072, **options))
    assert (arch.max_positions, arch.rope_scaling["rope_type"]) == (4096, "longrope")
    assert read_architecture(config_dir("phi3", max_position_embeddings=131072)).max_positions == 131072


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
@pytest.mark.parametrize(
    "older",
    [
        {},
        {"rope_theta": 20000.0},
        {"rope_theta": 20000.0, "rope_local_base_freq": 7.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}},
    ],
    ids=str,
)
def test_older_files_have_the_rotary_positions_of_full_attention_layers_at_the_top_level(family, older, config_dir):
    from transformers import AutoConfig

    directory = config_dir(family, **older)
    arch, expected = read_architecture(directory), AutoConfig.from_pretrained(directory).rope_parameters
    found = {"sliding_attention": arch.ropes[arch.rope_kind(0)], "full_attention": arch.ropes[0]}
    for kind, (theta, scaling) in found.items():
        assert theta == expected[kind]["rope_theta"]
        assert (scaling or {"rope_type": "default"})["rope_type"] == expected[kind]["rope_type"]


def test_matrix_parameters_count_all_linear_layers(config_dir):
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = config_dir("qwen3", head_dim=16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    expected = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert read_architecture(directory).matrix_parameters == expected


def test_digest_and_differences_distinguish_architectures(config_dir):
    one, same = read_architecture(config_dir()), read_architecture(config_dir())
    other = read_architecture(config_dir(rms_norm_eps=1e-5, max_position_embeddings=512))
    assert one.digest == same.digest != other.digest
    assert one.differences(same) == []
    assert one.differences(other) == ["norm_eps=1e-05 instead of 1e-06"]
    learned, longer = (read_architecture(config_dir("gpt2", n_positions=length)) for length in (64, 128))
    assert learned.differences(longer) == ["max_positions=128 instead of 64"]


PINNED = {
    ("llama", "llama3, old spelling"): "3e6ff95cc17c5b30",
    ("mistral", "window on"): "0e8e6d6272142513",
    ("qwen2", "window on"): "07e83cba9de255ab",
    ("qwen3", "as written"): "01ef3672d1f6c4a1",
}


@pytest.mark.parametrize("family, variant", PINNED)
def test_digest_and_identity_of_a_known_model_never_change(family, variant, config_dir):
    """The engine finds stored reference log-probabilities by the weights' digest, which depends on ``arch.digest``.

    The engine resumes from a checkpoint only if the checkpoint has the same model identity as the run.
    """
    options = {**VARIANTS[variant], "max_window_layers": "absent"}
    arch = read_architecture(config_dir(family, **options))
    assert arch.digest == PINNED[family, variant]
    assert list(model_identity(arch)["model"]) == [
        "model_type", "num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "head_dim",
        "ffn_hidden_size", "vocab_size", "norm_eps", "qkv_bias", "qk_norm", "tied_embeddings", "rope_theta",
        "rope_scaling",
    ]  # fmt: skip


def test_digest_of_a_known_mixture_never_changes(config_dir):
    assert read_architecture(config_dir("qwen3_moe")).digest == "38567dc7d6219e0d"


@pytest.mark.parametrize("case", CASES)
def test_identity_survives_json(case, tiny_hf):
    """A checkpoint stores the identity as JSON, which has no tuples.

    A resumed run compares the stored identity with its own identity.
    """
    arch = read_architecture(checkpoint(tiny_hf, case))
    assert json.loads(json.dumps(model_identity(arch))) == model_identity(arch)


REFUSED = {
    "activation": (
        {"hidden_act": "gelu"},
        "hidden_act='gelu': the MLP of this family uses SiLU; other activations are not supported",
    ),
    "rope kind": (
        {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
        "rope_type='proportional': only default, linear, dynamic, llama3, yarn, longrope are supported; use another "
        "model",
    ),
    "rope spelled as text": (
        {"rope_scaling": "linear"},
        "rope_scaling='linear': must be an object; correct config.json",
    ),
    "rope kind that is a list": (
        {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}},
        "rope_type=['linear']: only default, linear, dynamic, llama3, yarn, longrope are supported; use another model",
    ),
    "rope parameters that are a list": (
        {"rope_parameters": [1]},
        "rope_parameters=[1]: must be an object; correct config.json",
    ),
    "odd partial rope": (
        {"partial_rotary_factor": 0.4},
        "partial_rotary_factor: rotates 3 of 8 dimensions, but must rotate an even number above 0; correct config.json",
    ),
    "large partial rope": (
        {"partial_rotary_factor": 2},
        "partial_rotary_factor=2.0: must be at most 1; correct config.json",
    ),
    "rope by layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters.full_attention: rotary positions cannot depend on the layer in this family",
    ),
    "llama3 edges": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
        "low_freq_factor=4.0: must be below high_freq_factor=1.0; correct config.json",
    ),
    "longrope without factors": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1, "2"]}},
        "short_factor: must be a list of numbers above 0; correct config.json",
    ),
    "longrope with other factors": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1, 2]}},
        "short_factor: its length is 2, but must be 4, the number of frequencies of a head; correct config.json",
    ),
    "quantized": (
        {"quantization_config": {"quant_method": "fp8"}},
        "quantization_config={'quant_method': 'fp8'}: quantized weights cannot be trained; use the original "
        "unquantized checkpoint",
    ),
    "heads": (
        {"num_key_value_heads": 3},
        "num_key_value_heads=3: must divide num_attention_heads=8; correct config.json",
    ),
    "odd heads": ({"head_dim": 7}, "head_dim=7: must be even for rotary embeddings; correct config.json"),
    "text for a number": (
        {"hidden_size": "64"},
        "hidden_size='64': must be a whole number, at least 1; correct it in config.json",
    ),
    "zero": ({"vocab_size": 0}, "vocab_size=0: must be a whole number, at least 1; correct it in config.json"),
    "absent": (
        {"intermediate_size": "absent"},
        "intermediate_size=None: must be a whole number, at least 1; correct it in config.json",
    ),
    "no eps": ({"rms_norm_eps": 0}, "rms_norm_eps=0: must be a number above 0; correct it in config.json"),
    "flag": (
        {"tie_word_embeddings": "yes"},
        "tie_word_embeddings='yes': must be true or false; correct it in config.json",
    ),
    "unknown": (
        {"model_type": "lama"},
        "unknown model family 'lama'; did you mean llama? Registered: arcee, cohere, cohere2 and 34 more; a plugin can "
        "register a family",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_config_is_refused_in_one_line(case, config_dir):
    fields, expected = REFUSED[case]
    assert problems(config_dir(**fields)) == [expected]


REFUSED_IN_FAMILIES = {
    "gpt2": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True: scales that depend on"),
    "qwen3": ({"attention_bias": True}, "attention_bias=True: a bias in the attention's output projection is not"),
    "gpt_oss": ({"swiglu_limit": 0}, "swiglu_limit=0: must be a number above 0; correct it in config.json"),
    "olmo2": ({"attention_bias": True}, "attention_bias=True: biases in attention are not supported for OLMo models"),
    "cohere": ({"use_qk_norm": True}, "use_qk_norm=True: norms with a separate weight for each head are not supported"),
    "stablelm": ({"qk_layernorm": True}, "qk_layernorm=True: norms with a separate weight for each head are not"),
    "gemma": ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True: attention to later tokens is"),
    "qwen2": (
        {"use_sliding_window": True, "max_window_layers": "1"},
        "max_window_layers='1': must be a whole number; correct it in config.json",
    ),
    "smollm3": (
        {"no_rope_layers": [1, 0]},
        "no_rope_layers=[1, 0]: must have 3 entries, each 0 or 1; correct config.json",
    ),
    "gemma3_text": ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping=30.0: soft caps of attention are not"),
    "gemma2": ({"final_logit_softcapping": -1}, "final_logit_softcapping=-1: must be a number above 0; correct it in"),
    "olmo3": (
        {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
        "layer_types: must have 3 entries, each full_attention or sliding_attention; use another model",
    ),
    "seed_oss": (
        {"attention_bias": False, "attention_out_bias": True},
        "attention has a bias in its output projection, but none in its query, key and value projections. Megatron",
    ),
    "arcee": (
        {"hidden_act": "xielu"},
        "hidden_act='xielu': the engine's MLP does not support this activation, but supports silu, gelu, gelu_new, ",
    ),
}


@pytest.mark.parametrize("family", REFUSED_IN_FAMILIES)
def test_what_a_family_does_not_support_is_refused_by_name(family, config_dir):
    fields, expected = REFUSED_IN_FAMILIES[family]
    (line,) = problems(config_dir(family, **fields))
    assert line.startswith(expected)


def test_gemma_and_olmo3_refuse_other_attention(config_dir):
    assert problems(config_dir("gemma", attention_bias=True)) == [
        "attention_bias=True: biases in attention are not supported for Gemma models"
    ]
    for name, value, why in (
        ("use_bidirectional_attention", True, "attention to later tokens is not supported"),
        ("attention_bias", True, "biases in attention are not supported for Gemma models"),
    ):
        for family in ("gemma2", "gemma3_text"):
            assert problems(config_dir(family, **{name: value})) == [f"{name}={value}: {why}"]
    assert problems(config_dir("olmo3", attention_bias=True)) == [
        "attention_bias=True: biases in attention are not supported for OLMo models"
    ]


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "family, fields, expected",
    [
        ("mistral", {"sliding_window": 8}, [8, 8, 8]),
        ("mistral", {"sliding_window": None}, [None] * 3),
        ("ministral", {"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING]}, [8, None, 8]),
        ("ministral", {"sliding_window": 8, "layer_types": [FULL] * 3}, [None] * 3),
        ("qwen2", {"sliding_window": 8}, [None] * 3),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True}, [None] * 3),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True}, [None] * 3),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, [8, 8, 8]),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, [None, None, 8]),
        ("olmo3", {"sliding_window": 8, "layer_types": [FULL] * 3}, [None] * 3),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}, [8, None, 8]),
        ("cohere2", {"sliding_window": 8, "sliding_window_pattern": 2}, [8, None, 8]),
        ("exaone4", {"sliding_window": 8, "sliding_window_pattern": "LLG"}, [8, 8, None]),
        ("exaone4", {"sliding_window": None}, [None] * 3),
        ("smollm3", {"sliding_window": 8, "no_rope_layers": [1, 0, 1]}, [None] * 3),
        ("smollm3", {"sliding_window": 8, "no_rope_layers": [1, 0, 1], "use_sliding_window": True}, [None, 8, None]),
        ("phi3", {"sliding_window": 8}, [8, 8, 8]),
        ("starcoder2", {}, [None] * 3),
    ],
)
def test_windows_of_layers(family, fields, expected, config_dir):
    arch = read_architecture(config_dir(family, **fields))
    assert [arch.window(layer) for layer in range(3)] == expected
    assert arch.has_windows == any(expected)


def test_windows_change_the_digest(config_dir):
    """Stored reference log-probabilities must not be used for a model with other windows."""
    layers = [[SLIDING] * 3, [SLIDING, FULL, FULL], [FULL] * 3]
    options = {"sliding_window": 8, "use_sliding_window": True}
    found = {
        (family, read_architecture(config_dir(family, **options, layer_types=kinds)).digest)
        for family in ("qwen2", "ministral", "olmo3", "gemma3_text")
        for kinds in layers
    }
    assert len(found) == 12
    narrow, wide = (read_architecture(config_dir("mistral", sliding_window=window)) for window in (8, 16))
    assert narrow.differences(wide) == ["sliding_window=16 instead of 8"]


@pytest.mark.parametrize("case", CASES)
def test_absent_fields_have_the_defaults_of_transformers(case, tiny_models):
    check_defaults(tiny_models, case)


def test_sparse_text_configs_have_the_defaults_of_transformers(config_dir):
    """The published config.json files of Gemma 3 have few fields in ``text_config``."""
    from transformers import AutoConfig

    given = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 7, "sliding_window": 1024}
    given["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    for absent in {None, *given}:
        text = {name: value for name, value in given.items() if name != absent}
        sparse = config_dir("gemma3", text_config=text, vision_config={})
        full = AutoConfig.from_pretrained(sparse).text_config.to_dict()
        expected = read_architecture(config_dir(full.pop("model_type"), **full))
        found = read_architecture(config_dir("gemma3", text_config=text, vision_config={}))
        assert found.differences(expected) == ["model_type='gemma3_text' instead of 'gemma3'"]
        assert found.max_positions == expected.max_positions


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"rope_parameters": [1]}, "rope_parameters=[1]: must be an object"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention=3: must be an object"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn': must be an object"),
        (
            {"rope_parameters": {FULL: {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor: must be 1 in this family",
        ),
        ({"rope_parameters": {"factor": 8.0}}, "rope_parameters: must have an object for each kind of layer in this"),
    ],
)
def test_rotary_fields_by_kind_of_layer_are_checked(fields, says, config_dir):
    (problem,) = problems(config_dir("gemma3_text", **fields))
    assert problem.startswith(says)


def test_a_null_rope_theta_for_a_kind_of_layer_counts_as_absent(config_dir):
    fields = {"rope_theta": 5e5, "rope_parameters": {FULL: {"rope_type": "default", "rope_theta": None}}}
    assert read_architecture(config_dir("gemma3_text", **fields)).rope_theta == 5e5


def test_problems_in_a_text_config_begin_with_text_config(config_dir):
    assert problems(config_dir("gemma3", text_config=[])) == ["text_config: must be an object; correct config.json"]
    assert problems(config_dir("gemma3", text_config={"vocab_size": 0, "attention_bias": True})) == [
        "text_config: attention_bias=True: biases in attention are not supported for Gemma models",
        "text_config: vocab_size=0: must be a whole number, at least 1; correct it in config.json",
    ]


def test_ministral3_rows_end_where_queries_would_be_scaled(config_dir):
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    assert read_architecture(config_dir("ministral3", rope_parameters=scaling)).max_positions == 32
    assert read_architecture(config_dir("ministral3", max_position_embeddings=262144)).max_positions == 16384


def test_all_problems_are_reported_at_once(config_dir):
    found = problems(config_dir(vocab_size=-1, mlp_bias=1, hidden_act="relu"), "reference.path")
    assert [line.split("=")[0] for line in found] == ["mlp_bias", "hidden_act", "vocab_size"]


def test_invalid_checkpoint_directory_is_refused(tmp_path):
    file = tmp_path / "config.json"
    assert problems(tmp_path / "none") == ["no such directory; set it to the directory of a Hugging Face checkpoint"]
    assert problems(tmp_path) == ["has no config.json; set it to the directory of a Hugging Face checkpoint"]
    for text, said in {
        "{": "config.json cannot be read (invalid JSON at column 2: the text ends inside a value",
        "[" * 100_000: "config.json cannot be read (is nested deeper than 64 levels",
        "[1]": "config.json cannot be read (is a list, not an object",
        '{"hidden_size": 64, "hidden_size": 1}': "config.json cannot be read (key 'hidden_size' occurs twice",
        "{}": "unknown model family None",
    }.items():
        file.write_text(text)
        [line] = problems(tmp_path)
        assert line.startswith(said)
    file.write_bytes(b"\xff\xfe")
    assert problems(tmp_path)[0].startswith("config.json cannot be read (is UTF-16")


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt", "latest_checkpointed_iteration.txt"])
def test_megatrons_distributed_checkpoint_is_refused_and_never_loaded(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")  # a pickle that runs a command
    with pytest.raises(ConfigError) as caught:
        read_architecture(tmp_path)
    assert str(caught.value) == (
        f"model.path={tmp_path}: is a distributed checkpoint of Megatron or torch, and such checkpoints are never "
        "loaded, because their index is a pickle; convert this one to a Hugging Face checkpoint first (see Models in "
        "the documentation)"
    )
