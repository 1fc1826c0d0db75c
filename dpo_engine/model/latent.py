"""Multi-head latent attention: keys and values, and usually queries, are computed from much smaller vectors.

Megatron's own module cannot be used. It computes rotary angles from a token's index, but in a row of trees (prompts,
each followed by its responses), or in a context-parallel rank's share of a row, a token's position differs from its
index. The names of the parameters are Megatron's.

Not covered: Transformer Engine's modules, and the smaller cache that this attention allows in inference.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from dpo_engine.model.attention import CoreAttention, indices_on
from dpo_engine.model.norms import RMSNorm
from dpo_kernels import rotate

EPS = 1e-6
"""Epsilon of the norms of the small vectors. As in transformers, it does not depend on ``rms_norm_eps``."""


class Replicated(nn.Module):
    """A linear layer without a bias, of which every tensor-parallel rank has a full copy."""

    def __init__(self, inputs: int, outputs: int, config: Any):
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype, device=device))
        # With sequence parallelism, a rank computes the weight's gradient from its own tokens, and Megatron sums this
        # gradient over tp. Without sequence parallelism, the gradient of this layer's output is already summed over tp:
        # by the backward pass of the sharded linear layer that follows and, for the keys' rotary part, in `_heads`.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x [..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight)


class LatentAttention(nn.Module):
    """The attention of a layer, with Megatron's constructor arguments and the outputs of ``layer.Attention``.

    *Source*: DeepSeek-V2 (arXiv 2405.04434) eq. 9 to 19.
    """

    def __init__(self, config: Any, submodules: Any = None, layer_number: int = 1, **megatron: Any):
        super().__init__()
        arch, groups = config.arch, megatron["pg_collection"]
        self.config, self.latent, self.tp = config, arch.latent, groups.tp
        self.width, self.neighbors = arch.head_dim, arch.rotary_interleaved
        inside, heads, hidden = arch.latent, arch.num_attention_heads, arch.hidden_size
        common = {"config": config, "bias": False, "tp_group": self.tp}
        column = partial(
            ColumnParallelLinear, **common, init_method=config.init_method, gather_output=False, skip_bias_add=False
        )
        if inside.query_rank is None:
            self.linear_q_proj = column(hidden, heads * self.width)
        else:
            self.linear_q_down_proj = Replicated(hidden, inside.query_rank, config)
            self.q_layernorm = RMSNorm(config, inside.query_rank, EPS)
            self.linear_q_up_proj = column(inside.query_rank, heads * self.width)
        self.linear_kv_down_proj = Replicated(hidden, inside.down_size, config)
        self.kv_layernorm = RMSNorm(config, inside.rank, EPS)
        self.linear_kv_up_proj = column(inside.rank, heads * (inside.plain + inside.value))
        scale = self.width**-0.5 if arch.attention_scale is None else arch.attention_scale
        self.core_attention = CoreAttention(
            config, layer_number, None, "self", softmax_scale=scale, pg_collection=groups
        )
        self.linear_proj = RowParallelLinear(
            heads * inside.value,
            hidden,
            **common,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        columns: Tensor | None = None,
        **megatron: Any,
    ) -> tuple[Tensor, None]:
        """Compute the output of attention. Arguments and shapes are those of ``layer.Attention.forward``.

        *Collectives* over tp: those of the sharded linear layers, and a sum of the gradient of the keys' rotary part.
        With sequence parallelism, this sum is a reduce-scatter, and the forward pass all-gathers the rotary part. Over
        cp: those of core attention.
        """
        query, key, value = self._heads(hidden_states, rotary_pos_emb[0])
        core = self.core_attention
        if columns is not None:
            query, core = query[indices_on(query.device, columns)], partial(core, columns=columns)
        out, _ = self.linear_proj(core(query, key, value, attention_mask))
        return out, None

    def _heads(self, hidden: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys [s/cp, r, n/t, plain + rotary], and values [s/cp, r, n/t, value]."""
        inside = self.latent
        if inside.query_rank is None:
            query, _ = self.linear_q_proj(hidden)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))
        plain, rotary = query.unflatten(-1, (-1, self.width)).split([inside.plain, inside.rotary], dim=-1)
        query = torch.cat([plain, rotate(rotary, table, self.neighbors)], dim=-1)
        small, shared = self.linear_kv_down_proj(hidden).split([inside.rank, inside.rotary], dim=-1)
        # All heads share this part of the keys. Each tp rank computes the gradient of this part from its own heads
        # only, so the gradients of all tp ranks are summed.
        if self.config.sequence_parallel:
            shared = gather_from_sequence_parallel_region(shared, group=self.tp)
        else:
            shared = copy_to_tensor_model_parallel_region(shared, group=self.tp)
        shared = rotate(shared[:, :, None], table, self.neighbors)
        both, _ = self.linear_kv_up_proj(self.kv_layernorm(small))
        plain, value = both.unflatten(-1, (-1, inside.plain + inside.value)).split([inside.plain, inside.value], dim=-1)
        key = torch.cat([plain, shared.expand(-1, -1, plain.shape[2], -1)], dim=-1)
        return query, key, value
