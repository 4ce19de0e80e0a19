"""`longvila bench folding`: that mappings of every axis change nothing, what they send, and which faults show.

Everything is fp64 on forked gloo ranks, more of them than cores: they prove correctness and tell no time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from longvila.bench import bubble, engines, sent
from longvila.bench.bars import at_least, at_most, sections
from longvila.bench.gradient_faults import FAULTS, OF_PIPELINES, Fault
from longvila.bench.mapping import MAPPINGS, PIPELINES, Mapping, dropping, is_able
from longvila.config import ParallelConfig
from longvila.difference import relative_error
from longvila.parallel.fold import fold_groups, share_between_nodes
from longvila.parallel.launch import run_cases, run_ranks
from longvila.shards.order import Cursor
from longvila.train.checkpoint import Checkpoints, Position
from longvila.train.loop import resume
from longvila.train.step import TrainingState

Rows = list[dict[str, Any]]

GRADIENT, NORM, RESHARDED, BUBBLE = 1e-11, 1e-9, 1e-11, 1e-12
MAPPINGS_WANTED = 16


FAULTY = Mapping(8, ParallelConfig(tensor=2, experts=2, expert_tensor=2))
"""Where faults are put in: of every kind of copy there are two."""
FAULTY_PIPELINE = Mapping(4, ParallelConfig(pipeline=2, experts=2))
STEPS = 1
"""Before a run is saved."""
SAVED = Mapping(4, ParallelConfig(tensor=2, inner=2, expert_tensor=2))
CONTINUED = (
    Mapping(4, ParallelConfig(inner=2, experts=2)),
    Mapping(2, ParallelConfig(tensor=2, experts=2)),
    Mapping(4, ParallelConfig(pipeline=2, experts=2)),
)


def run(quick: bool, show: Callable[[str, Rows, str], None]) -> dict[str, Any]:
    """Runs all sections and returns what is written as JSON.

    Args:
        quick: a mapping of four, and a fault of three; no bar of how many.
        show: called with (title, rows, note) as each section is done.
    """
    figures: dict[str, Any] = {"quick": quick}

    section = sections(figures, show)

    chosen = MAPPINGS[::4] if quick else MAPPINGS
    pipelines = [each for each in PIPELINES if is_able(each.parallel)]
    cases = [each for each in bubble.CASES if is_able(each)]
    if quick:
        pipelines, cases = pipelines[:1], cases[:3]
    faults = FAULTS[::3] if quick else (*FAULTS, *OF_PIPELINES)
    mappings = section(
        "mappings", [measure(each) for each in (*chosen, *pipelines)], "one step of four rows, against one process"
    )
    sizes = section("bytes", [row for each in (*chosen, *pipelines) for row in sent.measure(each)], sent.NOTE)
    caught = section("faults", measure_faults(faults), "the loss stays right")
    waits = section(
        "bubble", [bubble.measure(each) for each in cases],
        "the order of work is measured; that every part takes one unit of time is a model",
    )  # fmt: skip
    resharded = section("resharding", measure_resharding(), f"saved under {SAVED.name} by {SAVED.world}; the next step")
    section("nodes", cross_node_bytes(), "computed, not measured: even routing, bf16, nodes of 8, a token and layer")
    figures["bars"] = [
        *([] if quick else [at_least("mappings_checked", len(mappings), MAPPINGS_WANTED)]),
        at_most("gradient_max_error", max(row["gradient_error"] for row in mappings), GRADIENT),
        at_most("loss_error", max(row["loss_error"] for row in (*mappings, *resharded)), GRADIENT),
        at_most("norm_error", max(row["norm_error"] for row in mappings), NORM),
        at_most("bytes_mismatch", sum(abs(row["counted"] - row["formula"]) for row in sizes), 0),
        at_most(
            "bubble_error",
            max(abs(row["bubble"] - row["formula"]) for row in waits if row["formula"] is not None),
            BUBBLE,
        ),
        at_least("faults_caught", sum(row["caught"] for row in caught), len(faults)),
        at_most("reshard_max_error", max(row["gradient_error"] for row in resharded), RESHARDED),
    ]
    return figures


def measure(mapping: Mapping) -> dict[str, Any]:
    """One step under a mapping and on one process: relative errors of loss, norm, and of the worst gradient."""
    return _compare(mapping, *run_ranks(_folded_step, mapping.world, mapping)[0])


def _compare(mapping: Mapping, found: dict[str, float], folded: dict[str, Tensor]) -> dict[str, Any]:
    (expected,), gradients, _ = _expected(mapping)
    errors = {name: relative_error(folded[name], gradient) for name, gradient in gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    return {
        "ranks": mapping.world,
        "mapping": mapping.name,
        "drops": mapping.drops,
        "dropped": found.get("choices_dropped", 0.0),
        "loss_error": relative_error(found["loss"], expected["loss"]),
        "norm_error": relative_error(found["grad_norm"], expected["grad_norm"]),
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


def measure_faults(faults: Sequence[Fault]) -> Rows:
    """Whether each fault shows in a gradient or in the norm, while the loss stays right."""
    rows = []
    for mapping, is_pipeline in ((FAULTY, False), (FAULTY_PIPELINE, True)):
        chosen = [fault for fault in faults if (fault in OF_PIPELINES) == is_pipeline]
        found = run_cases(_folded_step, mapping.world, [(mapping, fault) for fault in chosen]) if chosen else []
        for fault, by_rank in zip(chosen, found, strict=True):
            row = _compare(mapping, *by_rank[0])
            seen = row["gradient_error"] > 1e-6 or row["norm_error"] > 1e-6
            kept = {name: row[name] for name in ("mapping", "loss_error", "norm_error", "gradient_error", "worst")}
            caught = seen and row["loss_error"] < 1e-12
            rows.append({"fault": _title(fault), **kept, "caught": caught})
    return rows


def _title(fault: Any) -> str:
    return fault.__name__.replace("_", " ")


def _folded_step(mapping: Mapping, fault: Fault = nullcontext) -> tuple[dict[str, float], dict[str, Tensor]]:
    with fault():
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
    return engines.plain_steps(1, mapping.build if mapping.mixture.capacity is None else partial(dropping, mapping))


def measure_resharding() -> Rows:
    """The next step's gradients, of a run that goes on under its own mapping and of runs that go on under others."""
    with tempfile.TemporaryDirectory() as folder:
        expected, gradients = run_ranks(_save, SAVED.world, SAVED, Path(folder))[0]
        rows = []
        for mapping in CONTINUED:
            found, resumed = run_ranks(_continue, mapping.world, mapping, Path(folder))[0]
            errors = {name: relative_error(resumed[name], gradient) for name, gradient in gradients.items()}
            rows.append({
                "ranks": mapping.world, "mapping": mapping.name,
                "loss_error": relative_error(found["loss"], expected["loss"]),
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
