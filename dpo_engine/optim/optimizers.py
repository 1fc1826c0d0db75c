"""The registered optimizers, and how a run's optimizer is chosen and checked. Needs no Megatron.

An optimizer other than ``adamw`` is a function ``(groups, lr, *, options)`` that returns a ``torch.optim.Optimizer``:

groups  list of parameter groups: first the matrices, to which weight decay applies, and then biases and norm weights. A
        group without parameters is left out. Before each step, the engine sets ``lr`` and ``weight_decay`` of each
        group. For biases and norm weights, ``weight_decay`` is 0
lr      peak learning rate

For a model with experts, the function is called separately for the experts' parameters and for all other parameters.
The parameters are this tensor-parallel rank's shards of the weights or, for bf16 weights, fp32 copies of these shards.
The update must therefore be elementwise: the update of an element may depend only on that element and its gradients. An
optimizer such as Muon, which reads whole matrices, cannot be registered.

An optimizer is registered with a tuple ``state``: the names of the tensors that the attribute ``state`` of the torch
optimizer contains for each parameter. Each tensor has the shape of the parameter, and is zero before the first step.
Checkpoints contain these tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt

from dpo_engine.config.run import Config
from dpo_engine.config.sections import OptimConfig
from dpo_engine.options import name_problem, option_problems, options_of, with_defaults
from dpo_engine.registry import Registry
from dpo_engine.wording import show

OPTIMIZERS = Registry("optimizer", passes=2)


class MegatronAdamW:
    """Megatron's AdamW, whose options are ``optim.betas`` and ``optim.eps``."""

    state = ("exp_avg", "exp_avg_sq")


OPTIMIZERS["adamw"] = MegatronAdamW()


@OPTIMIZERS.register("sgd", state=("momentum_buffer",))
def sgd(
    groups: list[dict[str, Any]],
    lr: float,
    *,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum. Weight decay is added to the gradient, as in torch."""
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def _sgd_problems(options: Mapping[str, Any]) -> list[str]:
    if options["nesterov"] and not options["momentum"]:
        return ["nesterov=true: requires optim.optimizer_options.momentum > 0; set it, or remove nesterov"]
    return []


sgd.problems = _sgd_problems


def optimizer_problems(config: Config) -> list[str]:
    """List the problems with ``optim.optimizer``, its options, and settings that the optimizer ignores or rejects."""
    optim, name = config.optim, config.optim.optimizer
    if name not in OPTIMIZERS:
        return [name_problem(OPTIMIZERS, name, f"optim.optimizer={show(name)}", plugins=bool(config.plugins))]
    problems = option_problems(OPTIMIZERS, name, optim.optimizer_options, "optim.optimizer_options")
    if not isinstance(getattr(OPTIMIZERS[name], "state", None), tuple):
        problems.append(
            f"optim.optimizer={name}: is registered without its state, so a run could not resume; register it with "
            "state=(...), the names of the tensors that it keeps for each parameter"
        )
    return problems + list(_ignored(config)) if name != "adamw" else problems


def _ignored(config: Config) -> Iterator[str]:
    optim, name = config.optim, config.optim.optimizer
    for key in ("betas", "eps"):
        if getattr(optim, key) != OptimConfig.model_fields[key].default:
            yield (
                f"optim.{key}={show(getattr(optim, key))}: applies only to optimizer adamw, but optim.optimizer is "
                f"{name}; remove optim.{key}, or use optim.optimizer_options"
            )
    if config.parallel.distributed_optimizer:
        yield (
            "parallel.distributed_optimizer=true: Megatron's distributed optimizer supports only AdamW, but "
            f"optim.optimizer is {name}; set parallel.distributed_optimizer=false"
        )


def build_torch_optimizer(
    name: str, options: Mapping[str, Any], groups: list[dict[str, Any]], lr: float
) -> torch.optim.Optimizer:
    """Build the registered optimizer ``name`` for the parameter groups."""
    return OPTIMIZERS[name](groups, lr, **with_defaults(options_of(OPTIMIZERS, name), options))
