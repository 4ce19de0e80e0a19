"""Differentiable collectives. Tokens move between folds by these alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all(x: Tensor, in_splits: Sequence[int], out_splits: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Sends consecutive pieces of `x` to the ranks of `group` and joins what they send; gradients travel back.

    Args:
        x: (sum(in_splits), ...).
        in_splits: rows for each rank of the group, in rank order.
        out_splits: rows that each rank of the group sends here.

    Returns:
        (sum(out_splits), ...).
    """
    return _AllToAll.apply(x, list(in_splits), list(out_splits), group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, in_splits: list[int], out_splits: list[int], group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.arguments = (out_splits, in_splits, group)
        out = x.new_empty((sum(out_splits), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), out_splits, in_splits, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _AllToAll.apply(grad, *ctx.arguments), None, None, None
