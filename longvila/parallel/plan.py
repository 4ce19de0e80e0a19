"""The plan of one packed row: who owns which token, which attention tasks run where, and what is sent to whom.

Every rank computes the same immutable plan from the document lengths and the sizes of the attention fold; the executor
(`attention.py`) only carries it out. Pure integers, no torch. Two kinds of offsets occur: row positions (spans of the
layout) and local offsets (index into the tokens that one context rank holds, in ascending row order).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from longvila.config import LayoutName
from longvila.errors import ConfigError, DataError
from longvila.parallel.layout import LAYOUTS, Span


@dataclass(frozen=True)
class Task:
    """One kernel call: queries `q` against keys `k`; `causal` only for a square block on the diagonal."""

    q: Span
    """Local offsets on the rank that runs the task."""
    k: Span
    """Offsets into the keys at hand: the rank's own, or the block received from `source`, in the order sent."""
    causal: bool

    @property
    def work(self) -> int:
        """Query-key pairs computed."""
        rows, columns = self.q[1] - self.q[0], self.k[1] - self.k[0]
        return rows * (rows + 1) // 2 if self.causal else rows * columns


@dataclass(frozen=True)
class Plan:
    """Causal attention within each document of a row, over `parts` context ranks x `head` head ranks.

    With `c` a context rank: `spans[c]` are the row spans it owns; `tasks[c][s]` the tasks it runs on keys of context
    rank `s`; `sends[s][c]` the local spans of its keys that `s` sends to `c` (empty where nothing is needed).
    """

    lengths: tuple[int, ...]
    parts: int
    head: int
    layout: LayoutName
    spans: tuple[tuple[Span, ...], ...]
    tasks: tuple[tuple[tuple[Task, ...], ...], ...]
    sends: tuple[tuple[tuple[Span, ...], ...], ...]

    def num_tokens(self, part: int) -> int:
        """Tokens of one context rank."""
        return _size(self.spans[part])

    def rank_tokens(self, part: int) -> tuple[int, ...]:
        """Tokens of each head rank of a context rank, outside attention (contiguous pieces of the local order)."""
        total = self.num_tokens(part)
        return tuple(total * (h + 1) // self.head - total * h // self.head for h in range(self.head))

    def positions(self, part: int, head: int) -> list[int]:
        """Row positions of the tokens that rank (part, head) owns outside attention, ascending."""
        local = [position for start, stop in self.spans[part] for position in range(start, stop)]
        total = len(local)
        return local[total * head // self.head : total * (head + 1) // self.head]

    def work(self) -> tuple[int, ...]:
        """Query-key pairs of each context rank."""
        return tuple(sum(task.work for tasks in by_source for task in tasks) for by_source in self.tasks)


@lru_cache(maxsize=256)
def make_plan(lengths: tuple[int, ...], parts: int, head: int = 1, layout: LayoutName = "document_zigzag") -> Plan:
    """Plans causal attention over packed documents.

    Args:
        lengths: tokens of each document, in row order.
        parts: context ranks (inner x outer).
        head: head ranks that share each context rank's tokens.
        layout: a name in `layout.LAYOUTS`.

    Raises:
        DataError: for an empty row or an empty document.
        ConfigError: for an unknown layout or a size below 1.
    """
    if not lengths:
        raise DataError("a row needs at least one document")
    if min(lengths) < 1:
        raise DataError(
            f"document {lengths.index(min(lengths))} of the row has {min(lengths)} tokens; at least 1 needed"
        )
    if parts < 1 or head < 1:
        raise ConfigError(f"an attention fold needs sizes of at least 1, not {parts} context x {head} head ranks")
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout '{layout}'; there is {', '.join(sorted(LAYOUTS))}")
    spans = LAYOUTS[layout](lengths, parts)
    tasks: list[list[tuple[Task, ...]]] = []
    sends: list[list[tuple[Span, ...]]] = [[() for _ in range(parts)] for _ in range(parts)]
    ends = list(accumulate(lengths))
    for c in range(parts):
        tasks.append([])
        for s in range(parts):
            needed, found = _tasks(_local(spans[c], ends), _local(spans[s], ends), own=c == s)
            tasks[c].append(found)
            sends[s][c] = () if c == s else needed
    return Plan(lengths, parts, head, layout, spans, tuple(tuple(t) for t in tasks), tuple(tuple(s) for s in sends))


@dataclass(frozen=True)
class _Piece:
    """A span with the document it belongs to and where it begins among its rank's tokens."""

    document: int
    start: int
    stop: int
    offset: int


def _local(spans: Sequence[Span], ends: Sequence[int]) -> list[_Piece]:
    pieces, offset = [], 0
    for start, stop in spans:
        pieces.append(_Piece(bisect_right(ends, start), start, stop, offset))
        offset += stop - start
    return pieces


def _tasks(queries: list[_Piece], keys: list[_Piece], own: bool) -> tuple[tuple[Span, ...], tuple[Task, ...]]:
    """The local key spans that `queries` need from `keys`, and the tasks over those keys packed end to end."""
    by_document: dict[int, list[_Piece]] = {}
    for key in keys:
        by_document.setdefault(key.document, []).append(key)
    wanted = [
        (query, [key for key in by_document.get(query.document, ()) if key.start < query.stop]) for query in queries
    ]
    needed = sorted({(key.offset, key.offset + key.stop - key.start) for _, visible in wanted for key in visible})
    # Own keys are used where they lie; received ones lie packed, in the order of `needed`.
    packed, total = {}, 0
    for start, stop in needed:
        packed[start] = start if own else total
        total += stop - start
    tasks: list[Task] = []
    for query, visible in wanted:
        q = (query.offset, query.offset + query.stop - query.start)
        for key in visible:
            at = packed[key.offset]
            task = Task(q, (at, at + key.stop - key.start), causal=key.start == query.start)
            # Neighbouring rectangles become one call: along the keys, or along the queries.
            last = tasks[-1] if tasks else None
            if last and not last.causal and not task.causal and last.q == q and last.k[1] == at:
                tasks[-1] = Task(q, (last.k[0], task.k[1]), causal=False)
            elif last and not last.causal and not task.causal and last.k == task.k and last.q[1] == q[0]:
                tasks[-1] = Task((last.q[0], q[1]), last.k, causal=False)
            else:
                tasks.append(task)
    return tuple(needed), tuple(tasks)


def _size(spans: Sequence[Span]) -> int:
    return sum(stop - start for start, stop in spans)
