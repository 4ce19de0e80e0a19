"""The plan of one packed row: who owns which token, which attention tasks run where and when, and what is sent to whom.

Every rank computes the same plan from the document lengths and the sizes of the attention fold; the executor
(`attention.py`) only carries it out, and `replay.py` predicts its time and bytes. Pure integers, no torch. Two kinds of
offsets occur: row positions (spans of the layout) and local offsets (index into the tokens that one context rank holds,
in ascending row order).

Context rank c = o x inner + i meets every other rank once, at the step `meeting_step` says: at step t = to x inner + ti
the ranks `to` windows and `ti` places before it. Each step is a permutation of the ranks, so that a step's transfers
never share a link's end.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple

from longvila.errors import ConfigError, DataError
from longvila.parallel.blocks import Block, Mask, Span, join_squares, visible_blocks

Link = Literal["inner", "outer"]
Cargo = Literal["keys", "queries"]


@dataclass(frozen=True)
class Transfer:
    """A message between two context ranks: the keys and values, or the queries, of some of `owner`'s tokens.

    What comes of them travels as a transfer too: gradients of keys, and what a helper computed for queries.
    """

    cargo: Cargo
    owner: int
    source: int
    target: int
    spans: tuple[Span, ...]
    """Local offsets of `owner`."""
    link: Link
    posted: int
    """The step at which both ends post it, so that both post their messages in one order."""
    step: int
    """The step at which the target needs it."""

    @property
    def num_tokens(self) -> int:
        return count_tokens(self.spans)


@dataclass(frozen=True)
class Step:
    """What one rank computes with the tokens of `owner`: its own queries on the keys of `owner`, or (helping) the
    queries of `owner` on its own keys.

    Offsets in `tasks` are local on the side that is the rank's own, and into what was received on the other: the
    transfer's spans laid end to end.
    """

    index: int
    owner: int
    cargo: Cargo
    tasks: tuple[Block, ...]

    @property
    def work(self) -> int:
        """Query-key pairs."""
        return sum(task.work for task in self.tasks)

    @cached_property
    def launches(self) -> tuple[Block, ...]:
        """The tasks as kernels are called for them."""
        return tuple(join_squares(self.tasks))


@dataclass(frozen=True)
class Program:
    """All that one context rank does in one attention call, in order of steps."""

    rank: int
    steps: tuple[Step, ...]
    fetches: tuple[Transfer, ...]
    """Keys and queries that this rank sends or receives, in the order in which they are posted."""
    returns: tuple[Transfer, ...]
    """What it sends or receives of results: gradients of keys (backward only), and answers of helpers (both ways)."""

    @cached_property
    def indices(self) -> tuple[int, ...]:
        """The steps at which this rank does anything, ascending."""
        moves = [*self.fetches, *self.returns]
        return tuple(sorted({s.index for s in self.steps} | {t.posted for t in moves} | {t.step for t in self.fetches}))

    @cached_property
    def last_uses(self) -> dict[tuple[Cargo, int], int]:
        """Keys and queries of other ranks, by cargo and owner: the last step at which they are read or passed on."""
        last: dict[tuple[Cargo, int], int] = {}
        for step in self.steps:
            last[step.cargo, step.owner] = max(step.index, last.get((step.cargo, step.owner), 0))
        for transfer in self.fetches:
            if transfer.source == self.rank:
                key = (transfer.cargo, transfer.owner)
                last[key] = max(transfer.posted, last.get(key, 0))
        return {key: index for key, index in last.items() if key[1] != self.rank}

    def steps_at(self, index: int) -> list[Step]:
        """The step at `index`, if there is one."""
        return [step for step in self.steps if step.index == index]

    @property
    def only_launch(self) -> Block | None:
        """The kernel call that is all there is to do, if one is. It is over all its tokens: each sees itself."""
        if self.fetches or self.returns or len(self.steps) != 1 or len(self.steps[0].launches) != 1:
            return None
        return self.steps[0].launches[0]


class Plan:
    """Attention inside each document of a row, over `outer` x `inner` context ranks and `head` head ranks. Immutable.

    Programs are worked out when first asked for, and kept.

    Args:
        lengths: tokens of each document, in row order.
        spans: row spans that each of the inner x outer context ranks owns, ascending.
        inner, outer, head: sizes of the fold.
        relay: pass whole blocks on from neighbour to neighbour: a ring, or with outer > 1 a double ring (LoongTrain,
            section 4.2). Otherwise only what is needed is sent, straight to whom it serves.
        helpers: early ranks compute for late ones (LightSeq).
        tensor: ranks that bring their tokens to attention together, each some heads of all of them.

    Raises:
        DataError: for an empty row or an empty document.
        ConfigError: for a size below 1, or helpers in a relay.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        spans: tuple[tuple[Span, ...], ...],
        inner: int = 1,
        outer: int = 1,
        head: int = 1,
        relay: bool = False,
        helpers: bool = False,
        tensor: int = 1,
    ) -> None:
        check_row(lengths, inner, outer, head, tensor)
        if relay and helpers:
            raise ConfigError("queries that go to helpers cannot be carried by a relay; use routing=direct")
        self.lengths, self.spans, self.inner, self.outer, self.head = lengths, spans, inner, outer, head
        self.relay, self.helpers, self.tensor = relay, helpers, tensor
        self.parts = inner * outer
        ends = list(accumulate(lengths))
        self._pieces = [_pieces(owned, ends) for owned in spans]
        self._documents = [[piece.document for piece in pieces] for pieces in self._pieces]
        self._found: dict[tuple[int, int, Mask], Step | None] = {}
        self._pairs: dict[tuple[int, int, Mask], _Pair] = {}
        self._programs: dict[tuple[int, Mask], Program] = {}

    @property
    def identity(self) -> tuple[object, ...]:
        """What must be equal on all ranks of a sequence group: everything follows from it."""
        return self.lengths, self.spans, self.inner, self.outer, self.head, self.relay, self.helpers, self.tensor

    def num_tokens(self, part: int) -> int:
        """Tokens of one context rank."""
        return count_tokens(self.spans[part])

    def rank_tokens(self, part: int) -> tuple[int, ...]:
        """Tokens that each head rank of a context rank brings to attention (contiguous pieces of the local order)."""
        return tuple(sum(self.tensor_tokens(part, head)) for head in range(self.head))

    def tensor_tokens(self, part: int, head: int) -> tuple[int, ...]:
        """Of those of a head rank, the tokens that each rank of its tensor group owns."""
        total, pieces = self.num_tokens(part), self.head * self.tensor
        first = head * self.tensor
        return tuple(total * (i + 1) // pieces - total * i // pieces for i in range(first, first + self.tensor))

    def positions(self, part: int, piece: int) -> list[int]:
        """Row positions of the tokens that a rank owns outside attention, ascending.

        Args:
            piece: head rank x tensor + tensor rank.
        """
        local = [position for start, stop in self.spans[part] for position in range(start, stop)]
        total, pieces = len(local), self.head * self.tensor
        return local[total * piece // pieces : total * (piece + 1) // pieces]

    def program(self, rank: int, mask: Mask = Mask()) -> Program:
        """What context rank `rank` does under `mask`."""
        key = (rank, mask)
        if key not in self._programs:
            self._programs[key] = self._relay(rank, mask) if self.relay else self._direct(rank, mask)
        return self._programs[key]

    def meeting_step(self, rank: int, owner: int) -> int:
        """The step at which `rank` and `owner`'s tokens meet."""
        windows = (rank // self.inner - owner // self.inner) % self.outer
        return windows * self.inner + (rank - owner) % self.inner

    def link(self, one: int, other: int) -> Link:
        """Ranks of one inner ring are joined by fast links."""
        return "inner" if one // self.inner == other // self.inner else "outer"

    def _pair(self, queries: int, keys: int, mask: Mask) -> _Pair:
        key = (queries, keys, mask)
        if key not in self._pairs:
            self._pairs[key] = _pair(self._pieces[queries], self._pieces[keys], self._documents[keys], mask)
        return self._pairs[key]

    def _helps(self, queries: int, keys: int, mask: Mask) -> bool:
        """Whether the keys' owner computes this pair: LightSeq's rule (Li et al. 2023, section 3.2)."""
        # In the plain schedule, rank p works on its own chunk and on those of the p ranks before it, so that early
        # ranks fall idle. Pairs more than half the ranks apart are theirs.
        return self.helpers and mask.causal and queries - keys > self.parts // 2

    def _step(self, rank: int, owner: int, mask: Mask) -> Step | None:
        """What `rank` computes with `owner`'s tokens, if anything."""
        key = (rank, owner, mask)
        if key not in self._found:
            self._found[key] = self._make_step(rank, owner, mask)
        return self._found[key]

    def _make_step(self, rank: int, owner: int, mask: Mask) -> Step | None:
        index = self.meeting_step(rank, owner)
        whole = rank == owner or self.relay
        if tasks := self._pair(rank, owner, mask).tasks_on_keys(whole):
            if not self._helps(rank, owner, mask):
                return Step(index, owner, "keys", tasks)
        elif self._helps(owner, rank, mask) and (tasks := self._pair(owner, rank, mask).tasks_on_queries()):
            return Step(index, owner, "queries", tasks)
        return None

    def _steps(self, rank: int, mask: Mask) -> tuple[Step, ...]:
        found = [step for owner in range(self.parts) if (step := self._step(rank, owner, mask))]
        return tuple(sorted(found, key=lambda step: step.index))

    def _direct(self, rank: int, mask: Mask) -> Program:
        """All is posted at once, and each result returned as soon as it is there."""
        steps = self._steps(rank, mask)
        meetings = [(rank, step) for step in steps if step.owner != rank]
        for other in range(self.parts):
            if other != rank and (step := self._step(other, rank, mask)):
                meetings.append((other, step))
        fetches, returns = [], []
        for worker, step in meetings:
            if step.cargo == "keys":
                spans = self._pair(worker, step.owner, mask).keys
            else:
                spans = self._pair(step.owner, worker, mask).queries
            link = self.link(worker, step.owner)
            there = Transfer(step.cargo, step.owner, step.owner, worker, spans, link, 0, step.index)
            back = Transfer(step.cargo, step.owner, worker, step.owner, spans, link, step.index, self.parts)
            fetches.append(there)
            returns.append(back)
        return Program(rank, steps, _in_order(fetches), _in_order(returns))

    def _relay(self, rank: int, mask: Mask) -> Program:
        """Blocks travel round the inner ring; at each window's end the next one's have come by the outer ring."""
        fetches, returns = [], []
        for owner in range(self.parts):
            path = self._path(owner, mask)
            fetches += [hop for hop in path.hops if rank in (hop.source, hop.target)]
            returns += [hop for hop in path.homeward if rank in (hop.source, hop.target)]
        return Program(rank, self._steps(rank, mask), _in_order(fetches), _in_order(returns))

    def _path(self, owner: int, mask: Mask) -> _Path:
        """How one block travels: as far as somebody needs it, and its gradients behind it."""
        home_window, place = divmod(owner, self.inner)
        spans = ((0, self.num_tokens(owner)),) if self.num_tokens(owner) else ()
        needed = [
            self.meeting_step(rank, owner)
            for rank in range(self.parts)
            if rank != owner and self._pair(rank, owner, mask).tasks
        ]
        hops, homeward = [], []

        def hop(into: list[Transfer], source: int, target: int, posted: int, step: int) -> None:
            link = self.link(source, target)
            into.append(Transfer("keys", owner, source, target, spans, link, posted, step))

        last = max(needed, default=0)
        if not spans or not needed:
            return _Path((), ())
        num_windows = last // self.inner + 1
        for window in range(num_windows):
            first = (home_window + window) % self.outer * self.inner
            # As many ranks of this window as there are in need, counted from the block's entry.
            inside = [step - window * self.inner for step in needed if step // self.inner == window]
            reach = max(inside, default=0)
            ranks = [first + (place + i) % self.inner for i in range(reach + 1)]
            begin = window * self.inner
            if window + 1 < num_windows:
                entry = (first + self.inner) % self.parts + place
                hop(hops, ranks[0], entry, begin, begin + self.inner)
            for i in range(reach):
                hop(hops, ranks[i], ranks[i + 1], begin + i, begin + i + 1)
                hop(homeward, ranks[i], ranks[i + 1], begin + i, begin + i + 1)
            if reach:
                hop(homeward, ranks[-1], ranks[0], begin + reach, begin + self.inner)
            end = begin + self.inner
            if window + 1 < num_windows:
                hop(homeward, ranks[0], (first + self.inner) % self.parts + place, end, end + self.inner)
            elif window:
                hop(homeward, ranks[0], owner, end, end + self.inner)
        return _Path(tuple(hops), tuple(homeward))


def check_row(lengths: tuple[int, ...], inner: int, outer: int, head: int, tensor: int = 1) -> None:
    """Raises where there is nothing to plan: DataError for an empty row or document, ConfigError for an empty axis."""
    if not lengths:
        raise DataError("a row needs at least one document")
    if min(lengths) < 1:
        raise DataError(
            f"document {lengths.index(min(lengths))} of the row has {min(lengths)} tokens; at least 1 needed"
        )
    if min(inner, outer, head, tensor) < 1:
        raise ConfigError(
            f"a fold needs sizes of at least 1, not outer {outer} x inner {inner} x head {head} x tensor {tensor}"
        )


def count_tokens(spans: Sequence[Span]) -> int:
    """Tokens in spans that do not overlap."""
    return sum(stop - start for start, stop in spans)


@dataclass(frozen=True)
class _Path:
    hops: tuple[Transfer, ...]
    homeward: tuple[Transfer, ...]


@dataclass(frozen=True)
class _Pair:
    """What the queries of one rank need of the keys of another, in local offsets of each."""

    tasks: tuple[Block, ...]
    keys: tuple[Span, ...]
    """Key spans needed, ascending."""
    queries: tuple[Span, ...]
    """Query spans that need any."""

    def tasks_on_keys(self, whole: bool) -> tuple[Block, ...]:
        """Tasks with offsets into the needed keys laid end to end, or into all keys of their rank (`whole`)."""
        if whole:
            return self.tasks
        return _packed(self.tasks, self.keys, "k")

    def tasks_on_queries(self) -> tuple[Block, ...]:
        """Tasks with offsets into the needed queries laid end to end, and keys where they lie."""
        return _packed(self.tasks, self.queries, "q")


def _packed(tasks: tuple[Block, ...], spans: tuple[Span, ...], side: Literal["q", "k"]) -> tuple[Block, ...]:
    starts = [start for start, _ in spans]
    shifts = [start - before for (start, _), before in zip(spans, _sizes_before(spans), strict=True)]

    def move(span: Span) -> Span:
        shift = shifts[bisect_right(starts, span[0]) - 1]
        return span[0] - shift, span[1] - shift

    if side == "k":
        return tuple(Block(task.q, move(task.k), task.kind) for task in tasks)
    return tuple(Block(move(task.q), task.k, task.kind) for task in tasks)


def _sizes_before(spans: Sequence[Span]) -> list[int]:
    return [0, *accumulate(stop - start for start, stop in spans)][:-1]


class _Piece(NamedTuple):
    """A span with the document it belongs to and where it begins among its rank's tokens."""

    document: int
    start: int
    stop: int
    offset: int


def _pieces(spans: Sequence[Span], ends: Sequence[int]) -> list[_Piece]:
    pieces, offset = [], 0
    for start, stop in spans:
        pieces.append(_Piece(bisect_right(ends, start), start, stop, offset))
        offset += stop - start
    return pieces


def _pair(queries: list[_Piece], keys: list[_Piece], documents: list[int], mask: Mask) -> _Pair:
    tasks: list[Block] = []
    for query in queries:
        begin, end = bisect_left(documents, query.document), bisect_right(documents, query.document)
        for key in keys[begin:end]:
            for block in visible_blocks((query.start, query.stop), (key.start, key.stop), mask):
                q, k = _shift(block.q, query.offset - query.start), _shift(block.k, key.offset - key.start)
                _add(tasks, Block(q, k, block.kind))
    return _Pair(tuple(tasks), _union([task.k for task in tasks]), _union([task.q for task in tasks]))


def _add(tasks: list[Block], task: Block) -> None:
    """Neighbouring rectangles become one call: along the keys, or along the queries."""
    last = tasks[-1] if tasks else None
    if last and last.kind == task.kind == "full":
        if last.q == task.q and last.k[1] == task.k[0]:
            tasks[-1] = Block(task.q, (last.k[0], task.k[1]), "full")
            return
        if last.k == task.k and last.q[1] == task.q[0]:
            tasks[-1] = Block((last.q[0], task.q[1]), task.k, "full")
            return
    tasks.append(task)


def _shift(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _union(spans: Sequence[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def _in_order(transfers: Sequence[Transfer]) -> tuple[Transfer, ...]:
    return tuple(sorted(transfers, key=lambda t: (t.posted, t.step, t.cargo, t.owner)))
