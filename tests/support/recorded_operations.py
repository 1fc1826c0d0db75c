"""A stand-in for CUDA graphs on a CPU: it repeats torch's operations on the same memory.

A CUDA graph reuses memory in ways that depend on the allocator. To find every use of memory that is no longer valid,
this stand-in overwrites floating-point numbers with NaN where a GPU could have other values:

- At the end of a recording: in all memory that the recording allocated. A CUDA graph does not run the operations while
  it records them, so this memory has no valid values before a replay.
- After a replay: in all memory that later recordings of the same pool allocated. On a GPU, later recordings can share
  memory with intermediate results of the replayed recording.
- After a replay: in all memory that earlier recordings of the same pool had already freed when the replayed recording
  was made.

Unlike a CUDA graph, the stand-in runs the operations while it records them. If they change tensors that existed before
the recording, the stand-in restores these tensors.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


class Pool:
    """A pool of memory: its recordings, in the order in which they were made."""

    def __init__(self):
        self.recordings = []


class Recorder(TorchDispatchMode):
    """Run operations, and remember them with their tensors.

    operations  each operation with its arguments and its results
    own         a dictionary of the storages that the operations allocated. A key is the address of a storage, and its
                value is a list of this recorder's tensors on the storage
    before      the tensors that existed before the recording and were changed, with their earlier values
    """

    references = Counter()
    """Maps the address of each storage to the number of references that all recorders hold to the storage."""

    def __init__(self):
        super().__init__()
        self.operations, self.own, self.before = [], {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host would wait for the device during the recording")
        if func._schema.is_mutable:
            written = [
                value
                for value, argument in zip(args, func._schema.arguments, strict=False)
                if argument.alias_info and argument.alias_info.is_write
            ]
            for tensor in written:
                if tensor.untyped_storage().data_ptr() not in self.own:
                    self.before.append((tensor.detach(), tensor.detach().clone()))
        result = func(*args, **kwargs)
        if func.namespace == "c10d":
            result = self._waited(result, args)
        given = {one.untyped_storage().data_ptr() for one in tree_flatten((args, kwargs))[0] if torch.is_tensor(one)}
        for one in tree_flatten(result)[0]:
            if torch.is_tensor(one) and (address := one.untyped_storage().data_ptr()) not in given:
                self.own.setdefault(address, [])
        self.operations.append((func, *(self._aliased(part) for part in (args, kwargs, result))))
        return result

    @staticmethod
    def _waited(result, args):
        """Wait for a collective, and return its result.

        Waiting for some collectives starts operations, such as a copy. These operations are not recorded here, but they
        would be recorded if the caller waited for the same collective again. Therefore, the returned result contains
        the handle of a different collective, a broadcast of one number. Waiting for the broadcast starts no operations.
        """
        group = next(one for one in args if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one._type()))
        _, done = torch.ops.c10d.broadcast_([torch.zeros(1)], group, 0, 0)
        return tree_map_only(torch.ScriptObject, lambda work: (work.wait(), done)[1], result)

    def _aliased(self, tree):
        """Replace tensors with tensors on the same memory, so that the originals can be freed."""
        return tree_map_only(torch.Tensor, self._alias, tree)

    def _alias(self, tensor):
        storage = tensor.untyped_storage()
        with torch.utils._python_dispatch._disable_current_modes():
            alias = torch.empty(0, dtype=tensor.dtype).set_(
                storage, tensor.storage_offset(), tensor.size(), tensor.stride()
            )
        Recorder.references[storage.data_ptr()] += 1
        if storage.data_ptr() in self.own:
            self.own[storage.data_ptr()].append(alias)
        return alias


class RecordedOperations:
    """A replacement for :class:`dpo_engine.model.recording.Recording` on a CPU."""

    replays = 0

    def __init__(self, work, pool):
        with Recorder() as recorder:
            self.result = work()
        self.operations, self.own = recorder.operations, recorder.own
        with torch.no_grad():
            for tensor, value in reversed(recorder.before):
                tensor.copy_(value)
        self.invalidate()
        self.freed = [aliases for one in pool.recordings for aliases in one.own.values() if not in_use(aliases)]
        self.later = pool.recordings, len(pool.recordings) + 1
        pool.recordings.append(self)

    @torch.no_grad()
    def replay(self):
        RecordedOperations.replays += 1
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                if torch.is_tensor(old):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)
                elif hasattr(new, "wait"):
                    new.wait()
        recordings, start = self.later
        for one in recordings[start:]:
            one.invalidate()
        for aliases in self.freed:
            fill(aliases)

    @torch.no_grad()
    def invalidate(self):
        for aliases in self.own.values():
            fill(aliases)

    def reset(self):
        self.operations.clear()


def in_use(aliases):
    """Whether anything but recorders refers to this memory."""
    storage = aliases[0].untyped_storage()
    known = Recorder.references[storage.data_ptr()] + 1  # `storage` is one more reference
    return torch._C._storage_Use_Count(storage._cdata) > known


def fill(aliases):
    for alias in aliases:
        if alias.is_floating_point():
            alias.fill_(float("nan"))


def replace_recordings():
    """Make this process use :class:`RecordedOperations` instead of CUDA graphs."""
    from dpo_engine.model import recording

    recording.Recording, recording.new_pool = RecordedOperations, Pool
