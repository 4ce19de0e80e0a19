"""The longest row that fits a budget: a search over real steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longvila.bench.cell import Limits, Result

NEAR = 1.1
"""The search ends when what fits and what does not are this close."""
GRAIN = 512
"""Lengths tried are multiples of it."""


@dataclass(frozen=True)
class Longest:
    """What a search found."""

    tokens: int
    """The longest row that ran; 0 where none did."""
    too_long: int | None
    """The shortest that did not fit; None where nothing was too long within the limit of time."""
    result: Result | None
    """Of the longest."""
    why: str
    """Why the search ended."""


def find_longest(run: Callable[[int], Result], limits: Limits, first: int) -> Longest:
    """Doubles from `first`, then goes by the line through the two longest that fitted, or by halves where it is wrong.

    Args:
        run: takes one step on that many tokens, under `limits`.
    """
    fits: dict[int, Result] = {}
    too_long: int | None = None
    while True:
        best = max(fits, default=0)
        if too_long is not None and (too_long <= NEAR * best or too_long <= best + GRAIN):
            return Longest(best, too_long, fits.get(best), f"{too_long} tokens do not fit")
        tokens = _next(fits, too_long, limits.memory, first)
        if best and (needed := _seconds(fits[best], best, tokens)) > limits.seconds:
            why = f"{tokens} tokens would take about {needed / 60:.0f} min of CPU a rank"
            return Longest(best, too_long, fits[best], why)
        result = run(tokens)
        if result.why_not is None and max(result.peaks) <= limits.memory:
            fits[tokens] = result
        elif result.why_not is None or result.over_memory:
            too_long = tokens
        else:
            return Longest(best, too_long, fits.get(best), result.why_not)


def _next(fits: dict[int, Result], too_long: int | None, memory: int, first: int) -> int:
    if not fits:
        return first if too_long is None else _round(too_long / 2)
    if len(fits) == 1 and too_long is None:
        return 2 * first
    best = max(fits)
    if len(fits) == 1:
        assert too_long is not None
        return _round((best + too_long) / 2)
    before = sorted(fits)[-2]
    slope = (max(fits[best].peaks) - max(fits[before].peaks)) / (best - before)
    guess = best + (memory - max(fits[best].peaks)) / slope if slope > 0 else 2 * best
    # A little below the guess, so that it fits; when that is no longer than what has fitted, a little above.
    wanted = 0.97 * guess if 0.97 * guess > NEAR * best else 1.03 * guess
    wanted = max(min(wanted, 2 * best), best + GRAIN)
    if too_long is not None and wanted > too_long - GRAIN:
        wanted = (best + too_long) / 2
    return _round(wanted)


def _seconds(result: Result, tokens: int, wanted: int) -> float:
    """CPU time of the slowest rank, if all of it grew with the square of the tokens: attention's does."""
    return max(map(sum, result.seconds)) * (wanted / tokens) ** 2


def _round(tokens: float) -> int:
    return max(GRAIN, round(tokens / GRAIN) * GRAIN)
