"""This project's side of the training bench: `train.step.take_step` on a row, as every stage runs it."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from longvila.bench.cell import Cell
from longvila.bench.rank import Watch, language_model, tokens_of
from longvila.config import ModelConfig, OptimizerConfig, ParallelConfig, ShardingConfig, StageConfig
from longvila.model.loss import IGNORE
from longvila.model.vlm import LongVilaConfig, LongVilaModel
from longvila.parallel.batch import even_share, shift_labels
from longvila.parallel.fold import make_fold, start_world
from longvila.shards.rows import Row
from longvila.train.engine import make_engine
from longvila.train.feed import Step
from longvila.train.flops import count_flops
from longvila.train.optimizer import choose_trained
from longvila.train.step import TrainingState, take_step
from longvila.train.summary import count_parameters

RATE = 1e-4
TOWER = {"image_size": 112, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2.0}
"""14 x 14 patches: 196 tokens a frame through a projector that keeps them all."""


def train_text(cell: Cell, watch: Watch) -> None:
    """A row of text; the language model trains, as in context extension."""
    state = _start(cell, ("language_model",), clip=0.0 if cell.gradients else 1.0)
    ids = tokens_of(cell)
    labels = shift_labels(ids, (cell.tokens,))
    frames = torch.zeros((0, 3, TOWER["image_size"], TOWER["image_size"]), dtype=torch.uint8)
    row = Row(ids, labels, torch.arange(cell.tokens), (cell.tokens,), ("row",), (0,), frames, ())
    _run_steps(state, row, cell, watch)


def train_video(cell: Cell, watch: Watch) -> None:
    """A film of `cell.frames` frames, and behind it text, half of it targets, up to `cell.tokens` tokens in all. Tower,
    projector and language model train."""
    state = _start(cell, ("vision", "projector", "language_model"), clip=1.0)
    model, size = state.model, TOWER["image_size"]
    generator = torch.Generator().manual_seed(1)
    num_frame_tokens = cell.frames * model.projector.tokens_per_frame
    text = torch.randint(0, cell.model.vocabulary, (cell.tokens - num_frame_tokens,), generator=generator)
    ids = torch.cat([torch.full((num_frame_tokens,), model.config.frame_token_id), text])
    labels = shift_labels(ids, (cell.tokens,))
    labels[: cell.tokens - len(text) // 2 - 1] = IGNORE
    share = even_share(cell.frames, state.fold.sequence_rank, state.fold.num_sequence)
    generator.manual_seed(2 + share.start)
    frames = torch.randint(0, 256, (len(share), 3, size, size), generator=generator, dtype=torch.uint8)
    row = Row(ids, labels, torch.arange(cell.tokens), (cell.tokens,), ("film",), (cell.frames,), frames, ())
    _run_steps(state, row, cell, watch)


def _start(cell: Cell, trains: Any, clip: float) -> TrainingState:
    parallel = ParallelConfig(inner=cell.inner)
    config = StageConfig(
        name="bench", scale="bench", starts_from=None, model=ModelConfig("bench", None, "bench"), trains=trains,
        phases=(), optimizer=OptimizerConfig(clip=clip), parallel=parallel, recompute=cell.recompute,
        sharding=ShardingConfig(parameters=cell.parameters), tile_tokens=cell.tile_tokens,
    )  # fmt: skip
    device = start_world()
    fold = make_fold(parallel, device.type)
    model = wrap(language_model(cell.model))
    choose_trained(model, trains)
    flops = count_flops(model)
    parameters = count_parameters(model)
    engine = make_engine(model, fold, config)
    return TrainingState(config, fold, device, engine, cast(Any, None), flops, parameters)


def wrap(text: PreTrainedModel) -> LongVilaModel:
    """A vision-language model around a language model; its frame token needs no word of the vocabulary."""
    tower = {
        "name": "bench",
        "model_cfg": {"embed_dim": 16, "vision_cfg": TOWER},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    texts = text.config
    config = LongVilaConfig(tower=tower, projector="mlp", text_config=texts, frame_token_id=texts.vocab_size)
    return LongVilaModel(config, language_model=text).train()


def _run_steps(state: TrainingState, row: Row, cell: Cell, watch: Watch) -> None:
    step = Step((row,), int((row.labels != IGNORE).sum()), 0)
    for index in range(cell.steps):
        if index == 0 and (cell.gradients or cell.frames):  # not where time is measured
            _look_at_gradients(state, cell, watch)
        watch.begin()
        figures = take_step(state, step, RATE)
        watch.end(figures["loss"])
        watch.norm = figures["grad_norm"]


def _look_at_gradients(state: TrainingState, cell: Cell, watch: Watch) -> None:
    """In the next step, once they are complete: keeps the language model's where asked for, and notes which trained
    parameters have none that is finite and not zero."""
    norm = state.engine.gradient_norm

    def look() -> float:
        found = {name for name, parameter in state.model.named_parameters() if parameter.requires_grad}
        kept = {}
        for name, gradient in state.engine.gradients():
            largest = gradient.abs().max().item()
            if math.isfinite(largest) and largest > 0:
                found.discard(name)
            if cell.gradients and name.startswith("language_model."):
                kept[name.removeprefix("language_model.")] = gradient
        watch.without_gradient, watch.gradients = sorted(found), kept or None
        state.engine.gradient_norm = norm
        return norm()

    state.engine.gradient_norm = look
