"""Expert parallelism: every token travels to the ranks that hold its experts, and the results travel back.

Of the experts of every layer a rank holds its share. Which ranks share is a fold of its own over all ranks (MoE
Parallel Folding, Liu et al. 2025): it need not agree with the attention fold, so that experts of any number go with any
way of sharing a row.

The matrices of each expert may be shared out too: then the ranks that have its parts gather their tokens and spread the
sums of their results.

Nothing is dropped, or what is above an expert's capacity (GShard, Lepikhin et al. 2020, section 2.2): of the choices of
one rank's tokens each expert takes ceil(choices / experts * factor).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from longvila.parallel.exchange import all_to_all
from longvila.parallel.tensor import gather_tokens, spread_sums

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(tokens (n, D), experts (n, k), weights (n, k)) -> (n, D): the weighted sum of what a token's experts make of it."""


@dataclass(frozen=True)
class Capacity:
    """How many of a rank's tokens an expert takes, and which."""

    factor: float
    """Of an even share."""
    keeps: Literal["probability", "position"] = "probability"
    pads: bool = False
    """Send zeros in the place of tokens that an expert could take and does not get."""

    def of(self, choices: int, num_experts: int) -> int:
        """Tokens that each expert takes, where `choices` (tokens times experts each) have been made on this rank."""
        # The factor as it is written: 0.8 as a float is a little more, and 30 choices of 8 experts would take 4.
        return math.ceil(choices * Fraction(str(self.factor)) / num_experts)


def dispatch(
    experts: Experts,
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    num_local: int,
    group: dist.ProcessGroup | None,
    capacity: Capacity | None = None,
    tensor: dist.ProcessGroup | None = None,
) -> Tensor:
    """Runs tokens through experts that lie on other ranks. Collective over `group`, also for a rank without tokens.

    Args:
        experts: runs the experts of this rank, numbered from 0.
        hidden: (T, D) tokens of this rank; T may be 0 and differ between ranks.
        chosen: (T, k) their experts, numbered over the group: rank r of it holds `num_local` of them from
            r * num_local on.
        weights: (T, k) the weights of those experts' results.
        group: None where this rank holds all experts.
        capacity: None drops nothing.
        tensor: ranks that hold the same experts and of each a part of its matrices, whose results are summed.

    Returns:
        (T, D); of choices that were dropped there is nothing in it. Differentiable in `hidden`, `weights` and what
        `experts` reads.
    """
    ranks, top_k = dist.get_world_size(group) if group else 1, chosen.shape[1]
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=ranks * num_local)
    order, most = _by_expert(flat, weights, capacity), None
    if capacity is not None:
        most = capacity.of(len(flat), ranks * num_local)
        place = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[flat[order]]
        order, place = order[place < most], place[place < most]
        counts = counts.clamp(max=most)
    tokens, rows = hidden[order // top_k], None
    if capacity is not None and capacity.pads:
        assert most is not None
        rows = flat[order] * most + place
        tokens = tokens.new_zeros(len(counts) * most, hidden.shape[1]).index_copy(0, rows, tokens)
        counts = torch.full_like(counts, most)
    results = _exchange(experts, tokens, counts.view(ranks, num_local), group, tensor)
    if rows is not None:
        results = results[rows]
    # Back in order of (token, choice). The weights are the sender's: no gradient of theirs has to travel.
    each = results.new_zeros(len(flat), hidden.shape[1]).index_copy(0, order, results)
    return (each.view(*chosen.shape, hidden.shape[1]) * weights[..., None]).sum(1).to(hidden.dtype)


def _by_expert(flat: Tensor, weights: Tensor, capacity: Capacity | None) -> Tensor:
    """The choices of one expert after another, and of each those first that it keeps first. Stable: of equals, the
    earlier in the row."""
    if capacity is None or capacity.keeps == "position":
        return flat.argsort(stable=True)
    largest = weights.detach().flatten().argsort(descending=True, stable=True)
    return largest[flat[largest].argsort(stable=True)]


def _exchange(
    experts: Experts, tokens: Tensor, counts: Tensor, group: dist.ProcessGroup | None, tensor: dist.ProcessGroup | None
) -> Tensor:
    """Results of `tokens`, which lie in the order of their experts; counts (ranks, experts of each)."""
    ranks, num_local = counts.shape
    coming = counts
    if group is not None:
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts, group=group)
        sent, received = counts.sum(1).tolist(), coming.sum(1).tolist()
        tokens = all_to_all(tokens, sent, received, group, "experts")
    numbers = torch.arange(num_local, device=tokens.device).repeat(ranks).repeat_interleave(coming.flatten())
    if tensor is None:
        results = _run(experts, tokens, numbers)
    else:
        each = [torch.empty(1, dtype=torch.long, device=tokens.device) for _ in range(dist.get_world_size(tensor))]
        dist.all_gather(each, torch.tensor([len(tokens)], device=tokens.device), group=tensor)
        sizes = torch.cat(each).tolist()
        numbers = gather_tokens(numbers, sizes, tensor, "expert_tensor")
        results = _run(experts, gather_tokens(tokens, sizes, tensor, "expert_tensor"), numbers)
        results = spread_sums(results, sizes, tensor, "expert_tensor")
    return results if group is None else all_to_all(results, received, sent, group, "experts")


def _run(experts: Experts, tokens: Tensor, numbers: Tensor) -> Tensor:
    if len(tokens):
        return experts(tokens, numbers[:, None], tokens.new_ones(len(tokens), 1))
    # A row of zeros whose result is thrown away: parameters without a gradient would leave a collective out.
    results = experts(tokens.new_zeros(1, tokens.shape[1]), numbers.new_zeros(1, 1), tokens.new_ones(1, 1))[:0]
    return results + 0 * tokens
