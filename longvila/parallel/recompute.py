"""Activation checkpointing that knows attention: which of its results a layer keeps, so that they are not computed again.

Without checkpointing a layer keeps everything. With it, a layer's inputs are kept and the rest is computed again in the
backward; attention is the dearest part of that, and its recomputation would repeat its communication too.

| policy | kept beside the layer's input | computed again |
|---|---|---|
| `all` | nothing | everything: two attention forwards a step |
| `save_attention` | attention's output and log-sum-exp; with a head axis also q, k, v and the output as exchanged | all but attention and its transfers |
| `offload_attention` | the same, in host memory | the same |

`save_attention` is LightSeq's rematerialisation-aware checkpointing (Li et al. 2023, section 3.4) and LoongTrain's
Selective Checkpoint++ (Gu et al. 2024, section 4.5.2); `layers` chooses where.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, create_selective_checkpoint_contexts

from longvila.config import RecomputeName
from longvila.errors import ConfigError

# FSDP2 labels what it does for a unit inside a layer (a mixture's experts), in the backward more often than before.
# Torch counts the labels among the operators that must come again alike, and would refuse.
SAC_IGNORED_OPS.update(
    {torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}
)

ContextFn = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]


def checkpoint_arguments(policy: RecomputeName, layers: Collection[int] | None = None) -> dict[str, Any]:
    """What to give `model.gradient_checkpointing_enable` as `gradient_checkpointing_kwargs`.

    Args:
        policy: `all`, `save_attention` or `offload_attention`.
        layers: numbers of the layers whose attention is kept; None means all, the others are as under `all`.

    Raises:
        ConfigError: for an unknown policy, or layers with a policy that keeps nothing.
    """
    if policy not in ("all", "save_attention", "offload_attention"):
        raise ConfigError(
            f"there is no recompute policy '{policy}'; there is all, save_attention and offload_attention"
        )
    if policy == "all":
        if layers is not None:
            raise ConfigError(f"recompute=all keeps no layer's attention, but {sorted(layers)} are to be kept")
        return {"use_reentrant": False}

    def is_kept(op: Any, args: tuple[Any, ...]) -> bool:
        # The layer's number is the last argument of both operators, and what travels the one before.
        return op in _operators() and "experts" not in args and (layers is None or args[-1] in layers)

    def save() -> tuple[AbstractContextManager, AbstractContextManager]:
        def decide(_context: object, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if is_kept(op, args) else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(decide)

    def offload() -> tuple[AbstractContextManager, AbstractContextManager]:
        kept: list[Any] = []
        return _ToHost(is_kept, kept), _FromHost(is_kept, kept)

    return {"use_reentrant": False, "context_fn": save if policy == "save_attention" else offload}


def _operators() -> tuple[Any, ...]:
    return torch.ops.longvila.context_attention.default, torch.ops.longvila.all_to_all.default


class _ToHost(TorchDispatchMode):
    """Copies what is kept to host memory, in the order in which it is computed. (torch's own policy MUST_CPU_OFFLOAD is
    for compiled graphs alone: run eagerly, it computes again.)"""

    def __init__(self, is_kept: Callable[[Any, tuple[Any, ...]], bool], kept: list[Any]) -> None:
        super().__init__()
        self._is_kept, self._kept = is_kept, kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self._is_kept(func, args):
            self._kept.append(tree_map(_to_host, out))
        return out


class _FromHost(TorchDispatchMode):
    """Gives back what `_ToHost` kept instead of computing it."""

    def __init__(self, is_kept: Callable[[Any, tuple[Any, ...]], bool], kept: list[Any]) -> None:
        super().__init__()
        self._is_kept, self._kept = is_kept, kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._is_kept(func, args):
            return func(*args, **(kwargs or {}))
        if not self._kept:
            raise RuntimeError("attention kept in host memory was asked for twice; run the backward once")
        return tree_map(lambda pair: pair[0].to(pair[1], non_blocking=True), self._kept.pop(0), is_leaf=_is_pair)


def _to_host(x: Tensor) -> tuple[Tensor, torch.device]:
    """`x` in host memory, and where it was. On one stream, so that its memory is not used again too early."""
    if x.device.type == "cpu":
        return x.detach(), x.device
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x.detach(), non_blocking=True), x.device


def _is_pair(entry: object) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], torch.device)
