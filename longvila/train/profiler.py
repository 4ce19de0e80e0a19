"""Records chosen steps with torch's profiler: a trace for chrome://tracing or Perfetto, and the dearest operators."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from longvila.errors import ConfigError

log = logging.getLogger(__name__)


class StepProfiler:
    """Records the steps `first` to `last` (from 1, both included) of the process that is `active`.

    Args:
        folder: where the trace goes.
        steps: (first, last); None records nothing.
        taken, total: steps that the run has behind it, and that it has in all.

    Raises:
        ConfigError: for steps that the run does not have, or has taken.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, taken: int, total: int, active: bool) -> None:
        if steps is not None and not taken < steps[0] <= steps[1] <= total:
            raise ConfigError(
                f"--profile {steps[0]}:{steps[1]} does not lie within the steps that are left, {taken + 1}:{total}"
            )
        self._folder = folder
        self._steps = steps if active else None
        self._recorder: profile | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def before(self, step: int) -> None:
        """Call before step `step` (from 1)."""
        if self._steps is not None and step == self._steps[0]:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._recorder = profile(activities=activities, acc_events=True)  # else torch 2.11 warns of cycles
            self._recorder.start()

    def after(self, step: int) -> None:
        """Call after step `step`."""
        if self._steps is not None and step == self._steps[1]:
            self._write()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._write()  # of a run that ends in between, what there is

    def _write(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is None or self._steps is None:
            return
        recorder.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._steps[0]}-{self._steps[1]}.json.gz"
        recorder.export_chrome_trace(str(path))
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = recorder.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=48)
        log.info("steps %d to %d are profiled: %s\n%s", *self._steps, path, table)
