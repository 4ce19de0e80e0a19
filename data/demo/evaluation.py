"""The demo's evaluation folder: held-out films in VideoMME's layout, captions, subtitles and a needle haystack.

Nothing here is seen in training: other minutes of the film, two other clips, other seeds.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .backdrops import load_backdrops
from .draw import COLOURS, SHAPES, fade
from .film import draw_frame, encode, make_film, picture
from .language import film_caption, narration, subtitles
from .questions import LETTERS, needle_questions, script_questions
from .script import Event, Script, event_script, generator, random_needle
from .training import LENGTHS

DURATIONS = ("short", "medium", "short", "long", "medium", "short", "short", "medium", "short", "long")
"""Films take these by turns: half are short, three of ten medium, two of ten long."""

_held_out = lru_cache(maxsize=1)(lambda cache: load_backdrops(cache)[1])


def held_out_script(seed: int, index: int) -> Script:
    """The script of one evaluation film; each split's lengths, evenly in log scale."""
    rng = generator("evaluation", seed, index)
    low, high = LENGTHS[DURATIONS[index % len(DURATIONS)]]
    return event_script(rng, round(math.exp(rng.uniform(math.log(low), math.log(high)))))


def write_film(index: int, out: Path, seed: int, cache: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes one film and its subtitles; returns (its VideoMME entry, its caption entry)."""
    script, name = held_out_script(seed, index), f"{index + 1:03}"
    rng = generator("evaluation words", seed, index)
    (out / "videos" / f"{name}.mp4").write_bytes(make_film(script, _held_out(cache), rng))
    (out / "subtitles" / f"{name}.srt").write_text(subtitles(narration(script, rng)))
    questions = []
    for k, question in enumerate(script_questions(script, rng)[:3]):
        options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True)]
        questions.append(
            {
                "question_id": f"{name}-{k + 1}",
                "task_type": question.task_type,
                "question": question.text,
                "options": options,
                "answer": question.letter,
            }
        )
    entry = {
        "video_id": name,
        "duration": DURATIONS[index % len(DURATIONS)],
        "domain": "Film & Television",
        "sub_category": "Animation",
        "questions": questions,
    }
    return entry, {"video": name, "caption": film_caption(script, rng), "events": script.facts}


def write_needles(out: Path, seed: int, count: int, seconds: int, cache: str) -> None:
    """Writes `needle/`: a haystack of `seconds` frames at 1 fps, and `count` needle images with their questions.

    The haystack is the held-out film played slowly, four times a second of film, then once more in mirror image.
    """
    backdrop = _held_out(cache)
    (out / "images").mkdir(parents=True)
    straight = len(backdrop.frames)
    haystack = (
        fade(backdrop.frames[k % straight] if k // straight % 2 == 0 else backdrop.frames[k % straight, :, ::-1])
        for k in range(seconds)
    )
    (out / "haystack.mp4").write_bytes(encode(haystack, fps=1))
    lines = []
    for index in range(count):
        rng = generator("evaluation needle", seed, index)
        needle = replace(random_needle(rng), content=_content(index))
        image = draw_frame(Script(1, None, (Event(needle, 0, 1),)), backdrop.still(rng), 0)
        (out / "images" / f"{index:02}.png").write_bytes(picture(image, "PNG"))
        question, answer = needle_questions(needle, rng)[0]
        lines.append(json.dumps({"image": f"images/{index:02}.png", "question": question, "answer": answer}))
    (out / "needles.jsonl").write_text("\n".join(lines) + "\n")


def _content(index: int) -> int | tuple[str, str]:
    """Numbers and coloured shapes by turns, each as often as any other."""
    turn = index // 2
    return turn % 10 if index % 2 == 0 else (list(COLOURS)[turn % len(COLOURS)], SHAPES[turn % len(SHAPES)])
