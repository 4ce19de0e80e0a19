"""How evenly layouts spread packed rows, and what they send: counted on plans, times replayed (a model)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from longvila.config import LayoutName
from longvila.parallel.blocks import Mask
from longvila.parallel.choose import make_plan
from longvila.parallel.plan import Plan
from longvila.parallel.replay import Machine, Shape, predict

TOKENS = 65_536
SHAPE = Shape(heads=32, kv_heads=8, head_dim=128)
MACHINE = Machine(flops=150e12, inner=200e9, outer=25e9)
RANKS_OF_A_NODE = 8
MIXES = ("lognormal", "pareto")


@dataclass(frozen=True)
class Balance:
    """One layout on packs of one mix, over seeds: figures are of the worst pack but for bytes."""

    layout: str
    mix: str
    parts: int
    packs: int
    work: float
    """Query-key pairs of the busiest rank / mean."""
    makespan: float
    """Replayed time, forward and backward / ideal. A model."""
    tokens: float
    """Tokens of the fullest rank / mean."""
    key_share: float
    """Tokens whose keys are sent / those that a full ring sends; mean over packs."""


def pack(mix: str, seed: int, tokens: int = TOKENS) -> tuple[int, ...]:
    """Document lengths of a full row: lognormal(7.0, 1.3) in [32, 64K], or (Pareto(1.1) + 1) * 512 in [64, 32K].
    The last document is cut to fit."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        if mix == "lognormal":
            length = np.clip(rng.lognormal(7.0, 1.3), 32, 65_536)
        else:
            length = np.clip((rng.pareto(1.1) + 1) * 512, 64, 32_768)
        lengths.append(min(int(length), left))
    return tuple(lengths)


def measure(parts: Iterable[int], seeds: int, layouts: Sequence[LayoutName]) -> list[Balance]:
    """Each layout, with direct transfers, on `seeds` packs of each mix."""
    table = []
    for count in parts:
        inner = min(count, RANKS_OF_A_NODE)
        for mix in MIXES:
            rows = [pack(mix, seed) for seed in range(seeds)]
            for layout in layouts:
                # Uncached: plans of 64 ranks are large, and each is looked at once.
                measured = [_one(make_plan.__wrapped__(row, inner, count // inner, 1, layout)) for row in rows]
                work, makespan, tokens, share = zip(*measured, strict=True)
                table.append(Balance(layout, mix, count, len(rows), max(work), max(makespan), max(tokens), mean(share)))
    return table


def _one(plan: Plan) -> tuple[float, float, float, float]:
    prediction = predict(plan, Mask(), SHAPE, MACHINE)
    tokens = [plan.num_tokens(part) for part in range(plan.parts)]
    sent = sum(
        transfer.num_tokens
        for part in range(plan.parts)
        for transfer in plan.program(part).fetches
        if transfer.source == part and transfer.cargo == "keys"
    )
    ring = (plan.parts - 1) * sum(plan.lengths)
    return prediction.imbalance, prediction.makespan, max(tokens) * plan.parts / sum(tokens), sent / ring
