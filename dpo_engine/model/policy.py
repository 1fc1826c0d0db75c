"""The model: each rank's shard of Megatron's GPTModel, with a forward pass that takes explicit token positions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from dpo_engine.model.architecture import Architecture
from dpo_engine.model.attention import indices_on
from dpo_engine.model.cuda_graphs import ChunkGraphs
from dpo_engine.model.rotary import Rotary
from dpo_engine.model.spec import stage_spec
from dpo_engine.platform.device import Platform, gradient_fusion
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.platform.parallel import ParallelGroups


@dataclass
class LayerConfig(TransformerConfig):
    """Megatron's configuration, from which the engine's modules also get the architecture."""

    arch: Any = None


class Policy(GPTModel):
    """One model chunk on one rank. Policy and reference are both instances of this class."""

    def __init__(self, arch: Architecture, *, device: torch.device, **megatron: Any):
        super().__init__(position_embedding_type="learned_absolute" if arch.learned_positions else "none", **megatron)
        dtype = self.config.params_dtype
        if arch.learned_positions and self.pre_process:
            self.embedding.position_embeddings.to(dtype)  # Megatron builds this table in fp32
        self.learned_positions = arch.learned_positions
        self.rotary = Rotary(arch, device, dtype)
        # As in transformers, this factor is rounded to the dtype of the embeddings.
        self.embedding_scale = torch.tensor(arch.embedding_scale, dtype=dtype).item()
        self.logit_scale = arch.logit_scale
        # DDP waits for gathered parameters in a hook that runs before a module's forward(). The output layer's
        # forward() is never called, so `head` must wait explicitly.
        self.await_head: Callable[[], None] = lambda: None
        # Whether some weights are frozen. If the embedding is among them, its output does not require a gradient.
        self.frozen_input = False
        self.graphs: ChunkGraphs | None = None  # recordings of the layers' work, if there are any
        self.adapted = False  # whether all weights are frozen, and adapters are trained instead

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        segments: Tensor | None,
        columns: Tensor | None,
        sites: Tensor,
        entries: Tensor | None = None,
    ) -> Tensor:
        """Compute the hidden states of this chunk; on the last stage, only the hidden states at the scored sites.

        A column is an index on the last axis of ``tokens``. A row of trees contains prompts, each followed by its
        responses.

        tokens     [r, s/cp]  int64; read on the first stage only
        positions  [s/cp]     int64, position of each column
        segments   [2, k]     int64, in host memory: lengths and parents of the segments in a row of trees; None:
                              causal rows
        columns    [q]        int64, in host memory: columns for which the last layer computes outputs; None: all
        sites      [m]        int64, scored sites: indices into the flattened ``[s/cp, r]``; read on the last stage only
        entries    [2b, 3, e] fp64, tokens at which router losses are computed, from
                              :func:`~dpo_engine.model.router_losses.response_tokens`; None: no router losses

        Returns  last stage: [m, h], the same on all tp ranks. In the backward pass, each tp rank computes a part of the
                 gradient, and the parts are summed.
                 Other stages: [s/cp (/t), r, h]

        *Collectives*: those of the layers (see :meth:`~dpo_engine.model.layer.Layer.forward`). On the first stage, also
        those of Megatron's embedding over tp. On the last stage, also a sum of the gradient over tp or, with sequence
        parallelism, an all-gather and a reduce-scatter.
        """
        places = positions.expand(tokens.shape) if self.pre_process and self.learned_positions else None
        hidden = self.embedding(input_ids=tokens, position_ids=places) if self.pre_process else None
        if self.pre_process and self.embedding_scale != 1.0:
            hidden = hidden * self.embedding_scale
        if self.frozen_input and self.pre_process and torch.is_grad_enabled() and not hidden.requires_grad:
            # Megatron's checkpointed layers need an input that requires a gradient. Otherwise, recomputed layers above
            # a frozen embedding would silently get no gradients. In addition, the backward pass of the first pipeline
            # stage needs an output that requires a gradient.
            hidden.requires_grad_(self.needs_input_gradient)
        if self.graphs is not None:
            self.graphs.begin_forward()
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=segments,
            context=columns,
            context_mask=entries,
            rotary_pos_emb=self.rotary(positions),
        )
        if self.graphs is not None:
            self.graphs.end_forward()
        if not self.post_process:
            return hidden
        if columns is not None:
            sites = torch.searchsorted(indices_on(sites.device, columns), sites)
        tp = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp)
            return self._scaled(hidden.flatten(0, 1)[sites])
        return copy_to_tensor_model_parallel_region(self._scaled(hidden.flatten(0, 1)[sites]), group=tp)

    def _scaled(self, hidden: Tensor) -> Tensor:
        """Scale the hidden states. This also scales the logits, which are linear in them."""
        return hidden if self.logit_scale == 1.0 else hidden * self.logit_scale

    @property
    def needs_input_gradient(self) -> bool:
        """Whether the embedding's output must require a gradient, even if the embedding is frozen."""
        return self.config.recompute_granularity is not None or self.config.pipeline_model_parallel_size > 1

    @property
    def head(self) -> Tensor:
        """Weight of the output layer [v/t, h], on the last stage only; with tied embeddings, the embedding's weight.

        *Collectives*: if the all-gather of parameters over dp_cp overlaps with the forward pass, this property waits
        until the weight has arrived.
        """
        self.await_head()
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def await_weights(chunks: Sequence[torch.nn.Module]) -> None:
    """Wait until this rank has all weights of the last optimizer update.

    Forward passes wait by themselves. Call this function before other code reads or replaces the weights.

    *Collectives*: the unfinished part of the all-gather of parameters over dp_cp (for experts, over expt_dp), if it
    overlaps with the forward pass.
    """
    for chunk in chunks:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            chunk.start_param_sync(force_sync=True)


def leave_uninitialized(weight: Tensor) -> Tensor:
    """Leave a weight uninitialized, because every weight is read from a checkpoint.

    Megatron calls this function as its init method. Megatron's initialization cannot be turned off, because it also
    sets attributes of tensor-parallel parameters. The gradient norm depends on these attributes.
    """
    return weight


def transformer_config(
    arch: Architecture,
    *,
    groups: ParallelGroups,
    platform: Platform,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: str = "none",
    spec: str = "native",
    options: Mapping[str, Any] = MappingProxyType({}),
) -> TransformerConfig:
    """Build Megatron's configuration for ``arch`` in this run's layout.

    ``calculate_per_token_loss`` is set so that neither the schedules nor DDP rescale the loss or the gradients. Our
    training step divides the loss by the sum of the weights of all pairs of the global batch, and gradients are summed
    over ranks.

    options   further fields of the configuration, from the section ``megatron.transformer``
    """
    dims = groups.dims
    recompute_options: dict[str, Any] = {
        "none": {},
        # The MLP keeps over half of a layer's activations. Recomputing the MLP increases the work of the matrix
        # products by about a quarter.
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[recompute]
    if recompute == "none":
        options = {name: value for name, value in options.items() if not name.startswith("recompute_")}
    ours: dict[str, Any] = dict(
        arch=arch,
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_hidden_size,
        layernorm_epsilon=arch.norm_eps,
        normalization={"layer": "LayerNorm"}.get(arch.norm, "RMSNorm"),
        gated_linear_unit=arch.gated,
        activation_func=F.silu,
        add_bias_linear=arch.mlp_bias,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norms,
        softmax_scale=arch.attention_scale,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=leave_uninitialized,
        output_layer_init_method=leave_uninitialized,
        embedding_init_method=leave_uninitialized,
        tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp,
        virtual_pipeline_model_parallel_size=dims.vpp,
        pipeline_model_parallel_layout=_layer_layout(dims),
        context_parallel_size=dims.cp,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # With interleaving over two stages, two batched sends between the same two ranks can be matched to the wrong
        # receives. Interleaved schedules therefore issue sends one by one.
        batch_p2p_comm=dims.vpp is None,
        batch_p2p_sync=False,  # Megatron's wait after each exchange works around a race in old versions of torch
        overlap_p2p_comm=dims.vpp is not None,
        # Interleaved schedules do not exchange tensor shapes, so all micro-batches of a step are padded to one length.
        variable_seq_lengths=dims.pp > 1 and dims.vpp is None,
        # Megatron's default requires equal numbers of tokens on all ranks, and rejects lengths that vary.
        moe_token_dispatcher_type="alltoall",
        # Free a stage's output after sending it. This is safe only with NCCL; gloo may still be reading the memory.
        deallocate_pipeline_outputs=platform.gpu,
        calculate_per_token_loss=True,
        # There is no fused kernel for fp64.
        gradient_accumulation_fusion=gradient_fusion(platform) and dtype is not torch.float64,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **(_mixture_options(arch, dims, grouped=spec == "te") if arch.experts else {}),
        **recompute_options,
    )
    return LayerConfig(**{**ours, **options})


def _layer_layout(dims: ParallelDims) -> list[list[str]] | None:
    """Return the layers of each model chunk in Megatron's format, or None if the chunks have equally many layers."""
    if dims.layers is None:
        return None
    layout = [["decoder"] * count for count in dims.layers]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def _mixture_options(arch: Architecture, dims: ParallelDims, *, grouped: bool) -> dict[str, Any]:
    """Return the fields of Megatron's configuration for experts.

    The experts drop no tokens, so the output of the experts for a token does not depend on other tokens. Megatron's
    losses for load balancing are off.

    grouped  whether the experts of a rank are computed by grouped matrix products, which need Transformer Engine
    """
    experts = arch.experts
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.chosen,
        "moe_router_pre_softmax": True,  # unused, but Megatron rejects the default if a token uses one expert
        "moe_router_load_balancing_type": "none",
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_size,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_layer_freq": [int(layer in experts.layers) for layer in arch.layers()],
        "moe_grouped_gemm": grouped,
        "moe_permute_fusion": grouped,
        "expert_model_parallel_size": dims.ep,
        "expert_tensor_parallel_size": dims.etp,
    }


def build_chunks(
    arch: Architecture,
    config: TransformerConfig,
    *,
    groups: ParallelGroups,
    platform: Platform,
    spec: str,
    trees: bool = False,
    adapted: bool = False,
) -> list[Policy]:
    """Build this rank's model chunks (``vpp`` chunks if ``vpp`` is set, else one) with uninitialized weights.

    spec     ``native`` or ``te``, from :func:`dpo_engine.model.spec.choose_spec`
    trees    whether the model will run rows of trees
    adapted  whether adapters will be attached

    *Collectives*: with tied embeddings and several stages, Megatron sums the two copies of the embedding once, over the
    embedding group.
    """
    dims = groups.dims
    chunks = []
    for index in range(dims.chunks):
        vp_stage = index if dims.vpp else None
        chunk = Policy(
            arch,
            device=platform.device,
            config=config,
            transformer_layer_spec=stage_spec(
                arch,
                spec,
                config,
                vp_stage=vp_stage,
                pp_rank=groups.pp.rank(),
                trees=trees,
                adapted=adapted,
                last=groups.last_stage and index == dims.chunks - 1,
            ),
            vocab_size=dims.padded_vocab(arch.vocab_size),
            max_sequence_length=arch.max_positions,
            pre_process=groups.first_stage and index == 0,
            post_process=groups.last_stage and index == dims.chunks - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            pg_collection=groups.megatron,
            vp_stage=vp_stage,
        )
        mark_experts(chunk)
        chunks.append(chunk.to(platform.device))
    return chunks


def mark_experts(chunk: torch.nn.Module) -> None:
    """Set the attributes that tell Megatron how to reduce experts' gradients and count them in the gradient norm."""
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            # Sum the gradient over the copies of the expert. Megatron-Core 0.16 sums it only if ep > 1, but tp ranks
            # can also hold copies of an expert, each of which gets different tokens.
            parameter.allreduce = False
            # Count the gradient on every tp rank. With Transformer Engine, Megatron-Core 0.16 counts only the experts
            # on the first tp rank. It treats all experts on the other tp ranks as copies, but some of them are
            # different experts, or different shards of an expert.
            parameter.tensor_model_parallel = True
