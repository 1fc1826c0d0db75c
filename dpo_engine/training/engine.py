"""Build one rank's platform, process groups, models, objective, and micro-batches from the configuration."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from dpo_engine.batching.batches import Batch
from dpo_engine.batching.micro_batches import fixed_rows, is_settled, share_batches, tree_plan, visible_share
from dpo_engine.batching.packing import CostModel
from dpo_engine.config.run import Config, import_plugins
from dpo_engine.data.dataset import PairDataset
from dpo_engine.data.hub import commits, model_directory
from dpo_engine.errors import ConfigError, Interrupted
from dpo_engine.faults import arm, reach, say_unmet
from dpo_engine.model.adaptation import Adaptation, adapter_lines, adapter_shapes, layer_of
from dpo_engine.model.architecture import Architecture, read_architecture
from dpo_engine.model.attention import attention_options
from dpo_engine.model.batch_size import settle_batches
from dpo_engine.model.cuda_graphs import attach_graphs, close_graphs
from dpo_engine.model.kernels import choose_kernels, require_effect, trees_are_slow
from dpo_engine.model.megatron_options import megatron_problems, optimizer_instances
from dpo_engine.model.policy import Policy, build_chunks, transformer_config
from dpo_engine.model.router_losses import set_router_losses
from dpo_engine.model.sizes import score_size
from dpo_engine.model.spec import choose_layers, describe_layers
from dpo_engine.model.stages import parallel_dims
from dpo_engine.model.tp_overlap import close_buffers, layer_options
from dpo_engine.model.weights.freeze import freeze, freeze_problems, frozen_lines, frozen_patterns, router_problems
from dpo_engine.model.weights.load import load_hf, weights_digest
from dpo_engine.model.weights.peft import adaptation_of, adapter_digest, adapter_facts, adapter_problems, other_base
from dpo_engine.objective.losses import LOSSES
from dpo_engine.optim.optimizer import Trained, build_optimizer, wrap_policy
from dpo_engine.optim.optimizers import optimizer_problems
from dpo_engine.optim.schedules import schedule_problems
from dpo_engine.platform.arrival import await_key, preparing, release
from dpo_engine.platform.device import Platform, describe_stack, device_memory, open_platform
from dpo_engine.platform.launcher import world_from_environment
from dpo_engine.platform.parallel import ParallelGroups, close_groups, open_groups
from dpo_engine.platform.progress_line import choose_progress
from dpo_engine.scoring.logps import kernels_in_use
from dpo_engine.training.adapting import adapt
from dpo_engine.training.metrics import source_names
from dpo_engine.training.objective import BatchFacts, Objective
from dpo_engine.training.rank_guard import compare_at_rendezvous, rank_facts
from dpo_engine.training.run_data import with_template_date


@dataclass
class Engine:
    """One rank's platform, process groups, architecture, and objective.

    The data and the training loop are in :class:`~dpo_engine.training.trainer.Trainer`.
    """

    config: Config
    platform: Platform
    groups: ParallelGroups
    arch: Architecture
    dtype: torch.dtype  # dtype of weights and activations
    spec: str  # layer implementation: native or te (Transformer Engine)
    objective: Objective
    adaptation: Adaptation | None  # the adapters that are trained; None: weights of the model are trained
    start: str | None  # digest of the adapter at adapter.path, equal on all ranks; None: no such adapter
    rank_facts: dict[str, dict[str, str]]  # settings and versions that must be equal on all ranks; see rank_guard
    row_tokens: int | None = None  # fixed length of rows in layout ``tree``, from settle_batches; None: lengths vary

    @classmethod
    def open(cls, config: Config, *, fp64: bool = False) -> "Engine":
        """Read the architecture and create the process groups. Load no weights.

        fp64  whether to compute in fp64 instead of ``model.dtype``; of the commands, only ``parity`` uses this

        Raises :class:`~dpo_engine.errors.ConfigError`, before any process group exists, if a setting does not fit the
        model, the layout or the machine, or if settings differ between ranks.
        """
        if problems := import_plugins(config.plugins):
            raise ConfigError(problems)
        rank, world = world_from_environment()
        arm(rank, world)
        models = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer}
        models |= {"adapter.path": config.adapter.path} if config.adapter else {}
        parallel, loss, entropy = config.parallel, config.loss, config.logging.entropy
        with preparing(parallel.timeout_s):
            for key, path in (models | {"reference.path": config.reference.path}).items():
                if path is not None:  # a download must not begin later, while other ranks wait in a collective
                    model_directory(path, key)
            arch, adapter = read_architecture(config.model.path), config.adapter
            unfit = adapter_problems(adapter, arch, parallel.tp)
            start = adapter_digest(adapter.path) if adapter and adapter.path and not unfit else None
        problems = [*schedule_problems(config), *optimizer_problems(config), *megatron_problems(config), *unfit]
        if fp64 and parallel.distributed_optimizer:
            problems.append("parallel.distributed_optimizer=true: does not support fp64; set it to false")
        if problems := problems + router_problems(config, arch) + freeze_problems(config.optim.freeze, arch):
            raise ConfigError(problems)
        adaptation = adaptation_of(adapter, arch) if adapter else None
        dims = parallel_dims(config, arch, world)
        platform = open_platform(deterministic=config.train.deterministic, own_stream=config.model.cuda_graphs)
        dtype = torch.float64 if fp64 else platform.dtype(config.model.dtype)
        kernels, flash = {"attention": config.model.attention, "head": config.model.head}, config.model.flash_attention
        spec = choose_layers(config, arch, dims, platform, dtype)
        needs = attention_options(arch, config.data.max_length)
        choose_kernels(kernels, arch, platform, dtype, needs, tp=dims.tp, cp=dims.cp, spec=spec, flash=flash)
        if fp64 and "triton" in kernels_in_use():
            raise ConfigError(
                "kernels=triton: sums in fp32, but --fp64 requires fp64; set model.attention=sdpa and model.head=eager"
            )
        objective = Objective(LOSSES[loss.name], loss.options, **loss.token_weighting, entropy=entropy)
        facts = rank_facts(config, arch, platform, spec)
        facts["model"] |= adapter_facts(adaptation, start)
        reach("rendezvous")
        groups = open_groups(
            dims,
            platform,
            seed=config.train.seed,
            timeout_s=parallel.timeout_s,
            instances=optimizer_instances(config, dims),
            compare=lambda store, progress: compare_at_rendezvous(
                store, rank, world, facts, partial(await_key, store, timeout_s=parallel.timeout_s, progress=progress)
            ),
        )
        release()
        choose_progress(config.logging.progress)
        config = with_template_date(config, groups.world)
        return cls(config, platform, groups, arch, dtype, spec, objective, adaptation, start, facts)

    def close(self) -> None:
        """Leave the process groups."""
        reach("shutdown")
        close_graphs()
        if isinstance(sys.exc_info()[1], Interrupted | None):
            say_unmet()
            # Closing waits for kernels. After an exception other than Interrupted, these may wait for a failed rank.
            close_buffers()
        close_groups()

    @property
    def sequence_parallel(self) -> bool:
        """Whether sequence parallelism shards the activations outside the tensor-parallel regions."""
        asked = self.config.parallel.sequence_parallel
        return self.groups.dims.tp > 1 if asked == "auto" else asked

    def describe(self) -> list[str]:
        """Return log lines: versions, layout, kernels, loss, reference, model, frozen weights, adapter, Hub commits."""
        dims, loss, flash = self.groups.dims, self.config.loss, self.config.model.flash_attention
        return [
            *describe_stack(self.platform),
            f"layout: {dims.describe(experts=self.arch.experts is not None)}; sequence parallelism "
            f"{'on' if self.sequence_parallel else 'off'}",
            f"kernels: {kernels_in_use()}" + (f", FlashAttention {flash}" if flash != 2 else ""),
            f"loss: {loss.name}, {loss.settings | self.objective.options}; {self._reference_line()}",
            f"model: {self.arch.model_type}, {self.arch.num_layers} layers, "
            + describe_layers(self.config, self.arch, self.spec, self.dtype_name),
            *frozen_lines(frozen_patterns(self.config, self.arch), self.arch),
            *adapter_lines(self.config.adapter, self.adaptation, self.arch),
            *(f"warning: {line}" for line in other_base(self.config.adapter, self.config.model.path)),
            *commits(),
        ]

    @property
    def dtype_name(self) -> str:
        """Name of the dtype: ``float32``, ``bfloat16`` or ``float64``."""
        return str(self.dtype).removeprefix("torch.")

    def _reference_line(self) -> str:
        if not self.objective.facts.needs_reference:
            return "reference: not needed"
        own = self.config.reference_mode == "dataset"
        return f"reference: {self.config.reference_mode}" + ("" if own else f", {self.config.reference_name}")

    def load_model(self, path: str, *, key: str = "model.path", recompute: str = "none") -> list[Policy]:
        """Load this rank's model chunks from the Hugging Face checkpoint at ``path``, in the run's dtype.

        key        configuration key that error messages name
        recompute  which activations to recompute in the backward pass, as in ``model.recompute``

        The checkpoint must have the policy's architecture. *Collectives* and errors: those of
        :func:`~dpo_engine.model.tp_overlap.layer_options` and of :func:`~dpo_engine.model.weights.load.load_hf`.
        """
        where: dict[str, Any] = {"groups": self.groups, "platform": self.platform, "spec": self.spec}
        config = transformer_config(
            self.arch,
            **where,
            dtype=self.dtype,
            sequence_parallel=self.sequence_parallel,
            recompute=recompute,
            options=layer_options(self.config, self.arch, self.groups.dims, self.groups.world, self.row_tokens),
        )
        chunks = build_chunks(
            self.arch,
            config,
            **where,
            trees=self.config.batch.layout == "tree",
            adapted=self.adaptation is not None,
        )
        load_hf(chunks, self.arch, path, groups=self.groups, key=key)
        return chunks

    @cached_property
    def omits_gradients(self) -> bool:
        """Whether a step computes no gradients in the first layers, because these layers have no adapters."""
        adapted = adapter_shapes(self.adaptation, self.arch) if self.adaptation else {}
        return bool(adapted) and min(map(layer_of, adapted)) > 0

    def load_start(self, *, recompute: str = "none") -> list[Policy]:
        """Load the initial policy. If the run trains adapters, attach new ones or those at ``adapter.path``."""
        chunks = self.load_model(self.config.model.path, recompute=recompute)
        if self.adaptation:
            dtype = torch.promote_types(self.dtype, torch.float32)
            adapt(chunks, self.config, self.adaptation, self.arch, self.groups, dtype=dtype)
        return chunks

    def load_reference(self) -> list[Policy]:
        """Load the reference model. If the reference includes the run's initial adapter, load this adapter, too."""
        if self.config.reference_has_adapter:
            return self.load_start()
        return self.load_model(self.config.reference_path, key=self.reference_key)

    def load_policy(self, *, total_steps: int) -> Trained:
        """Load the trainable policy, and create its optimizer and learning rate schedule at step 0."""
        chunks = self.load_start(recompute=self.config.model.recompute)
        freeze(chunks, self.arch, frozen_patterns(self.config, self.arch), self.groups)
        attach_graphs(chunks, self.config)
        set_router_losses(chunks, self.arch.experts, balance=self.config.loss.balance, z=self.config.loss.router_z)
        asked = self.config.optim.gradients if self.dtype is torch.bfloat16 else "fp32"
        parallel, options = self.config.parallel, self.config.megatron.ddp
        wrapped = wrap_policy(chunks, groups=self.groups, parallel=parallel, gradients=asked, options=options)
        return build_optimizer(wrapped, self.config.optim, parallel=parallel, total_steps=total_steps)

    def load_weights(self, chunks: Sequence[torch.nn.Module], path: str, *, key: str) -> None:
        """Load the weights of the Hugging Face checkpoint at ``path`` into ``chunks``, which can be DDP-wrapped."""
        load_hf([getattr(chunk, "module", chunk) for chunk in chunks], self.arch, path, groups=self.groups, key=key)

    @property
    def reference_key(self) -> str:
        """The configuration key that contains the path of the reference."""
        return "reference.path" if self.config.reference.path else "model.path"

    @property
    def same_weights(self) -> bool:
        """Whether policy and reference start as the same model, according to their paths; weights are not compared."""
        if self.config.adapter and self.config.adapter.path and not self.config.reference_has_adapter:
            return False
        reference = model_directory(self.config.reference_path, self.reference_key)
        return reference.resolve() == model_directory(self.config.model.path).resolve()

    @cached_property
    def reference_digest(self) -> str:
        """Digest of the reference's weights, independent of the path that they are loaded from.

        *Collectives*, on first use: those of :func:`~dpo_engine.model.weights.load.weights_digest`.
        """
        path = self.config.reference.path
        if path is None:
            weights = self.base_digest
        else:
            weights = weights_digest(self.arch, path, groups=self.groups, key="reference.path")
        if self.config.reference_has_adapter:
            weights = hashlib.sha256(f"{weights} {self.start}".encode()).hexdigest()[:32]
        return weights

    @cached_property
    def base_digest(self) -> str:
        """Digest of the weights at ``model.path``.

        *Collectives*, on first use: those of :func:`~dpo_engine.model.weights.load.weights_digest`.
        """
        return weights_digest(self.arch, self.config.model.path, groups=self.groups, key="model.path")

    @cached_property
    def adapter_identity(self) -> dict[str, Any] | None:
        """The adapters' settings, and digests of the base weights and of the adapter that the run starts from.

        None without adapters.

        *Collectives*, on first use: those of :func:`~dpo_engine.model.weights.load.weights_digest`.
        """
        if self.adaptation is None:
            return None
        return {**self.adaptation.facts, "base": self.base_digest, "start": self.start}

    @cached_property
    def cost(self) -> CostModel:
        """The cost model of a forward pass over rows of trees (a tree is a prompt with its responses)."""
        names = ("matrix_parameters", "num_layers", "num_attention_heads", "hidden_size", "vocab_size")
        head_dim = score_size(self.arch) // self.arch.num_attention_heads
        windows = [window for window in self.arch.windows if window and window < self.config.data.max_length]
        sizes = {name: getattr(self.arch, name) for name in names}
        return CostModel.of_decoder(**sizes, head_dim=head_dim, windows=windows)

    def settle_batches(self, pairs: PairDataset, others: Sequence[PairDataset] = ()) -> list[str]:
        """Choose the batch layout and the size of micro-batches for these pairs. Call this before building a model.

        Only this method replaces ``auto`` in the section ``batch`` of ``config``.

        others   further pairs that will be scored; they matter only if all rows have one fixed size
        Returns  lines for the log. Raises `ConfigError` if a kernel is selected that the layout does not use.

        *Collectives*: on a GPU, one MIN over world, so that all ranks choose the same size.
        """
        dims = self.groups.dims
        self.config, lines = settle_batches(
            *(self.config, self.arch, dims, pairs),
            dtype={torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype],
            device_memory=device_memory(self.platform, self.groups.world),
            slow_trees=trees_are_slow(self.platform),
        )
        require_effect(self.config.model, self.arch, self.spec, self.layout)
        self.row_tokens, fixed = fixed_rows(self.config, dims, self.sequence_parallel, pairs, others)
        lines += fixed
        if self.layout == "tree":
            plan = tree_plan(self.config, pairs, self.cost, self.row_tokens)
            lines[0] += f"; attention density {visible_share(self.config, pairs, dims.dp):.1%}; plan {plan}"
        return lines

    @property
    def layout(self) -> str:
        """Batch layout: ``stacked`` or ``tree``; can be ``auto`` before :meth:`settle_batches`."""
        return self.config.batch.layout

    def batches(self, dataset: PairDataset, indices: np.ndarray) -> list[Batch]:
        """Return the micro-batches of :meth:`host_batches`, copied to the device."""
        return [batch.to(self.platform.device) for batch in self.host_batches(dataset, indices)]

    def host_batches(self, dataset: PairDataset, indices: np.ndarray) -> list[Batch]:
        """Return this rank's micro-batches for the global batch that consists of the pairs ``indices``, in host memory.

        For each pair of this data-parallel rank, the micro-batches contain the tokens of this context-parallel rank.
        Losses and metrics do not depend on how pairs are grouped into micro-batches, or on the order of pairs in the
        global batch. This method does not communicate, and is safe to call on another thread.

        Raises `RuntimeError` if :meth:`settle_batches` must still choose the layout or the size of micro-batches.
        """
        if not is_settled(self.config):
            raise RuntimeError("Engine.host_batches: call Engine.settle_batches first, before a model is built")
        ranks, split = (self.groups.dp.rank(), self.groups.cp.rank()), self.sequence_parallel
        given = (self.config, self.groups.dims, *ranks, split, self.cost, self.row_tokens)
        return share_batches(dataset, indices, *given)


def batch_facts(dataset: PairDataset, indices: np.ndarray) -> BatchFacts:
    """Return the :class:`BatchFacts` of the global batch that consists of the pairs ``indices``."""
    weights = dataset.weights[indices].astype(np.float32).astype(np.float64)  # rounded to fp32, as in a batch
    mean_chosen_tokens = float(weights @ dataset.scored[indices, 0] / weights.sum())
    return BatchFacts(float(weights.sum()), mean_chosen_tokens, source_names(dataset.sources))
