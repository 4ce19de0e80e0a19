"""The demo source: long real videos whose content is known, so that a small model can be trained and judged on them.

Over real film (`backdrops`) a seeded script (`script`) lets coloured shapes cross the frame and numbers appear
(`draw`, `film`); captions, questions and texts (`questions`, `language`) follow from the script. See README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .backdrops import load_backdrops
from .film import draw_frame
from .language import still_caption, texts
from .script import generator, still_script

CACHE = "~/.cache/longvila/demo"

__all__ = ["captioned_frames", "texts"]


def captioned_frames(seed: int, count: int, cache: Path | str = CACHE) -> Iterator[tuple[np.ndarray, str]]:
    """(uint8 (128, 128, 3) RGB picture, caption) pairs over training film, each pure in (seed, index)."""
    training, _ = load_backdrops(cache)
    for index in range(count):
        rng = generator("captioned", seed, index)
        script, time = still_script(rng)
        yield draw_frame(script, training.still(rng), time), still_caption(script, time, rng)
