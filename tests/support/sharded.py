"""Load a checkpoint into a sharded model, and save it again; tests call this on each rank."""

from typing import Any

import torch

from dpo_engine.testing.sharded import open_model, whole_logits


def round_trip(directory, layout: dict[str, Any], tokens=None, export=None, dtype: str = "fp32", **options):
    """Load ``directory``. If ``export`` is given, save the model there with ``options``.

    Return the logits of ``tokens`` on ranks that have them, and None on other ranks or if there are no tokens.

    If loading or saving raises an error of the engine, return the problems of the error instead.
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
