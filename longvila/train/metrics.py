"""What a run shows: `metrics.jsonl` always, TensorBoard beside it, and a progress bar on rank 0."""

from __future__ import annotations

import json
import resource
import sys
from collections import deque
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """Records one line of figures a step. Does nothing on ranks other than 0.

    A resumed run drops the lines of steps it will take again, so that a step stands in the file once.

    Args:
        peak: FLOP/s of all devices together at their best; None where it is not known, and then there is no MFU.
    """

    def __init__(self, folder: Path, title: str, steps: int, first_step: int, peak: float | None, active: bool) -> None:
        self._active = active
        self._title = title
        self._steps = steps
        self._first = first_step
        self._folder = folder
        self._peak = peak
        self._seconds: deque[float] = deque(maxlen=20)

    def __enter__(self) -> Metrics:
        if not self._active:
            return self
        path = self._folder / "metrics.jsonl"
        kept = [line for line in read_jsonl(path) if line["step"] <= self._first]
        new = path.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in kept))
        new.replace(path)
        self._file = path.open("a")
        self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._first + 1)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=self._steps, completed=self._first, figures="")
        return self

    def record(self, step: int, figures: dict[str, Any]) -> None:
        """One line for step `step` (from 1). `figures` has what `speed` and `describe` read, `memory` in bytes."""
        if not self._active:
            return
        figures = {**figures, **speed(figures, self._peak)}
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)
        self._seconds.append(figures["seconds"])
        # Not rich's own estimate: it forgets steps that are older than half a minute, and long rows take longer.
        left = timedelta(seconds=round(fmean(self._seconds) * (self._steps - step)))
        shown = f"{describe(figures)}  ETA {left}"
        self._progress.update(self._task, completed=step, figures=shown)
        # A log file has no bar: it gets a line now and then instead.
        if self._progress.disable and (step == self._steps or step % max(1, self._steps // 10) == 0):
            self._progress.console.print(
                f"{self._title}  step {step}/{self._steps}  {figures['phase']}  {shown}  lr {figures['lr']:.2e}",
                soft_wrap=True,
            )

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._active:
            self._progress.stop()
            self._file.close()
            self._writer.close()


def speed(figures: dict[str, Any], peak: float | None) -> dict[str, float]:
    """Of a step's `tokens`, `flops` and `seconds`: what it made of its time, the wait for its data included."""
    seconds = max(figures["seconds"], 1e-9)
    rates = {"tokens_per_second": figures["tokens"] / seconds, "flops_per_second": figures["flops"] / seconds}
    return rates if peak is None else {**rates, "mfu": rates["flops_per_second"] / peak}


def describe(figures: dict[str, Any]) -> str:
    """A step's figures in one line: how far from its peak the machine is where that is known, else what it does; and
    the share of its time that it waited for data, those of the slowest rank."""
    if "mfu" in figures:
        use = f"{figures['mfu']:.1%} MFU"
    else:
        use = f"{figures['flops_per_second'] / 1e12:.3g} TFLOP/s"
    return (
        f"loss {figures['loss']:.3f}  {figures['tokens_per_second']:,.0f} tokens/s  {use}  "
        f"{figures['memory'] / 2**30:.2f} GiB  {figures['data_seconds'] / max(figures['seconds'], 1e-9):.0%} data"
    )


def peak_memory(device: torch.device) -> int:
    """Bytes at most: allocated on a GPU since the last call; of this whole process so far on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none if it does not exist; a last line cut by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
