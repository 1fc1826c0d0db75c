"""gpt-oss-20b and gpt-oss-120b models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, HF_LAYER, NORMS, ROOT, SINKS, biases, dense, sliding
from dpo_engine.model.families.mixtures import checked, named_count
from dpo_engine.model.families.rule import LAYER, Fused, Rule
from dpo_engine.model.mixture import Experts

EXPERT = f"{LAYER}mlp.experts.local_experts.{{e}}.linear_"
ROUTER, STORED = f"{HF_LAYER}mlp.router.", f"{HF_LAYER}mlp.experts."
TWICE = ("experts.ffn_hidden_size", "experts.ffn_hidden_size")
SCALING = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Scaling of rotary positions if ``config.json`` has none."""


def _expert(linear: str, tensor: str, rows: tuple[str, ...], columns: str, layout: str, cut: int) -> tuple[Rule, Rule]:
    """Return the rules for an expert's matrix, which is stored transposed, and for the bias of the matrix."""
    own, mixed = (f"{STORED}{{e}}.{tensor}", f"{STORED}{{e}}.{tensor}_bias"), len(rows) > 1
    facts = {"layout": layout, "layers": "experts", "interleaved": mixed}
    return (
        Rule(f"{EXPERT}{linear}.weight", own[:1], rows, columns, cut=cut, transposed=True, **facts),
        Rule(f"{EXPERT}{linear}.bias", own[1:], rows, cut=0, **facts),
    )


@FAMILIES.register("gpt_oss")
class GptOss:
    """Attention sinks, a window in every other layer, and experts with biases and a clamped gate in every layer."""

    rules = (
        *ROOT,
        *NORMS,
        *ATTENTION,
        *SINKS,
        Rule(f"{LAYER}mlp.router.weight", (f"{ROUTER}weight",), ("experts.count",), "hidden_size", layers="experts"),
        Rule(f"{LAYER}mlp.router.bias", (f"{ROUTER}bias",), ("experts.count",), layers="experts"),
        *_expert("fc1", "gate_up_proj", TWICE, "hidden_size", "glu", 0),
        *_expert("fc2", "down_proj", ("hidden_size",), "experts.ffn_hidden_size", "plain", 1),
    )
    fused = tuple(
        Fused(f"{STORED}{name}", (f"{STORED}{{e}}.{name}",), written=True)
        for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    )
    packed = "mxfp4"

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a gpt-oss ``config.json``."""
        layers = config.count("num_hidden_layers")
        if config.get("rope_scaling") is None and config.get("rope_parameters") is None:
            config.values["rope_parameters"] = SCALING
        experts = Experts(
            layers=tuple(range(layers)),
            count=named_count(config, "num_local_experts", "num_experts", default=128),
            chosen=config.count("num_experts_per_tok", 4),
            ffn_hidden_size=config.count("intermediate_size", 2880),
            router_bias=True,
            biases=True,
            clamp=config.number("swiglu_limit", 7.0),
            slope=config.number("swiglu_alpha", 1.702),
        )
        window = None if config.values.get("sliding_window", 128) is None else config.count("sliding_window", 128)
        return dense(
            config,
            head_dim=64,
            num_kv_heads=8,
            eps=("rms_norm_eps", 1e-5),
            theta=150000.0,
            sliding_window=window,
            sliding_layers=sliding(config, period=2) or None,
            attention_sinks=True,
            experts=checked(config, experts),
            **biases(config, attention=True),
        )
