"""Which parameters move, how AdamW groups them, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import LoraModel
from torch import nn

from longvila.config import PARTS, LoraConfig, OptimizerConfig, Phase, StageConfig
from longvila.errors import ConfigError


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


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters. Matrices decay; biases, norms (one dimension) and embeddings do not.

    The rate is 0 until `set_learning_rate`.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=config.betas, eps=config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def phase_at(config: StageConfig, step: int) -> tuple[int, int]:
    """(index of the phase that step `step` of the stage belongs to, steps of that phase before it)."""
    for index, phase in enumerate(config.phases):
        if step < phase.steps:
            return index, step
        step -= phase.steps
    raise ValueError(f"step {step} lies behind the stage's {config.steps} steps")


def learning_rate(phase: Phase, step: int) -> float:
    """Rate of step `step` (from 0) of a phase: linear warm-up, then the schedule down to 0 (or constant)."""
    warmup = round(phase.warmup * phase.steps)
    if step < warmup:
        return phase.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, phase.steps - warmup)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[phase.schedule]
    return phase.learning_rate * decay
