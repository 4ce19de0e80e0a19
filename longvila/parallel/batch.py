"""Cuts a packed row for the ranks of a sequence group, and routes frame tokens to the ranks that own their places.

This is MM-SP (LongVILA, section 3): the vision fold (each rank encodes an equal share of the row's frames), then the
attention fold (each rank owns the tokens that the layout gives it). Frame tokens go from one to the other by one
differentiable all-to-all; nothing is gathered whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longvila.config import LayoutName
from longvila.errors import DataError
from longvila.parallel.attention import FoldedPlan
from longvila.parallel.exchange import all_to_all
from longvila.parallel.fold import Fold
from longvila.parallel.plan import make_plan


@dataclass(frozen=True)
class LocalRow:
    """This rank's tokens of a row, ready for the model's forward."""

    input_ids: Tensor
    """(1, t)"""
    labels: Tensor
    """(1, t), shifted before the cut."""
    position_ids: Tensor
    """(1, t), restarting in each document."""
    plan: FoldedPlan
    route: Callable[[Tensor], Tensor]
    """(my frames, tokens per frame, width) -> (frame places among my tokens, width)."""


def frame_share(num_frames: int, rank: int, ranks: int) -> range:
    """Which of a row's frames one rank of the sequence group encodes: an equal, contiguous share."""
    return range(num_frames * rank // ranks, num_frames * (rank + 1) // ranks)


def shard_row(
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    lengths: tuple[int, ...],
    is_frame: Tensor,
    tokens_per_frame: int,
    fold: Fold,
    layout: LayoutName,
) -> LocalRow:
    """Cuts a row that is identical on every rank of the sequence group.

    Args:
        input_ids, labels, position_ids: (N,); labels already shifted inside each document.
        lengths: tokens of each document, in order.
        is_frame: (N,) bool, places that frame tokens fill, `tokens_per_frame` for each frame, in order.

    Raises:
        DataError: where lengths, tensors and frame places contradict each other.
    """
    num_tokens = input_ids.numel()
    if not (sum(lengths) == num_tokens == labels.numel() == position_ids.numel() == is_frame.numel()):
        raise DataError(
            f"documents of {sum(lengths)} tokens in all, but {num_tokens} input ids, {labels.numel()} labels, "
            f"{position_ids.numel()} positions and {is_frame.numel()} frame marks"
        )
    plan = make_plan(lengths, fold.parts, fold.num_heads, layout)
    mine = torch.tensor(plan.positions(fold.part, fold.head), dtype=torch.long)
    places = is_frame.cpu().nonzero().flatten()
    if places.numel() % tokens_per_frame:
        raise DataError(f"{places.numel()} frame places are not a whole number of frames of {tokens_per_frame} tokens")
    route = _frame_route(plan_owner(num_tokens, fold, plan.positions), places, tokens_per_frame, fold)
    on = mine.to(input_ids.device)
    return LocalRow(
        input_ids[on].unsqueeze(0),
        labels[on].unsqueeze(0),
        position_ids[on].unsqueeze(0),
        FoldedPlan(plan, fold),
        route,
    )


def plan_owner(num_tokens: int, fold: Fold, positions: Callable[[int, int], list[int]]) -> Tensor:
    """(N,) sequence rank that owns each row position."""
    owner = torch.empty(num_tokens, dtype=torch.long)
    for rank in range(fold.num_sequence):
        owner[torch.tensor(positions(*divmod(rank, fold.num_heads)), dtype=torch.long)] = rank
    return owner


def _frame_route(owner: Tensor, places: Tensor, tokens_per_frame: int, fold: Fold) -> Callable[[Tensor], Tensor]:
    me, ranks = fold.sequence_rank, fold.num_sequence
    num_frames = places.numel() // tokens_per_frame
    shares = [frame_share(num_frames, rank, ranks) for rank in range(ranks)]
    to = [owner[places[s.start * tokens_per_frame : s.stop * tokens_per_frame]] for s in shares]
    # Local orders are ascending in the row, and so are the shares of the ranks: sending each rank its tokens in row
    # order is all the sorting there is.
    order = torch.sort(to[me], stable=True).indices
    in_splits = torch.bincount(to[me], minlength=ranks).tolist()
    out_splits = [int((destinations == me).sum()) for destinations in to]

    def route(tokens: Tensor) -> Tensor:
        if tokens.shape[0] != len(shares[me]) or tokens.shape[1] != tokens_per_frame:
            raise DataError(
                f"this rank should route {len(shares[me])} frames of {tokens_per_frame} tokens, "
                f"not {tokens.shape[0]} of {tokens.shape[1]}"
            )
        return all_to_all(tokens.flatten(0, 1)[order.to(tokens.device)], in_splits, out_splits, fold.sequence)

    return route
