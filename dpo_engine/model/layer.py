"""A decoder layer with our own forward pass, and with linear layers of Megatron or Transformer Engine.

Megatron's own layer has two drawbacks. Rotating queries or keys takes about twenty operations, and on a GPU each
operation is a kernel launch. The layer also cannot limit its output to selected columns (indices of tokens in the
rows). The modules and their names are those of Megatron's layer, so everything that depends on them works: sharding,
gradient reduction, weight tables and hooks on the linear layers.
"""

import copy
from functools import partial
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.tensor_parallel import (
    all_gather_last_dim_from_tensor_parallel_region,
    checkpoint,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from dpo_engine.model.activations import ACTIVATIONS
from dpo_engine.model.attention import indices_on
from dpo_engine.model.cuda_graphs import ChunkGraphs
from dpo_engine.model.head_norms import HeadNorm
from dpo_engine.model.norms import norm_of
from dpo_engine.model.router_losses import within
from dpo_kernels import HeadNorms, gated, split_heads
from dpo_kernels import rotate as rotated
from dpo_kernels.eager_layer import GATES


class Attention(SelfAttention):
    """Self-attention whose queries can be restricted to some columns."""

    def __init__(self, config: Any, submodules: Any, layer_number: int, **megatron: Any):
        arch = config.arch
        if config.add_bias_linear != arch.out_bias:  # Megatron has one flag for this bias and the MLP's biases
            config = copy.copy(config)
            config.add_bias_linear = arch.out_bias
        super().__init__(config, submodules, layer_number=layer_number, **megatron)
        self.arch = arch
        self.rope_kind = arch.rope_kind(layer_number - 1)
        self.sinks = None
        if arch.attention_sinks:
            heads, device = self.num_attention_heads_per_partition, torch.cuda.current_device()
            self.sinks = nn.Parameter(torch.empty(heads, dtype=config.params_dtype, device=device))
            set_tensor_model_parallel_attributes(self.sinks, is_parallel=True, dim=0, stride=1)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        columns: Tensor | None = None,
        **megatron: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output of attention, and None or a bias that the caller must add to the output.

        hidden_states   [s/cp (/t), r, h], normalized
        attention_mask  [2, k] int64, in host memory: segments of a row of trees (prompts, each followed by its
                        responses); None for causal rows
        rotary_pos_emb  [kinds, 2, s/cp, w/2]  cosines and sines, from :class:`~dpo_engine.model.rotary.Rotary`
        columns         [q] int64, in host memory: columns of the queries; None: all columns

        Returns  [s/cp (/t), r, h], or [q (/t), r, h] with ``columns``
        """
        heads = self.heads(hidden_states, rotary_pos_emb)
        return self.linear_proj(self.attend(*heads, attention_mask, columns))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, columns: Tensor | None = None
    ) -> Tensor:
        """Return the output of core attention, [s/cp or q, r, n/t * d].

        query, key, value        results of :meth:`heads`
        attention_mask, columns  as for :meth:`forward`

        *Collectives*: those of core attention over cp.
        """
        core = partial(self.core_attention, attn_mask_type=self.attn_mask_type)
        if self.sinks is not None:
            core = partial(core, sinks=self.sinks)
        if columns is not None:
            query = query[indices_on(query.device, columns)]
            core = partial(core, columns=columns)
        if self.checkpoint_core_attention:
            return checkpoint(core, False, query, key, value, attention_mask)
        return core(query, key, value, attention_mask)

    def heads(self, hidden_states: Tensor, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [s/cp, r, n/t, d], and keys and values, both [s/cp, r, n_kv/t, d].

        Queries and keys are rotated if the layer has rotary positions.
        """
        mixed, _ = self.linear_qkv(hidden_states)
        groups, ranks = self.config.num_query_groups, self.pg_collection.tp.size()
        shared = max(ranks // groups, 1)  # number of ranks that share a key head
        if shared > 1:
            # This rank's rows of the weight do not form whole heads, so ranks gather their outputs.
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=self.pg_collection.tp)
            mixed = mixed.chunk(groups, dim=-1)[self.pg_collection.tp.rank() // shared]
        mixed = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head))
        table = None if self.rope_kind is None else tables[self.rope_kind]
        neighbors = self.arch.rotary_interleaved
        norms = None
        if isinstance(self.q_layernorm, HeadNorm):
            norms = HeadNorms(self.q_layernorm(), self.k_layernorm(), self.q_layernorm.offset, self.q_layernorm.eps)
        separate = self.arch.qk_norms and not norms
        later = separate and not self.arch.norm_after_rope
        query, key, value = split_heads(mixed, None if later else table, neighbors, norms)
        if shared > 1:
            query = query.chunk(shared, dim=2)[self.pg_collection.tp.rank() % shared]
        if separate:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if later and table is not None:
            query, key = rotated(query, table, neighbors), rotated(key, table, neighbors)
        return query, key, value


class Layer(TransformerLayer):
    """A layer of any architecture.

    The inputs of attention and MLP can be normalized, and their outputs can be normalized and scaled. The MLP reads
    either the sum of the hidden states and the attention's output, or the same hidden states as attention.
    """

    last = False
    graphs: ChunkGraphs | None = None  # CUDA graphs of the layer's model chunk; None: this layer is not recorded

    def __init__(self, config: Any, *positional: Any, **megatron: Any):
        super().__init__(config, *positional, **megatron)
        self.arch = config.arch
        if isinstance(self.mlp, MoELayer):  # for these, Megatron ignores "mlp" in recompute_modules
            modules = config.recompute_modules if config.recompute_granularity == "selective" else ()
            self.recompute_mlp = "mlp" in modules
        if self.arch.post_norms:
            norm = partial(norm_of(self.arch), config, config.hidden_size, config.layernorm_epsilon)
            self.post_attention_layernorm, self.post_mlp_layernorm = norm(), norm()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        context_mask: Tensor | None = None,
        **megatron: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the layer's output; a :class:`LastLayer` computes it at the selected columns only.

        hidden_states   [s/cp (/t), r, h]
        attention_mask  [2, k] int64, in host memory: segments of a row of trees; None for causal rows
        context         [q] int64, in host memory: columns that the last layer computes, as ascending indices into this
                        rank's share; with sequence parallelism, q is a multiple of t. None: all columns. We use this
                        argument because Megatron passes it unchanged to every layer
        rotary_pos_emb  [kinds, 2, s/cp, w/2]  cosines and sines, from :class:`~dpo_engine.model.rotary.Rotary`
        context_mask    [2b, 3, e] fp64, the tokens at which router losses are computed, from
                        :func:`~dpo_engine.model.router_losses.response_tokens`; None: no losses are computed

        Returns  [s/cp (/t), r, h], or [q (/t), r, h] if columns are selected; and ``context``

        *Collectives* over tp: those of the linear layers, of their adapters, and of norms of all heads together. Over
        cp: those of core attention. If tp ranks share key heads, also an all-gather of the projected queries, keys and
        values over tp, and a reduce-scatter of their gradients. With latent attention, also the exchange of the keys'
        rotary part over tp. If columns are selected and sequence parallelism is on, also two all-gathers over tp: of
        ``hidden_states``, and of the gradient of the selected columns. With experts, also all-to-alls of tokens over
        ep, and the router's collectives. If experts are sharded, also gathers and reduce-scatters over expt_tp.
        """
        if self.graphs is not None and self.graphs.slot is not None:
            return self._replayed(self.graphs, hidden_states, attention_mask, rotary_pos_emb), context
        columns = context if self.last else None
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attention(normed, attention_mask, rotary_pos_emb=rotary_pos_emb, columns=columns)
        before = self._selected(hidden_states, columns)
        # Normalizing the selected columns again is cheaper than gathering them.
        shared = normed if columns is None or self.arch.parallel != "one norm" else self.input_layernorm(before)
        if context_mask is not None and columns is not None:
            context_mask = within(context_mask, indices_on(hidden_states.device, columns))
        return self._rest(before, _with_bias(*attended), shared, context_mask), context

    def _replayed(self, graphs: ChunkGraphs, hidden: Tensor, segments: Tensor, tables: Tensor) -> Tensor:
        """Compute the layer's output. Everything except core attention is a replay of recorded work."""
        graphs.await_weights(self)
        slot, parameters, number = graphs.slot, [*self.parameters()], self.layer_number
        given = {f"hidden states of layer {number}": hidden}
        found = slot.run(f"before attention {number}", self._before, given | {"rotary tables": tables}, parameters)
        given[f"attention's output of layer {number}"] = self.self_attention.attend(*found[:3], segments)
        given |= {f"normalized hidden states of layer {number}": normed for normed in found[3:]}
        return slot.run(f"after attention {number}", self._after, given, parameters)[0]

    def _before(self, hidden: Tensor, tables: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values and, if the MLP has the same input as attention, this input."""
        normed = self.input_layernorm(hidden)
        heads = self.self_attention.heads(normed, tables)
        return (*heads, normed) if self.arch.parallel == "one norm" else heads

    def _after(self, hidden: Tensor, attended: Tensor, normed: Tensor | None = None) -> tuple[Tensor]:
        return (self._rest(hidden, _with_bias(*self.self_attention.linear_proj(attended)), normed),)

    def _rest(self, before: Tensor, out: Tensor, normed: Tensor | None, entries: Tensor | None = None) -> Tensor:
        """Return the layer's output.

        before   the hidden states before the layer
        out      the output of attention
        normed   input of attention; read only if the MLP has the same input
        entries  tokens at which router losses are computed, as for :meth:`forward`
        """
        arch = self.arch
        hidden = before + self._scaled(self.post_attention_layernorm(out) if arch.post_norms else out)
        if arch.parallel == "one norm":
            into = normed
        else:
            into = self.pre_mlp_layernorm(before if arch.parallel else hidden)
        args = (into, entries)
        out = checkpoint(self._mlp_again, False, *args) if self.recompute_mlp else self._mlp(*args)
        return hidden + self._scaled(self.post_mlp_layernorm(out) if arch.post_norms else out)

    def _mlp_again(self, hidden: Tensor, entries: Tensor | None = None) -> Tensor:
        # The block turns on FP8 only during its forward pass, but the MLP is computed again during the backward pass.
        with get_fp8_context(self.config, self.layer_number - 1):
            return self._mlp(hidden, entries)

    def _mlp(self, hidden: Tensor, entries: Tensor | None = None) -> Tensor:
        if isinstance(self.mlp, MoELayer):
            self.mlp.router.entries = entries
            return self.mlp(hidden)[0]
        inside = _with_bias(*self.mlp.linear_fc1(hidden))
        return _with_bias(*self.mlp.linear_fc2(self._activated(inside)))

    def _activated(self, inside: Tensor) -> Tensor:
        name = self.arch.activation
        if not self.arch.gated:
            return ACTIVATIONS[name](inside)
        if name in GATES:
            return gated(inside, name)
        gate, up = inside.chunk(2, dim=-1)
        return ACTIVATIONS[name](gate) * up

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.arch.residual_scale == 1.0 else out * self.arch.residual_scale

    def _selected(self, hidden_states: Tensor, columns: Tensor | None) -> Tensor:
        if columns is None:
            return hidden_states
        columns = indices_on(hidden_states.device, columns)
        if not self.config.sequence_parallel:
            return hidden_states[columns]
        tp = self.pg_collection.tp
        whole = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False, group=tp)
        return scatter_to_sequence_parallel_region(whole[columns], group=tp)


class LastLayer(Layer):
    """The model's last layer for rows of trees. It computes its output for selected columns only.

    In a prompt, for example, only the output of the last column is used. This output predicts the first token of each
    response. Queries, keys and values are projected for all columns. Core attention, the output projection and the MLP
    run for the selected columns only. The number of these columns varies, so this layer never uses the communication
    buffers of ``tp_comm_overlap``, whose size is fixed.
    """

    last = True

    def __init__(self, config: Any, *positional: Any, **megatron: Any):
        if config.tp_comm_overlap:
            config = copy.copy(config)
            config.tp_comm_overlap = False
        super().__init__(config, *positional, **megatron)


def _with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias
