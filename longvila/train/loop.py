"""Trains one stage: the start, the loop and the end of a run.

`train` reads as the story of a stage. Every rank runs it; what ranks are for is decided by the folds (`apply.py`), and
what they agree on each step by `feed.py`.
"""

from __future__ import annotations

import json
import logging
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from longvila import config as configuration
from longvila.apply import apply_folds, attention_of
from longvila.config import PARTS, Phase, StageConfig
from longvila.errors import ConfigError, LongvilaError
from longvila.model.build import build_model, load_model, save_model
from longvila.model.chat import encode_messages, encode_text
from longvila.model.rope import set_rope_theta
from longvila.model.vlm import LongVilaModel
from longvila.parallel.agree import any_rank, barrier, max_over_world, sum_over_world
from longvila.parallel.batch import shard_row
from longvila.parallel.fold import Fold, make_fold, start_world
from longvila.shards.bad import BadSamples
from longvila.shards.loader import RowLoader
from longvila.shards.rows import Row
from longvila.train.anomaly import LossWatch
from longvila.train.checkpoint import Position, load_checkpoint, save_checkpoint
from longvila.train.feed import RowFeed, Step
from longvila.train.flops import ModelFlops, count_flops, peak_flops
from longvila.train.interrupt import StopSignal
from longvila.train.memory import memory_table
from longvila.train.metrics import Metrics, peak_memory, read_jsonl
from longvila.train.optimizer import (
    add_lora,
    choose_trained,
    learning_rate,
    make_optimizer,
    phase_at,
    set_learning_rate,
)
from longvila.train.profiler import StepProfiler
from longvila.train.summary import write_summary

log = logging.getLogger(__name__)


def train(config: StageConfig, run: Path, data: Path, profile: tuple[int, int] | None = None) -> Path:
    """Runs one stage, or what is left of it, and returns the folder of its final model.

    Args:
        run: the run's folder; the stage lives in `run/config.name`.
        data: the data root that relative shard paths start from.
        profile: first and last step to record with torch's profiler, on rank 0.

    Raises:
        ConfigError: a missing or foreign input checkpoint, a folder that holds another run, a fold that does not fit.
        DataError: on every rank, when the data cannot go on.
    """
    device = start_world()
    folder = run / config.name
    if claim_folder(folder, config):
        log.info("%s is complete: %s", config.name, folder / "model")
        return folder / "model"
    torch.manual_seed(config.seed)
    fold = make_fold(config.parallel, device.type)
    state = _start(config, run, fold, device)
    before = part_checksums(state.model)
    started = time.time()
    _run_steps(state, folder, data, profile)
    moved = {part: any_rank(before[part] != after) for part, after in part_checksums(state.model).items()}
    if wrong := [part for part in PARTS if moved[part] != (part in config.trains)]:
        raise LongvilaError(f"{config.name} trains {config.trains}, but what moved is {moved}: {wrong} went wrong")
    _finish(state, run, moved, time.time() - started)
    return folder / "model"


@dataclass
class TrainingState:
    """Everything that a stage's loop holds."""

    config: StageConfig
    fold: Fold
    device: torch.device
    model: LongVilaModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    skipped_in_a_row: int = 0

    @cached_property
    def flops(self) -> ModelFlops:
        """What a row costs, to tell how well the devices are used."""
        return count_flops(self.model)


def claim_folder(folder: Path, config: StageConfig) -> bool:
    """Makes the stage's folder and saves the configuration; True where the stage is already complete.

    Raises:
        ConfigError: where the folder holds a run of another configuration.
    """
    text, path = configuration.to_json(config), folder / "config.json"
    if path.exists() and path.read_text() != text:
        raise ConfigError(
            f"{folder} holds a run with another configuration ({path} differs); use another --run, or remove the folder"
        )
    complete = (folder / "model" / "config.json").exists()
    barrier()
    if dist.get_rank() == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    barrier()
    return complete


def load_start(config: StageConfig, run: Path) -> tuple[LongVilaModel, PreTrainedTokenizerBase]:
    """The model that a stage starts from, its trained parameters chosen and its adapters in place."""
    if config.starts_from is None:
        model, tokenizer = build_model(config.model, seed=config.seed)
    else:
        previous = run / config.starts_from / "model"
        if not (previous / "config.json").exists():
            raise ConfigError(
                f"{config.name} starts from {config.starts_from}, but {previous} has no model; run that stage first"
            )
        model, tokenizer = load_model(previous)
    return model, tokenizer


def prepare(model: LongVilaModel, config: StageConfig) -> Callable[[], object]:
    """Chooses what trains and adds adapters, in place; returns what folds the adapters back into the weights."""
    choose_trained(model, config.trains)
    if config.lora is None:
        return lambda: None
    if "language_model" not in config.trains:
        raise ConfigError(f"{config.name} has LoRA settings, but does not train the language model")
    return add_lora(model.language_model, config.lora).merge_and_unload


def _start(config: StageConfig, run: Path, fold: Fold, device: torch.device) -> TrainingState:
    model, tokenizer = load_start(config, run)
    prepare(model, config)
    model.to(device)  # type: ignore[arg-type]
    model.train()
    apply_folds(model, fold, config.precision, config.recompute, config.recompute_keeps, config.sharding)
    optimizer = make_optimizer(model, config.optimizer)
    if dist.get_rank() == 0:
        log.info("%s trains %s", config.name, describe_parameters(model))
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, moves in sizes if moves)
        log.info("\n".join(memory_table(total, trained, dist.get_world_size(), config.sharding, config.precision)))
    return TrainingState(config, fold, device, model, tokenizer, optimizer)


def _run_steps(state: TrainingState, folder: Path, data: Path, profile: tuple[int, int] | None) -> None:
    config = state.config
    position = load_checkpoint(folder / "checkpoints", state.model, state.optimizer) or Position()
    if position.step:
        log.info("%s continues at step %d", config.name, position.step)
    feed: RowFeed | None = None
    watch = LossWatch()
    bad = folder / f"bad-{state.fold.data_rank}.jsonl"
    stop, first_rank = StopSignal(), dist.get_rank() == 0
    peak = (config.peak_flops or peak_flops(state.device, config.precision) or 0.0) * dist.get_world_size()
    with (
        stop,
        StepProfiler(folder / "profile", profile, position.step, config.steps, first_rank) as profiler,
        Metrics(folder, config.name, config.steps, position.step, peak or None, first_rank) as metrics,
    ):
        for step in range(position.step, config.steps):
            profiler.before(step + 1)
            index, step_of_phase = phase_at(config, step)
            phase = config.phases[index]
            if feed is None or step_of_phase == 0:
                start = position if step_of_phase else Position()
                loader = _make_loader(state, phase, data)
                feed = RowFeed(loader, state.fold, phase.rows_per_step, start.epoch, start.rows)
                extend_context(state.model, config.phases[: index + 1])
                watch = LossWatch()
            started = time.time()
            try:
                batch = feed.next_step()
            finally:
                if state.fold.sequence_rank == 0:
                    list_bad(bad, feed.bad)
            rate = learning_rate(phase, step_of_phase)
            figures = take_step(state, batch, rate)
            seconds = time.time() - started
            profiler.after(step + 1)
            memory = max_over_world(peak_memory(state.device))
            metrics.record(step + 1, {"phase": phase.name, **figures, "seconds": seconds, "memory": memory})
            # Every rank sees the same loss; one of each sequence group names its samples.
            leap = None if figures["skipped"] else watch.see(figures["loss"])
            if leap and state.fold.sequence_rank == 0:
                log.warning("step %d: %s, on samples %s", step + 1, leap, [row.keys for row in batch.rows])
            done = step + 1
            stopped = any_rank(stop.requested)
            due = config.checkpoint_every and done % config.checkpoint_every == 0
            if done < config.steps and (due or stopped):
                position = Position(done, feed.epoch, feed.rows)
                save_checkpoint(folder / "checkpoints", state.model, state.optimizer, position, config.checkpoints_kept)
            if done < config.steps and stopped:
                raise LongvilaError(
                    f"{config.name} was told to stop (SIGTERM) and saved step {done} of {config.steps}; the same "
                    f"command goes on from there"
                )


def take_step(state: TrainingState, batch: Step, rate: float) -> dict[str, float]:
    """One optimizer step; returns its figures, equal on all ranks.

    Raises:
        LongvilaError: on every rank, when a step has no target, or too many in a row had to be skipped.
    """
    if batch.num_targets == 0:
        raise LongvilaError(f"no target token in the whole step (samples {[row.keys for row in batch.rows]})")
    state.optimizer.zero_grad()
    loss = 0.0
    for index, row in enumerate(batch.rows):
        if state.config.sharding.gradients == "none" and isinstance(state.model, FSDPModule):
            state.model.set_requires_gradient_sync(index + 1 == len(batch.rows))
        output = forward_row(state, row)
        # The only division: from here on every gradient is a plain sum over ranks.
        (output / batch.num_targets).backward()
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
    trained = [p for p in state.model.parameters() if p.requires_grad]
    clip = state.config.optimizer.clip or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(trained, clip)
    grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    bound = state.config.optimizer.skip_norm or float("inf")
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm <= bound)
    if skipped:
        _count_skipped(state, f"loss {loss:g}, gradient norm {grad_norm:g}", [row.keys for row in batch.rows])
    else:
        state.skipped_in_a_row = 0
        set_learning_rate(state.optimizer, rate)
        state.optimizer.step()
    return {
        "loss": loss,
        "skipped": int(skipped),
        "lr": rate,
        "grad_norm": grad_norm,
        "target_tokens": batch.num_targets,
        # The ranks of a sequence group all counted the same rows.
        **{name: total / state.fold.num_sequence for name, total in zip(counted, sums, strict=True)},
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


def list_bad(path: Path, bad: BadSamples) -> None:
    """Writes the unusable samples of the current phase that `path` does not list yet, one JSON object a line."""
    known = {line["key"] for line in read_jsonl(path)} if bad.listed else set()
    if new := [{"key": key, "reason": reason} for key, reason in bad.listed.items() if key not in known]:
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in new)


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
    output = model(
        input_ids=local.input_ids,
        frames=row.frames.to(device),
        position_ids=local.position_ids,
        labels=local.labels,
        route=local.route,
        plan=local.plan,
    )
    return output.loss_sum


def _make_loader(state: TrainingState, phase: Phase, data: Path) -> RowLoader:
    model, tokenizer = state.model, state.tokenizer
    tokens_per_frame = model.projector.tokens_per_frame

    def encode(messages: list[dict], text: str | None, num_frames: int) -> tuple[list[int], list[int]]:
        if messages:
            return encode_messages(tokenizer, messages, num_frames, tokens_per_frame)
        return encode_text(tokenizer, text or "")

    return RowLoader(
        phase.data, data, encode, tokens_per_frame, model.vision.image_size,
        data_rank=state.fold.data_rank, num_data_ranks=state.fold.num_data,
        sequence_rank=state.fold.sequence_rank, num_sequence_ranks=state.fold.num_sequence,
        seed=state.config.seed,
    )  # fmt: skip


def extend_context(model: LongVilaModel, phases: Sequence[Phase]) -> None:
    """Sets the RoPE base that the last of `phases` to name one asks for."""
    if bases := [phase.rope_theta for phase in phases if phase.rope_theta is not None]:
        set_rope_theta(model.language_model, bases[-1])


def assemble(
    config: StageConfig, run: Path, weights: Mapping[str, Any], phases: Sequence[Phase]
) -> tuple[LongVilaModel, PreTrainedTokenizerBase]:
    """The model of a stage as others load it: with trained `weights`, adapters merged, and the RoPE base of `phases`,
    those begun so far."""
    model, tokenizer = load_start(config, run)
    merge = prepare(model, config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise LongvilaError(f"trained weights do not fit the model: missing {missing}, unexpected {unexpected}")
    extend_context(model, phases)
    merge()
    return model, tokenizer


def _finish(state: TrainingState, run: Path, moved: dict[str, bool], seconds: float) -> None:
    """Writes the final model, adapters merged, in Hugging Face format, and the stage's summary."""
    config, folder = state.config, run / state.config.name
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(state.model, options=options)
    if dist.get_rank() == 0:
        model, tokenizer = assemble(config, run, weights, config.phases)
        write_summary(folder, config, state.model, moved, seconds)
        save_model(model, tokenizer, folder / "model")
    barrier()


def part_checksums(model: LongVilaModel) -> dict[str, int]:
    """A checksum of this rank's share of every part's parameters, to tell which parts moved."""
    sums = {}
    for part in PARTS:
        sums[part] = 0
        for parameter in getattr(model, part).parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            raw = local.detach().cpu().contiguous().view(torch.uint8).numpy()
            sums[part] = zlib.crc32(raw.tobytes(), sums[part])
    return sums


def describe_parameters(model: LongVilaModel) -> dict[str, str]:
    """`{"projector": "12,345 of 12,345", ...}`: trained parameters of each part."""
    counts = {}
    for part in PARTS:
        parameters = list(getattr(model, part).parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        counts[part] = f"{trained:,} of {sum(p.numel() for p in parameters):,}"
    return counts
