"""The same steps through every engine, and as a textbook has them: dense attention on one process, autograd, clipping,
AdamW, in fp64 and none of the machinery.

AdamW divides by the gradient's own size and clipping by its norm, so that weights say little about gradients: halved
ones end at the same weights. What counts is each step's gradient norm before clipping, and the first step's gradients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longvila.config import (
    PARTS,
    DataConfig,
    EngineName,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Phase,
    StageConfig,
)
from longvila.difference import relative_error
from longvila.model.vlm import LongVilaModel
from longvila.parallel.batch import even_share, shift_labels
from longvila.parallel.fold import Fold, make_fold
from longvila.parallel.launch import run_ranks
from longvila.shards.rows import Row
from longvila.train.engine import make_engine
from longvila.train.feed import Step
from longvila.train.flops import count_flops
from longvila.train.gradients import MIXED, TEXT, VIDEO, make_model, make_row, reference
from longvila.train.loop import prepare
from longvila.train.optimizer import make_optimizer, set_learning_rate
from longvila.train.step import TrainingState, take_step
from longvila.train.summary import count_parameters

DOCUMENTS = (MIXED, TEXT, VIDEO, MIXED[::-1])
Build = Callable[[], LongVilaModel]
RATE = 1e-3
OPTIMIZER = OptimizerConfig(weight_decay=0.1, clip=0.5)
ROWS_PER_STEP = 4
"""Over all data ranks: with fewer of them, gradients accumulate."""

NORM, FIRST_GRADIENT, FIRST_GRADIENT_FP64, WEIGHTS = 1e-5, 1e-5, 1e-11, 0.01
"""Bounds: relative errors of norms and gradients; weights as a share of the sum of the learning rates."""


_fold_of = lru_cache(make_fold)
"""States of one process share their groups."""


def make_config(parallel: ParallelConfig, **fields: Any) -> StageConfig:
    """A stage of one phase without data, that trains everything; `fields` of StageConfig replace its own."""
    phase = Phase("only", 4, DataConfig(sources=()), RATE)
    model = ModelConfig("", None, "")
    config = StageConfig("test", "tiny", None, model, PARTS, (phase,), parallel=parallel, optimizer=OPTIMIZER)
    return replace(config, **fields)


def make_state(
    parallel: ParallelConfig, dtype: torch.dtype = torch.float64, build: Build | None = None, **fields: Any
) -> TrainingState:
    """The small model of `train.gradients` (or what `build` makes) on this rank, ready for `take_step`. Collective."""
    config = make_config(parallel, **fields)
    fold = _fold_of(parallel, "cpu")
    model = (build or make_model)()
    torch.nn.Module.to(model, dtype)  # transformers wraps `model.to` in a way that a type checker misreads
    prepare(model, config)
    no_tokenizer: Any = None  # rows are made of ids
    flops = count_flops(model)
    parameters = count_parameters(model)
    engine = make_engine(model, fold, config)
    return TrainingState(config, fold, torch.device("cpu"), engine, no_tokenizer, flops, parameters)


def make_rows(fold: Fold, indices: range) -> list[Row]:
    """Rows `indices` of an endless list, as one rank of a sequence group sees them."""
    rows = []
    for index in indices:
        documents = DOCUMENTS[index % len(DOCUMENTS)]
        whole = make_row(documents, 4, 32, seed=index)
        share = even_share(len(whole.frames), fold.sequence_rank, fold.num_sequence)
        rows.append(
            Row(
                input_ids=whole.input_ids,
                labels=shift_labels(whole.labels, whole.lengths),
                position_ids=whole.position_ids,
                lengths=whole.lengths,
                keys=tuple(f"row{index}-{d}" for d in range(len(documents))),
                num_frames=tuple(d.frames for d in documents),
                frames=whole.frames[share.start : share.stop],
                failed=(),
            )
        )
    return rows


def make_step(fold: Fold, step: int) -> Step:
    """ROWS_PER_STEP rows, dealt to the data ranks."""
    everything = make_rows(fold, range(ROWS_PER_STEP * step, ROWS_PER_STEP * (step + 1)))
    targets = sum(int((row.labels != -100).sum()) for row in everything)
    return Step(tuple(everything[fold.data_rank :: fold.num_data]), targets, 0)


def take_steps(state: TrainingState, first: int, count: int) -> list[dict[str, float]]:
    """Takes steps `first` to `first + count - 1` and returns their figures."""
    return [take_step(state, make_step(state.fold, step), RATE) for step in range(first, first + count)]


def plain_steps(
    count: int, build: Build | None = None
) -> tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]:
    """The textbook's steps: loss and gradient norm of each, the first step's gradients, and the weights in the end."""
    model = (build or make_model)()
    optimizer = make_optimizer(model, OPTIMIZER)
    figures, first = [], {}
    for step in range(count):
        rows = [
            make_row(DOCUMENTS[i % len(DOCUMENTS)], 4, 32, seed=i)
            for i in range(ROWS_PER_STEP * step, ROWS_PER_STEP * (step + 1))
        ]
        optimizer.zero_grad()
        loss, gradients = reference(model, rows)
        first = first or gradients
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip)
        set_learning_rate(optimizer, RATE)
        optimizer.step()
        figures.append({"loss": loss, "grad_norm": norm.item()})
    return figures, first, {name: p.detach() for name, p in model.named_parameters()}


def engine_steps(
    parallel: ParallelConfig,
    engine: EngineName,
    dtype: torch.dtype,
    count: int,
    scale: float = 1.0,
    build: Build | None = None,
    **fields: Any,
) -> tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]:
    """The same through an engine, on every rank. `scale` multiplies every gradient: a fault, to see it caught.

    Returns:
        As `plain_steps`; the weights on rank 0 alone.
    """
    state = make_state(parallel, dtype, build, engine=engine, **fields)
    backward, norm, first = state.engine.backward, state.engine.gradient_norm, {}

    def scaled(loss: Tensor, last: bool) -> None:
        backward(loss * scale, last)

    def noted() -> float:
        if not first:
            first.update({name: gradient.clone() for name, gradient in state.engine.gradients()})
        return norm()

    state.engine.backward, state.engine.gradient_norm = scaled, noted
    figures = take_steps(state, 0, count)
    return figures, first, state.engine.weights()


def measure(quick: bool = False) -> list[dict[str, Any]]:
    """Every engine in fp32 and FSDP2 in fp64 on folds of two and four ranks, and a run with halved gradients.

    Returns:
        A dict for each: `engine`, `fold` (data x outer x inner x head), `dtype`, `gradients` (`right` or `halved`), and
        `norm_error` (relative, the worst step), `first_gradient_error` (max |difference| / max |reference|, the worst
        parameter), `weight_error` (max |difference| / sum of learning rates), and `within` all bounds or not. All are
        None of an engine that is not installed.
    """
    count = 3 if quick else 10
    folds = [(2, ParallelConfig(inner=2))]
    if not quick:
        folds += [(2, ParallelConfig(head=2)), (4, ParallelConfig(inner=2))]
    cases: list[tuple[EngineName, torch.dtype, float]] = [
        ("fsdp2", torch.float64, 1.0), ("fsdp2", torch.float32, 1.0), ("zero1", torch.float32, 1.0),
        ("zero2", torch.float32, 1.0), ("zero3", torch.float32, 1.0), ("fsdp2", torch.float64, 0.5),
    ]  # fmt: skip
    expected = run_ranks(plain_steps, 1, count)[0]
    table = []
    for world, parallel in folds:
        for engine, dtype, scale in cases:
            if engine == "fsdp2" or importlib.util.find_spec("deepspeed"):
                found = run_ranks(engine_steps, world, parallel, engine, dtype, count, scale)[0]
                figures: dict[str, Any] = errors(found, expected, exact=dtype == torch.float64)
            else:
                figures = dict.fromkeys(("norm_error", "first_gradient_error", "weight_error", "within"))
            table.append({
                "engine": engine,
                "fold": f"{world // parallel.sequence}x{parallel.outer}x{parallel.inner}x{parallel.head}",
                "dtype": str(dtype).removeprefix("torch."),
                "gradients": "right" if scale == 1 else "halved",
                **figures,
            })  # fmt: skip
    return table


def errors(found: tuple, expected: tuple, exact: bool) -> dict[str, Any]:
    """What a run of `engine_steps` differs by from `plain_steps`; `exact` demands fp64's bound of the gradients."""
    figures, first, weights = found
    norms = [relative_error(a["grad_norm"], b["grad_norm"]) for a, b in zip(figures, expected[0], strict=True)]
    gradients = [relative_error(first[name], gradient) for name, gradient in expected[1].items()]
    moved = [relative_error(weights[name], weight, scale=1) for name, weight in expected[2].items()]
    result = {
        "norm_error": max(norms),
        "first_gradient_error": max(gradients),
        "weight_error": max(moved) / (RATE * len(figures)),
    }
    bounds = (NORM, FIRST_GRADIENT_FP64 if exact else FIRST_GRADIENT, WEIGHTS)
    return {**result, "within": all(error <= bound for error, bound in zip(result.values(), bounds, strict=True))}
