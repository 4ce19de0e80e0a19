"""`longvila bench folding`: that mappings of every axis change nothing, what they send, and which faults show.

Everything is fp64 on forked gloo ranks, more of them than cores: they prove correctness and tell no time.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longvila.apply.experts import is_experts
from longvila.bench import bubble, engines
from longvila.bench.bars import at_least, at_most, sections
from longvila.bench.gradient_faults import FAULTS
from longvila.config import MixtureConfig, ParallelConfig
from longvila.model.vlm import LongVilaModel
from longvila.parallel.balance import capacity_of
from longvila.parallel.choose import make_plan
from longvila.parallel.experts import Capacity
from longvila.parallel.fold import fold_groups, share_between_nodes
from longvila.parallel.launch import run_ranks
from longvila.parallel.traffic import counting
from longvila.shards.order import Cursor
from longvila.train.checkpoint import Checkpoints, Position
from longvila.train.gradients import WholeRow, make_model, make_row, reference
from longvila.train.loop import resume
from longvila.train.step import TrainingState, forward_row

Rows = list[dict[str, Any]]

GRADIENT, NORM, RESHARDED, BUBBLE = 1e-11, 1e-9, 1e-11, 1e-12
MAPPINGS_WANTED, FAULTS_WANTED = 16, 12
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
FAULTY = Mapping(8, ParallelConfig(tensor=2, experts=2, expert_tensor=2))
"""Where faults are put in: of every kind of copy there are two."""
STEPS = 1
"""Before a run is saved."""
SAVED = Mapping(4, ParallelConfig(tensor=2, inner=2, expert_tensor=2))
CONTINUED = (
    Mapping(4, ParallelConfig(inner=2, experts=2)),
    Mapping(2, ParallelConfig(tensor=2, experts=2)),
)


def run(quick: bool, show: Callable[[str, Rows, str], None]) -> dict[str, Any]:
    """Runs all sections and returns what is written as JSON.

    Args:
        quick: a mapping of four, and a fault of three.
        show: called with (title, rows, note) as each section is done.
    """
    figures: dict[str, Any] = {"quick": quick}

    section = sections(figures, show)

    chosen = MAPPINGS[::4] if quick else MAPPINGS
    pipelines = PIPELINES[:1] if quick else PIPELINES
    faults = FAULTS[::3] if quick else FAULTS
    mappings = section(
        "mappings", [measure(each) for each in (*chosen, *pipelines)], "one step of four rows, against one process"
    )
    sizes = section("bytes", [row for each in chosen for row in measure_bytes(each)], "of all ranks, one row")
    caught = section("faults", [measure_fault(fault) for fault in faults], f"in {FAULTY.name}; the loss stays right")
    waits = section(
        "bubble", [bubble.measure(each) for each in (bubble.CASES[:3] if quick else bubble.CASES)],
        "the order of work is measured; that every part takes one unit of time is a model",
    )  # fmt: skip
    resharded = section("resharding", measure_resharding(), f"saved under {SAVED.name} by {SAVED.world}; the next step")
    section("nodes", cross_node_bytes(), "computed, not measured: even routing, bf16, nodes of 8, a token and layer")
    figures["bars"] = [
        at_least("mappings_checked", len(mappings), MAPPINGS_WANTED),
        at_most("gradient_max_error", max(row["gradient_error"] for row in mappings), GRADIENT),
        at_most("norm_error", max(row["norm_error"] for row in mappings), NORM),
        at_most("bytes_mismatch", sum(abs(row["counted"] - row["formula"]) for row in sizes), 0),
        at_most(
            "bubble_error",
            max(abs(row["bubble"] - row["formula"]) for row in waits if row["formula"] is not None),
            BUBBLE,
        ),
        at_least("faults_caught", sum(row["caught"] for row in caught), FAULTS_WANTED),
        at_most("reshard_max_error", max(row["gradient_error"] for row in resharded), RESHARDED),
    ]
    return figures


def measure(mapping: Mapping, fault: Callable[[], None] | None = None) -> dict[str, Any]:
    """One step under a mapping and on one process: relative errors of loss, norm, and of the worst gradient."""
    (expected,), gradients, _ = _expected(mapping)
    found, folded = run_ranks(_folded_step, mapping.world, mapping, fault)[0]
    errors = {name: _error(folded[name], gradient) for name, gradient in gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    return {
        "ranks": mapping.world,
        "mapping": mapping.name,
        "drops": mapping.drops,
        "dropped": found.get("choices_dropped", 0.0),
        "loss_error": abs(found["loss"] - expected["loss"]) / expected["loss"],
        "norm_error": abs(found["grad_norm"] - expected["grad_norm"]) / expected["grad_norm"],
        "gradient_error": errors[worst],
        "worst": worst,
    }


def _expected(mapping: Mapping) -> tuple:
    """Of one process, which knows no ranks where nothing is dropped."""
    if mapping.mixture.capacity is None:
        return _expected_of(replace(mapping, world=1, parallel=ParallelConfig()))
    return run_ranks(_plain_step, 1, mapping)[0]


@lru_cache(maxsize=2)
def _expected_of(mapping: Mapping) -> tuple:
    return run_ranks(_plain_step, 1, mapping)[0]


def measure_fault(fault: Callable[[], None]) -> dict[str, Any]:
    """Whether a fault shows in a gradient or in the norm, while the loss stays right."""
    row = measure(FAULTY, fault)
    seen = row["gradient_error"] > 1e-6 or row["norm_error"] > 1e-6
    kept = {name: row[name] for name in ("loss_error", "norm_error", "gradient_error", "worst")}
    return {"fault": fault.__name__.replace("_", " "), **kept, "caught": seen and row["loss_error"] < 1e-12}


def _folded_step(mapping: Mapping, fault: Callable[[], None] | None) -> tuple[dict[str, float], dict[str, Tensor]]:
    if fault is not None:
        fault()
    return _observed_step(engines.make_state(mapping.parallel, build=mapping.build, mixture=mapping.mixture), 0)


def _observed_step(state: TrainingState, number: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures and gradients of the step numbered `number`, which moves no weight."""
    engine, gradients = state.engine, {}
    norm = engine.gradient_norm

    def noted() -> float:
        gradients.update({name: gradient.clone() for name, gradient in engine.gradients()})
        return norm()

    engine.gradient_norm, engine.step = noted, lambda rate: engine.discard()
    (figures,) = engines.take_steps(state, number, 1)
    return figures, gradients


def _plain_step(mapping: Mapping) -> tuple:
    capacity = capacity_of(mapping.mixture)
    build = mapping.build if capacity is None else partial(_dropping, mapping, capacity)
    return engines.plain_steps(1, build)


def _dropping(mapping: Mapping, capacity: Capacity) -> LongVilaModel:
    """The model of one process that drops, of each rank's tokens by themselves, what that rank drops."""
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


def measure_bytes(mapping: Mapping) -> Rows:
    """Bytes of all ranks by kind in the forward and backward of one row on each data rank, and by formulas that know
    the row, what routers choose, and no collective."""
    counted: Counter[str] = Counter()
    for of_rank in run_ranks(_count, mapping.world, mapping):
        counted.update(of_rank)
    formula = run_ranks(_formula, 1, mapping)[0]
    kinds = [kind for kind in ("tensor", "experts", "expert_tensor") if counted[f"bytes {kind}"] or formula[kind]]
    return [
        {
            "ranks": mapping.world, "mapping": mapping.name, "drops": mapping.drops, "kind": kind,
            "collectives": counted[f"collective {kind}"], "counted": counted[f"bytes {kind}"], "formula": formula[kind],
        }
        for kind in kinds
    ]  # fmt: skip


def _count(mapping: Mapping) -> Counter[str]:
    state = engines.make_state(mapping.parallel, build=mapping.build, mixture=mapping.mixture)
    step = engines.make_step(state.fold, 0)
    with counting() as counter:
        output = forward_row(state, step.rows[0])
        state.engine.backward(output / step.num_targets, last=True)
    return counter


def _formula(mapping: Mapping) -> Counter[str]:
    p, size = mapping.parallel, 8
    mixture = capacity_of(mapping.mixture)
    model = mapping.build() if mixture is None else _dropping(mapping, mixture)
    chosen: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if is_experts(module):
            module.register_forward_pre_hook(lambda _, inputs: chosen.append((inputs[1], inputs[2])), prepend=True)
    layers = len(model.language_model.base_model.layers)
    groups = fold_groups(p, mapping.world)
    found: Counter[str] = Counter()
    sent = torch.zeros(layers, mapping.world, EXPERTS, dtype=torch.long)
    """Choices of each rank for each expert."""
    for number, members in enumerate(groups["sequence"]):
        chosen.clear()
        positions = rank_positions(p, number)
        if mapping.experts:
            reference(model, [make_test_row(number)])
        for rank, mine in zip(_by_place(p, members), positions, strict=True):
            for layer, (experts, weights) in enumerate(chosen):
                counts = torch.bincount(experts[mine].flatten(), minlength=EXPERTS)
                if mixture is not None:
                    kept = kept_of(mixture, experts[mine], weights[mine], EXPERTS)
                    counts = torch.bincount(experts[mine][kept], minlength=EXPERTS)
                    if mixture.pads:
                        counts = torch.full_like(counts, mixture.of(experts[mine].numel(), EXPERTS))
                sent[layer, rank] = counts
        if p.tensor > 1:
            cut = 1 if mapping.experts else 2  # modules of a layer: attention, and the MLP of a dense one
            for start in range(0, len(positions), p.tensor):
                most = max(len(each) for each in positions[start : start + p.tensor])
                # Each gathers and spreads, there and back; and positions are gathered once, as integers.
                found["tensor"] += p.tensor * (p.tensor - 1) * most * (layers * cut * 4 * WIDTH * size + 8)
    if "experts" in groups:
        local = EXPERTS // p.experts
        for layer in range(layers):
            arrived = torch.zeros(mapping.world, dtype=torch.long)
            for members in groups["experts"]:
                for rank in members:
                    for place, target in enumerate(members):
                        tokens = int(sent[layer, rank, place * local : (place + 1) * local].sum())
                        arrived[target] += tokens
                        if target != rank:  # there and back, and the gradients of both
                            found["experts"] += 4 * tokens * WIDTH * size
            for members in groups["expert_tensor"] if p.expert_tensor > 1 else []:
                most = int(arrived[members].max())
                # Gathered and spread, there and back; and once, as integers, for which expert each token is.
                found["expert_tensor"] += p.expert_tensor * (p.expert_tensor - 1) * most * (4 * WIDTH * size + 8)
    return found


def _by_place(p: ParallelConfig, members: Sequence[int]) -> list[int]:
    """The ranks of a sequence group in the order of (part, piece)."""
    parts = p.inner * p.outer
    if p.placement == "head_first":
        return list(members)
    order = torch.tensor(members).view(p.head, parts, p.tensor).transpose(0, 1)
    return order.flatten().tolist()


def measure_resharding() -> Rows:
    """The next step's gradients, of a run that goes on under its own mapping and of runs that go on under others."""
    with tempfile.TemporaryDirectory() as folder:
        expected, gradients = run_ranks(_save, SAVED.world, SAVED, Path(folder))[0]
        rows = []
        for mapping in CONTINUED:
            found, resumed = run_ranks(_continue, mapping.world, mapping, Path(folder))[0]
            errors = {name: _error(resumed[name], gradient) for name, gradient in gradients.items()}
            rows.append({
                "ranks": mapping.world, "mapping": mapping.name,
                "loss_error": abs(found["loss"] - expected["loss"]) / expected["loss"],
                "gradient_error": max(errors.values()), "worst": max(errors, key=errors.__getitem__),
            })  # fmt: skip
    return rows


def _save(mapping: Mapping, folder: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    state = engines.make_state(mapping.parallel, build=mapping.build)
    engines.take_steps(state, 0, STEPS)
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.save(state.engine.state(), Position(STEPS, Cursor()), state.config)
    return _observed_step(state, STEPS)


def _continue(mapping: Mapping, folder: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    state = engines.make_state(mapping.parallel, build=mapping.build)
    resume(state.engine, Checkpoints(folder, 1))
    return _observed_step(state, STEPS)


@dataclass(frozen=True)
class Published:
    """A mapping of MoE Parallel Folding's table (Liu et al. 2025), of one pipeline stage."""

    model: str
    width: int
    top_k: int
    ranks: int
    tensor: int
    unfolded_experts: int
    folded_experts: int


PUBLISHED = (
    Published("Mixtral 8x22B", 6144, 2, 16, 2, 4, 8),
    Published("Llama3-8x70B", 8192, 2, 16, 8, 4, 8),
    Published("Qwen2-57B-A14B", 3584, 8, 16, 2, 4, 4),
    Published("Mixtral 8x22B G8T8", 6144, 8, 16, 4, 8, 8),
)


def cross_node_bytes(node: int = 8) -> Rows:
    """Bytes that a token's way to its experts and back, and the gradients', take between nodes: experts on neighbouring
    ranks (folded), and on ranks a tensor group apart (unfolded, where each tensor group's ranks share an expert)."""
    rows = []
    for each in PUBLISHED:
        folded = fold_groups(ParallelConfig(experts=each.folded_experts), each.ranks)["experts"]
        unfolded = fold_groups(ParallelConfig(experts=each.unfolded_experts, expert_tensor=each.tensor), 64)["experts"]
        shares = [share_between_nodes(groups, node) for groups in (unfolded, folded)]
        bytes_ = [4 * each.top_k * each.width * 2 * share for share in shares]
        rows.append({
            "model": each.model, "tensor": each.tensor, "experts_unfolded": each.unfolded_experts,
            "experts_folded": each.folded_experts, "kib_unfolded": bytes_[0] / 1024, "kib_folded": bytes_[1] / 1024,
        })  # fmt: skip
    return rows


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
