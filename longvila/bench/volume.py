"""Bytes that attention sends: counted where they are sent, on real ranks, against formulas that know no plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longvila.config import ParallelConfig
from longvila.parallel.attention import FoldedPlan
from longvila.parallel.choose import make_plan
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import run_cases, run_ranks
from longvila.parallel.traffic import counting

TOKENS = 480
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 16
PACKED = (5, 1, 230, 2, 90, 152)
MEGATRON_ELEMENTS = 14
"""N x d elements a worker and layer moves under Megatron's tensor and sequence parallelism with recomputation, times
(P - 1) / P: the figure of LightSeq's authors (Li et al. 2023, section 3.5)."""


@dataclass(frozen=True)
class Volume:
    """Bytes of all ranks for one layer, forward and backward, by link."""

    name: str
    row: str
    link: str
    counted: int
    formula: int


CASES = (
    ("ring", ParallelConfig(inner=4, layout="zigzag", routing="relay"), (TOKENS,)),
    ("double ring", ParallelConfig(inner=2, outer=2, layout="zigzag", routing="relay"), (TOKENS,)),
    ("Ulysses", ParallelConfig(head=4), (TOKENS,)),
    ("2D", ParallelConfig(head=2, inner=2, layout="zigzag", routing="relay"), (TOKENS,)),
    ("LightSeq", ParallelConfig(inner=4, layout="lightseq"), (TOKENS,)),
    ("direct", ParallelConfig(inner=4), PACKED),
    ("direct", ParallelConfig(inner=2, outer=2), PACKED),
    ("direct", ParallelConfig(head=2, inner=2), PACKED),
    ("direct", ParallelConfig(inner=4, layout="joint"), PACKED),
)


def measure() -> list[Volume]:
    """Each case on four ranks, bf16 with fp32 gradients."""
    table = []
    by_case = run_cases(_count, 4, [(parallel, lengths) for _, parallel, lengths in CASES])
    for (name, parallel, lengths), by_rank in zip(CASES, by_case, strict=True):
        counted: Counter[str] = Counter()
        for of_rank in by_rank:
            counted.update(of_rank)
        formula = _formula(name, parallel, lengths)
        row = "one document" if len(lengths) == 1 else "packed"
        table += [
            Volume(f"{name} {parallel.outer}x{parallel.inner}x{parallel.head} {parallel.layout}", row, link,
                   counted[link], formula[link])
            for link in ("heads", "inner", "outer") if counted[link] or formula[link]
        ]  # fmt: skip
    return table


def lightseq_volume_ratio(parts: int = 8) -> float:
    """Megatron's elements over those of LightSeq's schedule at Llama-7B's shape (32 heads of 128, no shared keys).

    Counted on real ranks in fp32, where an element is 4 bytes, with fewer tokens.
    """
    tokens, heads, dim = 16 * parts, 32, 128
    counted = run_ranks(_count, parts, ParallelConfig(inner=parts, layout="lightseq"), (tokens,), (heads, heads, dim),
                        torch.float32)  # fmt: skip
    elements = sum(sum(of_rank.values()) for of_rank in counted) / 4 / parts
    return MEGATRON_ELEMENTS * tokens * heads * dim * (parts - 1) / parts / elements


def _count(
    parallel: ParallelConfig,
    lengths: tuple[int, ...],
    shape: tuple[int, int, int] = (HEADS, KV_HEADS, HEAD_DIM),
    dtype: torch.dtype = torch.bfloat16,
) -> Counter[str]:
    """Bytes that this rank sends, by link."""
    fold = make_fold(parallel, "cpu")
    plan = make_plan(lengths, fold.inner, fold.outer, fold.num_heads, parallel.layout, parallel.routing)
    folded = FoldedPlan(plan, fold)
    heads, kv_heads, dim = shape
    q, k, v = (
        torch.randn(1, count, folded.num_tokens, dim).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    with counting() as counter:
        folded.attend(q, k, v, dim**-0.5).sum().backward()
    sent: Counter[str] = Counter()
    for name, number in counter.items():
        if name.startswith("bytes "):
            sent[name.rpartition(" ")[2]] += number
    return sent


def _formula(name: str, parallel: ParallelConfig, lengths: tuple[int, ...]) -> Counter[str]:
    """Bytes of all ranks by link. bf16 tensors, fp32 gradients of keys and values."""
    head, parts, inner = parallel.head, parallel.inner * parallel.outer, parallel.inner
    total = sum(lengths)
    found: Counter[str] = Counter()
    if head > 1:  # each way, for each rank: (h - 1) / h of its tokens' q, k, v and out
        numbers = (2 * HEADS + 2 * max(KV_HEADS, head)) * HEAD_DIM
        found["heads"] = 2 * total * numbers * 2 * (head - 1) // head
    kv_numbers = 2 * max(KV_HEADS, head) // head * HEAD_DIM  # of a token, on one head rank
    chunk = total // parts
    ranks = parts * head
    if name in ("ring", "double ring", "2D"):
        windows = parts // inner
        hops = {"inner": ((inner - 1) * windows, parts), "outer": (windows - 1, windows if windows > 1 else 0)}
        for link, (keys, gradients) in hops.items():
            found[link] = ranks * chunk * kv_numbers * (2 * keys * 2 + gradients * 4)
    elif name == "LightSeq":
        near = sum(parts - distance for distance in range(1, parts // 2 + 1))
        far = parts * (parts - 1) // 2 - near
        found["inner"] = near * chunk * kv_numbers * (2 * 2 + 4)
        forward, backward = HEAD_DIM * 2 + (HEAD_DIM + 1) * 4, 3 * HEAD_DIM * 2 + 4 + HEAD_DIM * 4
        found["inner"] += far * chunk * HEADS * (forward + backward)
    elif parts > 1:
        for (one, other), tokens in _needed(parallel, lengths).items():
            link = "inner" if one // inner == other // inner else "outer"
            found[link] += head * tokens * kv_numbers * (2 * 2 + 4)
    return found


def _needed(parallel: ParallelConfig, lengths: Sequence[int]) -> dict[tuple[int, int], int]:
    """Keys of each rank that any query of each other rank sees, token by token."""
    parts = parallel.inner * parallel.outer
    plan = make_plan(tuple(lengths), parallel.inner, parallel.outer, 1, parallel.layout)
    owner, document = {}, {}
    for part in range(parts):
        owner.update(dict.fromkeys(plan.positions(part, 0), part))
    for index, length in enumerate(lengths):
        document.update(dict.fromkeys(range(len(document), len(document) + length), index))
    needed: dict[tuple[int, int], set[int]] = {}
    for query in owner:
        start = sum(lengths[: document[query]])
        for key in range(start, query + 1):
            if owner[key] != owner[query]:
                needed.setdefault((owner[query], owner[key]), set()).add(key)
    return {pair: len(keys) for pair, keys in needed.items()}
