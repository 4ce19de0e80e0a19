"""Layouts: which tokens of a packed row each context rank owns. Pure integers, no torch, no communication.

A row is a sequence of documents laid end to end. A layout cuts it into spans `(start, stop)` of row positions and gives
every context rank a tuple of them, ascending. No span crosses a document border, spans of all ranks together cover
every token once, and lengths need not divide by anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from longvila.parallel.blocks import Span


def contiguous(lengths: Sequence[int], parts: int) -> tuple[tuple[Span, ...], ...]:
    """Rank r owns the r-th of `parts` equal pieces of the row. Causal work grows with r: 1.87x the mean at 8 ranks."""
    total = sum(lengths)
    return tuple(_cut_at_documents([(total * r // parts, total * (r + 1) // parts)], lengths) for r in range(parts))


def zigzag(lengths: Sequence[int], parts: int) -> tuple[tuple[Span, ...], ...]:
    """The row is cut into 2 x `parts` chunks and rank r owns chunks r and 2 x parts - 1 - r.

    An early and a late chunk together cost the same on every rank, if the row is one causal document.
    """
    total = sum(lengths)
    chunks = [(total * i // (2 * parts), total * (i + 1) // (2 * parts)) for i in range(2 * parts)]
    return tuple(_cut_at_documents([chunks[r], chunks[2 * parts - 1 - r]], lengths) for r in range(parts))


def document_zigzag(lengths: Sequence[int], parts: int) -> tuple[tuple[Span, ...], ...]:
    """Each document is zigzagged by itself, so that packed rows are balanced as well as single documents.

    The rank that gets the larger share of a remainder moves on with each document, so that remainders even out.
    """
    owned: list[list[Span]] = [[] for _ in range(parts)]
    start = 0
    for index, length in enumerate(lengths):
        cuts = [start + length * i // (2 * parts) for i in range(2 * parts + 1)]
        for part in range(parts):
            mirror = 2 * parts - 1 - part
            rank = (part + index) % parts
            owned[rank] += [(cuts[part], cuts[part + 1]), (cuts[mirror], cuts[mirror + 1])]
        start += length
    starts = {0, *accumulate(lengths)}
    return tuple(join_spans(spans, starts) for spans in owned)


def _cut_at_documents(spans: Sequence[Span], lengths: Sequence[int]) -> tuple[Span, ...]:
    borders = list(accumulate(lengths))
    pieces: list[Span] = []
    for start, stop in spans:
        for border in borders:
            if start < border < stop:
                pieces.append((start, border))
                start = border
        pieces.append((start, stop))
    return join_spans(pieces, {0, *borders})


def join_spans(spans: Sequence[Span], starts: set[int]) -> tuple[Span, ...]:
    """Drops empty spans and joins neighbours, except where a document starts (`starts`)."""
    joined: list[Span] = []
    for start, stop in spans:
        if start == stop:
            continue
        if joined and joined[-1][1] == start and start not in starts:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)
