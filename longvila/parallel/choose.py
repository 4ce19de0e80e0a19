"""From the names in a configuration to a plan: the layouts there are, and `auto`, which picks one by predicted cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from longvila.config import LayoutName, RoutingName
from longvila.errors import ConfigError
from longvila.parallel.blocks import Mask, Span
from longvila.parallel.joint import joint
from longvila.parallel.layout import contiguous, document_zigzag, zigzag
from longvila.parallel.plan import Plan, check_row
from longvila.parallel.replay import Machine, Shape, full_ring_bytes, predict


@dataclass(frozen=True)
class Layout:
    """A way to spread a row over context ranks."""

    cut: Callable[[Sequence[int], int], tuple[tuple[Span, ...], ...]]
    """(document lengths, context ranks) -> the spans of each rank."""
    helpers: bool = False
    """Whether early ranks compute for late ones, as in LightSeq."""


LAYOUTS: dict[LayoutName, Layout] = {
    "contiguous": Layout(contiguous),
    "zigzag": Layout(zigzag),
    "document_zigzag": Layout(document_zigzag),
    "lightseq": Layout(contiguous, helpers=True),
    "joint": Layout(joint),
}


PLANS = 8
"""Rows whose plan is kept for when they come again: in validation, or one layout tried after another. Most rows never
do, and a plan of 800 documents over 32 ranks takes 48 MB."""


@lru_cache(maxsize=PLANS)
def make_plan(
    lengths: tuple[int, ...],
    inner: int = 1,
    outer: int = 1,
    head: int = 1,
    layout: LayoutName = "document_zigzag",
    routing: RoutingName = "direct",
    tensor: int = 1,
) -> Plan:
    """The plan of a row; the same object for equal arguments, so that its programs are worked out once.

    Args:
        lengths: tokens of each document, in row order.
        inner, outer, head, tensor: sizes of the fold.
        layout: a name in `LAYOUTS`.
        routing: `direct` sends only what is needed, straight to whom it serves; `relay` passes whole blocks on.

    Raises:
        DataError: for an empty row or an empty document.
        ConfigError: for an unknown layout or routing, a size below 1, or a layout that `relay` cannot carry.
    """
    check_row(lengths, inner, outer, head, tensor)
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout '{layout}'; there is {', '.join(sorted(LAYOUTS))}")
    if routing not in ("direct", "relay"):
        raise ConfigError(f"unknown routing '{routing}'; there is direct and relay")
    rule = LAYOUTS[layout]
    spans = rule.cut(lengths, inner * outer)
    return Plan(lengths, spans, inner, outer, head, routing == "relay", rule.helpers, tensor)


@dataclass(frozen=True)
class Choice:
    """What `choose` picked, and why."""

    layout: LayoutName
    routing: RoutingName
    reason: str


CANDIDATES: tuple[tuple[LayoutName, RoutingName], ...] = (
    ("joint", "direct"),
    ("document_zigzag", "direct"),
    ("document_zigzag", "relay"),
    ("lightseq", "direct"),
)


@lru_cache(maxsize=PLANS)
def choose(
    lengths: tuple[int, ...],
    inner: int,
    outer: int,
    head: int,
    shape: Shape,
    masks: tuple[Mask, ...] = (Mask(),),
    machine: Machine = Machine(),
    tensor: int = 1,
) -> Choice:
    """The layout and routing with the least predicted time over layers of these masks; of equals, the fewest bytes.

    Args:
        shape: heads of the whole model, or of a rank of a tensor group.
        tensor: ranks of such a group.
    """
    busiest = shape.of_head_rank(head)
    full = full_ring_bytes(sum(lengths), inner * outer, busiest) * len(masks)
    costs = []
    for layout, routing in CANDIDATES:
        plan = make_plan(lengths, inner, outer, head, layout, routing, tensor)
        of_mask = {mask: predict(plan, mask, busiest, machine) for mask in set(masks)}
        predictions = [of_mask[mask] for mask in masks]
        seconds, ideal = (sum(getattr(p, name) for p in predictions) for name in ("seconds", "ideal"))
        sent = sum(sum(p.bytes.values()) for p in predictions)
        costs.append((seconds, sent, layout, routing, seconds / ideal, sent / full if full else 0.0))
    costs.sort(key=lambda cost: (cost[0], cost[1]))
    told = "; ".join(
        f"{layout} {routing} {makespan:.2f}x ideal, {100 * share:.0f} % of a ring's bytes"
        for _, _, layout, routing, makespan, share in costs
    )
    heads = ""
    if shape.heads % head:
        heads = f"; {shape.heads} heads on {head} ranks cost {busiest.heads * head / shape.heads:.2f}x"
    return Choice(costs[0][2], costs[0][3], f"by predicted time (a model): {told}{heads}")
