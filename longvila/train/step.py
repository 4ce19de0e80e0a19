"""One optimizer step: forward and backward of its rows, the loss divided once, weights moved or the step skipped."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cached_property

import torch
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
from longvila.train.flops import ModelFlops, count_flops

log = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """Everything that a stage's loop holds."""

    config: StageConfig
    fold: Fold
    device: torch.device
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    skipped_in_a_row: int = 0

    @property
    def model(self) -> LongVilaModel:
        return self.engine.model

    @cached_property
    def flops(self) -> ModelFlops:
        """What a row costs, to tell how well the devices are used."""
        return count_flops(self.model)


def take_step(state: TrainingState, batch: Step, rate: float) -> dict[str, float]:
    """One optimizer step; returns its figures, equal on all ranks.

    Raises:
        LongvilaError: on every rank, when a step has no target, or too many in a row had to be skipped.
    """
    if batch.num_targets == 0:
        raise LongvilaError(f"no target token in the whole step (samples {[row.keys for row in batch.rows]})")
    loss, routers = 0.0, state.engine.routers
    if routers:
        routers.rows = len(batch.rows)
    for index, row in enumerate(batch.rows):
        output = forward_row(state, row)
        # The only division: from here on every gradient is a plain sum over ranks.
        state.engine.backward(output / batch.num_targets, last=index + 1 == len(batch.rows))
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
    loss /= batch.num_targets
    grad_norm = state.engine.gradient_norm()
    bound = state.config.optimizer.skip_norm or float("inf")
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm <= bound)
    if skipped:
        state.engine.discard()
        _count_skipped(state, f"loss {loss:g}, gradient norm {grad_norm:g}", [row.keys for row in batch.rows])
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
        # The ranks of a sequence group all counted the same rows.
        **{name: total / state.fold.num_sequence for name, total in zip(counted, sums, strict=True)},
    }


def forward_row(state: TrainingState, row: Row) -> torch.Tensor:
    """Sum of the cross-entropy over this rank's targets of one row."""
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
    if state.engine.routers:
        state.engine.routers.is_frame = local.input_ids.flatten() == model.config.frame_token_id
    output = state.engine.forward(
        input_ids=local.input_ids,
        frames=row.frames.to(device),
        position_ids=local.position_ids,
        labels=local.labels,
        route=local.route,
        plan=local.plan,
    )
    return output.loss_sum


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
