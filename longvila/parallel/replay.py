"""Predicts what a plan costs, without running it: time by replaying every rank's program, and bytes, which are exact.

Times are a model: compute at a stated rate, messages at stated link speeds, one at a time each way on a link, in the
order in which they are posted; a rank waits for its next step's inputs alone. Bytes are those the executor sends, and a
benchmark counts them there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from longvila.parallel.blocks import Mask
from longvila.parallel.plan import Plan, Program, Transfer


class Shape(NamedTuple):
    """Attention of one layer on one rank."""

    heads: int
    kv_heads: int
    head_dim: int
    element: int = 2
    """Bytes of a number in q, k and v."""

    @property
    def exact(self) -> int:
        """Bytes of a number in partial results: fp32, or fp64 for fp64."""
        return max(4, self.element)

    def of_head_rank(self, ranks: int) -> Shape:
        """The busiest of `ranks` head ranks: where heads do not divide, some have one more."""
        heads = -(-self.heads // ranks)
        group = self.heads // self.kv_heads
        kv_heads = max(1, -(-heads // group))
        # A cut through a group of query heads gives each of them a key head of its own (`FoldedPlan._scatter_heads`).
        return Shape(heads, kv_heads if heads % kv_heads == 0 else heads, self.head_dim, self.element)


@dataclass(frozen=True)
class ModelAttention:
    """What attention of a whole model is like."""

    shape: Shape
    masks: tuple[Mask, ...]
    """Of each layer."""


@dataclass(frozen=True)
class Machine:
    """Speeds of the model."""

    flops: float = 150e12
    """Attention's rate on one rank, per second."""
    inner: float = 200e9
    outer: float = 25e9
    """Bytes per second each way between ranks of one inner ring, and between rings."""


@dataclass(frozen=True)
class Prediction:
    """What one attention layer costs, forward and backward."""

    seconds: float
    ideal: float
    """Seconds if all work were spread evenly and nothing were waited for."""
    work: tuple[int, ...]
    """Query-key pairs of each context rank."""
    bytes: Counter[str]
    """Bytes that all context ranks send, by link."""

    @property
    def imbalance(self) -> float:
        """Work of the busiest rank / mean."""
        return max(self.work) * len(self.work) / max(1, sum(self.work))

    @property
    def makespan(self) -> float:
        """Time / ideal time."""
        return self.seconds / self.ideal if self.ideal else 1.0


def fetch_bytes(transfer: Transfer, shape: Shape, backward: bool) -> int:
    """Bytes of one message of keys and values, or of queries, in one pass."""
    if transfer.cargo == "keys":
        return transfer.num_tokens * 2 * shape.kv_heads * shape.head_dim * shape.element
    tensors = 3 if backward else 1  # the gradient of the output, the queries and the output; the log-sum-exp
    per_head = tensors * shape.head_dim * shape.element + (shape.exact if backward else 0)
    return transfer.num_tokens * shape.heads * per_head


def return_bytes(transfer: Transfer, shape: Shape, backward: bool) -> int:
    """Bytes of one message of results, in one pass."""
    if transfer.cargo == "keys":
        return transfer.num_tokens * 2 * shape.kv_heads * shape.head_dim * shape.exact if backward else 0
    per_head = shape.head_dim + (0 if backward else 1)  # gradients of queries; outputs with their log-sum-exp
    return transfer.num_tokens * shape.heads * per_head * shape.exact


def sent_bytes(program: Program, shape: Shape) -> Counter[str]:
    """What one context rank sends in forward and backward, under the names that `traffic.counting` uses."""
    sent: Counter[str] = Counter()
    for backward in (False, True):
        for transfers, size in ((program.fetches, fetch_bytes), (program.returns, return_bytes)):
            for transfer in transfers:
                if transfer.source == program.rank and (number := size(transfer, shape, backward)):
                    sent[f"bytes {transfer.cargo} {transfer.link}"] += number
    return sent


def predict(plan: Plan, mask: Mask, shape: Shape, machine: Machine = Machine()) -> Prediction:
    """Time and bytes of one attention layer of `shape` (heads of one head rank) under `plan`."""
    programs = [plan.program(part, mask) for part in range(plan.parts)]
    work = tuple(sum(step.work for step in program.steps) for program in programs)
    sent: Counter[str] = Counter()
    for program in programs:
        for name, number in sent_bytes(program, shape).items():
            sent[name.rpartition(" ")[2]] += number
    seconds = sum(_Pass(programs, shape, machine, backward).run() for backward in (False, True))
    ideal = sum(_flops(shape, backward) for backward in (False, True)) * sum(work) / plan.parts / machine.flops
    return Prediction(seconds, ideal, work, sent)


def full_ring_bytes(num_tokens: int, parts: int, shape: Shape) -> int:
    """Bytes that all ranks of a plain ring send, forward and backward: K/V of P - 1 hops twice, dK/dV of P hops."""
    if parts == 1:
        return 0
    hop = num_tokens * 2 * shape.kv_heads * shape.head_dim  # of all ranks together
    return hop * (2 * (parts - 1) * shape.element + parts * shape.exact)


def _flops(shape: Shape, backward: bool) -> int:
    """For each query-key pair: two products forward, five backward (FlashAttention-2, section 4.1)."""
    return (10 if backward else 4) * shape.heads * shape.head_dim


class _Pass:
    """One forward or backward pass of all ranks, replayed in order of steps."""

    def __init__(self, programs: list[Program], shape: Shape, machine: Machine, backward: bool) -> None:
        self._programs, self._shape, self._machine, self._backward = programs, shape, machine, backward
        self._clock = [0.0] * len(programs)
        self._fetches = _by_step_posted(program.fetches for program in programs)
        self._returns = _by_step_posted(program.returns for program in programs)
        self._steps: dict[int, list[tuple[int, int]]] = defaultdict(list)
        """By step: (rank, query-key pairs)."""
        for program in programs:
            for step in program.steps:
                self._steps[step.index].append((program.rank, step.work))
        self._free: dict[tuple[str, str, int], float] = defaultdict(float)
        self._fetched: dict[int, list[tuple[int, float]]] = defaultdict(list)
        """By step: (rank, when its input is there)."""
        self._returned: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
        """By (rank, owner): (step posted, when it is there)."""

    def run(self) -> float:
        """Seconds until the last rank is done."""
        seconds_per_pair = _flops(self._shape, self._backward) / self._machine.flops
        for index in sorted({index for program in self._programs for index in program.indices}):
            for rank, arrival in self._fetched.pop(index, ()):
                self._clock[rank] = max(self._clock[rank], arrival)
            for transfer in self._fetches.get(index, ()):
                arrival = self._send(transfer, fetch_bytes(transfer, self._shape, self._backward))
                self._fetched[transfer.step].append((transfer.target, arrival))
            for rank, pairs in self._steps.get(index, ()):
                self._clock[rank] += seconds_per_pair * pairs
            returns = [t for t in self._returns.get(index, ()) if return_bytes(t, self._shape, self._backward)]
            for transfer in returns:  # what met on the way must be there before it is passed on
                for posted, arrival in self._returned.get((transfer.source, transfer.owner), ()):
                    if posted < index:
                        self._clock[transfer.source] = max(self._clock[transfer.source], arrival)
            for transfer in returns:
                arrival = self._send(transfer, return_bytes(transfer, self._shape, self._backward))
                self._returned[transfer.target, transfer.owner].append((index, arrival))
        for (rank, _), arrivals in self._returned.items():
            self._clock[rank] = max(self._clock[rank], *(arrival for _, arrival in arrivals))
        return max(self._clock)

    def _send(self, transfer: Transfer, size: int) -> float:
        """When a message is there that both ends have posted by now."""
        ends = [("out", transfer.link, transfer.source), ("in", transfer.link, transfer.target)]
        begin = max(self._clock[transfer.source], self._clock[transfer.target], *(self._free[end] for end in ends))
        arrival = begin + size / (self._machine.inner if transfer.link == "inner" else self._machine.outer)
        for end in ends:
            self._free[end] = arrival
        return arrival


def _by_step_posted(transfers: Iterable[Sequence[Transfer]]) -> dict[int, list[Transfer]]:
    """Transfers of all ranks, each once, by the step at which they are posted, in order."""
    found: dict[int, list[Transfer]] = defaultdict(list)
    for transfer in sorted({t for of_rank in transfers for t in of_rank}, key=lambda t: (t.step, t.source, t.owner)):
        found[transfer.posted].append(transfer)
    return found
