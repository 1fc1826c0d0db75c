"""Checks of a model family in the engine or in a plugin: tiny models are compared with transformers.

Each check takes a :class:`~dpo_engine.testing.models.TinyModels` and the name of one of its cases (a case describes one
tiny model). The check raises ``AssertionError`` if the family is wrong. The checks run on CPUs. All checks except
:func:`check_defaults` run on ranks that are forked from this process. A layout maps ``tp``, ``pp``, ``vpp``, ``cp``,
``ep`` and ``etp`` to sizes; each of these keys may be omitted.
"""

import copy
import json
import math
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import FAMILIES, Architecture, read_architecture
from dpo_engine.testing.comparison import assert_same_bits, assert_same_numbers, assert_same_weights
from dpo_engine.testing.hf_training import train_with_transformers
from dpo_engine.testing.models import TinyModels
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.sharded import open_model, whole_logits
from dpo_engine.testing.trajectory import VOCAB, load_weights, run_config, train_steps
from dpo_engine.testing.wide import expected_logits, wide, wide_model

TP2 = {"tp": 2}
TREE = {"layout": "tree", "tokens_per_micro_batch": 80}
NEVER_OMITTED = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "dtype",
    "architectures",
    "transformers_version",
}
"""Fields that every ``config.json`` has, or that no family reads."""
STEPS = [2, 3, 2, 2, 2]
"""Numbers of pairs in the five steps of :func:`check_steps`."""
OPTIMIZER = {"lr": 3e-4, "eps": 1e-6}
DECAY, CLIP = 0.01, 1.0
LONGEST = 32
"""Maximum length, in tokens, of the rows that :func:`check_steps` passes to transformers."""
TOKENS = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))


def check_logits(models: TinyModels, case: str, layout: Mapping[str, int] = TP2, ranks: int | None = None) -> None:
    """Compare the logits of a sharded model with those of transformers, both in fp64.

    ranks   number of ranks; None: as many as the layout needs without data parallelism

    The tolerance is 1e-12 of the largest logit. Raises ``AssertionError`` with the difference or, if the engine cannot
    run the model, with the traceback.
    """
    ours, _ = _loaded(models, case, layout, ranks)
    theirs = models.once(("logits", case), lambda: expected_logits(models.of(case), TOKENS))
    assert ours.shape == theirs.shape, f"{case}: logits have the shape {[*ours.shape]} instead of {[*theirs.shape]}"
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= 1e-12, f"{case}: logits differ from those of transformers by {error:.1e} of the largest logit"


def check_export(models: TinyModels, case: str, layout: Mapping[str, int] = TP2, ranks: int | None = None) -> None:
    """Load a checkpoint into a sharded model, export it, and check that all tensors are bitwise unchanged.

    ranks   as in :func:`check_logits`. This function and :func:`check_logits` share the started ranks

    Raises ``AssertionError`` with the name of a tensor that is missing or differs.
    """
    _, export = _loaded(models, case, layout, ranks)
    assert_same_bits(export, models.of(case))


def check_steps(
    models: TinyModels,
    case: str,
    layout: Mapping[str, int] = TP2,
    ranks: int | None = None,
    batch: Mapping[str, Any] = TREE,
) -> None:
    """Train five steps of DPO with weighted pairs. Compare the results with transformers, torch's autograd and AdamW.

    ranks   as in :func:`check_logits`
    batch   section ``batch`` of the run; by default, rows of trees (a tree is a prompt with its responses)

    All computations are in fp64, and gradients are clipped. The relative tolerance is 1e-10 for gradient norms. For the
    change of a weight tensor, it is 1e-8, plus 1e-13 of the norm of the tensor for rounding. Raises ``AssertionError``
    with a gradient norm or a tensor that differs by more than its tolerance.
    """
    norms, expected = models.once(("steps", case), lambda: _trained_by_transformers(models, case))
    with tempfile.TemporaryDirectory(dir=models.folder) as folder:
        optim = {**OPTIMIZER, "clip_grad": CLIP, "weight_decay": DECAY}
        results = train(models.of(case), folder, STEPS, layout, ranks, batch=batch, optim=optim)
        got, want, start = (load_weights(directory) for directory in (folder, expected, models.of(case)))
    for step, (found, norm) in enumerate(zip(results[0]["steps"], norms, strict=True)):
        close = math.isclose(found["grad_norm"], norm, rel_tol=1e-10)
        assert close, f"{case}: the gradient norm of step {step} is {found['grad_norm']} instead of {norm}"
    assert got.keys() == want.keys(), f"{case}: tensors in only one checkpoint: {sorted(got.keys() ^ want.keys())}"
    for name, value in want.items():
        moved, error = (value - start[name]).norm(), (got[name] - value).norm()
        close = error <= 1e-8 * moved + 1e-13 * value.norm()
        assert close, f"{case}: {name} differs by {error:.1e} after {len(STEPS)} steps that change it by {moved:.1e}"


def check_layouts(
    models: TinyModels,
    case: str,
    layout: Mapping[str, int] = TP2,
    ranks: int | None = None,
    recompute: str = "none",
) -> None:
    """Train two steps with rows of trees on the ranks of a layout. Compare the results with padded rows on one rank.

    ranks       as in :func:`check_logits`
    recompute   ``model.recompute`` of the run in the layout; the run on one rank uses the default

    All computations are in fp64. The results are the metrics of the steps and of an evaluation, the values of each
    evaluated pair (such as its log-probabilities and its loss), and the exported weights. The relative tolerance is
    1e-10. Raises ``AssertionError`` with a number or a tensor that differs. It is also raised if training did not
    change a tensor, or if training changed a tensor that the family's exports copy from the checkpoint.
    """

    def on_one_rank() -> tuple[dict[str, Any], Path]:
        folder = models.folder / f"one rank, {case}"
        return train(models.of(case), folder, [6, 5], {}, 1, few=3)[0], folder

    one, expected = models.once(("one rank", case), on_one_rank)
    untrained = getattr(FAMILIES[models.cases[case][0]], "carried", ())
    with tempfile.TemporaryDirectory(dir=models.folder) as folder:
        model = {"recompute": recompute}
        results = train(models.of(case), folder, [6, 5], layout, ranks, few=3, batch=TREE, model=model)
        for result in results:
            assert_same_numbers(result, one, 1e-10)
        assert_same_weights(folder, expected, models.of(case), 1e-10, untrained)


def check_defaults(models: TinyModels, case: str) -> None:
    """Omit each optional field of ``config.json``, one at a time, and compare the engine's default with transformers'.

    transformers writes every field, so a wrong default has an effect only for files that other programs wrote. This
    check needs no ranks.

    The engine reads the architecture twice: from the file without the field, and from the same file with the field's
    default from transformers. Raises ``AssertionError`` if the two results differ; the error contains the field and the
    differences between the architectures. If the engine rejects a file, the result for this file is the list of
    problems, and the error contains both results.
    """
    from transformers import AutoConfig

    values = json.loads((models.of(case) / "config.json").read_text())
    kind = values.pop("model_type")
    with tempfile.TemporaryDirectory(dir=models.folder) as folder:

        def read(fields: dict[str, Any]) -> Architecture | list[str]:
            Path(folder, "config.json").write_text(json.dumps({**fields, "model_type": kind}))
            try:
                return read_architecture(folder)
            except ConfigError as error:
                return error.problems

        for absent in sorted(values.keys() - NEVER_OMITTED):
            rest = {name: value for name, value in values.items() if name != absent}
            ours, theirs = read(rest), read(AutoConfig.for_model(kind, **copy.deepcopy(rest)).to_dict())
            if ours != theirs:
                both = isinstance(ours, Architecture) and isinstance(theirs, Architecture)
                found = theirs.differences(ours) if both else [ours, theirs]
                raise AssertionError(f"{case}: without {absent}, the engine and transformers differ: {found}")


FAMILY_CHECKS = (check_defaults, check_logits, check_export, check_steps, check_layouts)
"""The checks, in the order that helps most to find a mistake."""


def ranks_of(layout: Mapping[str, int]) -> int:
    """Return the number of ranks of a layout without data parallelism."""
    return math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp"))


def train(
    start: Path,
    folder: Path | str,
    sizes: list[int],
    layout: Mapping[str, int],
    ranks: int | None = None,
    few: int | None = None,
    **sections: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Train on all ranks in fp64, and export to ``folder``; return the results of the ranks.

    start       directory of the checkpoint
    ranks       as in :func:`check_logits`
    sizes, few  as in :func:`~dpo_engine.testing.trajectory.train_steps`
    sections    sections of the run, such as ``batch``
    """
    config = run_config(start, folder, parallel={"distributed_optimizer": False, **layout}, **sections)
    ranks = ranks or ranks_of(layout)
    return run_ranks(train_steps, ranks, config=config, sizes=sizes, export=str(folder), few=few, fp64=True)


def _trained_by_transformers(models: TinyModels, case: str) -> tuple[list[float], Path]:
    """Return the gradient norms of the steps, and the directory of the trained weights."""
    policy, reference = (wide_model(models.of(case), LONGEST) for _ in range(2))
    loaded, folder = [reference, policy], models.folder / f"transformers, {case}"
    with wide():
        norms, _ = train_with_transformers(
            case, STEPS, load=lambda case: loaded.pop(), decay=DECAY, clip=CLIP, **OPTIMIZER
        )
    policy.save_pretrained(folder)  # compare files: in memory, names can differ, and experts can be stacked
    return norms, folder


def _loaded(models: TinyModels, case: str, layout, ranks: int | None) -> tuple[torch.Tensor, Path]:
    """Return a case's logits and the directory of its export.

    The first call for a layout and a number of ranks starts the ranks, which load all cases that the layout allows.
    """
    ranks = ranks or ranks_of(layout)
    key = repr((sorted(layout.items()), ranks))
    folder = models.folder / f"exports, {key}"

    def load_all() -> dict[str, torch.Tensor | str]:
        directories = {name: models.of(name) for name in models.cases if _runs(models, name, layout)}
        return run_ranks(_load_and_save, ranks, directories=directories, layout=layout, exports=folder)[-1]

    found = models.once(key, load_all)[case]
    assert not isinstance(found, str), f"{case}: {found}"
    return found, folder / case


def _runs(models: TinyModels, case: str, layout) -> bool:
    """Whether a model can be loaded in a layout. A layout with ``ep`` or ``etp`` requires a model with experts."""
    return not {"ep", "etp"} & layout.keys() or read_architecture(models.of(case)).experts is not None


def _load_and_save(directories: dict[str, Path], layout, exports: Path) -> dict[str, Any]:
    """Load each case, compute its logits, and export it.

    Returns  for each case: the logits; None on a rank that does not have them; the traceback if the case fails
    """
    from dpo_engine.model.weights.load import load_hf
    from dpo_engine.model.weights.save import save_hf

    groups, found = None, {}
    for name, directory in directories.items():
        try:
            chunks, arch, groups = open_model(directory, layout, "fp64", groups=groups)
            load_hf(chunks, arch, directory, groups=groups)
            with torch.no_grad():
                logits = whole_logits(chunks, TOKENS, groups)
            found[name] = None if logits is None else logits[..., : arch.vocab_size]
            save_hf(chunks, arch, exports / name, source=directory, groups=groups)
        except Exception:
            found[name] = traceback.format_exc()
    return found
