"""The model's last layer, run on the rows that something is predicted from; the others it needs as keys and values."""

from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class LastLayer(TransformerLayer):
    """A transformer layer for a row of trees that goes on, behind its attention, with some of the columns only.

    Nothing reads what the last layer makes of a prompt but at its end. Keys, values and queries are projected for all
    columns; attention's output, the MLP and the norms run on the chosen ones.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **megatron: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output at the chosen columns.

        hidden_states   [s/cp (/t), 1, h]
        attention_mask  [2, k] int64, in host memory: the row's segments
        context         [q] int64, in host memory: the chosen columns of this rank's share, ascending; q divides by t
                        with sequence parallelism. Megatron hands what stands in this place to every layer

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
