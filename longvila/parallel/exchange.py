"""Differentiable collectives. Tokens move between folds by these alone.

They are torch operators (`torch.ops.longvila.all_to_all`), so that activation checkpointing can name them, and
`torch.compile` passes over them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from longvila.parallel.traffic import count


def all_to_all(
    x: Tensor, in_splits: Sequence[int], out_splits: Sequence[int], group: dist.ProcessGroup, what: str, layer: int = -1
) -> Tensor:
    """Sends consecutive pieces of `x` to the ranks of `group` and joins what they send; gradients travel back.

    Args:
        x: (sum(in_splits), ...).
        in_splits: rows for each rank of the group, in rank order.
        out_splits: rows that each rank of the group sends here.
        what: the name under which its bytes are counted.
        layer: the layer that asks; activation checkpointing keeps the results of some.

    Returns:
        (sum(out_splits), ...).
    """
    return _all_to_all(x, list(in_splits), list(out_splits), group.group_name, what, layer)


@torch.library.custom_op("longvila::all_to_all", mutates_args=())
def _all_to_all(x: Tensor, in_splits: list[int], out_splits: list[int], group: str, what: str, layer: int) -> Tensor:
    resolved = _resolve_process_group(GroupName(group))
    out = x.new_empty((sum(out_splits), *x.shape[1:]))
    own = in_splits[dist.get_rank(resolved)]
    count(f"bytes {what}", (x.shape[0] - own) * x[:1].numel() * x.element_size())
    count(f"collective {what}")
    dist.all_to_all_single(out, x.contiguous(), out_splits, in_splits, group=resolved)
    return out


@_all_to_all.register_fake
def _(x: Tensor, in_splits: list[int], out_splits: list[int], group: str, what: str, layer: int) -> Tensor:
    return x.new_empty((sum(out_splits), *x.shape[1:]))


def _setup(ctx, inputs, output) -> None:
    _, *ctx.arguments = inputs


def _backward(ctx, grad: Tensor):
    in_splits, out_splits, *rest = ctx.arguments
    return _all_to_all(grad, out_splits, in_splits, *rest), None, None, None, None, None


_all_to_all.register_autograd(_backward, setup_context=_setup)
