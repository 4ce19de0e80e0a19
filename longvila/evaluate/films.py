"""Help for benchmarks that ask about films: their files, their frames by address, and films with frames swapped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from random import Random

from longvila.config import FrameSampling
from longvila.errors import ConfigError, MediaError
from longvila.evaluate.request import FrameRef
from longvila.generate.caption import VIDEO_SUFFIXES
from longvila.media import probe, sample_timestamps


def film_sampling(frames: int, fps: float | None) -> FrameSampling:
    """`fps` frames a second of film, at most `frames`; past it, and always where `fps` is None, so many spread over it.

    Raises:
        ConfigError: less than one frame, or a rate that is not above 0.
    """
    check_at_least_one(frames=frames)
    if fps is None:
        return FrameSampling("uniform", frames)
    if not 0 < fps < math.inf:
        raise ConfigError(f"option 'fps' is {fps:g}; it must be above 0, or none to spread the frames over each film")
    return FrameSampling("fps", frames, fps)


def check_at_least_one(**options: int) -> None:
    """Raises ConfigError naming the first of the options that is below 1."""
    for name, value in options.items():
        if value < 1:
            raise ConfigError(f"option '{name}' is {value}; it must be at least 1")


def find_film(folders: Sequence[Path], name: str) -> Path:
    """The file of the film `name`, with its suffix or without, in the first of `folders` that has it.

    A film that none has gets the path it would have in the first: the runner counts and names what it cannot read.

    Raises:
        ConfigError: a name without suffix that several videos of a folder have.
    """
    for path in (folder / name for folder in folders):
        if path.is_file():
            return path
        # Beside 001.mp4 there may be 001.info.json, and beside clip.mp4 another film, clip.a.mp4.
        found = [
            film
            for film in sorted(path.parent.glob(f"{escape(path.name)}.*"))
            if film.stem == path.name and film.suffix.lower() in VIDEO_SUFFIXES
        ]
        if len(found) > 1:
            names = ", ".join(film.name for film in found)
            raise ConfigError(f"{path.parent}: the film '{name}' may be any of {names}; keep one, or name it in full")
        if found:
            return found[0]
    return folders[0] / name


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
