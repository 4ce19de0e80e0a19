"""One optimizer step: forward and backward of its rows, the loss divided once, weights moved or the step skipped."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from longvila.apply import attention_of
from longvila.config import StageConfig
from longvila.errors import LongvilaError
from longvila.model.vlm import LongVilaModel
from longvila.parallel.agree import sum_over_world
from longvila.parallel.batch import shard_row
from longvila.parallel.fold import Fold
from longvila.shards.rows import Row
from longvila.train.engine import Engine
from longvila.train.feed import Step
from longvila.train.flops import ModelFlops
from longvila.train.summary import Count

log = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """Everything that a stage's loop holds."""

    config: StageConfig
    fold: Fold
    device: torch.device
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    flops: ModelFlops
    """What a row costs, to tell how well the devices are used."""
    parameters: dict[str, Count]
    """Of each part of the whole model; a pipeline's stage has less."""
    skipped_in_a_row: int = 0

    @property
    def model(self) -> LongVilaModel:
        return self.engine.model


def take_step(state: TrainingState, batch: Step, rate: float) -> dict[str, float]:
    """One optimizer step; returns its figures, equal on all ranks.

    Raises:
        LongvilaError: on every rank, when a step never had a target, or too many in a row had to be skipped.
    """
    if batch.num_targets == 0 and not sum_over_world(batch.num_dropped)[0]:
        raise LongvilaError(f"no target token in the whole step (samples {[row.keys for row in batch.rows]})")
    divisor = max(batch.num_targets, 1)  # none: all documents were dropped, and the step is skipped
    loss, routers = 0.0, state.engine.routers
    if routers:
        routers.rows = len(batch.rows)
    if state.engine.pipeline is not None:
        loss = run_pipeline(state, batch.rows, divisor)
    else:
        for index, row in enumerate(batch.rows):
            output = forward_row(state, row)
            # The only division: from here on every gradient is a plain sum over ranks.
            state.engine.backward(output / divisor, last=index + 1 == len(batch.rows))
            loss += output.item()
    counted = {
        "tokens": sum(sum(row.lengths) for row in batch.rows),
        "frames": sum(sum(row.num_frames) for row in batch.rows),
        "flops": sum(state.flops.of_row(row) for row in batch.rows),
        "dropped": batch.num_dropped,
        "bad": batch.num_bad,
        "shortened": batch.num_shortened,
    }
    loss, *sums = sum_over_world(loss, *counted.values())
    loss = loss / batch.num_targets if batch.num_targets else math.nan
    grad_norm = state.engine.gradient_norm()
    bound = state.config.optimizer.skip_norm or float("inf")
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm <= bound)
    if skipped:
        state.engine.discard()
        figures = f"loss {loss:g}, gradient norm {grad_norm:g}, {batch.num_targets} targets"
        _count_skipped(state, figures, [row.keys for row in batch.rows])
    else:
        state.skipped_in_a_row = 0
        state.engine.step(rate)
    return {
        "loss": loss,
        "skipped": int(skipped),
        "lr": rate,
        "grad_norm": grad_norm,
        "target_tokens": batch.num_targets,
        **(routers.end_step(moved=not skipped) if routers else {}),
        # The ranks that read the same rows all counted them.
        **{name: total / dist.get_world_size(state.fold.readers) for name, total in zip(counted, sums, strict=True)},
    }


def sum_of_losses(state: TrainingState, rows: Sequence[Row]) -> float:
    """The cross-entropy over this rank's targets of all `rows`, forward alone."""
    with torch.no_grad():
        if state.engine.pipeline is not None:
            return run_pipeline(state, rows, 1, backward=False)
        return sum(forward_row(state, row).item() for row in rows)


def run_pipeline(state: TrainingState, rows: Sequence[Row], divisor: int, backward: bool = True) -> float:
    """The same through a pipeline; gradients are those of each loss divided by `divisor`, the only division."""
    assert state.engine.pipeline is not None
    inputs = [prepare_row(state, row) for row in rows]
    tokens = [each["input_ids"].shape[1] for each in inputs]
    loss = state.engine.pipeline.run(inputs, tokens, divisor, backward)
    if backward:
        state.engine.end_rows()
    return loss


def forward_row(state: TrainingState, row: Row) -> torch.Tensor:
    """Sum of the cross-entropy over this rank's targets of one row."""
    inputs = prepare_row(state, row)
    inputs.pop("begin")()
    inputs["frames"] = inputs["frames"].to(state.device)
    return state.engine.forward(**inputs).loss_sum


def prepare_row(state: TrainingState, row: Row) -> dict[str, Any]:
    """What the model's forward takes of one row, its frames where they were decoded; and `begin`, called before it."""
    model, device = state.model, state.device
    local = shard_row(
        row.input_ids.to(device),
        row.labels.to(device),
        row.position_ids.to(device),
        row.lengths,
        row.input_ids == model.config.frame_token_id,
        model.projector.tokens_per_frame,
        state.fold,
        state.config.parallel.layout,
        state.config.parallel.routing,
        attention_of(state.model.language_model.config),
    )

    def begin() -> None:
        if state.engine.routers:
            state.engine.routers.is_frame = local.input_ids.flatten() == model.config.frame_token_id

    return {
        "begin": begin,
        "input_ids": local.input_ids,
        "frames": row.frames,
        "position_ids": local.position_ids,
        "labels": local.labels,
        "route": local.route,
        "plan": local.plan,
    }


def _count_skipped(state: TrainingState, figures: str, keys: list[tuple[str, ...]]) -> None:
    """Every rank sees the same figures, so that all skip a step or none."""
    state.skipped_in_a_row += 1
    log.warning("step skipped, %s, on samples %s", figures, keys)
    if state.skipped_in_a_row > state.config.optimizer.max_skipped:
        raise LongvilaError(
            f"{state.skipped_in_a_row} steps in a row were skipped (optimizer.max_skipped is "
            f"{state.config.optimizer.max_skipped}); the last: {figures}, on samples {keys}; lower the learning rate, "
            f"or look at those samples"
        )
