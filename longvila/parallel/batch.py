"""Cuts a packed row for the ranks of a sequence group, and routes frame tokens to the ranks that own their places.

This is MM-SP (LongVILA, section 3): the vision fold (each rank encodes an equal share of the row's frames), then the
attention fold (each rank owns the tokens that the layout gives it). Frame tokens go from one to the other by one
differentiable all-to-all; nothing is gathered whole.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longvila.config import LayoutName, RoutingName
from longvila.errors import ConfigError, DataError, LongvilaError
from longvila.parallel.agree import check_same_row
from longvila.parallel.attention import FoldedPlan
from longvila.parallel.choose import choose, make_plan
from longvila.parallel.exchange import all_to_all
from longvila.parallel.fold import Fold
from longvila.parallel.replay import ModelAttention

log = logging.getLogger(__name__)
_told: set[tuple[LayoutName, RoutingName]] = set()


def shift_labels(labels: Tensor, lengths: Sequence[int], ignore: int = -100) -> Tensor:
    """(N,) the target after each token, inside each document. Must happen before a row is cut."""
    return torch.cat([F.pad(one[1:], (0, 1), value=ignore) for one in labels.split(list(lengths))])


def shard_batch(
    lengths: Sequence[int],
    fold: Fold,
    layout: LayoutName = "document_zigzag",
    routing: RoutingName = "direct",
    attention: ModelAttention | None = None,
    agreed: bool = False,
    **tensors: Tensor,
) -> dict[str, Any]:
    """This rank's share of a packed row, and its plan: what the forward of a Hugging Face language model takes.

    Args:
        lengths: tokens of each document, in row order.
        tensors: (N, ...) each, the same on every rank of the sequence group: `input_ids` or `inputs_embeds`,
            `position_ids` (restarting in each document), shifted `labels`, loss weights.
        attention: heads and masks of the model (`apply.attention_of`), for the layout `auto`.
        agreed: the ranks of the sequence group have made sure already that they hold the same row; otherwise this is
            collective over them, and checks it, but for the values of floating-point tensors.

    Returns:
        `plan`, and each tensor as (1, t, ...), t tokens being this rank's.

    Raises:
        DataError: where lengths and tensors contradict each other, or ranks hold different rows: on every rank.
        ConfigError: for a layout or routing that does not exist, or `auto` without `attention`.
    """
    lengths = tuple(lengths)
    plan, error = None, None
    try:
        if layout == "auto":
            layout, routing = _choose(lengths, fold, attention)
        plan = make_plan(lengths, fold.inner, fold.outer, fold.num_heads, layout, routing, fold.num_tensor)
        for name, tensor in tensors.items():
            if tensor.shape[0] != sum(lengths):
                raise DataError(f"documents of {sum(lengths)} tokens in all, but {tensor.shape[0]} {name}")
    except LongvilaError as reason:
        error = reason
    if not agreed:
        kinds = {name: (x.shape, str(x.dtype), _checksum(x)) for name, x in sorted(tensors.items())}
        check_same_row(plan.identity if plan else None, kinds, lengths, error, fold)
    if plan is None or error is not None:
        raise error or AssertionError("no plan and no error")
    mine = torch.tensor(plan.positions(fold.part, fold.piece), dtype=torch.long)
    local = {name: tensor[mine.to(tensor.device)].unsqueeze(0) for name, tensor in tensors.items()}
    return {**local, "plan": FoldedPlan(plan, fold)}


def _checksum(tensor: Tensor) -> int | None:
    """Of tokens, positions and labels, so that ranks which read different rows of one length are found out. None of
    embeddings, which are large, and follow from tokens that nobody has here."""
    return None if tensor.is_floating_point() else zlib.crc32(tensor.cpu().contiguous().numpy().data)


def _choose(lengths: tuple[int, ...], fold: Fold, attention: ModelAttention | None) -> tuple[LayoutName, RoutingName]:
    if attention is None:
        raise ConfigError("layout 'auto' needs the model's heads and masks: attention=attention_of(model)")
    shape = attention.shape.of_head_rank(fold.num_tensor)
    choice = choose(lengths, fold.inner, fold.outer, fold.num_heads, shape, attention.masks, tensor=fold.num_tensor)
    if fold.sequence_rank == 0 and fold.data_rank == 0 and (choice.layout, choice.routing) not in _told:
        _told.add((choice.layout, choice.routing))
        log.info("layout auto: %s %s for a row like this one, %s", choice.layout, choice.routing, choice.reason)
    return choice.layout, choice.routing


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


def even_share(count: int, rank: int, ranks: int) -> range:
    """Which of `count` things in a row (frames that a sequence group encodes, say) one rank takes: as many as any
    other, or one more, and the last rank always one."""
    return range(count * rank // ranks, count * (rank + 1) // ranks)


def shard_row(
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    lengths: tuple[int, ...],
    is_frame: Tensor,
    tokens_per_frame: int,
    fold: Fold,
    layout: LayoutName,
    routing: RoutingName = "direct",
    attention: ModelAttention | None = None,
) -> LocalRow:
    """Cuts a row that is identical on every rank of the sequence group.

    Args:
        input_ids, labels, position_ids: (N,); labels already shifted inside each document.
        lengths: tokens of each document, in order.
        is_frame: (N,) bool, places that frame tokens fill, `tokens_per_frame` for each frame, in order.

    Raises:
        DataError: where lengths, tensors and frame places contradict each other.
    """
    tensors = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "is_frame": is_frame}
    local = shard_batch(lengths, fold, layout, routing, attention, agreed=True, **tensors)
    folded: FoldedPlan = local["plan"]
    places = is_frame.cpu().nonzero().flatten()
    if places.numel() % tokens_per_frame:
        raise DataError(f"{places.numel()} frame places are not a whole number of frames of {tokens_per_frame} tokens")
    route = _frame_route(plan_owner(sum(lengths), fold, folded.plan.positions), places, tokens_per_frame, fold)
    return LocalRow(local["input_ids"], local["labels"], local["position_ids"], folded, route)


def plan_owner(num_tokens: int, fold: Fold, positions: Callable[[int, int], list[int]]) -> Tensor:
    """(N,) sequence rank that owns each row position."""
    owner = torch.empty(num_tokens, dtype=torch.long)
    for rank in range(fold.num_sequence):
        owner[torch.tensor(positions(*fold.coordinates(rank)), dtype=torch.long)] = rank
    return owner


def _frame_route(owner: Tensor, places: Tensor, tokens_per_frame: int, fold: Fold) -> Callable[[Tensor], Tensor]:
    me, ranks = fold.sequence_rank, fold.num_sequence
    num_frames = places.numel() // tokens_per_frame
    shares = [even_share(num_frames, rank, ranks) for rank in range(ranks)]
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
        return all_to_all(tokens.flatten(0, 1)[order.to(tokens.device)], in_splits, out_splits, fold.sequence, "frames")

    return route
