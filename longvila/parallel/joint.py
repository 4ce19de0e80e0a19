"""A layout chosen for balance and bytes together.

Spreading every document over all ranks balances any row, but sends most of its keys; leaving documents whole sends
nothing, but their work is lumpy. Between the two lie many layouts with equal tokens on every rank. A handful of them
are made here by two rules, and the one that sends least is taken among those whose work and replayed time stay within
`LIMIT` of ideal; where none does, the one with the least replayed time.

- `spread`: a document whose work exceeds a fraction of a rank's share is zigzagged over just as many ranks as bring it
  below; the others stay whole, on the least loaded rank with room. The fraction is scanned.
- `fill`: ranks are filled one after the other. Each takes whole documents, heaviest first, while the rest can still
  bring it to its share of tokens and work; then late and early tokens of the longest one, in just the amount that the
  lightest tokens left complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from longvila.parallel.blocks import Mask, Span
from longvila.parallel.layout import join_spans
from longvila.parallel.plan import Plan
from longvila.parallel.replay import Shape, predict

LIMIT = 1.045
"""Work of the busiest rank / mean, and time / ideal."""
FRACTIONS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03)
TOLERANCE = 0.02
"""How far from its share of work `fill` may leave a rank, as a part of that share."""
REPLAYED_RANKS = 96
"""Ranks replayed at most in all: every candidate on up to 8 ranks, fewer on many, where replaying takes its time."""
RANKS_OF_A_NODE = 8
SHAPE = Shape(heads=32, kv_heads=8, head_dim=128)
"""What is replayed: layouts do not depend on the model, so that all its layers share one."""

Spans = tuple[tuple[Span, ...], ...]
Rest = tuple[int, int, int]
"""(start, stop, document): tokens of a document that have no owner yet."""


def joint(lengths: Sequence[int], parts: int) -> Spans:
    """Few bytes at equal tokens (within one) and, wherever a candidate has it, work and time within `LIMIT` of ideal.

    Args:
        lengths: tokens of each document, at least 1.
        parts: context ranks.

    Returns:
        The row spans of each rank.
    """
    lengths = tuple(lengths)
    made = {fill(lengths, parts), *(spread(lengths, parts, fraction) for fraction in FRACTIONS)}
    share = sum(_work(0, length) for length in lengths) / parts
    costed = sorted((keys_sent(spans, lengths), imbalance(spans, lengths) / share, spans) for spans in made)
    balanced = [entry for entry in costed if entry[1] <= LIMIT] or [min(costed, key=lambda entry: entry[1])]
    if balanced[0][0] == 0:
        return balanced[0][2]
    inner = RANKS_OF_A_NODE if parts % RANKS_OF_A_NODE == 0 else parts
    replayed = []
    for _, _, spans in balanced[: max(3, REPLAYED_RANKS // parts)]:
        makespan = predict(Plan(lengths, spans, inner, parts // inner), Mask(), SHAPE).makespan
        if makespan <= LIMIT:
            return spans
        replayed.append((makespan, spans))
    return min(replayed)[1]


def keys_sent(spans: Spans, lengths: Sequence[int]) -> int:
    """Tokens whose keys travel: of each document, all before a rank's last query that are not its own."""
    sent = 0
    for owned in _by_document(spans, lengths):
        sent += sum(max(stop for _, stop in pieces) - sum(b - a for a, b in pieces) for pieces in owned.values())
    return sent


def imbalance(spans: Spans, lengths: Sequence[int]) -> int:
    """Query-key pairs of the busiest rank."""
    work = [0] * len(spans)
    for owned in _by_document(spans, lengths):
        for rank, pieces in owned.items():
            work[rank] += sum(_work(*piece) for piece in pieces)
    return max(work)


def spread(lengths: Sequence[int], parts: int, fraction: float) -> Spans:
    """Long documents over just as many ranks as bring their work below `fraction` of a rank's share, others whole."""
    row = _Row(lengths, parts)
    share = fraction * sum(_work(0, length) for length in lengths) / parts
    for document in sorted(range(len(lengths)), key=lambda document: (-lengths[document], document)):
        length = lengths[document]
        for count in range(min(parts, max(1, -int(-_work(0, length) // share))), parts + 1):
            least = [rank for rank in row.least_loaded() if row.room[rank] * count >= length + 2 * count * (count > 1)]
            if len(least) >= count:
                cuts = [length * i // (2 * count) for i in range(2 * count + 1)]
                for i, rank in enumerate(sorted(least[:count])):
                    row.give(rank, document, cuts[i], cuts[i + 1])
                    row.give(rank, document, cuts[2 * count - 1 - i], cuts[2 * count - i])
                break
        else:  # no room for equal pieces any more: fill up what there is
            start = 0
            for rank in row.least_loaded():
                stop = min(length, start + row.room[rank])
                row.give(rank, document, start, stop)
                start = stop
    return row.spans()


def fill(lengths: Sequence[int], parts: int) -> Spans:
    """Rank after rank to its share of tokens and work, from whole documents and the ends of one."""
    row = _Row(lengths, parts)
    left = [(0, length, document) for document, length in enumerate(lengths)]
    for rank in range(parts):
        left = sorted(_nonempty(left), key=lambda rest: (rest[1] - rest[0], rest[2]))
        tokens_left = sum(stop - start for start, stop, _ in left)
        target = sum(_work(start, stop) for start, stop, _ in left) * row.room[rank] / max(1, tokens_left)
        slack = TOLERANCE * target
        while row.room[rank] and target - row.work[rank] - _lightest(left, row.room[rank]) > slack:
            wanted = target - row.work[rank]
            for index in reversed(range(len(left))):
                start, stop, document = left[index]
                rest, others = row.room[rank] - (stop - start), left[:index] + left[index + 1 :]
                whole = _work(start, stop)
                if rest < 0 or whole <= slack or whole + _lightest(others, rest) > wanted + slack:
                    continue
                if whole + _heaviest(others, rest) >= wanted - slack:
                    row.give(rank, document, start, stop)
                    left = others
                    break
            else:
                start, stop, document = left.pop()
                late, early = _ends(left, (start, stop, document), row.room[rank], wanted)
                row.give(rank, document, stop - late, stop)
                row.give(rank, document, start, start + early)
                left += _nonempty([(start + early, stop - late, document)])
                break
        for index, (start, stop, document) in enumerate(left):
            count = min(row.room[rank], stop - start)
            row.give(rank, document, start, start + count)
            left[index] = (start + count, stop, document)
    return row.spans()


def _ends(others: list[Rest], longest: Rest, room: int, wanted: float) -> tuple[int, int]:
    """How many late, and how many early tokens of `longest` to take: as many of each as there can be, and just so many
    that the lightest tokens left complete the work."""
    start, stop, document = longest

    def early(late: int) -> int:
        return max(0, min(late, room - late, stop - start - late))

    def work(late: int) -> int:
        taken = _work(stop - late, stop) + _work(start, start + early(late))
        return taken + _lightest([*others, (start + early(late), stop - late, document)], room - late - early(late))

    low, high = 0, min(room, stop - start)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if work(middle) < wanted else (low, middle)
    return low, early(low)


def _nonempty(left: Sequence[Rest]) -> list[Rest]:
    return [rest for rest in left if rest[0] < rest[1]]


def _lightest(left: Sequence[Rest], tokens: int) -> int:
    """Work of `tokens` tokens from the beginnings of documents, shortest first."""
    work = 0
    for start, stop, _ in left:
        count = min(tokens, stop - start)
        work += _work(start, start + count)
        tokens -= count
    return work


def _heaviest(left: Sequence[Rest], tokens: int) -> int:
    """Work of `tokens` tokens from the ends of documents, longest first."""
    work = 0
    for start, stop, _ in reversed(left):
        count = min(tokens, stop - start)
        work += _work(stop - count, stop)
        tokens -= count
    return work


class _Row:
    """Who owns what so far, and how many tokens each rank may still take."""

    def __init__(self, lengths: Sequence[int], parts: int) -> None:
        total = sum(lengths)
        self.room = [total * (rank + 1) // parts - total * rank // parts for rank in range(parts)]
        self.work = [0] * parts
        self._starts = [0, *accumulate(lengths)]
        self._spans: list[list[Span]] = [[] for _ in range(parts)]

    def give(self, rank: int, document: int, start: int, stop: int) -> None:
        """Tokens `start` to `stop` of a document become `rank`'s."""
        if start < stop:
            self._spans[rank].append((self._starts[document] + start, self._starts[document] + stop))
            self.room[rank] -= stop - start
            self.work[rank] += _work(start, stop)

    def least_loaded(self) -> list[int]:
        return sorted(range(len(self.room)), key=lambda rank: (self.work[rank], -self.room[rank], rank))

    def spans(self) -> Spans:
        return tuple(join_spans(sorted(owned), set(self._starts)) for owned in self._spans)


def _by_document(spans: Spans, lengths: Sequence[int]) -> list[dict[int, list[Span]]]:
    """For each document, the pieces of each rank that has any, as positions in the document."""
    starts = [0, *accumulate(lengths)]
    found: list[dict[int, list[Span]]] = [{} for _ in lengths]
    document_at = {start: document for document, start in enumerate(starts[:-1])}
    pieces = sorted((start, stop, rank) for rank, owned in enumerate(spans) for start, stop in owned)
    document = 0
    for start, stop, rank in pieces:
        document = document_at.get(start, document)
        found[document].setdefault(rank, []).append((start - starts[document], stop - starts[document]))
    return found


def _work(start: int, stop: int) -> int:
    """Query-key pairs of the queries `start` to `stop` of a document."""
    return (stop * (stop + 1) - start * (start + 1)) // 2
