"""The model's last layer, computed only for the columns that predict a scored token.

The other columns only contribute keys and values.
"""

from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class LastLayer(TransformerLayer):
    """A transformer layer for a row of trees that outputs selected columns only.

    Of a prompt, only the last column's output is used, because it predicts the first token of each response. Queries,
    keys and values are projected for all columns; core attention, the output projection and the MLP run on the selected
    columns.
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
        attention_mask  [2, k] int64, in host memory: the row's segments
        context         [q] int64, in host memory: the selected columns of this rank's share, ascending; with sequence
                        parallelism q is a multiple of t. Megatron passes this argument unchanged to every layer

        Returns  [q (/t), 1, h], and ``context``

        *Collectives*: those of a layer; with sequence parallelism another all-gather of ``hidden_states`` over tp.
        """
        attention, tp = self.self_attention, self.pg_collection.tp
        columns = context.to(hidden_states.device, non_blocking=True)
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
