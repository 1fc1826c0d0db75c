"""Replace a rank's inputs that come from other ranks or files, so that one process can act as any rank of any run.

The replaced inputs are the rendezvous, Python objects from other ranks, the few numbers that control a step, the
numbers of tokens for each expert and, optionally, the weights. The engine's computation is not replaced.
"""

from typing import Any

import torch
import torch.distributed as dist

from card import Card

MOST_FLAGS = 16
"""An all-reduce of at most this many numbers reduces flags or counts that the host reads, or the gradient norm."""


class AnyStore(dist.Store):
    """A rendezvous store that behaves as if all other ranks had arrived."""

    def __init__(self, world: int):
        super().__init__()
        self.world = world
        self.values: dict[str, Any] = {}

    def set(self, key: str, value: Any) -> None:
        self.values[key] = value

    def get(self, key: str) -> Any:
        return self.values.get(key, bytes(128))  # NCCL's identifier of a communicator has 128 bytes

    def add(self, key: str, number: int) -> int:
        return self.world

    def wait(self, *keys: Any) -> None:
        pass

    def check(self, keys: Any) -> bool:
        return True

    def delete_key(self, key: str) -> bool:
        return self.values.pop(key, None) is not None

    def compare_set(self, key: str, expected: Any, desired: Any) -> Any:
        self.values[key] = desired
        return desired if isinstance(desired, bytes) else str(desired).encode()

    def num_keys(self) -> int:
        return len(self.values)

    def set_timeout(self, timeout: Any) -> None:
        pass


def replace_peers(card: Card, rank: int, world: int) -> None:
    """Make torch.distributed and the engine's rendezvous work without other ranks. Call this before Engine.open."""
    from dpo_engine.platform import device, parallel
    from dpo_engine.training import engine

    real_group = dist.new_group

    def new_group(ranks: Any = None, *rest: Any, **named: Any) -> Any:
        members = list(range(world)) if ranks is None else list(ranks)
        card.announce_group(members.index(rank) if rank in members else 0, len(members))
        return real_group(ranks, *rest, **named)

    def gather(out: list[Any], value: Any, group: Any = None) -> None:
        out[:] = [value] * len(out)

    dist.new_group = torch.distributed.distributed_c10d.new_group = new_group
    dist.all_gather_object = gather
    dist.broadcast_object_list = lambda *rest, **named: None
    parallel.meet = lambda rank, timeout: AnyStore(world)
    engine.compare_at_rendezvous = lambda *rest, **named: None
    engine.device_memory = lambda *rest: device.gpu_memory()  # all ranks have the same card


def replace_numbers(*, weights: bool = False) -> None:
    """Replace the numbers that control a step, so that every step is accepted.

    Kernels do not run, so the real numbers are arbitrary bits. The host still copies these numbers from the device, and
    waits for them.

    weights   whether the engine reads the weights of a checkpoint, and draws the weights of new adapters
    """
    from dpo_engine.optim import optimizer
    from dpo_engine.training import adapting, engine, metrics, step

    real_norm, real_means, real_reduce = optimizer.gradient_norm, metrics.means, dist.all_reduce
    real_routers = step.router_metrics

    def norm(trained: Any) -> float:
        real_norm(trained)
        return 2.0  # above the default of optim.clip_grad, so that gradients are clipped

    def means(totals: torch.Tensor, *rest: Any) -> dict[str, float]:
        return real_means(torch.zeros_like(totals), *rest)

    def reduce(tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
        work = real_reduce(tensor, *rest, **named)
        if tensor.numel() <= MOST_FLAGS:
            # The null GPU executes this small copy. The copy sets flags to 0. It sets counts, which are in fp64, to 1,
            # because the engine divides by counts.
            value = float(tensor.dtype is torch.float64)
            values = torch.full(tensor.shape, value, dtype=tensor.dtype, pin_memory=True)
            tensor.copy_(values, non_blocking=True)
        return work

    dist.all_reduce = reduce
    if not weights:
        engine.load_hf = lambda *rest, **named: None
        adapting.draw_adapters = lambda *rest, **named: None
    optimizer.gradient_norm = norm
    metrics.means = means
    step.router_metrics = lambda *rest: dict.fromkeys(real_routers(*rest), 0.0)
    _distribute_tokens_equally()


def _distribute_tokens_equally() -> None:
    """Make each rank send the same number of tokens to each expert, up to a difference of 1.

    The host derives the sizes of tensors from these numbers, so arbitrary numbers could stop the run.
    """
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher as Dispatcher

    real = Dispatcher.preprocess

    def preprocess(self: Any, routed: torch.Tensor) -> torch.Tensor:
        received = real(self, routed)
        total, experts = len(routed) * self.config.moe_router_topk, self.num_experts
        sent = torch.full((experts,), total // experts)
        sent[: total % experts] += 1
        own = sent[self.local_expert_indices]  # all ranks send the same numbers

        def replace(counts: torch.Tensor | None, values: torch.Tensor) -> None:
            if counts is not None:
                counts.copy_(
                    values.expand(counts.shape).contiguous().pin_memory(), non_blocking=True
                )  # the null GPU executes this small copy too

        replace(self.input_splits, sent.view(self.ep_size, -1).sum(1))
        replace(self.output_splits, own.sum())
        replace(self.output_splits_tp, own.sum() * self.ep_size)
        replace(self.num_global_tokens_per_local_expert, own)
        replace(received, own * self.tp_size * self.ep_size)
        return received

    Dispatcher.preprocess = preprocess
