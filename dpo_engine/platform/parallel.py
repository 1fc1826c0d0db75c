"""The process groups of each rank, and functions that all ranks call together."""

import datetime
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from dpo_engine.errors import ConfigError, EngineError, PeerError
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.platform.launcher import master_port, world_from_environment
from dpo_engine.platform.peer_watch import UNANSWERED, Lifeline, lost_rank, open_lifeline

if TYPE_CHECKING:
    from dpo_engine.platform.device import Platform

T = TypeVar("T")

NCCL_AFTER_S = 10.0
"""Extra seconds in NCCL's timeout. NCCL's watchdog aborts the process. The engine's watchdog sets an exit code, so it
must act first."""
_COMMUNICATION = re.compile(r"gloo|nccl|TCPStore|Connection (closed|reset|refused)|Timed out waiting|Broken pipe", re.I)
_TIMEOUT = re.compile(r"timed? ?out", re.I)
_lifeline: Lifeline | None = None


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's process groups, one for each parallel dimension, and the sizes of the dimensions.

    dp     ranks that hold the same shard of the model and work on different pairs
    cp     ranks that each hold a part of every sequence of the same micro-batch
    dp_cp  dp and cp combined: the ranks over which gradients are summed, except the gradients of experts
    ep       ranks that hold different experts of the same layers, and exchange tokens
    expt_tp  ranks that each hold a part of every matrix of the same experts
    expt_dp  ranks that hold the same parts of the same experts; the gradients of experts are summed over these ranks
    """

    dims: ParallelDims
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    ep: dist.ProcessGroup
    expt_tp: dist.ProcessGroup
    expt_dp: dist.ProcessGroup
    world: dist.ProcessGroup
    megatron: Any  # a ProcessGroupCollection, the form in which Megatron's modules take the groups

    def shards(self, expert: bool) -> dist.ProcessGroup:
        """Return the ranks over which matrices are split. ``expert`` says whether these are the matrices of experts."""
        return self.expt_tp if expert else self.tp

    def copies(self, expert: bool) -> dist.ProcessGroup:
        """Return the ranks with the same shard of experts (``expert`` is true) or of all other parameters (false)."""
        return self.expt_dp if expert else self.dp_cp

    @property
    def share_experts(self) -> bool:
        """Whether ranks share experts and may have different pairs. Such ranks must run every forward pass together."""
        return self.ep.size() > 1 or self.expt_tp.size() not in (1, self.tp.size())

    @property
    def waits_for_others(self) -> bool:
        """Whether an error that occurs only on some ranks can leave the other ranks waiting inside the step.

        This applies to pipeline stages, because only the last stage computes the loss. It also applies to ranks that
        share experts and may have different pairs.
        """
        return self.pp.size() > 1 or self.share_experts

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp.rank() == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp.rank() == self.pp.size() - 1


def meet(rank: int, timeout: datetime.timedelta) -> dist.Store:
    """Connect to the key-value store that all ranks share, at ``MASTER_ADDR``/``MASTER_PORT``.

    Torchrun or rank 0 serves the store. The function returns as soon as it has a connection, without waiting for the
    ranks that have not connected yet.
    Raises :class:`ConfigError` if one of the variables is not set or is invalid.
    """
    env = os.environ
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        raise ConfigError(
            f"{missing[0]}: is not set, but the ranks need it to connect; start with torchrun or launch/train.sbatch"
        )
    port = master_port()
    hosted = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        env["MASTER_ADDR"],
        port,
        is_master=rank == 0 and not hosted,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=not hosted,
    )
    # If torchrun restarts the ranks, its store still has the keys of the previous start. In that store, the prefix of
    # the keys therefore contains the number of restarts. A store that rank 0 serves is new at each start. Its prefix
    # must not contain this number, because torchrun may count restarts differently on each node.
    start = env.get("TORCHELASTIC_RESTART_COUNT", "0") if hosted else "0"
    return dist.PrefixStore(f"dpo_engine/start_{start}", store)


def open_groups(
    dims: ParallelDims,
    platform: "Platform",
    *,
    seed: int,
    timeout_s: float,
    instances: int = 1,
    compare: Callable[[dist.Store, Callable[[], None]], None] = lambda store, progress: None,
) -> ParallelGroups:
    """Connect to the other ranks and create all process groups of ``dims``.

    seed        seeds torch and Megatron's tensor-parallel RNG tracker
    compare     function that is called before any group exists, with the shared store and a function that restarts the
                timeout; must raise an error if the ranks cannot run together. Not called if a default group exists
    timeout_s   timeout of every collective operation, and of the initial wait for all ranks, in seconds
    instances   number of instances of the distributed optimizer; must divide dp x cp and expert_dp. The ranks of one
                instance together hold a complete optimizer state

    *Collectives*: the ranks connect at the address in the environment variables ``MASTER_ADDR`` and ``MASTER_PORT``,
    unless a default group already exists. If there are several ranks and ``MASTER_ADDR`` is set, rank 0 then broadcasts
    an object, to open the lifeline. Finally, all groups are created. A single process needs neither variable.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    group_s = timeout_s + (NCCL_AFTER_S if platform.gpu else 0.0)
    timeout = datetime.timedelta(seconds=group_s)
    rank, world = world_from_environment()
    if not dist.is_initialized():
        device = platform.device if platform.gpu else None
        # This watchdog enforces the timeout. If the first rank is lost, torch itself would keep trying to connect, for
        # several times as long as the timeout.
        clock = Lifeline(rank, {}, timeout_s)
        try:
            with clock.working():
                store = dist.HashStore() if world == 1 else meet(rank, timeout)
                compare(store, clock.progress)
                dist.init_process_group(
                    platform.backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device
                )
        finally:
            clock.leave(orderly=True)
    _hold_on(rank, world, timeout_s)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp,
        virtual_pipeline_model_parallel_size=dims.vpp,
        context_parallel_size=dims.cp,
        expert_model_parallel_size=dims.ep,
        expert_tensor_parallel_size=dims.etp,
        num_distributed_optimizer_instances=instances,
        distributed_timeout_minutes=group_s / 60,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return ParallelGroups(
        dims=dims,
        tp=collection.tp,
        pp=collection.pp,
        cp=collection.cp,
        dp=collection.dp,
        dp_cp=collection.dp_cp,
        ep=collection.ep,
        expt_tp=collection.expt_tp,
        expt_dp=collection.expt_dp,
        world=dist.group.WORLD,
        megatron=collection,
    )


def together(group: dist.ProcessGroup, work: Callable[[], T]) -> T:
    """Run ``work`` and return its result. If ``work`` fails on any rank, all ranks raise an error.

    All ranks raise the :class:`EngineError` of the failed rank with the lowest index in ``group``. There are two
    exceptions. If ``work`` raises a communication error on a rank, this rank raises the error at once, because it
    cannot tell the other ranks. If ``work`` raises any other error that is not an :class:`EngineError` on a rank, this
    rank raises the error unchanged, and reports it to the other ranks as a :class:`PeerError`.

    Use this function for work that can fail on only some ranks. Otherwise the remaining ranks would wait in their next
    collective for a rank that has left. A rank that has finished ``work`` waits for the other ranks in a collective, so
    the time limit of collectives also limits ``work``. For work on files, use
    :func:`~dpo_engine.platform.long_work.without_time_limit` instead.

    *Collectives* over ``group``: one all-gather of objects.
    """
    result, failure, bug = None, None, None
    try:
        result = work()
    except EngineError as error:
        failure = error
    except Exception as error:  # a bug; tell the other ranks, which would otherwise wait for this rank
        if communication_error(error):
            raise  # communication is broken, so the other ranks cannot be told
        failure, bug = PeerError(f"rank {group.rank()} died: {type(error).__name__}: {error}"), error
    failures: list[EngineError | None] = [None] * group.size()
    dist.all_gather_object(failures, failure, group=group)
    first = next((error for error in failures if error is not None), None)
    if bug is not None:
        raise bug
    if first is not None:
        raise first
    return result  # type: ignore[return-value]


def _hold_on(rank: int, world: int, timeout_s: float) -> None:
    """Open the lifeline between the ranks. If there are several ranks, but no ``MASTER_ADDR``, open no lifeline."""
    global _lifeline

    def share(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    address = os.environ.get("MASTER_ADDR")
    if world > 1 and address:
        _lifeline = open_lifeline(rank, world, address, share, timeout_s)
    elif world == 1:
        _lifeline = Lifeline(rank, {}, timeout_s)


@contextmanager
def working(*, alone: bool) -> Iterator[None]:
    """Watch this block for hangs: end the process if the time between calls of :func:`progress` exceeds the timeout.

    alone   whether errors that the block raises are known to this rank only; see ``EngineError.alone``
    """
    try:
        with _lifeline.working() if _lifeline else nullcontext():
            yield
    except EngineError as error:
        error.alone = alone
        raise


def progress() -> None:
    """Report progress, which restarts the timeout of :func:`working`."""
    if _lifeline:
        _lifeline.progress()


def communication_error(error: BaseException) -> PeerError | None:
    """Convert an error of torch.distributed, gloo or NCCL to a one-line error. Return ``None`` for any other error."""
    if isinstance(error, EngineError) or not isinstance(error, (dist.DistError, RuntimeError, ConnectionError)):
        return None
    if not isinstance(error, (dist.DistError, ConnectionError)) and not _COMMUNICATION.search(str(error)):
        return None
    if _TIMEOUT.search(str(error)):
        return PeerError(UNANSWERED)
    return PeerError(lost_rank(_lifeline.who() if _lifeline else "another rank"))


def close_groups() -> None:
    """Destroy all process groups and close the lifeline. If none were opened, do nothing.

    If this rank leaves because of a :class:`PeerError`, or because of an error that the other ranks do not raise, it
    closes its connection without a farewell message. The other ranks then treat this rank as lost and stop.
    """
    from megatron.core import parallel_state

    error = sys.exc_info()[1]
    orderly = error is None or (isinstance(error, EngineError) and not (error.alone or isinstance(error, PeerError)))
    if _lifeline:
        if error:
            communication_error(error)  # waits until the lost rank is known, before the lifeline closes
        _lifeline.leave(orderly=orderly)
    if not orderly and dist.is_initialized() and dist.get_backend() == "nccl":
        return  # destroying an NCCL group would wait for the lost ranks
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
