"""Resumable checkpoints through torch's distributed checkpoint (DCP): complete or absent, and checked when read.

A checkpoint is a folder `step-N`:

    __R_0.distcp, .metadata   DCP's: model, optimizer, and the state of every rank's random generators
    checkpoint.json           position, number of ranks, configuration, versions
    manifest.json             size and SHA-256 of every other file; written last

It is written as `step-N.part`, flushed to the disk and renamed: a save that is killed, finds the disk full or loses
power leaves the last good one. What cannot be read is set aside as `step-N.bad`, and the checkpoint before it is used.

DCP reshards on load, so that another number of ranks, fold or sharding may continue. The schedule is not saved: the
learning rate is a function of the step alone. The folder must be the same one for all ranks.
"""

from __future__ import annotations

import json
import logging
import pickle
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from longvila import __version__
from longvila.config import StageConfig
from longvila.errors import ConfigError, LongvilaError
from longvila.parallel.fold import world_timeout
from longvila.shards.order import Cursor
from longvila.train.manifest import describe, find_fault, flush_folder, write_file
from longvila.train.randomness import random_state, restore_random_state, seed_anew

log = logging.getLogger(__name__)

T = TypeVar("T")

RANDOM = "random"
"""Beside `model` and `optimizer` in what DCP saves: pickled states of random generators, by rank."""


@dataclass(frozen=True)
class Position:
    """Where in a stage a run stands: steps taken, and what was read of the data of the current phase."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    num_data: int | None = None
    """Data ranks that read it."""

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Position:
        """Inverse of `dataclasses.asdict`, through JSON."""
        if "cursor" not in fields:
            raise ConfigError(
                "the checkpoint is of an earlier version, which kept no place in the data; start the stage again"
            )
        cursor = fields["cursor"]
        cursor = Cursor(**{**cursor, "sources": tuple(cursor["sources"])})
        return Position(fields["step"], cursor, fields.get("num_data"))


class Checkpoints:
    """The checkpoints of one stage. Every method is collective.

    An asynchronous save copies the state before it returns and writes it in a thread; one is under way at a time. What
    goes wrong there is raised by the next `save` or by `close`, on every rank.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool = False) -> None:
        if keep < 1:
            raise ConfigError(f"checkpoints_kept is {keep}; at least one must be kept to go on from")
        self.folder = folder
        self._keep = keep
        # A group of its own, on the CPU: a save in the background must not meet the collectives of training.
        group = dist.new_group(backend="gloo", timeout=world_timeout())
        assert isinstance(group, dist.ProcessGroup), "the group is the world"
        self._group = group
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            log.warning("the save that was under way failed too: %s", failed)

    def close(self) -> None:
        """Waits for a save that is under way, and raises what went wrong with it."""
        try:
            self._wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def _wait(self) -> None:
        if self._under_way is not None:
            saving, self._under_way = self._under_way, None
            saving.result()

    def save(self, state: dict[str, Any], position: Position, config: StageConfig) -> None:
        """Writes `step-N`, complete or not at all, and removes all but the newest checkpoints.

        Args:
            state: `{"model": ..., "optimizer": ...}`, tensors or DTensors by their full names (`get_state_dict`).

        Raises:
            LongvilaError: on every rank, where it cannot be written, for instance because the disk is full. A run that
                can no longer save should stop while its last checkpoint is young.
        """
        self._wait()
        state = {**state, RANDOM: {str(self._rank): pickle.dumps(random_state())}}
        about = {
            "position": asdict(position),
            "world": self._world,
            "config": asdict(config),
            "versions": _versions(),
        }
        if self._thread is None:
            self._write(state, position.step, about)
            return
        stager = DefaultStager(StagingOptions(False, False, False, False))  # a plain copy, done when it returns
        staged = stager.stage(state)
        stager.close()
        assert isinstance(staged, dict)
        self._under_way = self._thread.submit(self._write, staged, position.step, about)

    def exist(self) -> bool:
        """Whether there is any, good or not."""
        self._wait()
        return bool(self._on_first(self._list))

    def load(self, state: dict[str, Any]) -> Position | None:
        """Fills `state` in place from the newest good checkpoint, and restores this rank's random generators.

        On another number of ranks the generators are seeded anew, by the run's seed, the step and the rank.

        Returns:
            The position it was saved at; None where there is no checkpoint.

        Raises:
            ConfigError: where no checkpoint can be read, or where it does not fit `state` (another architecture, other
                trained parameters).
        """
        self._wait()
        found = self._on_first(self._list)
        faults = {}
        for path in reversed(found):
            if (fault := self._fault(path)) is None:
                break
            faults[path] = fault
        else:
            if not found:
                return None
            raise ConfigError(
                f"none of the checkpoints in {self.folder} can be read ({_list_faults(faults)}); put back a good copy, "
                f"or remove the folder to start the stage again"
            )
        if faults:
            self._on_first(lambda: [_set_aside(bad) for bad in faults])
            if self._rank == 0:
                log.warning("set aside as .bad: %s; going on from %s instead", _list_faults(faults), path)
        about = json.loads((path / "checkpoint.json").read_text())
        self._refuse_other_architecture(path, state)
        if about["versions"] != _versions() and self._rank == 0:
            log.info("%s was saved by %s, this is %s: bits may differ", path, about["versions"], _versions())
        same_world = about["world"] == self._world
        wanted = {**state, RANDOM: {str(self._rank): b""}} if same_world else state
        try:
            dcp.load(wanted, checkpoint_id=path, process_group=self._group)
        except dcp.api.CheckpointException as error:
            raise ConfigError(
                f"{path}: cannot continue from this checkpoint with this configuration ({_reason(error)}); remove the "
                f"folder {self.folder} to start the stage again"
            ) from error
        position = Position.from_json(about["position"])
        if same_world:
            restore_random_state(pickle.loads(wanted[RANDOM][str(self._rank)]))
        else:
            seed_anew(about["config"]["seed"], position.step, self._rank)
            if self._rank == 0:
                log.info(
                    "%s was saved by %d ranks and continues on %d: their random generators are seeded anew",
                    path, about["world"], self._world,
                )  # fmt: skip
        return position

    def _write(self, state: dict[str, Any], step: int, about: dict[str, Any]) -> None:
        final = self.folder / f"step-{step:06d}"
        part = final.with_name(final.name + ".part")
        try:
            self._on_first(lambda: _make_empty(part))
            dcp.save(state, storage_writer=dcp.FileSystemWriter(part, sync_files=True), process_group=self._group)
            mine = f"__{self._rank}_*.distcp"
            by_rank = self._on_all(lambda: {path.name: describe(path) for path in part.glob(mine)})
            files = {name: file for rank in by_rank for name, file in rank.items()}
            self._on_first(lambda: self._complete(part, final, files, about))
        except (OSError, dcp.api.CheckpointException) as error:
            if self._rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            dist.barrier(self._group)
            raise LongvilaError(self._say_failed(final, state, error)) from error

    def _complete(self, part: Path, final: Path, files: dict[str, Any], about: dict[str, Any]) -> None:
        """On the first rank, when all ranks have written: seals `part`, gives it its name, removes old ones."""
        write_file(part / "checkpoint.json", json.dumps(about, indent=2))
        for name in (".metadata", "checkpoint.json"):
            files[name] = describe(part / name)
        write_file(part / "manifest.json", json.dumps({"files": files}, indent=2))
        flush_folder(part)
        if final.exists():
            _set_aside(final)
        part.rename(final)
        flush_folder(self.folder)
        superseded = [bad for bad in _steps(self.folder, r"\.bad") if _number(bad) <= _number(final)]
        for old in [*_steps(self.folder)[: -self._keep], *superseded]:
            # Renamed first, so that one that is half removed is no checkpoint.
            gone = old.rename(old.with_name(old.name + ".part"))
            shutil.rmtree(gone, ignore_errors=True)

    def _say_failed(self, final: Path, state: dict[str, Any], error: BaseException) -> str:
        needed = sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(state))
        free = shutil.disk_usage(self.folder.parent).free
        last = _steps(self.folder)
        way_out = (
            f"the last good checkpoint is {last[-1].name}: make room, and the same command goes on from it"
            if last
            else "there is no earlier checkpoint: make room, and the same command starts again"
        )
        return (
            f"{final} could not be saved: {_reason(error)}. It takes {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are "
            f"free; {way_out}"
        )

    def _list(self) -> list[Path]:
        """On the first rank: the checkpoints, oldest first, after removing what an interrupted run left half done."""
        for path in self.folder.glob("step-*.part"):
            shutil.rmtree(path)
        return _steps(self.folder)

    def _fault(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, the same on every rank; the ranks share its files."""
        faults = self._on_all(lambda: find_fault(path, self._rank, self._world))
        return next((fault for fault in faults if fault), None)

    def _refuse_other_architecture(self, path: Path, state: dict[str, Any]) -> None:
        """DCP would ignore tensors that only the checkpoint has, and convert types without a word."""
        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        there = {
            name: _shape(entry.size, entry.properties.dtype)
            for name, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        mine = {name: _shape(tensor.shape, tensor.dtype) for name, tensor in _tensors(state)}
        here = {name: shape for each in self._on_all(lambda: mine) for name, shape in each.items()}
        different = [
            f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise ConfigError(
                f"{path} is of another architecture, or of other trained parameters: {'; '.join(different[:3])}{more}. "
                f"Remove the folder {self.folder} to start the stage again"
            )

    def _on_all(self, function: Callable[[], T]) -> list[T]:
        """What `function` returns on every rank, on every rank; an OSError of one is raised on all."""
        answer: tuple[T | None, str | None]
        try:
            answer = function(), None
        except OSError as error:
            answer = None, str(error)
        answers: list[Any] = [None] * self._world
        dist.all_gather_object(answers, answer, group=self._group)
        for rank, (_, error) in enumerate(answers):
            if error is not None:
                raise OSError(f"{error} (rank {rank})")
        return [value for value, _ in answers]

    def _on_first(self, function: Callable[[], T]) -> T:
        """What `function` returns on the first rank, the only one to call it, on every rank."""
        first: Any = self._on_all(lambda: function() if self._rank == 0 else None)[0]
        return first


def read_position(checkpoint: Path) -> Position:
    """Where its run stood."""
    return Position.from_json(json.loads((checkpoint / "checkpoint.json").read_text())["position"])


def newest(folder: Path) -> Path | None:
    """The last checkpoint in `folder`, whatever its state."""
    return next(reversed(_steps(folder)), None)


def _steps(folder: Path, suffix: str = "") -> list[Path]:
    """Folders of checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(rf"step-\d+{suffix}", path.name)]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("step-"))


def _set_aside(path: Path) -> None:
    bad = path.with_name(path.name + ".bad")
    shutil.rmtree(bad, ignore_errors=True)
    path.rename(bad)


def _list_faults(faults: dict[Path, str]) -> str:
    return "; ".join(f"{path}: {fault}" for path, fault in faults.items())


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    flush_folder(folder.parent.parent)


def _tensors(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of nested dictionaries, under the name that DCP gives it."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value


def _shape(size: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(size)} {str(dtype).removeprefix('torch.')}"


def _reason(error: BaseException) -> str:
    """One line of an error; of DCP's, which lists the ranks' tracebacks, the first rank's error."""
    if isinstance(error, dcp.api.CheckpointException):
        rank, (error, _) = next(iter(error.failures.items()))
        return f"{_reason(error)} (rank {rank})"
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    # What torch's writer says when the disk fills up in the middle of a tensor: "unexpected pos 704 vs 598".
    return "a file could not be written to its end" if "inline_container" in lines[0] else lines[0]


def _versions() -> dict[str, str]:
    return {
        "longvila": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
