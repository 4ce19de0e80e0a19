"""One training sample after another: films, pictures and texts of the demo as conversations."""

from __future__ import annotations

import math
import random
from functools import lru_cache

from longvila.shards.sample import SourceSample

from .backdrops import load_backdrops
from .film import draw_frame, make_film, picture
from .language import (
    Messages,
    caption_messages,
    film_caption,
    long_text,
    narration,
    needle_messages,
    question_messages,
    still_messages,
    text_messages,
    texts,
)
from .questions import script_questions
from .script import Needle, event_script, generator, needle_script, still_script

LENGTHS = {"short": (4, 16), "medium": (24, 96), "long": (128, 1400), "long_text": (200, 4000)}
"""Shortest and longest item of each split: seconds of film, or words."""
SUBTITLED = 0.15
"""Share of the question samples whose prompt begins with the film's subtitles."""

_backdrops = lru_cache(maxsize=1)(load_backdrops)


def film_samples(index: int, split: str, seed: int, lengths: tuple[int, int], cache: str) -> list[SourceSample]:
    """The samples of one film. Two films of three tell a story and give a caption and a question sample, which share
    the file; the third hides a needle."""
    rng = generator(split, seed, index)
    seconds = _log_uniform(rng, lengths)
    is_needle = index % 3 == 2
    script = needle_script(rng, seconds) if is_needle else event_script(rng, seconds)
    conversations: dict[str, Messages] = {}
    caption = ""
    if is_needle:
        needle = script.events[0].what
        assert isinstance(needle, Needle)
        conversations["needle"] = needle_messages(needle, "video", rng)
    else:
        caption = film_caption(script, rng)
        conversations["caption"] = caption_messages(caption, "video", rng)
        lines = "\n".join(line for _, _, line in narration(script, rng)) if rng.random() < SUBTITLED else None
        questions = script_questions(script, rng)
        conversations["questions"] = question_messages(questions, "video", rng, subtitle_lines=lines)
    media = make_film(script, _backdrops(cache)[0], rng)
    metadata = {"source": "demo", "seconds": seconds, "caption": caption, "events": script.facts}
    stem = f"{split}-{seed}-{index:06}"
    return [
        SourceSample(f"{stem}-{kind}", messages, media, "video", metadata) for kind, messages in conversations.items()
    ]


def image_samples(index: int, split: str, seed: int, lengths: tuple[int, int], cache: str) -> list[SourceSample]:
    """One picture with a caption or with questions."""
    rng = generator(split, seed, index)
    script, time = still_script(rng)
    media = picture(draw_frame(script, _backdrops(cache)[0].still(rng), time), "JPEG")
    messages = still_messages(script, time, rng)
    return [SourceSample(f"{split}-{seed}-{index:06}", messages, media, "image", {"source": "demo"})]


def text_samples(index: int, split: str, seed: int, lengths: tuple[int, int], cache: str) -> list[SourceSample]:
    """`text`: a conversation about a written description, or (one of three) plain text. `long_text`: plain text."""
    rng = generator(split, seed, index)
    messages, metadata = [], {"source": "demo"}
    if split == "long_text":
        metadata["text"] = long_text(rng, _log_uniform(rng, lengths))
    elif index % 3 == 2:
        metadata["text"] = next(texts(rng.randrange(2**32), 1))
    else:
        messages = text_messages(rng)
    return [SourceSample(f"{split}-{seed}-{index:06}", messages, None, "text", metadata)]


def _log_uniform(rng: random.Random, lengths: tuple[int, int]) -> int:
    low, high = lengths
    return min(high, round(math.exp(rng.uniform(math.log(low), math.log(high)))))
