"""Tells of losses that leap: the sign of a bad sample, or of a rate that is too high. (Figures that are not finite are
told, and their steps skipped, where they arise.)"""

from __future__ import annotations

from collections import deque
from statistics import fmean, pstdev

WINDOW = 50
"""Steps that a loss is compared with."""
WARM_UP = 20
"""Steps to see before anything is told: at the start losses fall quickly, and their spread says little."""
DEVIATIONS = 6.0
LEAST_DEVIATION = 0.02
"""Share of the mean that counts as one deviation at least, so that a flat curve is not taken at its word."""


class LossWatch:
    """Compares each loss with those of the last steps. One that has leapt joins them, so a leap that stays is told of
    once or twice and not for ever."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def see(self, loss: float) -> str | None:
        """Takes in the loss of a step; says what is wrong with it, if anything is."""
        message = None
        if len(self._recent) >= WARM_UP:
            mean = fmean(self._recent)
            deviation = max(pstdev(self._recent, mean), LEAST_DEVIATION * mean)
            if loss > mean + DEVIATIONS * deviation:
                message = (
                    f"loss {loss:.4g} is {(loss - mean) / deviation:.1f} deviations above the last "
                    f"{len(self._recent)} steps ({mean:.4g} +- {deviation:.2g})"
                )
        self._recent.append(loss)
        return message
