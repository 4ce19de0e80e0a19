"""What balance is worth in time: CPU seconds along the critical path of a naive ring and of a balanced one.

The critical path is the sum over steps of the slowest rank's CPU time, as if ranks waited for each other at each step.
CPU time of each process, one thread a rank, minimum over repeats: a shared machine's other load does not enter, though
its caches do, and what shares a core with a rank may slow it for seconds, wherefore rounds are taken apart. More ranks
than cores change nothing in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longvila.config import LayoutName, ParallelConfig
from longvila.parallel.attention import FoldedPlan
from longvila.parallel.choose import make_plan
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import run_ranks
from longvila.parallel.traffic import counting

HEADS, HEAD_DIM = 2, 64


@dataclass(frozen=True)
class StepTime:
    """Naive over balanced, one document, forward."""

    parts: int
    tokens: int
    naive_ms: float
    balanced_ms: float
    ratio: float
    theory: float
    """The same ratio of query-key pairs."""

    @property
    def error(self) -> float:
        """|measured / theory - 1|."""
        return abs(self.ratio / self.theory - 1)


def measure(parts: int, tokens: int = 8192, rounds: int = 5, repeats: int = 3) -> StepTime:
    """Contiguous against zigzag chunks, each rank's steps in its real executor, `repeats` times in each round."""
    by_layout: dict[str, float] = {}
    by_round = [run_ranks(_times, parts, parts, tokens, repeats, timeout=900) for _ in range(rounds)]
    for layout in ("contiguous", "zigzag"):
        of_ranks = [[one for rank in ranks for one in rank[layout]] for ranks in zip(*by_round, strict=True)]
        steps = [max(min(one[f"ns step {step}"] for one in found) for found in of_ranks) for step in range(parts)]
        by_layout[layout] = sum(steps) / 1e6
    naive, balanced = (_critical_work(tokens, parts, layout) for layout in ("contiguous", "zigzag"))
    return StepTime(
        parts, tokens, by_layout["contiguous"], by_layout["zigzag"],
        by_layout["contiguous"] / by_layout["zigzag"], naive / balanced,
    )  # fmt: skip


def _times(parts: int, tokens: int, repeats: int) -> dict[str, Sequence[Counter[str]]]:
    fold = make_fold(ParallelConfig(inner=parts), "cpu")
    found = {}
    for layout in ("contiguous", "zigzag"):
        folded = FoldedPlan(make_plan((tokens,), parts, layout=layout), fold)
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, HEADS, folded.num_tokens, HEAD_DIM) for _ in range(3))
        counters = []
        for _ in range(repeats + 1):
            with counting() as counter:
                folded.attend(q, k, v, HEAD_DIM**-0.5)
            counters.append(counter)
        found[layout] = counters[1:]  # the first one warms up
    return found


def _critical_work(tokens: int, parts: int, layout: LayoutName) -> int:
    plan = make_plan((tokens,), parts, layout=layout)
    work: Counter[int] = Counter()
    for part in range(parts):
        for step in plan.program(part).steps:
            work[step.index] = max(work[step.index], step.work)
    return sum(work.values())
