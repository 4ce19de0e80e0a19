"""Which sample comes at which position of an epoch: a pure function of (seed, epoch, position) over shard sizes.

Two levels, integers alone. Within a source, shards are put in a random order, and the samples of as many consecutive
ones as make up a window are shuffled together. Between sources, sample number j of a source of weight w comes at time
(j + 1/2) / w, and all go by time: until a source runs dry each holds its share of every stretch of the epoch, without
the scatter of random draws.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np


@dataclass(frozen=True)
class Cursor:
    """Where in an epoch all data ranks together stand; what is needed to go on, on any number of ranks."""

    epoch: int = 0
    window: int = 0
    row: int = 0
    """Rows of the window that have been dealt. (Without an index: rows of the epoch that each data rank has read, or
    would have if its data had not ended.)"""
    sources: tuple[str, ...] = ()
    """A digest of the shards of each source; none without an index, and at the start."""


@dataclass(frozen=True, order=True)
class Place:
    """One sample: entry `entry` of shard `shard` of source `source`, all counted from 0."""

    source: int
    shard: int
    entry: int


class SourceOrder:
    """The samples of one source in one epoch."""

    def __init__(self, sizes: Sequence[int], amount: int, window: int, seed: str) -> None:
        """
        Args:
            sizes: samples of each shard.
            amount: samples in the epoch; past the source's own number they come again, in another order.
            window: samples shuffled together, or more where shards are longer.
        """
        self.amount = amount
        self._sizes, self._window, self._seed = sizes, window, seed
        self._total = sum(sizes)
        self._round = lru_cache(2)(self._make_round)
        self._group = lru_cache(4)(self._make_group)

    def place(self, position: int) -> tuple[int, int]:
        """(shard, entry) at `position` of the epoch."""
        number, position = divmod(position, self._total)
        groups, starts = self._round(number)
        index = int(np.searchsorted(starts, position, side="right")) - 1
        return self._group(number, groups[index])[position - int(starts[index])]

    def _make_round(self, number: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
        """The shards of one pass over the source in groups that are shuffled together, and where each group begins."""
        order = [shard for shard, size in enumerate(self._sizes) if size]
        random.Random(f"shards {self._seed} {number}").shuffle(order)
        groups: list[tuple[int, ...]] = []
        group: list[int] = []
        held = 0
        for shard in order:
            group.append(shard)
            held += self._sizes[shard]
            if held >= self._window:
                groups.append(tuple(group))
                group, held = [], 0
        if group:
            groups.append(tuple(group))
        lengths = [sum(self._sizes[shard] for shard in each) for each in groups]
        return groups, np.array([0, *accumulate(lengths)][:-1])

    def _make_group(self, number: int, shards: tuple[int, ...]) -> list[tuple[int, int]]:
        entries = [(shard, entry) for shard in shards for entry in range(self._sizes[shard])]
        random.Random(f"samples {self._seed} {number} {shards[0]}").shuffle(entries)
        return entries


class EpochOrder:
    """The samples of an epoch over all sources, in windows of `window` positions."""

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        amounts: Sequence[int],
        weights: Sequence[float],
        window: int,
        seed: int,
        epoch: int,
    ) -> None:
        """
        Args:
            sizes: samples of each shard of each source.
            amounts: samples of each source in an epoch.
            weights: of the samples of each source, above 0.
        """
        self.window_size = window
        self._sources = [
            SourceOrder(each, amount, window, f"{seed} {epoch} {source}")
            for source, (each, amount) in enumerate(zip(sizes, amounts, strict=True))
        ]
        times = np.concatenate(
            [(np.arange(amount) + 0.5) / weight for amount, weight in zip(amounts, weights, strict=True)]
        )
        of_position = np.repeat(np.arange(len(amounts), dtype=np.int16), amounts)[np.argsort(times, kind="stable")]
        self._windows = [of_position[start : start + window] for start in range(0, len(of_position), window)]
        counts = [np.bincount(each, minlength=len(amounts)) for each in self._windows]
        self._starts = np.cumsum([np.zeros(len(amounts), dtype=np.int64), *counts], axis=0)

    @property
    def num_windows(self) -> int:
        return len(self._windows)

    def window(self, number: int) -> list[Place]:
        """The samples at positions `number` * window to (`number` + 1) * window of the epoch."""
        following = self._starts[number].tolist()
        places = []
        for source in self._windows[number].tolist():
            places.append(Place(source, *self._sources[source].place(following[source])))
            following[source] += 1
        return places
