"""Tensor parallelism's collectives: tokens are gathered before matrices that ranks share out, and the partial results
are summed and spread after them.

Outside such matrices each rank of a tensor group keeps its own tokens, so that norms and routers see each token once
and activations are spread as well as matrices (sequence parallelism, Korthikanti et al. 2022). Ranks may have unequal
numbers of tokens; what travels is padded to the most of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from longvila.parallel.traffic import count

# torch 2.14 renamed them; earlier ones have the old names alone.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_tokens(x: Tensor, tokens: Sequence[int], group: dist.ProcessGroup, what: str = "tensor") -> Tensor:
    """The tokens of all ranks, in rank order; their gradients are summed and go back to their ranks.

    Args:
        x: (t, ...) of this rank.
        tokens: those of each rank of the group; t is this rank's.
        what: the name under which its bytes are counted.

    Returns:
        (sum(tokens), ...).
    """
    return _gather_tokens(x, list(tokens), group.group_name, what)


def spread_sums(x: Tensor, tokens: Sequence[int], group: dist.ProcessGroup, what: str = "tensor") -> Tensor:
    """The sum over ranks, of which each gets its own tokens; gradients are gathered. The transpose of `gather_tokens`.

    Args:
        x: (sum(tokens), ...), this rank's part of the sum.

    Returns:
        (t, ...), t being this rank's of `tokens`.
    """
    return _spread_sums(x, list(tokens), group.group_name, what)


@torch.library.custom_op("longvila::gather_tokens", mutates_args=())
def _gather_tokens(x: Tensor, tokens: list[int], group: str, what: str) -> Tensor:
    ranks, most = _resolve_process_group(GroupName(group)), max(tokens)
    padded = x if x.shape[0] == most else torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    _count(padded, len(tokens), what)
    out = x.new_empty(len(tokens) * most, *x.shape[1:])
    _gather(out, padded.contiguous(), group=ranks)
    if min(tokens) == most:
        return out
    return torch.cat([part[:n] for part, n in zip(out.split(most), tokens, strict=True)])


@torch.library.custom_op("longvila::spread_sums", mutates_args=())
def _spread_sums(x: Tensor, tokens: list[int], group: str, what: str) -> Tensor:
    ranks, most = _resolve_process_group(GroupName(group)), max(tokens)
    padded = x
    if min(tokens) != most:
        padded = x.new_zeros(len(tokens), most, *x.shape[1:])
        for place, part in zip(padded, x.split(tokens), strict=True):
            place[: len(part)] = part
    out = x.new_empty(most, *x.shape[1:])
    _count(out, len(tokens), what)
    _reduce_scatter(out, padded.contiguous().view(-1, *x.shape[1:]), group=ranks)
    return out[: tokens[dist.get_rank(ranks)]].clone()


def _count(piece: Tensor, ranks: int, what: str) -> None:
    """Bytes that a rank sends of a collective of `ranks` such pieces, in a ring."""
    count(f"bytes {what}", (ranks - 1) * piece.numel() * piece.element_size())
    count(f"collective {what}")


@_gather_tokens.register_fake
def _(x: Tensor, tokens: list[int], group: str, what: str) -> Tensor:
    return x.new_empty(sum(tokens), *x.shape[1:])


@_spread_sums.register_fake
def _(x: Tensor, tokens: list[int], group: str, what: str) -> Tensor:
    return x.new_empty(tokens[dist.get_rank(_resolve_process_group(GroupName(group)))], *x.shape[1:])


def _setup(ctx, inputs, output) -> None:
    _, *ctx.arguments = inputs


_gather_tokens.register_autograd(
    lambda ctx, grad: (_spread_sums(grad, *ctx.arguments), None, None, None), setup_context=_setup
)
_spread_sums.register_autograd(
    lambda ctx, grad: (_gather_tokens(grad, *ctx.arguments), None, None, None), setup_context=_setup
)


class SummedGradient(torch.autograd.Function):
    """A parameter that every rank of a group holds and that each uses for its own part: its gradient is their sum."""

    @staticmethod
    def forward(ctx, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        total = grads[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total, None
