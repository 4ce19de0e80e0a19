"""Expert parallelism: every token travels to the ranks that hold its experts, and the results travel back.

Of the experts of every layer a rank holds its share. Which ranks share is a fold of its own over all ranks (MoE
Parallel Folding, Liu et al. 2025): it need not agree with the attention fold, so that experts of any number go with any
way of sharing a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from longvila.parallel.exchange import all_to_all

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(tokens (n, D), experts (n, k), weights (n, k)) -> (n, D): the weighted sum of what a token's experts make of it."""


def dispatch(
    experts: Experts, hidden: Tensor, chosen: Tensor, weights: Tensor, num_local: int, group: dist.ProcessGroup
) -> Tensor:
    """Runs tokens through experts that lie on other ranks. Collective over `group`, also for a rank without tokens.

    Nothing is dropped: as many tokens go to an expert as choose it.

    Args:
        experts: runs the experts of this rank, numbered from 0.
        hidden: (T, D) tokens of this rank; T may be 0 and differ between ranks.
        chosen: (T, k) their experts, numbered over the group: rank r of it holds `num_local` of them from
            r * num_local on.
        weights: (T, k) the weights of those experts' results.

    Returns:
        (T, D). Differentiable in `hidden`, `weights` and what `experts` reads.
    """
    ranks, top_k = dist.get_world_size(group), chosen.shape[1]
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=ranks * num_local).view(ranks, num_local)
    coming = torch.empty_like(counts)
    dist.all_to_all_single(coming, counts, group=group)
    sent, received = counts.sum(1).tolist(), coming.sum(1).tolist()
    tokens = all_to_all(hidden[order // top_k], sent, received, group, "experts")
    numbers = torch.arange(num_local, device=hidden.device).repeat(ranks).repeat_interleave(coming.flatten())
    if not len(tokens):
        # A row of zeros whose result is thrown away: parameters without a gradient would leave a collective out.
        results = experts(tokens.new_zeros(1, tokens.shape[1]), numbers.new_zeros(1, 1), weights.new_ones(1, 1))[:0]
        results = results + 0 * tokens
    else:
        results = experts(tokens, numbers[:, None], weights.new_ones(len(tokens), 1))
    returned = all_to_all(results, received, sent, group, "experts")
    # Back in order of (token, choice). The weights are the sender's: no gradient of theirs has to travel.
    each = torch.empty_like(returned).index_copy(0, order, returned).view(*chosen.shape, hidden.shape[1])
    return (each * weights[..., None]).sum(1)
