"""The model's last layer, whose output is computed only at the columns that predict a scored token.

The last layer needs only the keys and values of the other columns.
"""

from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from dpo_engine.model.attention import indices_on


class LastLayer(TransformerLayer):
    """A transformer layer for a row of trees that computes its output for selected columns only.

    In a prompt, for example, only the output of the last column is used, because it predicts the first token of each
    response. The layer projects queries, keys and values for all columns. Core attention, the output projection and the
    MLP run for the selected columns only.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **megatron: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the layer's output at the selected columns.

        hidden_states   [s/cp (/t), 1, h]
        attention_mask  [2, k] int64, in host memory: segments of the row, as in :class:`CoreAttention`
        context         [q] int64, in host memory: selected columns, as ascending indices into this rank's share; with
                        sequence parallelism, q is a multiple of t. We use this argument because Megatron passes it
                        unchanged to every layer

        Returns  [q (/t), 1, h], and ``context``

        *Collectives*: those of any layer; with sequence parallelism, also an all-gather of ``hidden_states`` over tp.
        """
        attention, tp = self.self_attention, self.pg_collection.tp
        columns = indices_on(hidden_states.device, context)
        query, key, value = attention.get_query_key_value_tensors(self.input_layernorm(hidden_states), None)
        query = apply_rotary_pos_emb(query[columns], rotary_pos_emb[columns], config=self.config)
        key = apply_rotary_pos_emb(key, rotary_pos_emb, config=self.config)
        mixed = attention.core_attention(query, key, value, attention_mask, columns=context)
        out, _ = attention.linear_proj(mixed)
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False, group=tp)
            residual = scatter_to_sequence_parallel_region(whole[columns], group=tp)
        else:
            residual = hidden_states[columns]
        hidden = residual + out
        mlp, _ = self.mlp(self.pre_mlp_layernorm(hidden))
        return hidden + mlp, context
