"""A layout that weighs balance against bytes: documents stay whole where they can, only long ones are spread.

The work of a token is its position in its document. A rank is therefore balanced when it holds its share of the tokens
at the row's mean position: tokens late in a long document and those of short documents make up for each other, and one
border, moved token by token, settles both.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate, product
from typing import NamedTuple

from longvila.parallel.blocks import Mask, Span
from longvila.parallel.layout import join_spans
from longvila.parallel.plan import Plan
from longvila.parallel.replay import Shape, predict

TOLERANCE = 0.005
"""Work that may be missing, as a part of a rank's share, before a document is cut to supply it."""
MAKESPAN = 1.045
"""Replayed time / ideal up to which fewer bytes are worth more than less time."""
REPLAYED_RANKS = 16
"""Up to so many ranks layouts are replayed. On more, links between nodes decide, and the fewest bytes are taken."""
SHAPE = Shape(heads=32, kv_heads=8, head_dim=128)
"""What is replayed. Not the model's own: all its layers share one layout, and tests need no model."""


def joint(lengths: Sequence[int], parts: int) -> tuple[tuple[Span, ...], ...]:
    """Equal tokens, equal work and little traffic: of the layouts that `_peel` finds, the one that sends least while
    its replayed time stays near ideal, else the quickest.

    For any lengths, rank r holds exactly `total * (r + 1) // parts - total * r // parts` tokens. The query-key pairs of
    every rank are within 2 % of the mean wherever those of a single token are few against it (measured, not proven).
    The result depends on the arguments alone.

    Args:
        lengths: tokens of each document, in row order, at least 1 each.
        parts: context ranks, at least 1.

    Returns:
        For each rank its spans (start, stop) of row positions, ascending, joined except at document borders.
    """
    lengths = tuple(lengths)
    variants = product((range(parts)[::-1], range(parts)), (0, 1), (0.01, 0.03, 0.08))
    found = {_peel(lengths, order, spare, small) for order, spare, small in variants}
    cheapest = sorted(found, key=lambda spans: (keys_sent(lengths, spans), spans))
    if len(cheapest) == 1 or parts > REPLAYED_RANKS or keys_sent(lengths, cheapest[0]) == 0:
        return cheapest[0]
    inner = 8 if parts % 8 == 0 else parts
    times = []
    for spans in cheapest:
        times.append(predict(Plan(lengths, spans, inner, parts // inner), Mask(), SHAPE).makespan)
        if times[-1] <= MAKESPAN:
            return spans
    return cheapest[times.index(min(times))]


def keys_sent(lengths: Sequence[int], spans: Sequence[Sequence[Span]]) -> int:
    """Tokens whose keys travel: of each document, all before a rank's last query that are not its own."""
    ends = list(accumulate(lengths))
    pieces: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for rank, owned in enumerate(spans):
        for start, stop in owned:
            pieces[rank, bisect_right(ends, start)].append((start, stop))
    return sum(
        own[-1][1] - (ends[document] - lengths[document]) - sum(stop - start for start, stop in own)
        for (_, document), own in pieces.items()
    )


def _peel(lengths: Sequence[int], order: Sequence[int], spare: int, small: float) -> tuple[tuple[Span, ...], ...]:
    """Serves one rank after the other, each with its share of the tokens and of the work that are left.

    The heaviest document goes first. If it fits into a rank it stays whole, else it is spread over as few ranks as can
    hold it (and `spare` more), the next in `order`, each taking a piece from either end. Then a rank takes whole
    documents while they fit, but none whose work is `small` against its share. In the end its borders in the spread
    document are moved until the work is right when the lightest documents fill up the tokens. Should the work still be
    off, the rank takes from the heaviest and the lightest only, a mix that always exists.
    """
    pieces = [_Piece(0, length, end - length) for length, end in zip(lengths, accumulate(lengths), strict=True)]
    total, parts = sum(lengths), len(order)
    tokens_left, work_left = total, sum(piece.work for piece in pieces)
    rest, spread, ranks = _Rest(pieces), None, 0
    spans: list[tuple[Span, ...]] = [()] * parts
    starts = {piece.start for piece in pieces}
    for turn, rank in enumerate(order):
        tokens, most = total * (rank + 1) // parts - total * rank // parts, parts - turn
        if not tokens:
            continue
        work, ranks = work_left * tokens / tokens_left, ranks - 1
        if not spread or ranks < 1:
            spread = spread or rest.remove(len(rest.pieces) - 1)
            ranks = next((n for n in range(1, most) if rest.fits(spread, n * tokens, n * work)), most)
            ranks = min(ranks + spare, most) if ranks > 1 else 1
        for attempt in (ranks, 0):
            hand = _Hand(rest.copy(), tokens, work)
            left = hand.serve(spread, attempt, small)
            if abs(hand.work) <= 2 * hand.allowed:
                break
        rest, spread, spans[rank] = hand.rest, left, join_spans(sorted(piece.span for piece in hand.taken), starts)
        tokens_left, work_left = tokens_left - tokens, work_left - sum(piece.work for piece in hand.taken)
    return tuple(spans)


class _Piece(NamedTuple):
    """Tokens first to last - 1 of the document that begins at row position `start`."""

    first: int
    last: int
    start: int

    @property
    def size(self) -> int:
        return self.last - self.first

    @property
    def work(self) -> int:
        return _pairs(self.first, self.last)

    @property
    def span(self) -> Span:
        return self.start + self.first, self.start + self.last

    def split(self, head: int, tail: int) -> tuple[_Piece, _Piece, _Piece]:
        """The first `head` tokens, those between, the last `tail`."""
        first, last, start = self
        return (
            _Piece(first, first + head, start),
            _Piece(first + head, last - tail, start),
            _Piece(last - tail, last, start),
        )


def _weight(piece: _Piece) -> tuple[int, int]:
    """Orders pieces by mean position."""
    return piece.first + piece.last, piece.start


class _Rest:
    """What no rank owns yet, at most one piece of a document, the lightest first.

    Between `tokens[i]` and `tokens[i + 1]` lie those of piece i, counted from anywhere; `work` is alike.
    """

    def __init__(self, pieces: Iterable[_Piece] = ()) -> None:
        self.pieces = sorted(pieces, key=_weight)
        self.tokens = [0, *accumulate(piece.size for piece in self.pieces)]
        self.work = [0, *accumulate(piece.work for piece in self.pieces)]

    def copy(self) -> _Rest:
        other = _Rest()
        other.pieces, other.tokens, other.work = self.pieces[:], self.tokens[:], self.work[:]
        return other

    def size(self) -> int:
        return self.tokens[-1] - self.tokens[0]

    def add(self, piece: _Piece) -> None:
        if piece.size:
            i = bisect_left(self.pieces, _weight(piece), key=_weight)
            self.pieces.insert(i, piece)
            self.tokens[i + 1 :] = [tokens + piece.size for tokens in self.tokens[i:]]
            self.work[i + 1 :] = [work + piece.work for work in self.work[i:]]

    def remove(self, i: int) -> _Piece:
        piece = self.pieces.pop(i)
        self.tokens[i:] = [tokens - piece.size for tokens in self.tokens[i + 1 :]]
        self.work[i:] = [work - piece.work for work in self.work[i + 1 :]]
        return piece

    def lightest(self, tokens: int) -> int:
        """Work of the first `tokens`, or of all there are."""
        end = self.tokens[0] + tokens
        i = bisect_right(self.tokens, end) - 1
        part = self.pieces[i].split(end - self.tokens[i], 0)[0].work if i < len(self.pieces) else 0
        return self.work[i] - self.work[0] + part

    def fits(self, piece: _Piece, tokens: int, work: float) -> bool:
        """Whether tokens and work suffice for another piece and, for the tokens it leaves, the lightest."""
        filling = tokens - piece.size
        return filling >= 0 and piece.work + self.lightest(filling) <= work * (1 + TOLERANCE)

    def pop(self, tokens: int) -> list[_Piece]:
        """Takes the lightest `tokens` out. What is left of a piece stays in front, until it is put in its place."""
        end = self.tokens[0] + tokens
        i = bisect_right(self.tokens, end) - 1
        popped, cut = self.pieces[:i], end - self.tokens[i]
        del self.pieces[:i], self.tokens[:i], self.work[:i]
        if cut:
            head, self.pieces[0], _ = self.pieces[0].split(cut, 0)
            self.tokens[0], self.work[0] = end, self.work[0] + head.work
            popped.append(head)
        return popped


class _Hand:
    """What one rank takes out of the rest; `tokens` and `work` are what it lacks."""

    def __init__(self, rest: _Rest, tokens: int, work: float) -> None:
        self.rest, self.tokens, self.work = rest, tokens, work
        self.share, self.allowed = work, TOLERANCE * work
        self.taken: list[_Piece] = []

    def take(self, *pieces: _Piece) -> None:
        self.taken += pieces
        self.tokens -= sum(piece.size for piece in pieces)
        self.work -= sum(piece.work for piece in pieces)

    def serve(self, spread: _Piece, ranks: int, small: float) -> _Piece | None:
        """Takes a rank's share, `spread` being for this and the next ranks, `ranks` in all (0: only ends are taken).

        Returns what is left of `spread`.
        """
        if not ranks:
            self.rest.add(spread)
            return self.take_ends()
        # An even part of it is set aside while whole documents are chosen.
        part = min(-(-spread.size // ranks), self.tokens)
        head, left, tail = spread.split(part // 2, part - part // 2)
        self.take(head, tail)
        self.take_whole(small)
        if left.size:
            del self.taken[:2]
            self.tokens, self.work = self.tokens + part, self.work + head.work + tail.work
            left = self.take_borders(spread)
        if self.work - self.rest.lightest(self.tokens) <= self.allowed:
            self.fill(self.tokens)
        else:
            self.take_ends()
        return left if left.size else None

    def take_whole(self, small: float) -> None:
        """Takes whole pieces, heavy ones first, as long as the lightest can then fill up the tokens."""
        rest, i = self.rest, len(self.rest.pieces)
        while i and self.work - rest.lightest(self.tokens) > self.allowed:
            i -= 1
            piece = rest.pieces[i]
            tokens, work = self.tokens - piece.size, self.work - piece.work
            if _pairs(0, piece.last) < small * self.share or rest.tokens[i] - rest.tokens[0] < tokens:
                break
            if tokens >= 0 and rest.lightest(tokens) <= work + self.allowed:
                self.take(rest.remove(i))

    def take_borders(self, spread: _Piece) -> _Piece:
        """Takes as much of the end of a piece as makes the work right, and as much of its beginning.

        So every rank owns a part of the keys that all of them need. The lightest of the rest fill up the tokens.
        """

        def head_and_filling(tail: int) -> tuple[int, int]:
            head = min(tail, self.tokens - tail, spread.size - tail)
            filling = min(self.tokens - tail - head, self.rest.size())
            return self.tokens - tail - filling, filling

        def work(tail: int) -> int:
            head, filling = head_and_filling(tail)
            first, _, last = spread.split(head, tail)
            return first.work + last.work + self.rest.lightest(filling)

        most = min(self.tokens, spread.size)
        tail = bisect_left(range(most), self.work, key=work)
        head, filling = head_and_filling(tail)
        first, left, last = spread.split(head, tail)
        self.take(first, last)
        # Where all of it is not work enough, the caller looks for more.
        self.fill(filling if tail < most else 0)
        return left

    def take_ends(self) -> None:
        """Takes the heaviest and the lightest tokens, so many of each that the work is right."""
        rest, tokens, size = self.rest, self.tokens, self.rest.size()
        total = rest.lightest(size)
        heavy = bisect_left(
            range(tokens), self.work, key=lambda n: total - rest.lightest(size - n) + rest.lightest(tokens - n)
        )
        self.take(*rest.pop(tokens - heavy))
        self.rest = _Rest(rest.pop(size - tokens))
        self.take(*rest.pieces)

    def fill(self, tokens: int) -> None:
        """Takes the lightest tokens."""
        self.take(*self.rest.pop(tokens))
        if self.rest.pieces:
            self.rest.add(self.rest.remove(0))


def _pairs(first: int, last: int) -> int:
    """Query-key pairs of the queries first to last - 1 of a document."""
    return (last * (last + 1) - first * (first + 1)) // 2
