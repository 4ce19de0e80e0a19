"""Ways to spread the small vision-language model of `train.gradients` over ranks, and what it drops on one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longvila.apply.experts import is_experts
from longvila.bench import engines
from longvila.config import MixtureConfig, ParallelConfig
from longvila.model.vlm import LongVilaModel
from longvila.parallel.balance import capacity_of
from longvila.parallel.choose import make_plan
from longvila.parallel.experts import Capacity
from longvila.parallel.pipeline import SPLITS_BACKWARD
from longvila.train.gradients import WholeRow, make_model, make_row

EXPERTS, TOP_K, WIDTH = 8, 3, 48


@dataclass(frozen=True)
class Mapping:
    """One way to spread the small vision-language model over ranks."""

    world: int
    parallel: ParallelConfig
    experts: int = EXPERTS
    """In each layer; 0 for a dense language model."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    layers: int = 2
    tied: bool = True
    dense: tuple[int, ...] = ()
    """Layers without experts."""

    @property
    def name(self) -> str:
        axes = ("tensor", "head", "inner", "outer", "experts", "expert_tensor", "pipeline", "chunks")
        data = self.world // self.parallel.sequence // self.parallel.pipeline
        sizes = {"data": data, **{axis: getattr(self.parallel, axis) for axis in axes}}
        names = [f"{axis} {size}" for axis, size in sizes.items() if size > 1]
        names += ["layers " + "+".join(map(str, self.parallel.stage_layers))] * bool(self.parallel.stage_layers)
        return " ".join(names + ["zero bubble"] * (self.parallel.schedule == "zero_bubble"))

    @property
    def drops(self) -> str:
        mixture = self.mixture
        if mixture.capacity is None:
            return "nothing" if self.experts else ""
        return f"above {mixture.capacity:g} by {mixture.keeps}" + ", padded" * mixture.pads

    def build(self) -> LongVilaModel:
        return make_model(heads=(4, 2), experts=self.experts, layers=self.layers, tied=self.tied, dense=self.dense)


MAPPINGS = (
    Mapping(8, ParallelConfig(tensor=2, inner=2), 0),
    Mapping(8, ParallelConfig(tensor=2, head=2, inner=2, layout="joint"), 0),
    Mapping(8, ParallelConfig(tensor=2, inner=2, outer=2, layout="zigzag", routing="relay"), 0),
    Mapping(8, ParallelConfig(tensor=2, head=2, outer=2, placement="context_first"), 0),
    Mapping(8, ParallelConfig(inner=2, experts=8)),
    Mapping(8, ParallelConfig(tensor=2, inner=2, experts=4)),
    Mapping(8, ParallelConfig(tensor=2, experts=2, expert_tensor=2)),
    Mapping(8, ParallelConfig(head=2, inner=2, experts=2, expert_tensor=4)),
    Mapping(8, ParallelConfig(inner=2, head=2, experts=4), mixture=MixtureConfig(capacity=1.0)),
    Mapping(8, ParallelConfig(tensor=2, experts=2, expert_tensor=2), mixture=MixtureConfig(capacity=0.75, pads=True)),
    Mapping(16, ParallelConfig(tensor=2, inner=2, head=2, outer=2), 0),
    Mapping(16, ParallelConfig(tensor=2, inner=4, layout="lightseq"), 0),
    Mapping(16, ParallelConfig(tensor=2, inner=2, experts=4, expert_tensor=2)),
    Mapping(16, ParallelConfig(tensor=2, head=2, inner=2, outer=2, experts=8)),
    Mapping(16, ParallelConfig(tensor=2, inner=4, experts=2, expert_tensor=4)),
    Mapping(16, ParallelConfig(inner=4, head=2, experts=8, expert_tensor=2), mixture=MixtureConfig(capacity=1.25)),
    Mapping(
        16, ParallelConfig(tensor=2, inner=2, outer=2, experts=8), mixture=MixtureConfig(capacity=0.8, keeps="position")
    ),
)
PIPELINES = (
    Mapping(8, ParallelConfig(pipeline=2, tensor=2, inner=2, schedule="zero_bubble"), 0),
    Mapping(8, ParallelConfig(pipeline=2, chunks=2, inner=2, experts=2, expert_tensor=2), layers=4),
    Mapping(16, ParallelConfig(pipeline=4, tensor=2, inner=2, experts=4), layers=4, tied=False),
)


def is_able(parallel: ParallelConfig) -> bool:
    """Before 2.14 torch cannot split a backward as the zero-bubble schedule does."""
    return SPLITS_BACKWARD or parallel.schedule != "zero_bubble"


def dropping(mapping: Mapping) -> LongVilaModel:
    """The model of one process that drops, of each rank's tokens by themselves, what that rank drops."""
    capacity = capacity_of(mapping.mixture)
    assert capacity is not None
    model, rows = mapping.build(), iter(range(engines.ROWS_PER_STEP))
    chunks: list[list[int]] = []

    def begin(*_: Any) -> None:
        chunks[:] = rank_positions(mapping.parallel, next(rows))

    def drop(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, chosen, weights = inputs
        kept = torch.zeros_like(chosen, dtype=torch.bool)
        for chunk in chunks:
            kept[chunk] = kept_of(capacity, chosen[chunk], weights[chunk], module.num_experts)
        return hidden, chosen, weights * kept

    model.language_model.register_forward_pre_hook(begin)
    for module in model.modules():
        if is_experts(module):
            module.register_forward_pre_hook(drop)
    return model


def kept_of(capacity: Capacity, chosen: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """Which choices (T, k) of one rank are kept, one expert at a time; of equals, the earlier in the row."""
    thousandths = round(capacity.factor * 1000)
    most = -(-chosen.numel() * thousandths // (1000 * num_experts))
    kept = torch.zeros_like(chosen, dtype=torch.bool)
    for expert in range(num_experts):
        places = (chosen == expert).nonzero().tolist()
        if capacity.keeps == "probability":
            places.sort(key=lambda place: -weights[place[0], place[1]].item())
        for token, choice in places[:most]:
            kept[token, choice] = True
    return kept


def make_test_row(number: int) -> WholeRow:
    """As the steps of `bench.engines` take them."""
    return make_row(engines.DOCUMENTS[number % len(engines.DOCUMENTS)], 4, 32, seed=number)


def rank_positions(parallel: ParallelConfig, row: int) -> list[list[int]]:
    """Row positions of each rank of a sequence group, of the row numbered `row`; in the order of (part, piece)."""
    lengths, p = make_test_row(row).lengths, parallel
    plan = make_plan(lengths, p.inner, p.outer, p.head, p.layout, p.routing, p.tensor)
    return [plan.positions(part, piece) for part in range(p.inner * p.outer) for piece in range(p.head * p.tensor)]
