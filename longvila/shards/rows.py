"""Documents -> packed rows, of which each rank of a sequence group decodes only its own share of the frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch

from longvila.errors import MediaError
from longvila.media import Decoder, FrameMemory
from longvila.shards.document import Document

LOOK_AHEAD = 16
"""Documents that wait while a row is filled from a stream."""


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
    """Frames (of an image, tiles) of each document; they sum to F."""
    frames: torch.Tensor
    """uint8 (F_local, 3, S, S): frames F*r//P to F*(r+1)//P of the row, on rank r of a sequence group of P. A pixel's
    channels lie side by side in memory (`torch.channels_last`), which later rows use when no tensor does."""
    failed: tuple[tuple[int, str], ...]
    """(document, reason) where this rank could not read or decode; zeros stand there until its group drops it."""
    plan: int = 0
    """A digest of what all data ranks read in this round; 0 where rows are not planned."""


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


def start_row(
    documents: list[Document], rank: int | None, num_ranks: int, decoder: Decoder, memory: FrameMemory, plan: int = 0
) -> Callable[[], Row]:
    """Begins to decode what rank `rank` of a sequence group of `num_ranks` decodes of the row of `documents`; nothing
    where `rank` is None.

    Returns:
        What waits for the row.
    """
    num_frames = sum(document.num_frames for document in documents)
    first, last = 0, 0
    if rank is not None:
        first, last = num_frames * rank // num_ranks, num_frames * (rank + 1) // num_ranks
    tasks, end = [], 0
    for index, document in enumerate(documents):
        for clip in document.clips:
            start, end = end, end + len(clip.views)
            low, high = max(start, first), min(end, last)
            if low >= high:
                continue
            waits = None
            if clip.media is not None:
                waits = decoder.start(
                    clip.media, clip.views[low - start : high - start], memory.image_size, document.key
                )
            tasks.append((index, slice(low - first, high - first), waits))

    def finish() -> Row:
        frames = memory.take(last - first)
        failed = {index: document.fault for index, document in enumerate(documents) if document.fault}
        for index, place, waits in tasks:
            try:
                if waits:
                    waits(frames[place])
                else:
                    frames[place] = 0
            except MediaError as error:
                frames[place] = 0
                failed[index] = str(error)
        lengths = tuple(len(document.ids) for document in documents)
        return Row(
            input_ids=_tensor(document.ids for document in documents),
            labels=_tensor(document.labels for document in documents),
            position_ids=torch.cat([torch.arange(length) for length in lengths]),
            lengths=lengths,
            keys=tuple(document.key for document in documents),
            num_frames=tuple(document.num_frames for document in documents),
            frames=frames,
            failed=tuple(sorted(failed.items())),
            plan=plan,
        )

    return finish


def _tensor(parts: Iterable[list[int]]) -> torch.Tensor:
    # By way of numpy: torch.tensor takes four times as long for a list of integers.
    return torch.from_numpy(np.array(list(chain.from_iterable(parts)), dtype=np.int64))
