"""Operations on one rank's tensors: torch and triton only, no process groups, nothing of the engine."""

from dpo_kernels.dispatch import BACKENDS, backend, backend_name, shard_entropies, shard_grad, shard_stats, use_backend

__all__ = ["BACKENDS", "backend", "backend_name", "shard_entropies", "shard_grad", "shard_stats", "use_backend"]
