"""Help for benchmarks that ask about films: their frames by address, and the same films with frames swapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from longvila.config import FrameSampling
from longvila.errors import ConfigError, MediaError
from longvila.evaluate.request import FrameRef
from longvila.media import probe, sample_timestamps


def film_refs(path: Path, sampling: FrameSampling) -> tuple[FrameRef, ...]:
    """Addresses of the sampled frames of a film.

    A film that cannot be probed gets the address of its first frame: the runner fails there, and counts and names it
    like every other film it cannot read.
    """
    try:
        timestamps = sample_timestamps(probe(path, str(path)), sampling)
    except MediaError:
        timestamps = (0.0,)
    return tuple(FrameRef(str(path), seconds) for seconds in timestamps)


def derangement(names: Sequence[str], seed: int = 0) -> dict[str, str]:
    """Another name for each name, each used once: a random cycle through all of them (Sattolo 1986).

    Raises:
        ConfigError: there is one name only.
    """
    order = list(names)
    if len(order) < 2:
        raise ConfigError(f"frames can be swapped between two films or more; here is only {order}")
    Random(seed).shuffle(order)
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def spread(refs: Sequence[FrameRef], count: int) -> list[FrameRef]:
    """Up to `count` different frames, spread over `refs`."""
    return list(dict.fromkeys(refs[(2 * part + 1) * len(refs) // (2 * count)] for part in range(count)))
