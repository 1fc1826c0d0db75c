"""Open a sharded model and compute its logits. The checks call these functions on each rank."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


def open_model(directory, layout: dict[str, Any], dtype: str = "fp32", arch_directory=None, groups=None):
    """Build this rank's model, with all parameters set to nan; return ``(chunks, architecture, groups)``.

    dtype           "fp32", "bf16" or "fp64"
    arch_directory  directory whose ``config.json`` describes the architecture; None: ``directory``
    groups          process groups of an earlier call with the same layout; None: create them
    """
    from dpo_engine.model.architecture import read_architecture
    from dpo_engine.model.policy import build_chunks, transformer_config
    from dpo_engine.platform.device import open_platform
    from dpo_engine.platform.dims import ParallelDims
    from dpo_engine.platform.parallel import open_groups

    platform = open_platform(deterministic=True)
    arch = read_architecture(arch_directory or directory)
    dims = ParallelDims(**layout, world=dist.get_world_size())
    groups = groups or open_groups(dims, platform, seed=1, timeout_s=60)
    wanted = torch.float64 if dtype == "fp64" else platform.dtype(dtype)
    config = transformer_config(arch, groups=groups, platform=platform, dtype=wanted, sequence_parallel=dims.tp > 1)
    chunks = build_chunks(arch, config, groups=groups, platform=platform, spec="native")
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))  # nan in the results shows that a weight was not loaded
    return chunks, arch, groups


def whole_logits(chunks, tokens: torch.Tensor, groups) -> torch.Tensor | None:
    """Return logits [b, s, v], in sequence order, on the ranks of the last stage, and None on other ranks."""
    from dpo_engine.model.pipeline import logit_softcap, run_pipeline

    cp, rank = groups.cp.size(), groups.cp.rank()
    pieces = torch.arange(tokens.shape[1]).chunk(2 * cp)
    mine = torch.cat([pieces[rank], pieces[2 * cp - 1 - rank]])
    every = SimpleNamespace(sites=torch.arange(len(mine) * len(tokens)))
    rows = {"tokens": tokens[:, mine].contiguous(), "positions": mine, "segments": None, "columns": None}
    batch = SimpleNamespace(**rows, scored=every, index=range(len(tokens)))
    batches = [batch] * (groups.dims.pp if groups.dims.vpp else 1)
    results = run_pipeline(
        chunks, batches, lambda _, __, *ends: (ends[0].new_zeros(()), ends), groups=groups, backward=False
    )
    if not groups.last_stage:
        return None
    hidden, head = (part.detach() for part in results[-1])
    product, cap = hidden @ head.T, logit_softcap(chunks)
    product = product if cap is None else cap * (product / cap).tanh()
    local = product.unflatten(0, (len(mine), -1)).transpose(0, 1).contiguous()  # [b, s/cp, v/t]
    vocab = [torch.empty_like(local) for _ in range(groups.tp.size())]
    dist.all_gather(vocab, local, group=groups.tp)
    full = torch.cat(vocab, dim=-1)
    shares = [torch.empty_like(full) for _ in range(cp)]
    dist.all_gather(shares, full, group=groups.cp)
    order = torch.cat([torch.cat([pieces[r], pieces[2 * cp - 1 - r]]) for r in range(cp)])
    return torch.cat(shares, dim=1)[:, order.argsort()]
