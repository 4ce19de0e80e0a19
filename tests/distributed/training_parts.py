"""A small model, rows and a state to take steps with, without files."""

import torch

from longvila.apply import apply_folds
from longvila.config import (
    PARTS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Phase,
    ShardingConfig,
    StageConfig,
)
from longvila.parallel.batch import frame_share, shift_labels
from longvila.parallel.fold import make_fold
from longvila.shards.bad import BadSamples
from longvila.shards.rows import Row
from longvila.train.feed import Step
from longvila.train.gradients import MIXED, TEXT, VIDEO, make_model, make_row
from longvila.train.loop import TrainingState, take_step
from longvila.train.optimizer import choose_trained, make_optimizer

DOCUMENTS = (MIXED, TEXT, VIDEO, MIXED[::-1])
RATE = 1e-3
NUM_ROWS = 4
"""Of a step, over all data ranks."""
OPTIMIZER = OptimizerConfig(weight_decay=0.1, clip=0.5)


def make_config(parallel: ParallelConfig, trains=PARTS, sharding=ShardingConfig()) -> StageConfig:
    phase = Phase("only", 4, DataConfig(sources=()), RATE)
    return StageConfig("test", "tiny", None, ModelConfig("", None, ""), trains, (phase,), parallel=parallel,
                       optimizer=OPTIMIZER, sharding=sharding)  # fmt: skip


def make_state(parallel: ParallelConfig, trains=PARTS, sharding=ShardingConfig()) -> TrainingState:
    fold = make_fold(parallel, "cpu")
    model = make_model()
    choose_trained(model, trains)
    apply_folds(model, fold, sharding=sharding)
    optimizer = make_optimizer(model, OPTIMIZER)
    return TrainingState(make_config(parallel, trains, sharding), fold, torch.device("cpu"), model, None, optimizer)


def make_rows(fold, indices) -> list[Row]:
    """Rows `indices` of an endless list, as one rank of a sequence group sees them."""
    rows = []
    for index in indices:
        documents = DOCUMENTS[index % len(DOCUMENTS)]
        whole = make_row(documents, 4, 32, seed=index)
        share = frame_share(len(whole.frames), fold.sequence_rank, fold.num_sequence)
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


def steps(state, first, count):
    """Takes steps of NUM_ROWS rows each, dealt to the data ranks; returns their figures."""
    figures = []
    for step in range(first, first + count):
        start = NUM_ROWS * step
        everything = make_rows(state.fold, range(start, start + NUM_ROWS))
        mine = tuple(everything[state.fold.data_rank :: state.fold.num_data])
        targets = sum(int((row.labels != -100).sum()) for row in everything)
        figures.append(take_step(state, Step(mine, targets, 0), RATE))
    return figures


class RowList:
    """The loader's interface over rows in memory."""

    image_size = 32

    def __init__(self, rows, max_bad_share=1.0):
        self.rows = rows
        self.bad = BadSamples(max_bad_share)

    def epoch(self, epoch, skip=0):
        return iter(self.rows[skip:])


def whole_weights(model) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in model.named_parameters()}
