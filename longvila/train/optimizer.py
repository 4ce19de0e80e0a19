"""Which parameters move, how AdamW groups them, and the learning rate of every step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import LoraModel
from torch import nn
from transformers import get_scheduler

from longvila.config import PARTS, LoraConfig, OptimizerConfig, Phase, StageConfig
from longvila.errors import ConfigError

DECAY = 0.1
"""Share of a phase's steps over which `warmup_stable_decay` falls."""


def choose_trained(model: nn.Module, trains: Iterable[str]) -> None:
    """Sets `requires_grad`: the parts named in `trains` move, everything else is frozen.

    Raises:
        ConfigError: for a part the model does not have, or if nothing would be trained.
    """
    trains = tuple(trains)
    if unknown := sorted(set(trains) - set(PARTS)):
        raise ConfigError(f"trains names {unknown}; a model has the parts {list(PARTS)}")
    if not trains:
        raise ConfigError(f"a stage must train at least one of {list(PARTS)}")
    for part in PARTS:
        getattr(model, part).requires_grad_(part in trains)


def freeze(model: nn.Module, expressions: Iterable[str]) -> None:
    """Freezes the trained parameters whose names hold a match of one of `expressions`.

    Raises:
        ConfigError: for an expression that matches none of them, or if nothing of a part would be trained.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for expression in expressions:
        found = [name for name in trained if re.search(expression, name)]
        if not found:
            raise ConfigError(f"freezes: '{expression}' matches no trained parameter; they are {_some(trained)}")
        for name in found:
            trained[name].requires_grad_(False)
    for part in PARTS:
        left = [parameter.requires_grad for name, parameter in trained.items() if name.startswith(f"{part}.")]
        if left and not any(left):
            raise ConfigError(
                f"freezes {list(expressions)} leaves no parameter of {part} to train; take it out of trains"
            )


def add_lora(language_model: nn.Module, lora: LoraConfig) -> LoraModel:
    """Puts low-rank adapters into `language_model`, in place; freezes all else but `lora.full`.

    Returns:
        The adapter handle: `merge_and_unload()` folds the adapters into the weights, in place.

    Raises:
        ConfigError: where a target matches no layer.
    """
    config = PeftLoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    try:
        adapted = LoraModel(language_model, {"default": config}, "default")
    except ValueError as error:
        raise ConfigError(
            f"LoRA targets {list(lora.targets)} match no layer of {type(language_model).__name__}"
        ) from error
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_("lora_" in name or any(word in name for word in lora.full))
    return adapted


def make_optimizer(model: nn.Module, config: OptimizerConfig, part: bool = False) -> torch.optim.AdamW:
    """AdamW over the trained parameters, grouped as `config.groups` says. Where a group names no weight decay, matrices
    decay; biases, norms (one dimension) and embeddings do not.

    The rate is 0 until `set_learning_rate`.

    Args:
        part: whether this is a part of a model, that of a pipeline's stage, in which a group may have no parameter.

    Raises:
        ConfigError: for a group without a parameter, or a trained parameter without a group.
    """
    undecayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        # Towers of open_clip and timm tell what does not decay: places, and tokens of their own.
        told: Callable[[], set[str]] = getattr(module, "no_weight_decay", set)
        parameters = dict(module.named_parameters())
        undecayed |= {id(parameters[name]) for name in told() if name in parameters}
    members: list[dict[float, list[nn.Parameter]]] = [{} for _ in config.groups]
    names = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        names.append(name)
        index = next((i for i, group in enumerate(config.groups) if re.search(group.match, name)), None)
        if index is None:
            raise ConfigError(
                f"no group of the optimizer matches the parameter {name}: {[group.match for group in config.groups]}; "
                f"add one with an empty expression for the rest, or freeze it"
            )
        decay = config.groups[index].weight_decay
        if decay is None:
            decay = 0.0 if parameter.ndim < 2 or id(parameter) in undecayed else config.weight_decay
        members[index].setdefault(decay, []).append(parameter)
    groups = []
    for group, by_decay in zip(config.groups, members, strict=True):
        if not by_decay and not part:
            raise ConfigError(
                f"the optimizer's group '{group.match}' has no parameter: none of the trained ones match it that no "
                f"earlier group took; they are {_some(names)}"
            )
        groups += [{"params": ps, "weight_decay": decay, "factor": group.rate} for decay, ps in by_decay.items()]
    return torch.optim.AdamW(groups or [{"params": [], "factor": 1.0}], lr=0.0, betas=config.betas, eps=config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def phase_at(config: StageConfig, step: int) -> tuple[int, int]:
    """(index of the phase that step `step` of the stage belongs to, steps of that phase before it)."""
    for index, phase in enumerate(config.phases):
        if step < phase.steps:
            return index, step
        step -= phase.steps
    raise ValueError(f"step {step} lies behind the stage's {config.steps} steps")


def learning_rate(phase: Phase, step: int) -> float:
    """Rate of step `step` (from 0) of a phase. A pure function, so that a checkpoint needs no schedule."""
    return phase.learning_rate * _schedule(phase)(step + 1)


def _schedule(phase: Phase) -> Callable[[int], float]:
    """Factor on the rate, by step. transformers' schedules are 0 at step 0 and at the last: one more at each end is
    counted, so that no step is taken at rate 0."""
    steps, warmup = phase.steps + 1, round(phase.warmup * phase.steps)
    name, options = {
        "constant": ("constant_with_warmup", {}),
        "linear": ("polynomial", {"lr_end": phase.floor, "power": 1.0}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": phase.floor}),
        "warmup_stable_decay": (
            "warmup_stable_decay",
            {"num_decay_steps": max(1, round(DECAY * phase.steps)) + 1, "min_lr_ratio": phase.floor},
        ),
    }[phase.schedule]
    holder = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # schedules are made for an optimizer, ours are only asked
    scheduler: Any = get_scheduler(name, holder, warmup, steps, scheduler_specific_kwargs=options)
    return scheduler.lr_lambdas[0]


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
