"""Attention over folds against a dense mask on one process: largest error of out, dq, dk and dv."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longvila.config import LayoutName, ParallelConfig, RoutingName
from longvila.difference import relative_error
from longvila.parallel.attention import FoldedPlan
from longvila.parallel.blocks import Mask
from longvila.parallel.choose import LAYOUTS, make_plan
from longvila.parallel.fold import Fold, make_fold
from longvila.parallel.launch import run_cases, run_ranks
from longvila.parallel.plan import Plan

SCALE = 0.3
HEADS = ((4, 2), (6, 2), (5, 1), (7, 7))
"""Query and key/value heads; among them counts that no head axis divides."""
ROWS = ((37,), (5, 1, 23, 2, 9), (1, 1, 1))
"""Documents that nothing divides, of a single token, fewer tokens than ranks."""


@dataclass(frozen=True)
class Error:
    """The largest error over one fold and layout."""

    fold: str
    layout: str
    error: float


def dense_mask(lengths: Sequence[int], mask: Mask) -> Tensor:
    """bool (N, N): whether the query of a row sees the key of a column."""
    document = torch.repeat_interleave(torch.tensor(lengths))
    visible = document[:, None] == document[None]
    if mask.causal:
        visible = visible.tril()
    if mask.window is not None:
        visible = visible.triu(1 - mask.window)
    return visible


_Case = tuple[tuple[int, ...], tuple[int, int], Mask]
"""Lengths of documents, query and key heads, and who sees whom."""
_Reference = tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]
"""Random q, k and v; the gradient of their output; and that output, dq, dk and dv under a dense mask. All fp64."""
_references: dict[_Case, _Reference] = {}


def _reference(case: _Case) -> _Reference:
    if case not in _references:
        _references[case] = _compute_reference(*case)
    return _references[case]


def _compute_reference(lengths: tuple[int, ...], heads: tuple[int, int], mask: Mask) -> _Reference:
    torch.manual_seed(0)
    shapes = [(1, count, sum(lengths), 16) for count in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, grad = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    group = heads[0] // heads[1]
    keys, values = whole[1].repeat_interleave(group, 1), whole[2].repeat_interleave(group, 1)
    visible = dense_mask(lengths, mask)
    out = F.scaled_dot_product_attention(whole[0], keys, values, attn_mask=visible, scale=SCALE)
    return (q, k, v), grad, (out.detach(), *torch.autograd.grad(out, whole, grad))


def attention_error(fold: Fold, plan: Plan, heads: tuple[int, int], mask: Mask, dtype: torch.dtype) -> float:
    """The largest of max |difference| / max |reference| over out, dq, dk and dv of this rank, in `dtype` against fp64.

    References below 1 count as 1: with a window of one, gradients of queries and keys are zero.
    """
    inputs, grad, expected = _reference((tuple(plan.lengths), heads, mask))
    mine = torch.tensor(plan.positions(fold.part, fold.piece), dtype=torch.long)
    local = [x[:, :, mine].to(dtype).requires_grad_() for x in inputs]
    out = FoldedPlan(plan, fold).attend(local[0], local[1], local[2], SCALE, mask)
    grads = torch.autograd.grad(out, local, grad[:, :, mine].to(dtype))
    pairs = zip((out, *grads), expected, strict=True)
    if not len(mine):
        return 0.0
    return max(relative_error(a.double(), b[:, :, mine], b.abs().max().clamp(min=1)) for a, b in pairs)


def meshes(world: int) -> list[tuple[int, int, int]]:
    """Every (head, inner, outer) of `world` ranks."""
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    return [(h, i, o) for h in sizes for i in sizes for o in sizes if h * i * o == world]


def variants() -> list[tuple[LayoutName, RoutingName]]:
    """Every layout with every routing that can carry it."""
    direct: list[tuple[LayoutName, RoutingName]] = [(layout, "direct") for layout in LAYOUTS]
    return direct + [(layout, "relay") for layout, rule in LAYOUTS.items() if not rule.helpers]


def plans(fold: Fold, rows: Sequence[tuple[int, ...]]) -> Iterator[tuple[str, Plan]]:
    """The name of each variant, with a plan for each row."""
    for layout, routing in variants():
        for lengths in rows:
            yield f"{layout} {routing}", make_plan(lengths, fold.inner, fold.outer, fold.num_heads, layout, routing)


def rank_errors(
    world: int, dtype: torch.dtype, masks: Sequence[Mask], rows: Sequence[tuple[int, ...]], heads: Sequence
) -> list[Error]:
    """On one rank of a world: the largest error of each mesh and variant. Placements take turns over the meshes."""
    found: dict[tuple[str, str], float] = {}
    for index, (head, inner, outer) in enumerate(meshes(world)):
        placement = "context_first" if index % 2 else "head_first"
        fold = make_fold(ParallelConfig(head, inner, outer, placement=placement), "cpu")
        for name, plan in plans(fold, rows):
            key = (f"{outer}x{inner}x{head} {placement}", name)
            for counts in (counts for counts in heads if counts[0] >= head):
                for mask in masks:
                    found[key] = max(found.get(key, 0.0), attention_error(fold, plan, counts, mask, dtype))
    return [Error(*key, error) for key, error in found.items()]


def measure(worlds: Sequence[int], masks: Sequence[Mask], rows=ROWS, heads=HEADS) -> list[Error]:
    """fp64, every factorisation and variant of each world size: the largest error over its ranks."""
    # Ranks are forked with them. In a rank, since beside a GPU a process that ran autograd forks none that can run it.
    cases: list[Any] = [case for case in product(rows, heads, masks) if case not in _references]
    found = run_cases(_compute_reference, 1, cases) if cases else []
    _references.update({case: of_case for case, (of_case,) in zip(cases, found, strict=True)})
    table = []
    for world in worlds:
        by_rank = run_ranks(rank_errors, world, world, torch.float64, masks, rows, heads, timeout=600)
        for errors in zip(*by_rank, strict=True):
            table.append(Error(errors[0].fold, errors[0].layout, max(one.error for one in errors)))
    return table
