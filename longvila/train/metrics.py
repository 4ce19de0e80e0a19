"""What a run shows: `metrics.jsonl` always, TensorBoard beside it, and a progress bar on rank 0."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """Records one line of figures a step. Does nothing on ranks other than 0.

    A resumed run drops the lines of steps it will take again, so that a step stands in the file once.
    """

    def __init__(self, folder: Path, title: str, steps: int, first_step: int, active: bool) -> None:
        self._active = active
        self._title = title
        self._steps = steps
        self._first = first_step
        self._folder = folder

    def __enter__(self) -> Metrics:
        if not self._active:
            return self
        path = self._folder / "metrics.jsonl"
        kept = [line for line in read_jsonl(path) if line["step"] <= self._first]
        self._file = path.open("w")
        self._file.writelines(json.dumps(line) + "\n" for line in kept)
        self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._first + 1)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=self._steps, completed=self._first, figures="")
        return self

    def record(self, step: int, figures: dict[str, Any]) -> None:
        """One line for step `step` (from 1)."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)
        shown = f"loss {figures['loss']:.3f}  {figures['tokens'] / max(figures['seconds'], 1e-9):,.0f} tokens/s"
        self._progress.update(self._task, completed=step, figures=shown)
        # A log file has no bar: it gets a line now and then instead.
        if self._progress.disable and (step == self._steps or step % max(1, self._steps // 10) == 0):
            self._progress.console.print(
                f"{self._title}  step {step}/{self._steps}  {figures['phase']}  {shown}  lr {figures['lr']:.2e}"
            )

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._active:
            self._progress.stop()
            self._file.close()
            self._writer.close()


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
