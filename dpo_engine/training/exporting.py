"""Export a trained policy as a Hugging Face checkpoint and, if the run trained adapters, also as a PEFT adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dpo_engine.config.run import Config
from dpo_engine.data.hub import model_directory
from dpo_engine.data.tokenizer import Tokenizer
from dpo_engine.errors import EngineError
from dpo_engine.model.policy import await_weights
from dpo_engine.model.weights.adapter_weights import Merge, stage_adapters
from dpo_engine.model.weights.save import save_hf
from dpo_engine.model.weights.save_peft import save_peft
from dpo_engine.optim.optimizer import Trained
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.platform.parallel import together
from dpo_engine.training.engine import Engine
from dpo_engine.training.output_lease import sole_exporter
from dpo_engine.training.run_data import open_tokenizer


def export_policy(
    engine: Engine,
    trained: Trained,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    card: Callable[[str], str] | None = None,
    tokenizer: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the policy as a Hugging Face checkpoint with the run's tokenizer and chat template.

    With adapters, the checkpoint contains the merged weights. The adapters alone are also written, as a PEFT adapter,
    to a directory beside the checkpoint. The directory's name ends with ``_adapter``.

    dtype, card  as for :func:`~dpo_engine.model.weights.save.save_hf`
    tokenizer    digest of the tokenizer and the chat template at the time of training; None: not compared
    say          called with each line for the log. On the first rank, there is a line if the tokenizer or the chat
                 template has changed since training, a line for each property of the tokenizer that the export cannot
                 keep, a line if layers for multi-token prediction are copied unchanged, and a line if the export waits
                 because another export may be running. With adapters, every rank also gets a line about the PEFT
                 adapter

    *Collectives*: those of :func:`~dpo_engine.model.weights.save.save_hf` and
    :func:`~dpo_engine.training.output_lease.sole_exporter`, and two all-gathers of objects over world. With adapters,
    also those of :func:`merge_of`, :func:`save_adapter`, a second ``sole_exporter``, and ``Merge.rounding``.
    """
    await_weights(trained.chunks)
    config, world = engine.config, engine.groups.world

    def read() -> Tokenizer | None:
        if world.rank() != 0:
            return None
        found = open_tokenizer(config)
        if tokenizer not in (None, found.content):
            say(
                "export: the chat template or the tokenizer's files have changed since training; the export "
                "contains the current template and files"
            )
        return found

    def told(line: str) -> None:
        say(f"export: {line}")

    chunks = [chunk.module for chunk in trained.chunks]
    with sole_exporter(directory, world, told):
        merge = merge_of(engine, chunks) if engine.adaptation else None
        save_hf(
            chunks,
            engine.arch,
            directory,
            source=config.model.path,
            groups=engine.groups,
            tokenizer=config.model.tokenizer,
            trained_with=without_time_limit(world, read, Meter("reading the tokenizer")),
            card=card,
            dtype=dtype,
            change=merge,
            adapter=_start(config),
            say=told,
        )
        if merge:
            with sole_exporter(adapter_directory(directory), world, told):
                save_adapter(engine, merge, directory, card)
    if merge:
        told(f"{adapter_directory(directory)} contains the adapter; {merge.rounding(world)}")


def _start(config: Config) -> Path | None:
    """Return the directory of the adapter that the run started from; None if there is none."""
    path = config.adapter and config.adapter.path
    return model_directory(path, "adapter.path") if path else None


def adapter_directory(directory: str | Path) -> Path:
    """Return the directory for the adapter whose merged weights are exported to ``directory``."""
    place = Path(directory).resolve()
    return place.with_name(f"{place.name}_adapter")


def merge_of(engine: Engine, chunks: Sequence[nn.Module]) -> Merge:
    """Return the :class:`Merge` that merges the adapters into the weights of the model.

    *Collectives*: those of :func:`~dpo_engine.model.weights.adapter_weights.stage_adapters`; one all-gather of objects.
    Raises :class:`~dpo_engine.errors.NumbersError` on all ranks if a value of an adapter is not finite.
    """
    failure, tensors = None, {}
    try:
        tensors = stage_adapters(chunks, engine.arch, engine.groups)
    except EngineError as error:
        failure = error

    def agree() -> None:
        if failure is not None:
            raise failure

    together(engine.groups.world, agree)
    return Merge(engine.adaptation, engine.arch, tensors)


def save_adapter(engine: Engine, merge: Merge, directory: str | Path, card: Callable[..., str] | None = None) -> None:
    """Write the adapters as a PEFT adapter beside ``directory``, with the tokenizer that was exported to ``directory``.

    card   from :func:`~dpo_engine.training.model_card.card_writer`; None: no README.md

    *Collectives*: those of :func:`~dpo_engine.model.weights.save_peft.save_peft`.
    """
    config = engine.config
    save_peft(
        merge.tensors,
        engine.adaptation,
        engine.arch,
        adapter_directory(directory),
        base=config.model.path,
        sources=(model_directory(config.model.path), _start(config)),
        groups=engine.groups,
        tokenizer=Path(directory),
        card=None if card is None else partial(card, "AutoTokenizer", adapter=True),
    )
