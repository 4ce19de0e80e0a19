"""Bytes that ranks send in one step, counted where they are sent, and by formulas that know the rows, what routers
choose and the sizes of weights, and no collective.

Attention's own have their section in `longvila bench attention`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longvila.apply.experts import is_experts
from longvila.apply.pipeline import is_tied, stretches
from longvila.bench import engines
from longvila.bench.mapping import EXPERTS, WIDTH, Mapping, dropping, kept_of, make_test_row, rank_positions
from longvila.config import ParallelConfig
from longvila.model.vlm import LongVilaModel
from longvila.parallel.balance import capacity_of
from longvila.parallel.fold import fold_groups
from longvila.parallel.launch import run_ranks
from longvila.parallel.traffic import counting
from longvila.train.gradients import reference
from longvila.train.step import forward_row, run_pipeline

NOTE = "of all ranks; one row on each data rank, forward and backward, or of a pipeline all rows of a step"
KINDS = ("tensor", "experts", "expert_tensor", "pipeline", "weights", "gradients")
"""Tokens to and from cut matrices, to and from experts, to and from their parts, and between stages; weights that FSDP2
gathers, and gradients that it sums."""
SIZE = 8
"""Bytes of a number."""
GREETING = 4
"""Bytes that torch's schedules send each neighbour first, there and back."""


def measure(mapping: Mapping) -> list[dict[str, Any]]:
    """Of each kind that a mapping sends: collectives, bytes counted, and bytes by formula; all of all ranks."""
    counted: Counter[str] = Counter()
    for of_rank in run_ranks(_count, mapping.world, mapping):
        counted.update(of_rank)
    formula = run_ranks(_formula, 1, mapping)[0]
    return [
        {
            "ranks": mapping.world, "mapping": mapping.name, "drops": mapping.drops, "kind": kind,
            "collectives": counted[f"collective {kind}"], "counted": counted[f"bytes {kind}"], "formula": formula[kind],
        }
        for kind in KINDS if counted[f"bytes {kind}"] or formula[kind]
    ]  # fmt: skip


class _Torchs(TorchDispatchMode):
    """Counts what torch sends by itself, which is what FSDP2 and the schedules of pipelines send."""

    def __init__(self, pipeline: dist.ProcessGroup, counter: Counter[str]) -> None:
        super().__init__()
        self._pipeline, self._counter = pipeline.group_name, counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        match str(func):
            case "c10d._allgather_base_.default":
                self._add("weights", args[0].nbytes - args[1].nbytes)
            case "c10d._reduce_scatter_base_.default":
                self._add("gradients", args[1].nbytes - args[0].nbytes)
            case "c10d.send.default" if dist.ProcessGroup.unbox(args[1]).group_name == self._pipeline:
                self._add("pipeline", sum(tensor.nbytes for tensor in args[0]))
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, sent: int) -> None:
        self._counter[f"bytes {kind}"] += sent
        self._counter[f"collective {kind}"] += 1


def _count(mapping: Mapping) -> Counter[str]:
    state = engines.make_state(mapping.parallel, build=mapping.build, mixture=mapping.mixture)
    step = engines.make_step(state.fold, 0)
    with counting() as counter, _Torchs(state.fold.pipeline, counter):
        if state.engine.pipeline is not None:
            run_pipeline(state, step.rows, step.num_targets)
        else:
            output = forward_row(state, step.rows[0])
            state.engine.backward(output / step.num_targets, last=True)
    return counter


def _formula(mapping: Mapping) -> Counter[str]:
    p = mapping.parallel
    model = mapping.build() if mapping.mixture.capacity is None else dropping(mapping)
    owned = stretches(len(model.language_model.base_model.layers), p)
    stages = [[layer for stretch in owned[stage :: p.pipeline] for layer in stretch] for stage in range(p.pipeline)]
    world = mapping.world // p.pipeline
    """Ranks of a stage."""
    groups = fold_groups(replace(p, pipeline=1, chunks=1, schedule="1f1b", stage_layers=()), world)
    num_data = len(groups["sequence"])
    found: Counter[str] = Counter()
    lengths: list[list[int]] = []
    """Of each row of a data rank, tokens of each rank of a stage."""
    for first in range(0, engines.ROWS_PER_STEP if p.pipeline > 1 else num_data, num_data):
        positions, sent = _routes(mapping, model, range(first, first + num_data), groups["sequence"])
        lengths.append([len(positions[rank]) for rank in range(world)])
        for layers in stages:
            if p.tensor > 1:
                cut = 1 if mapping.experts else 2  # modules of a layer: attention, and the MLP of a dense one
                for members in groups["tensor"]:
                    most = max(lengths[-1][rank] for rank in members)
                    # Each gathers and spreads, there and back; and once, as integers, positions for every stretch.
                    each = len(layers) * cut * 4 * WIDTH * SIZE + p.chunks * 8
                    found["tensor"] += p.tensor * (p.tensor - 1) * most * each
            if "experts" in groups:
                for layer in layers:
                    _add_experts(found, sent[layer], groups, p)
    between = p.pipeline * p.chunks - 1
    for rank in range(world):  # what travels is as long as the longest
        longest = max(of_row[rank] for of_row in lengths)
        found["pipeline"] += 2 * between * (len(lengths) * longest * WIDTH * SIZE + GREETING)
    if p.pipeline > 1 and is_tied(model.language_model):  # both ends send theirs
        found["pipeline"] += 2 * world * _shard(model.language_model.get_output_embeddings().weight.shape, world) * SIZE
    _add_parameters(found, mapping, model)
    return found


def _routes(
    mapping: Mapping, model: LongVilaModel, rows: range, sequences: Sequence[list[int]]
) -> tuple[dict[int, list[int]], Tensor]:
    """Of rows that data ranks take at once: positions of each rank, and how many of its choices (layer, rank, expert)
    are sent to each expert."""
    p, mixture = mapping.parallel, capacity_of(mapping.mixture)
    chosen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: chosen.append((inputs[1], inputs[2])), prepend=True)
        for module in model.modules() if is_experts(module)
    ]  # fmt: skip
    sent = torch.zeros(mapping.layers, mapping.world, EXPERTS, dtype=torch.long)
    positions: dict[int, list[int]] = {}
    for number, members in zip(rows, sequences, strict=True):
        chosen.clear()
        if mapping.experts:
            reference(model, [make_test_row(number)])
        for rank, mine in zip(_by_place(p, members), rank_positions(p, number), strict=True):
            positions[rank] = mine
            for layer, (experts, weights) in enumerate(chosen):
                counts = torch.bincount(experts[mine].flatten(), minlength=EXPERTS)
                if mixture is not None:
                    kept = kept_of(mixture, experts[mine], weights[mine], EXPERTS)
                    counts = torch.bincount(experts[mine][kept], minlength=EXPERTS)
                    if mixture.pads:
                        counts = torch.full_like(counts, mixture.of(experts[mine].numel(), EXPERTS))
                sent[layer, rank] = counts
    for hook in hooks:
        hook.remove()
    return positions, sent


def _add_experts(found: Counter[str], sent: Tensor, groups: dict[str, list[list[int]]], p: ParallelConfig) -> None:
    """Of one layer, whose choices are `sent` (rank, expert)."""
    local = EXPERTS // p.experts
    arrived = torch.zeros(len(sent), dtype=torch.long)
    for members in groups["experts"]:
        for rank in members:
            for place, target in enumerate(members):
                tokens = int(sent[rank, place * local : (place + 1) * local].sum())
                arrived[target] += tokens
                if target != rank:  # there and back, and the gradients of both
                    found["experts"] += 4 * tokens * WIDTH * SIZE
    for members in groups["expert_tensor"] if p.expert_tensor > 1 else []:
        most = int(arrived[members].max())
        # Gathered and spread, there and back; and once, as integers, for which expert each token is.
        found["expert_tensor"] += p.expert_tensor * (p.expert_tensor - 1) * most * (4 * WIDTH * SIZE + 8)


def _add_parameters(found: Counter[str], mapping: Mapping, model: LongVilaModel) -> None:
    """Of every parameter on every stage that holds it: gathered for the forward, and again for the backward but where
    that does not look at it, or stays gathered as in a pipeline; its gradient is summed once."""
    p, world = mapping.parallel, mapping.world // mapping.parallel.pipeline
    experts = {id(each) for module in model.modules() if is_experts(module) for each in module.parameters()}
    words = [model.language_model.get_input_embeddings().weight, model.language_model.get_output_embeddings().weight]
    for name, parameter in model.named_parameters():
        parts = 1
        if id(parameter) in experts:
            parts = p.experts * p.expert_tensor
        elif "_proj." in name and ".layers." in name:
            parts = p.tensor
        copies = world // parts
        if parts == 1:
            shard = _shard(parameter.shape, copies)
        else:
            shard = parameter.numel() // parts // copies
        sent = world * (copies - 1) * shard * SIZE
        at_ends = sum(parameter is each for each in words)
        held = at_ends if p.pipeline > 1 and at_ends else 1  # tied words lie on two stages
        again = p.pipeline == 1 and not at_ends
        found["weights"] += held * (1 + again) * sent
        found["gradients"] += held * sent


def _shard(shape: torch.Size, ranks: int) -> int:
    """Numbers of a parameter on each of its ranks, filled up so that all have as many."""
    return -(-shape[0] // ranks) * shape[1:].numel()


def _by_place(p: ParallelConfig, members: Sequence[int]) -> list[int]:
    """The ranks of a sequence group in the order of (part, piece)."""
    parts = p.inner * p.outer
    if p.placement == "head_first":
        return list(members)
    order = torch.tensor(members).view(p.head, parts, p.tensor).transpose(0, 1)
    return order.flatten().tolist()
