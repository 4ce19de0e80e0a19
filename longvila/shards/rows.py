"""Documents -> packed rows, of which each rank of a sequence group decodes only its own share of the frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice

import torch

from longvila.errors import MediaError
from longvila.media import decode_frames, decode_image
from longvila.shards.document import Document

LOOK_AHEAD = 16
"""Documents that wait while a row is filled."""


@dataclass
class Row:
    """One packed row of N tokens and F frames. All but `frames` and `failed` is the same on every rank of a group."""

    input_ids: torch.Tensor
    """int64 (N,); places of frame tokens hold the id of the frame token."""
    labels: torch.Tensor
    """int64 (N,), already shifted inside each document: labels[i] is the target after token i, -100 for none."""
    position_ids: torch.Tensor
    """int64 (N,), counted from 0 in each document."""
    lengths: tuple[int, ...]
    """Tokens of each document; they sum to N."""
    keys: tuple[str, ...]
    num_frames: tuple[int, ...]
    """Frames of each document; they sum to F."""
    frames: torch.Tensor
    """uint8 (F_local, 3, S, S): frames F*r//P to F*(r+1)//P of the row, on rank r of a sequence group of P."""
    failed: tuple[tuple[int, str], ...]
    """(document, reason) where this rank could not decode; zeros stand in `frames` until its group drops it."""


def pack(documents: Iterable[Document], row_tokens: int) -> Iterator[list[Document]]:
    """Groups documents into rows of at most `row_tokens` tokens: best fit among the next LOOK_AHEAD.

    Each row begins with the document that has waited longest, so none waits for ever, and goes on with the longest that
    still fits.
    """
    source = iter(documents)
    waiting = list(islice(source, LOOK_AHEAD))
    while waiting:
        row: list[Document] = []
        room = row_tokens
        chosen: int | None = 0
        while chosen is not None:
            row.append(waiting.pop(chosen))
            room -= len(row[-1].ids)
            waiting += islice(source, 1)
            fitting = [index for index, document in enumerate(waiting) if len(document.ids) <= room]
            chosen = max(fitting, key=lambda index: len(waiting[index].ids), default=None)
        yield row


def build_row(documents: list[Document], rank: int, num_ranks: int, image_size: int) -> Row:
    """The row of `documents` as rank `rank` of a sequence group of `num_ranks` sees it, its share of frames decoded."""
    lengths = tuple(len(document.ids) for document in documents)
    num_frames = tuple(len(document.timestamps) for document in documents)
    frames, failed = _decode_share(documents, rank, num_ranks, image_size)
    return Row(
        input_ids=torch.tensor([token for document in documents for token in document.ids]),
        labels=torch.tensor([label for document in documents for label in document.labels]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        lengths=lengths,
        keys=tuple(document.key for document in documents),
        num_frames=num_frames,
        frames=frames,
        failed=failed,
    )


def _decode_share(
    documents: list[Document], rank: int, num_ranks: int, image_size: int
) -> tuple[torch.Tensor, tuple[tuple[int, str], ...]]:
    ends = list(accumulate(len(document.timestamps) for document in documents))
    first, last = ends[-1] * rank // num_ranks, ends[-1] * (rank + 1) // num_ranks
    frames = torch.zeros(last - first, 3, image_size, image_size, dtype=torch.uint8)
    failed = []
    for index, (document, end) in enumerate(zip(documents, ends, strict=True)):
        start = end - len(document.timestamps)
        low, high = max(start, first), min(end, last)
        if low >= high or document.media is None:
            continue
        try:
            if document.media_type == "image":
                decoded = decode_image(document.media, image_size, document.key)[None]
            else:
                timestamps = document.timestamps[low - start : high - start]
                decoded = decode_frames(document.media, timestamps, image_size, document.key)
        except MediaError as error:
            failed.append((index, str(error)))
        else:
            frames[low - first : high - first] = decoded
    return frames, tuple(failed)
