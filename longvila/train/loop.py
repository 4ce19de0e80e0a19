"""Trains one stage: the start, the loop and the end of a run.

`train` reads as the story of a stage. Every rank runs it; what ranks are for is decided by the folds (`apply/`), and
what they agree on each step by `feed.py`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from longvila import config as configuration
from longvila.config import PARTS, DataConfig, Phase, StageConfig, ValidationConfig
from longvila.errors import ConfigError, LongvilaError
from longvila.model.build import build_model, load_model, save_model
from longvila.model.chat import ChatEncoder, prepare_tokenizer
from longvila.model.rope import extend_context
from longvila.model.vlm import LongVilaModel
from longvila.parallel.agree import any_rank, barrier, max_over_world, sum_over_world
from longvila.parallel.fold import Fold, experts_between_nodes, make_fold, start_world
from longvila.parallel.lost import lost_ranks
from longvila.parallel.pipeline import check_rows
from longvila.shards.bad import BadSamples
from longvila.shards.loader import RowLoader
from longvila.shards.order import Cursor
from longvila.train.anomaly import LossWatch
from longvila.train.checkpoint import Checkpoints, Position, newest, read_position
from longvila.train.engine import Engine, make_engine
from longvila.train.feed import RowFeed, rows_of_rank
from longvila.train.flops import count_flops, peak_flops
from longvila.train.interrupt import StopSignal
from longvila.train.manifest import find_fault
from longvila.train.memory import memory_table, sharding_of
from longvila.train.metrics import Metrics, peak_memory, read_jsonl
from longvila.train.optimizer import add_lora, choose_trained, freeze, learning_rate, phase_at
from longvila.train.profiler import StepProfiler
from longvila.train.step import TrainingState, sum_of_losses, take_step
from longvila.train.summary import count_parameters, write_summary

log = logging.getLogger(__name__)


def train(
    config: StageConfig, run: Path, data: Path, profile: tuple[int, int] | None = None, dry_run: bool = False
) -> Path:
    """Runs one stage, or what is left of it, and returns the folder of its final model.

    Args:
        run: the run's folder; the stage lives in `run/config.name`.
        data: the data root that relative shard paths start from.
        profile: first and last step to record with torch's profiler, on rank 0.
        dry_run: does everything but the steps, and writes nothing.

    Raises:
        ConfigError: a missing or foreign input checkpoint, a folder that holds another run, a fold that does not fit.
        DataError: on every rank, when the data cannot go on.
        LongvilaError: on the other ranks, when one has died or hangs.
    """
    with lost_ranks(config.rank_timeout):
        return _train(config, run, data, profile, dry_run)


def _train(config: StageConfig, run: Path, data: Path, profile: tuple[int, int] | None, dry_run: bool) -> Path:
    device = start_world(config.rank_timeout)
    folder = run / config.name
    if claim_folder(folder, config, write=not dry_run):
        log.info("%s is complete: %s", config.name, folder / "model")
        return folder / "model"
    torch.manual_seed(config.seed)
    fold = make_fold(config.parallel, device.type)
    check_batches(config, fold)
    state = _start(config, run, fold, device)
    if dry_run:
        _rehearse(state, folder, data)
        return folder / "model"
    before = part_checksums(state.engine)
    started = time.time()
    _run_steps(state, folder, data, profile)
    moved = {part: any_rank(before[part] != after) for part, after in part_checksums(state.engine).items()}
    if wrong := [part for part in PARTS if moved[part] != (part in config.trains)]:
        raise LongvilaError(f"{config.name} trains {config.trains}, but what moved is {moved}: {wrong} went wrong")
    _finish(state, run, moved, time.time() - started)
    return folder / "model"


MAY_CHANGE = frozenset({
    *("parallel", "sharding", "engine", "deepspeed_json", "recompute", "recompute_keeps", "tile_tokens"),
    *("checkpoint_every", "checkpoints_kept", "checkpoint_async", "rank_timeout", "peak_flops"),
    *("validation", "optimizer.max_skipped"),
    *(f"phases.*.data.{name}" for name in (
        "workers", "prefetch", "decode_timeout", "cache", "cache_gib", "allow_pipes", "max_bad_share",
    )),
})  # fmt: skip
"""Fields of a stage that say how it is carried out and not what is trained: a run goes on under others."""


def claim_folder(folder: Path, config: StageConfig, write: bool = True) -> bool:
    """Makes the stage's folder and saves the configuration, if `write`; True where the stage is already complete.

    Raises:
        ConfigError: where the folder holds a run that trains something else, naming the fields that differ.
    """
    text, path = configuration.to_json(config), folder / "config.json"
    differs: set[str] = set()
    if path.exists():
        try:
            differs = set(configuration.differences(configuration.from_json(StageConfig, path.read_text()), config))
        except ConfigError as error:
            raise ConfigError(f"{path} is of another version of this program: {error}; use another --run") from error
    if others := sorted(name for name in differs if not _may_change(name)):
        raise ConfigError(
            f"{folder} holds a run with another configuration: {', '.join(others)} in {path}; use another --run, or "
            f"remove the folder"
        )
    complete = (folder / "model" / "config.json").exists()
    barrier()
    if write and dist.get_rank() == 0 and not complete and (differs or not path.exists()):
        if differs:
            log.info("%s goes on with another %s", config.name, ", ".join(sorted(differs)))
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)
    barrier()
    return complete


def _may_change(name: str) -> bool:
    """Whether `MAY_CHANGE` has a field, `phases.0.data.workers`, or one that holds it."""
    parts = re.sub(r"\.\d+(?=\.|$)", ".*", name).split(".")
    return any(".".join(parts[:count]) in MAY_CHANGE for count in range(1, len(parts) + 1))


def load_start(config: StageConfig, run: Path) -> tuple[LongVilaModel, PreTrainedTokenizerBase]:
    """The model that a stage starts from, its trained parameters chosen and its adapters in place."""
    if config.starts_from is None:
        model, tokenizer = build_model(config.model, seed=config.seed)
    else:
        stage = run / config.starts_from / "model"
        previous = next((p for p in (stage, Path(config.starts_from)) if (p / "config.json").exists()), None)
        if previous is None:
            raise ConfigError(
                f"{config.name} starts from {config.starts_from}, but neither {stage} nor {config.starts_from} holds a "
                f"model; run that stage first, or name the folder of one"
            )
        model, tokenizer = load_model(previous)
        prepare_tokenizer(tokenizer, config.model.chat_template)
    return model, tokenizer


def prepare(model: LongVilaModel, config: StageConfig) -> Callable[[], object]:
    """Chooses what trains and adds adapters, in place; returns what folds the adapters back into the weights."""
    choose_trained(model, config.trains)
    adapted = None
    if config.lora is not None:
        if "language_model" not in config.trains:
            raise ConfigError(f"{config.name} has LoRA settings, but does not train the language model")
        adapted = add_lora(model.language_model, config.lora)
    freeze(model, config.freezes)
    return adapted.merge_and_unload if adapted else lambda: None


def _start(config: StageConfig, run: Path, fold: Fold, device: torch.device) -> TrainingState:
    model, tokenizer = load_start(config, run)
    check_context(model.language_model.config.max_position_embeddings, config)
    prepare(model, config)
    model.to(device)  # type: ignore[arg-type]
    model.train()
    parameters = count_parameters(model)  # while it is whole
    if dist.get_rank() == 0:
        log.info("%s trains %s", config.name, {part: str(count) for part, count in parameters.items()})
        total, trained = (sum(each) for each in zip(*parameters.values(), strict=True))
        node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        if warning := experts_between_nodes(config.parallel, dist.get_world_size(), node):
            log.warning(warning)
        log.info("\n".join(memory_table(total, trained, dist.get_world_size(), sharding_of(config), config.precision)))
    flops = count_flops(model)
    return TrainingState(config, fold, device, make_engine(model, fold, config), tokenizer, flops, parameters)


def _run_steps(state: TrainingState, folder: Path, data: Path, profile: tuple[int, int] | None) -> None:
    config = state.config
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoints_kept, config.checkpoint_async)
    position = resume(state.engine, checkpoints)
    if position.step:
        log.info("%s continues at step %d", config.name, position.step)
    unset = any(phase.rows_per_step is None for phase in config.phases)
    if unset and (warning := other_batch(position, state.fold.num_data)) and dist.get_rank() == 0:
        log.warning(warning)
    if config.validation:
        make_loader(state, config.validation.data, data)  # says now, and not after the first steps, what is missing
    feed: RowFeed | None = None
    watch = LossWatch()
    bad = folder / f"bad-{state.fold.data_rank}.jsonl"
    listed = {line["key"] for line in read_jsonl(bad)}
    stop, first_rank = StopSignal(), dist.get_rank() == 0
    peak = (config.peak_flops or peak_flops(state.device, config.precision) or 0.0) * dist.get_world_size()
    with (
        stop,
        checkpoints,
        StepProfiler(folder / "profile", profile, position.step, config.steps, first_rank) as profiler,
        Metrics(folder, config.name, config.steps, position.step, peak or None, first_rank) as metrics,
    ):
        for step in range(position.step, config.steps):
            profiler.before(step + 1)
            index, step_of_phase = phase_at(config, step)
            phase = config.phases[index]
            if feed is None or step_of_phase == 0:
                start = position.cursor if step_of_phase else Cursor()
                loader = make_loader(state, phase.data, data)
                feed = RowFeed(loader, state.fold, rows_of_phase(config, index, state.fold), start)
                enter_phase(state.model, config.phases[: index + 1])
                watch = LossWatch()
            started = time.time()
            try:
                batch = feed.next_step()
            finally:
                if state.fold.sequence_rank == state.fold.stage_number == 0:
                    list_bad(bad, feed.bad, listed)
            waited = time.time() - started
            rate = learning_rate(phase, step_of_phase)
            figures = take_step(state, batch, rate)
            figures |= {"seconds": time.time() - started, "data_seconds": waited, "epoch": feed.cursor.epoch}
            figures["memory"] = max_over_world(peak_memory(state.device))
            profiler.after(step + 1)
            # Every rank sees the same loss; one of each sequence group names its samples.
            leap = None if figures["skipped"] else watch.see(figures["loss"])
            if leap and state.fold.sequence_rank == state.fold.stage_number == 0:
                log.warning("step %d: %s, on samples %s", step + 1, leap, [row.keys for row in batch.rows])
            done = step + 1
            if config.validation and (done % config.validation.every == 0 or done == config.steps):
                figures["validation_loss"] = validate(state, config.validation, data)
            metrics.record(done, {"phase": phase.name, **figures})
            stopped = any_rank(stop.requested)
            due = config.checkpoint_every and done % config.checkpoint_every == 0
            if done < config.steps and (due or stopped):
                checkpoints.save(state.engine.state(), Position(done, feed.cursor, state.fold.num_data), config)
            if done < config.steps and stopped:
                checkpoints.close()
                raise LongvilaError(
                    f"{config.name} was told to stop (SIGTERM) and saved step {done} of {config.steps}; the same "
                    f"command goes on from there"
                )


def rows_of_phase(config: StageConfig, index: int, fold: Fold) -> int:
    """Rows of a step of a phase that each data rank reads."""
    return rows_of_rank(config.phases[index].rows_per_step, fold.num_data, f"phases.{index}.rows_per_step")


def check_batches(config: StageConfig, fold: Fold) -> None:
    """Raises ConfigError where data ranks cannot share the rows of a step evenly, or no pipeline can take them."""
    for index in range(len(config.phases)):
        check_rows(rows_of_phase(config, index, fold), fold.num_stages, f"phases.{index}.rows_per_step")
    if config.validation:
        rows = rows_of_rank(config.validation.rows, fold.num_data, "validation.rows")
        check_rows(rows, fold.num_stages, "validation.rows")


def resume(engine: Engine, checkpoints: Checkpoints) -> Position:
    """Restores the newest checkpoint; where there is none, the start."""
    if not checkpoints.exist():  # the state of an engine is dear to ask for
        return Position()
    state = engine.state()
    position = checkpoints.load(state)
    assert position is not None, "there was a checkpoint"
    engine.load_state(state)
    return position


def other_batch(position: Position, num_data: int) -> str | None:
    """What it means that other data ranks read the steps before; None where as many did."""
    before = position.num_data or num_data
    if before == num_data:
        return None
    return (
        f"each of {num_data} data ranks reads the rows of a step, where {before} did before: a step has "
        f"{num_data / before:g} times as many, and learning rates do not fit; choose ranks and parallel.* so that "
        f"{before} read again"
    )


def _rehearse(state: TrainingState, folder: Path, root: Path) -> None:
    """Reads the first step of every phase, and says what the stage would do. The last checkpoint is looked at and not
    loaded: loading tidies the folder, in which another run may be saving."""
    config = state.config
    last = newest(folder / "checkpoints")
    fault = find_fault(last) if last else None
    done = read_position(last).step if last and not fault else 0
    log.info("%s: %d of %d steps are done", config.name, done, config.steps)
    if fault:
        log.warning("%s: %s; the checkpoint before it would be used", last, fault)
    for index, phase in enumerate(config.phases):
        rows = rows_of_phase(config, index, state.fold)
        feed = RowFeed(make_loader(state, phase.data, root), state.fold, rows)
        batch = feed.next_step()
        counts = [(sum(row.lengths), len(row.lengths), sum(row.num_frames)) for row in batch.rows]
        tokens, documents, frames = (sum(each) for each in zip(*counts, strict=True))
        log.info(
            "  %s: %d steps of %d rows of %d tokens at rate %g; the first: %d tokens in %d documents with %d frames on "
            "this data rank, %d targets in all; %d samples unusable",
            phase.name, phase.steps, rows * state.fold.num_data, phase.data.row_tokens,
            phase.learning_rate, tokens, documents, frames, batch.num_targets, feed.bad.count,
        )  # fmt: skip
    if config.validation:
        rows = rows_of_rank(config.validation.rows, state.fold.num_data, "validation.rows")
        feed = RowFeed(make_loader(state, config.validation.data, root), state.fold, rows)
        log.info("  validation: %d targets in all", feed.next_step().num_targets)
    log.info("everything but the steps was done; nothing was written")


def validate(state: TrainingState, validation: ValidationConfig, root: Path) -> float:
    """Mean loss over the targets of rows that are the same every time. Collective.

    Raises:
        LongvilaError: on every rank, where those rows have no target.
    """
    rows = rows_of_rank(validation.rows, state.fold.num_data, "validation.rows")
    feed = RowFeed(make_loader(state, validation.data, root), state.fold, rows)
    batch = feed.next_step()
    if batch.num_targets == 0:
        raise LongvilaError(f"no target token in {validation.rows} rows of validation data; ask for more rows")
    if left_out := batch.num_dropped + feed.bad.count:
        log.warning("validation: %d samples could not be used: %s", left_out, feed.bad.listed)
    state.model.eval()
    (loss,) = sum_over_world(sum_of_losses(state, batch.rows))
    state.model.train()
    return loss / batch.num_targets


def list_bad(path: Path, bad: BadSamples, listed: set[str]) -> None:
    """Writes the unusable samples whose keys are not `listed` yet, one JSON object a line, and lists them."""
    if new := {key: reason for key, reason in bad.listed.items() if key not in listed}:
        with path.open("a") as file:
            file.writelines(json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in new.items())
        listed.update(new)


def make_loader(state: TrainingState, data: DataConfig, root: Path) -> RowLoader:
    """The rows of `data`, shards below `root`, as the model at hand reads them."""
    model = state.model
    encode = ChatEncoder(state.tokenizer, model.projector.tokens_per_frame)
    return RowLoader(
        data, root, encode, model.vision.image_size,
        data_rank=state.fold.data_rank, num_data_ranks=state.fold.num_data,
        sequence_rank=state.fold.sequence_rank, num_sequence_ranks=state.fold.num_sequence,
        decodes=state.fold.stage_number == 0, seed=state.config.seed,
    )  # fmt: skip


def enter_phase(model: LongVilaModel, phases: Sequence[Phase]) -> None:
    """Gives the model the context that the last of `phases` to raise the RoPE base asks for."""
    if raising := [phase for phase in phases if phase.rope_theta is not None]:
        assert raising[-1].rope_theta is not None
        extend_context(model.language_model, raising[-1].rope_theta, raising[-1].data.row_tokens)


def check_context(context: int, config: StageConfig) -> None:
    """Raises ConfigError where rows may hold a document longer than the model's context, `context` tokens at first."""
    validated = phase_at(config, min(config.validation.every, config.steps) - 1)[0] if config.validation else None
    for index, phase in enumerate(config.phases):
        if phase.rope_theta is not None:
            context = max(context, phase.data.row_tokens)
        if phase.data.row_tokens > context:
            raise ConfigError(
                f"phase {phase.name} has rows of {phase.data.row_tokens} tokens, but the model's context is {context}; "
                f"give shorter rows (data.row_tokens), or raise the RoPE base there (rope_theta)"
            )
        if config.validation and index == validated and config.validation.data.row_tokens > context:
            raise ConfigError(
                f"validation has rows of {config.validation.data.row_tokens} tokens, but the model's context is "
                f"{context} when it is first done, in phase {phase.name}; give shorter rows "
                f"(validation.data.row_tokens)"
            )


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
    enter_phase(model, phases)
    merge()
    return model, tokenizer


def _finish(state: TrainingState, run: Path, moved: dict[str, bool], seconds: float) -> None:
    """Writes the final model, adapters merged, in Hugging Face format, and the stage's summary."""
    config, folder = state.config, run / state.config.name
    weights = state.engine.weights()
    if dist.get_rank() == 0:
        model, tokenizer = assemble(config, run, weights, config.phases)
        write_summary(folder, config, state.parameters, moved, seconds)
        save_model(model, tokenizer, folder / "model")
    barrier()


def part_checksums(engine: Engine) -> dict[str, int]:
    """A checksum of this rank's share of every part's parameters, to tell which parts moved."""
    sums: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, share in engine.shares():
        part, raw = name.partition(".")[0], share.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        sums[part] = zlib.crc32(raw.tobytes(), sums[part])
    return sums
