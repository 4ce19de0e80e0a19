"""Cuts "who sees whom" into blocks that every attention kernel knows: rectangles and causal squares. Pure integers.

A block of queries x keys is one of three kinds:

- `full`: every query sees every key;
- `causal`: a square; query i sees keys 0..i;
- `edge`: a square; query i sees keys i..n-1. It is where a sliding window lets go of its oldest keys. With queries and
  keys both in reverse order it is a causal square, so that no kernel needs to know about windows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

Span = tuple[int, int]
Kind = Literal["full", "causal", "edge"]


class Mask(NamedTuple):
    """Which keys of its document a query sees."""

    causal: bool = True
    """Keys up to its own; otherwise all (encoders)."""
    window: int | None = None
    """Only the last `window` keys up to its own, itself among them (as transformers counts); causal only."""


@dataclass(frozen=True)
class Block:
    """One kernel call: queries `q` against keys `k`."""

    q: Span
    k: Span
    kind: Kind
    cuts: tuple[int, ...] = ()
    """Of several `causal` squares laid end to end: where each begins, from 0, and where the last ends."""

    @property
    def work(self) -> int:
        """Query-key pairs computed."""
        rows, columns = self.q[1] - self.q[0], self.k[1] - self.k[0]
        if self.cuts:
            return sum((stop - start) * (stop - start + 1) // 2 for start, stop in pairwise(self.cuts))
        return rows * columns if self.kind == "full" else rows * (rows + 1) // 2


def join_squares(blocks: Iterable[Block]) -> list[Block]:
    """Causal squares that follow one another without a gap become one block: one launch for many documents."""
    joined: list[Block] = []
    for block in blocks:
        last = joined[-1] if joined else None
        if last and last.kind == block.kind == "causal" and (last.q[1], last.k[1]) == (block.q[0], block.k[0]):
            cuts = last.cuts or (0, last.q[1] - last.q[0])
            q, k = (last.q[0], block.q[1]), (last.k[0], block.k[1])
            joined[-1] = Block(q, k, "causal", (*cuts, q[1] - q[0]))
        else:
            joined.append(block)
    return joined


def halve_squares(block: Block, leaf: int) -> list[Block]:
    """The same pairs in more blocks: squares end to end become single ones, and each is cut into two squares and the
    rectangle between them, again and again down to squares of `leaf` tokens or fewer, so that a kernel that computes
    more of a square than is seen wastes less. Cuts lie at multiples of `leaf`; a rectangle comes after its squares."""
    if block.kind == "full":
        return [block]
    ends = block.cuts or (0, block.q[1] - block.q[0])
    return [
        piece
        for start, stop in pairwise(ends)
        for piece in _halved(block.q[0] + start, block.k[0] + start, stop - start, block.kind, leaf)
    ]


def _halved(q: int, k: int, size: int, kind: Kind, leaf: int) -> list[Block]:
    """A square whose first query is `q` and first key `k`."""
    if size <= leaf:
        return [Block((q, q + size), (k, k + size), kind)]
    half = leaf
    while 2 * half < size:
        half *= 2
    early, late = (0, half), (half, size)
    rows, columns = (late, early) if kind == "causal" else (early, late)
    return [
        *_halved(q, k, half, kind, leaf),
        *_halved(q + half, k + half, size - half, kind, leaf),
        Block((q + rows[0], q + rows[1]), (k + columns[0], k + columns[1]), "full"),
    ]


def visible_blocks(q: Span, k: Span, mask: Mask) -> list[Block]:
    """The blocks of what queries `q` see of keys `k`.

    Args:
        q, k: positions in one document; they are the same span, or do not overlap.
        mask: which keys a query sees.

    Returns:
        Blocks in positions. Each visible pair is in exactly one of them, no other pair is in any.
    """
    if not mask.causal:
        return [Block(q, k, "full")]
    if k[0] >= q[1]:
        return []
    if k != q:
        return _before(q, k, mask.window)
    if mask.window is None:
        return [Block(q, q, "causal")]
    blocks = []
    for start in range(q[0], q[1], mask.window):  # inside such a piece the window hides nothing
        piece = (start, min(start + mask.window, q[1]))
        blocks += [*_before(piece, (q[0], start), mask.window), Block(piece, piece, "causal")]
    return blocks


def _before(q: Span, k: Span, window: int | None) -> list[Block]:
    """Keys that all lie before all queries: only the window's far end can cut."""
    if k[0] == k[1]:
        return []
    if window is None:
        return [Block(q, k, "full")]
    blocks = []
    # Query x sees keys from x - window + 1 on.
    sees_all = min(q[1], k[0] + window)
    if sees_all > q[0]:
        blocks.append(Block((q[0], sees_all), k, "full"))
    start, stop = max(q[0], k[0] + window), min(q[1], k[1] + window - 1)
    if start < stop:
        rest = stop - window + 1
        blocks.append(Block((start, stop), (start - window + 1, rest), "edge"))
        if rest < k[1]:
            blocks.append(Block((start, stop), (rest, k[1]), "full"))
    return blocks
