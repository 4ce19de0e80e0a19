"""Counts what attention does where it does it: kernel calls, and bytes sent by kind and link.

`counting()` is for benchmarks and tests; outside it nothing is kept.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_counters: list[Counter[str]] = []


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """This rank's counts while the block runs, by name: `bytes keys inner`, `bytes heads`, `kernel forward`."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Adds the CPU nanoseconds of this process while the block runs, if a counter is open."""
    begin = time.process_time_ns() if _counters else 0
    yield
    if _counters:
        count(name, time.process_time_ns() - begin)


def count(name: str, number: int = 1) -> None:
    """Adds to every counter that is open."""
    for counter in _counters:
        counter[name] += number
