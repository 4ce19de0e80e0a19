"""Agreements between ranks about a step, so that no rank waits for one that went another way.

Each step opens with one small gather. From it every rank knows which ranks have a row, which hit an error, whether the
ranks of a sequence group read the same row, which documents any of them could not decode, and the global count of
target tokens by which the loss is divided, and that all data ranks follow one plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longvila.errors import DataError
from longvila.parallel.fold import Fold

_FAILED = -1
_ABSENT = 0


@dataclass(frozen=True)
class RowView:
    """What one rank has to say about one row of a step."""

    digest: int
    """`row_digest` of the row's shape; 0 where this rank's data has ended."""
    content: int = 0
    """A checksum of its tokens; not compared where a document failed."""
    plan: int = 0
    """`row_digest` of what all data ranks read together; 0 where that is not planned."""
    failed: tuple[int, ...] = ()
    """Documents that this rank could not read or decode."""
    targets: tuple[int, ...] = ()
    """Target tokens of each document."""


@dataclass(frozen=True)
class Agreement:
    """What holds on every rank for one step."""

    ended: bool
    """No rank has a row left in this epoch."""
    dropped: tuple[tuple[int, ...], ...]
    """For each row of this rank's sequence group, the documents that the whole group drops."""
    num_targets: int
    """Target tokens of the step over all rows and data ranks, dropped documents left out."""


def row_digest(*parts: object) -> int:
    """A positive 62-bit digest of what must be equal on all ranks of a sequence group."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 2 | 1


def agree(views: Sequence[RowView], error: Exception | None, fold: Fold) -> Agreement:
    """Collective over the world, once a step; `views` has the same length on every rank.

    Raises:
        DataError: on every rank, if any rank passed an error, or if ranks of a sequence group read different rows.
    """
    mine = [
        (_FAILED if error else view.digest, len(view.failed), sum(view.targets), view.content, view.plan)
        for view in views
    ]
    of_ranks = gather(torch.tensor(mine, dtype=torch.int64))
    if error is not None:
        raise error
    if broken := (of_ranks[..., 0] == _FAILED).any(-1).nonzero().flatten().tolist():
        raise DataError(
            f"rank {broken[0]} could not read its data and stopped (its own message says why); stopping too"
        )
    everyone = _by_row(of_ranks, fold)
    different = everyone[..., 0] != everyone[:, :1, :, 0]
    whole = (everyone[..., 1] == 0).all(
        1, keepdim=True
    )  # a rank that could not read a document does not know its tokens
    if (different | whole & (everyone[..., 3] != everyone[:, :1, :, 3])).any():
        raise DataError(
            "ranks of one sequence group read different rows; they must see the same shards, seed and epoch "
            "(is one of them reading a stale or partial copy of the data?)"
        )
    plans = [set(everyone[..., index, 4].flatten().tolist()) - {0} for index in range(len(views))]
    if any(len(each) > 1 for each in plans):
        raise DataError(
            "data ranks planned different rows; they must see the same shards with the same indexes, tokenizer and "
            "seed (is one of them reading a stale or partial copy of the data?)"
        )
    ended = bool((everyone[..., 0] == _ABSENT).all())
    if not everyone[..., 1].any():
        return Agreement(ended, ((),) * len(views), int(everyone[:, 0, :, 2].sum()))
    dropped = _union_of_failures(views, fold)
    left = sum(
        count
        for view, gone in zip(views, dropped, strict=True)
        for document, count in enumerate(view.targets)
        if document not in gone
    )
    targets = _by_row(gather(torch.tensor([left], dtype=torch.int64)), fold)[..., 0]
    return Agreement(ended, dropped, int(targets[:, 0].sum()))


def _by_row(everyone: Tensor, fold: Fold) -> Tensor:
    """(data ranks, ranks that read the same rows, ...) of what every rank of the world says."""
    return everyone.unflatten(0, (fold.num_stages, fold.num_data, fold.num_sequence)).transpose(0, 1).flatten(1, 2)


def check_same_row(
    identity: object, shapes: object, lengths: Sequence[int], error: Exception | None, fold: Fold
) -> None:
    """Collective over the sequence group: raises on every rank unless all of them hold the same row without an error.

    Raises:
        DataError: naming two ranks that differ, or the rank that had an error (which itself raises that error).
    """
    digest = _FAILED if error else row_digest(identity, shapes)
    mine = torch.tensor([digest, sum(lengths), len(lengths)], dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(fold.num_sequence)]
    dist.all_gather(everyone, mine, group=fold.sequence)
    if error is not None:
        raise error
    for rank, (other, tokens, documents) in enumerate(view.tolist() for view in everyone):
        if other == _FAILED:
            raise DataError(f"rank {rank} of the sequence group refused its row (its own message says why)")
        if other != digest:
            raise DataError(
                f"ranks of one sequence group hold different rows: rank {fold.sequence_rank} has {sum(lengths)} tokens "
                f"in {len(lengths)} documents, rank {rank} has {tokens} in {documents}, or they differ in layout, fold "
                f"or tensors; all must be given the same"
            )


def _union_of_failures(views: Sequence[RowView], fold: Fold) -> tuple[tuple[int, ...], ...]:
    gathered: list = [None] * dist.get_world_size(fold.readers)
    dist.all_gather_object(gathered, [view.failed for view in views], group=fold.readers)
    return tuple(tuple(sorted({document for peer in gathered for document in peer[row]})) for row in range(len(views)))


def gather(values: Tensor) -> Tensor:
    """(world, *values.shape): `values` of every rank, in rank order. CPU tensors."""
    out = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(out, values)
    return torch.stack(out)


def sum_over_world(*values: float) -> list[float]:
    """The sum of each number over all ranks, in rank order, so that every rank gets the same bits."""
    return gather(torch.tensor(values, dtype=torch.float64)).sum(0).tolist()


def max_over_world(value: float) -> float:
    """The largest of all ranks' numbers."""
    return gather(torch.tensor([value], dtype=torch.float64)).max().item()


def any_rank(flag: bool) -> bool:
    """True on every rank if it is True on any."""
    return bool(gather(torch.tensor([int(flag)])).any())


def barrier() -> None:
    dist.barrier()
