"""Leaving in time: a job's time limit announces itself by SIGTERM, and a run that is told saves before it goes."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class StopSignal:
    """While entered, SIGTERM is noted instead of obeyed; the loop looks at `requested` after each step."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        # Python allows handlers in the main thread alone; elsewhere signals are left as they are.
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # torchrun tells all ranks to stop as soon as one has failed. One that is about to end with an error of its own
        # must not be cut off before it has said it.
        failing = error is not None and "RANK" in os.environ
        if self._active and not failing:
            signal.signal(signal.SIGTERM, self._previous)
