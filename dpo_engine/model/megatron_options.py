"""The section ``megatron`` of a configuration: options of Megatron for which the engine has no key of its own.

Megatron-Core reads its settings from dataclasses. The section ``megatron`` sets some of their fields, with the names
and types of the installed version. Only the fields in `ACCEPTED` can be set. Tests train with each of these fields,
except ``num_layers_at_start_in_bf16`` and ``num_layers_at_end_in_bf16``. For FP8 and ``tp_comm_overlap``, these tests
run on an emulated GPU that computes nothing. For the remaining fields, they run on CPUs.

Every field that is not in `ACCEPTED` is refused. Many of these fields are read only by modules that the engine
replaces, and Megatron does not report a field that nothing reads. ``megatron_fields.yaml`` lists the fields that are
refused for a known reason, with this reason or with the engine's key to use instead.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from fnmatch import fnmatch
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.fp8 import FIELDS, fp8_model_problems, fp8_problems
from dpo_engine.model.tp_overlap import FIELD as OVERLAP
from dpo_engine.model.tp_overlap import overlap_model_problems, overlap_problems
from dpo_engine.platform.dims import ParallelDims, choices, divisors
from dpo_engine.wording import join, nearest, show

REFUSED: dict[str, dict[str, list[str]]] = yaml.safe_load(
    Path(__file__).with_name("megatron_fields.yaml").read_text(encoding="utf-8")
)
"""Fields that are refused for a known reason, grouped by dataclass and then by reason. A reason can name the key to use
instead."""

ACCEPTED = {
    "transformer": (
        "recompute_method",
        "recompute_num_layers",
        "recompute_modules",
        "distribute_saved_activations",
        "microbatch_group_size_per_vp_stage",
        *FIELDS,
        OVERLAP,
    ),
    "ddp": (
        "num_distributed_optimizer_instances",
        "bucket_size",
        "align_param_gather",
        "pad_buckets_for_high_nccl_busbw",
        "reduce_scatter_with_fp32_accumulation",
    ),
    "optimizer": (),  # no field can be set; the error messages name the engine's keys
}

MODULES = ("core_attn", "mlp")
"""Names in ``recompute_modules`` that the engine's layer supports."""


INSTANCES = "num_distributed_optimizer_instances"

WITH_SHARDS = (
    INSTANCES,
    "align_param_gather",
    "pad_buckets_for_high_nccl_busbw",
    "reduce_scatter_with_fp32_accumulation",
)
"""Fields of ``ddp`` that have an effect only with the distributed optimizer."""


def optimizer_instances(config: Config, dims: ParallelDims) -> int:
    """Return the number of instances of the distributed optimizer.

    The ranks of one instance together hold the whole state of the optimizer.

    Raises :class:`~dpo_engine.errors.ConfigError` if the data-parallel ranks cannot be divided into this many
    instances.
    """
    if problems := instance_problems(config, dims):
        raise ConfigError(problems)
    return instances_of(config)


def instances_of(config: Config) -> int:
    """Return the configured number of instances of the distributed optimizer; 1 if it is not set, or invalid."""
    value = config.megatron.ddp.get(INSTANCES, 1)
    return value if type(value) is int and value > 0 else 1


def instance_problems(config: Config, dims: ParallelDims) -> list[str]:
    """Return a list with a problem if the data-parallel ranks cannot be divided into the optimizer's instances."""
    count, ranks = instances_of(config), math.gcd(dims.dp * dims.cp, dims.expert_dp)
    if ranks % count == 0:
        return []
    copies = "" if dims.ep == 1 else f", and must divide the number of copies of each expert, which is {dims.expert_dp}"
    return [
        f"megatron.ddp.{INSTANCES}={count}: must divide dp x cp, which is {dims.dp * dims.cp}{copies}; use "
        f"{choices(divisors(ranks))}"
    ]


def layout_problems(config: Config, arch: Architecture, dims: ParallelDims, *, ranks: bool) -> list[str]:
    """List the conflicts of the section ``megatron`` with the model and the layout.

    ranks   whether ``dims`` has as many ranks as the run. If not, instances of the optimizer are not checked
    """
    problems = fp8_model_problems(config, arch, dims) + overlap_model_problems(config, arch, dims)
    return problems + (instance_problems(config, dims) if ranks else [])


@lru_cache
def dataclass_of(part: str) -> type:
    """Return Megatron's dataclass for a key of the section ``megatron``."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    known = {"transformer": TransformerConfig, "ddp": DistributedDataParallelConfig, "optimizer": OptimizerConfig}
    return known[part]


def megatron_problems(config: Config) -> list[str]:
    """List the conflicts of the section ``megatron`` with the installed Megatron-Core and with other sections.

    Megatron is imported only if the section sets something.
    """
    problems = []
    for part in ACCEPTED:
        for name, value in getattr(config.megatron, part).items():
            if problem := _problem(part, name, value):
                problems.append(f"megatron.{part}.{name}={show(value)}: {problem}")
    return problems or [f"megatron.{line}" for line in (*_without_effect(config), *_wrong_values(config))]


def _problem(part: str, name: str, value: Any) -> str | None:
    owner = dataclass_of(part)
    names = [field.name for field in dataclasses.fields(owner)]
    if name not in names:
        from megatron.core import __version__

        near = nearest(name, names)
        hint = f"did you mean {near}?" if near else "remove it"
        return f"no such field of {owner.__name__} in megatron-core {__version__}; {hint}"
    if name not in ACCEPTED[part]:
        known = ((reason, one) for reason, fields in REFUSED[part].items() for one in fields)
        reason = next(
            (reason for reason, one in known if fnmatch(name, one)), "it has never been tested with the engine"
        )
        if reason.startswith("use "):
            return f"the engine has its own key; {reason}"
        return f"cannot be set, because {reason}" + ("" if "; use " in reason else "; remove the field")
    hint = typing.get_type_hints(owner)[name]
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError:
        return f"must be {_wanted(hint)}; correct it"
    return None


def _without_effect(config: Config) -> list[str]:
    """Return a message for each field that has no effect in this run."""
    parallel, recompute = config.parallel, config.model.recompute
    full = recompute == "full", "model.recompute is full"
    interleaved = parallel.vpp is not None, "parallel.vpp is set"
    transformer = config.megatron.transformer
    fp8 = transformer.get("fp8") is not None, "megatron.transformer.fp8 is set"
    some_in_bf16 = (
        fp8[0] and transformer.get("first_last_layers_bf16") is True,
        "megatron.transformer.fp8 is set and first_last_layers_bf16 is true",
    )
    needs = {
        "transformer": {
            "recompute_method": full,
            "recompute_num_layers": full,
            "recompute_modules": (recompute == "selective", "model.recompute is selective"),
            "distribute_saved_activations": (
                full[0] and parallel.tp > 1 and parallel.sequence_parallel is False,
                "model.recompute is full, parallel.tp is above 1, and parallel.sequence_parallel is false",
            ),
            "microbatch_group_size_per_vp_stage": interleaved,
            "fp8": (transformer.get("fp8") is not None, "the field is set to e4m3 or hybrid"),
            "fp8_recipe": fp8,
            "first_last_layers_bf16": fp8,
            **dict.fromkeys(FIELDS[3:], some_in_bf16),
            OVERLAP: (
                config.megatron.tp_comm_overlap and parallel.tp > 1 and parallel.sequence_parallel is not False,
                "its value is true, parallel.tp is above 1, and parallel.sequence_parallel is true or auto",
            ),
        },
        "ddp": {
            "num_distributed_optimizer_instances": (
                parallel.distributed_optimizer,
                "parallel.distributed_optimizer is true",
            ),
            "bucket_size": (parallel.overlap, "parallel.overlap is true"),
            "align_param_gather": (
                parallel.overlap and parallel.distributed_optimizer and interleaved[0],
                "parallel.overlap and parallel.distributed_optimizer are true and parallel.vpp is set",
            ),
            "pad_buckets_for_high_nccl_busbw": (
                parallel.distributed_optimizer,
                "parallel.distributed_optimizer is true",
            ),
            "reduce_scatter_with_fp32_accumulation": (
                parallel.distributed_optimizer and config.optim.gradients == "bf16",
                "parallel.distributed_optimizer is true and optim.gradients is bf16",
            ),
        },
    }
    return [
        f"{part}.{name}={show(value)}: has no effect unless {condition}; meet this condition, or remove the field"
        for part in ACCEPTED
        for name, value in getattr(config.megatron, part).items()
        for holds, condition in [needs[part][name]]
        if not holds
    ]


def _wrong_values(config: Config) -> list[str]:
    """Return a message for each value that Megatron's types allow, but that the engine does not support."""
    asked, problems = config.megatron.transformer, [*fp8_problems(config), *overlap_problems(config)]
    modules = asked.get("recompute_modules")
    if modules is not None and not (modules and set(modules) <= set(MODULES)):
        problems.append(
            f"transformer.recompute_modules={show(modules)}: must contain {join(MODULES, 'or')}, or both; the engine's "
            "layer cannot recompute other modules; correct it"
        )
    group = asked.get("microbatch_group_size_per_vp_stage")
    if group is not None and (group < 1 or group % config.parallel.pp):
        problems.append(
            f"transformer.microbatch_group_size_per_vp_stage={group}: must be a multiple of "
            f"parallel.pp={config.parallel.pp}; correct it"
        )
    ddp = config.megatron.ddp
    if ddp.get(INSTANCES, 1) > 1:
        line = f"ddp.{INSTANCES}={ddp[INSTANCES]}"
        if ddp.get("reduce_scatter_with_fp32_accumulation"):
            problems.append(
                f"{line}: Megatron sums bf16 gradients in fp32 only if there is one instance; remove this field, or "
                "ddp.reduce_scatter_with_fp32_accumulation"
            )
        if find_spec("einops") is None:
            problems.append(f"{line}: Megatron needs the package einops for this field; run pip install einops")
    for key in ("transformer.recompute_num_layers", "ddp.bucket_size", f"ddp.{INSTANCES}"):
        part, _, name = key.partition(".")
        value = getattr(config.megatron, part).get(name)
        if value is not None and value < 1:
            problems.append(f"{key}={value}: must be at least 1; correct it")
    return problems


def _wanted(hint: Any) -> str:
    """Describe a field's type for an error message."""
    return join(_choices(hint))


def _choices(hint: Any) -> list[str]:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [choice for argument in typing.get_args(hint) for choice in _choices(argument)]
    known = {bool: "true or false", int: "a whole number", type(None): "null"}
    return [known.get(hint, "a list of names")]
