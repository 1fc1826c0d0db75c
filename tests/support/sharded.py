"""Load a checkpoint into a sharded model, and save the model again."""

from typing import Any

import torch

from dpo_engine.testing.sharded import open_model, whole_logits


def round_trip(directory, layout: dict[str, Any], tokens=None, export=None, dtype: str = "fp32", **options):
    """Load the checkpoint in ``directory``. If ``export`` is given, save the model to the directory ``export``.

    The option ``arch_directory`` is the directory whose config.json describes the model; the default is ``directory``.
    All other ``options`` are passed to `save_hf`.

    Tests call this function on each rank. It returns the logits of ``tokens`` on the ranks that have logits, and None
    on the other ranks. Without ``tokens``, it returns None on all ranks.

    If loading or saving raises an `EngineError`, return the error's problems instead.
    """
    from dpo_engine.errors import EngineError
    from dpo_engine.model.weights.load import load_hf
    from dpo_engine.model.weights.save import save_hf

    arch_directory = options.pop("arch_directory", None)
    chunks, arch, groups = open_model(directory, layout, dtype, arch_directory)
    try:
        load_hf(chunks, arch, directory, groups=groups)
        with torch.no_grad():
            logits = None if tokens is None else whole_logits(chunks, tokens, groups)
        if export is not None:
            save_hf(chunks, arch, export, groups=groups, **{"source": directory, **options})
    except EngineError as error:
        return error.problems
    return None if logits is None else logits[..., : arch.vocab_size].float()
