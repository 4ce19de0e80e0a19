"""Cells of the training bench: one way to train, one model, one length; fresh processes, limits, figures.

What a rank weighs is its peak resident memory (`VmHWM`) less what it held once everything was imported, before the
model was built. Ranks are watched from outside: one that passes the limit of memory or of CPU time ends the cell, and
the cell says which. Time is CPU time (`time.process_time`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longvila.config import RecomputeName, ScopeName

GIB = 2**30
POLL = 0.1
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class TextModel:
    """A Qwen3 with heads of 64, in fp32."""

    vocabulary: int
    hidden: int
    mlp: int
    layers: int = 2
    heads: int = 2
    tied: bool = False
    """Whether embeddings and output matrix are one. ALST's tiled loss fails where they are."""

    def __str__(self) -> str:
        return (
            f"Qwen3, fp32: {self.layers} layers of width {self.hidden}, MLP {self.mlp}, {self.heads} heads of 64, "
            f"{self.vocabulary:,} words{', tied' if self.tied else ''}"
        )


@dataclass(frozen=True)
class Cell:
    """One way to train on a row of `tokens` tokens, for `steps` optimizer steps."""

    contender: str
    """`plain`, `Trainer`, `Trainer + ALST`, `longvila` or `longvila video` (`rank.contender`)."""
    model: TextModel
    tokens: int
    steps: int = 1
    ranks: int = 1
    gradients: bool = False
    """Whether the first step's gradients are wanted."""
    inner: int = 1
    """longvila alone: ranks of the ring; policy of activation checkpointing; where weights are sharded between forward
    and backward; tile; frames of a film."""
    recompute: RecomputeName = "save_attention"
    parameters: ScopeName = "world"
    tile_tokens: int | None = None
    frames: int = 0

    @classmethod
    def from_json(cls, text: str) -> Cell:
        values = json.loads(text)
        return cls(**{**values, "model": TextModel(**values["model"])})


@dataclass(frozen=True)
class Limits:
    """What a cell may take."""

    memory: int
    """Bytes of a rank, or of all ranks together."""
    seconds: float
    """CPU time of a rank, all steps and imports."""
    of_all: bool = False
    """Whether `memory` is of all ranks together."""

    def __str__(self) -> str:
        return (
            f"limits: {self.memory / GIB:.3g} GiB {'over all ranks' if self.of_all else 'a rank'}, "
            f"{self.seconds / 60:.3g} min of CPU a rank"
        )


@dataclass(frozen=True)
class Result:
    """What came of a cell."""

    why_not: str | None = None
    """None where it ran to its end."""
    over_memory: bool = False
    over_time: bool = False
    peaks: tuple[int, ...] = ()
    """Bytes of each rank; where the cell was ended, as far as it had come."""
    seconds: tuple[tuple[float, ...], ...] = ()
    """CPU time of each rank: of each of its steps."""
    losses: tuple[float, ...] = ()
    norm: float = 0.0
    without_gradient: tuple[str, ...] = ()
    gradients: dict[str, Tensor] | None = None


def least_seconds(rounds: Sequence[Sequence[Sequence[float]]]) -> float:
    """CPU time of a step, summed over ranks, as it is while nothing else disturbs: of each rank the least.

    A rank does the same work each time, and what disturbs it comes to one core at a time. The least of sums would wait
    for a moment at which all ranks are left alone, and so favour those who have few.

    Args:
        rounds: seconds of each step of each rank in each round; at least one step of each.
    """
    return sum(min(itertools.chain(*of_rank)) for of_rank in zip(*rounds, strict=True))


def run_cell(cell: Cell, limits: Limits) -> Result:
    """Starts the ranks of a cell, watches them, and gathers their figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cell.json").write_text(json.dumps(dataclasses.asdict(cell)))
        ranks = [_start_rank(cell, rank, folder, port) for port in [_free_port()] for rank in range(cell.ranks)]
        codes: list[int] = []
        try:
            why_not, peaks = _watch(ranks, folder, limits)
            codes = [process.poll() or 0 for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if why_not is None and any(codes):
            # A negative code is a signal: 9 is what a machine without memory ends processes with.
            signals = [f"rank {rank} was ended by signal {-code}" for rank, code in enumerate(codes) if code < 0]
            why_not = "; ".join(signals) or _last_line(folder, cell.ranks)
        if why_not is not None:
            return Result(why_not, why_not.startswith("memory"), why_not.startswith("time"), peaks)
        found: list[dict[str, Any]] = [json.loads((folder / f"rank-{i}.json").read_text()) for i in range(cell.ranks)]
        saved = folder / "gradients.pt"
        return Result(
            peaks=tuple(one["peak"] for one in found),
            seconds=tuple(tuple(one["seconds"]) for one in found),
            losses=tuple(found[0]["losses"]),
            norm=found[0]["norm"],
            without_gradient=tuple(found[0]["without_gradient"]),
            gradients=torch.load(saved) if saved.exists() else None,
        )


def peak_rss(process: int) -> int:
    """Bytes that a process held in memory at most, so far; 0 when it has ended."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _start_rank(cell: Cell, rank: int, folder: Path, port: int) -> subprocess.Popen[bytes]:
    world = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": cell.ranks, "LOCAL_WORLD_SIZE": cell.ranks,
        "MASTER_ADDR": "localhost", "MASTER_PORT": port,
    }  # fmt: skip
    variables = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": 1}
    if cell.ranks > 1:
        variables |= world
    with (folder / f"rank-{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "longvila.bench.rank", str(folder / "cell.json")],
            env={**os.environ, **{name: str(value) for name, value in variables.items()}},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _watch(ranks: list[subprocess.Popen[bytes]], folder: Path, limits: Limits) -> tuple[str | None, tuple[int, ...]]:
    """Until all have ended, or one has failed or passed a limit: why, and each rank's peak."""
    peaks = [0] * len(ranks)
    while True:
        states = [process.poll() for process in ranks]
        for rank, process in enumerate(ranks):
            baseline = folder / f"rank-{rank}.baseline"
            if states[rank] is None and baseline.exists() and (text := baseline.read_text()):
                peaks[rank] = max(peaks[rank], peak_rss(process.pid) - int(text))
            if states[rank] is None and _cpu_seconds(process.pid) > limits.seconds:
                return f"time: more than {limits.seconds / 60:.3g} min of CPU on rank {rank}", tuple(peaks)
        held = sum(peaks) if limits.of_all else max(peaks)
        if held > limits.memory:
            return f"memory: more than {limits.memory / GIB:.3g} GiB", tuple(peaks)
        if any(states) or None not in states:
            return None, tuple(peaks)
        time.sleep(POLL)


def _cpu_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _last_line(folder: Path, ranks: int) -> str:
    """What each rank said last."""
    logs = [(folder / f"rank-{rank}.log").read_text(errors="replace").strip() for rank in range(ranks)]
    return "; ".join(dict.fromkeys(log.splitlines()[-1] for log in logs if log)) or "it ended without a word"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
