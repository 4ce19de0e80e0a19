"""Needle in a haystack: one picture hidden in a film, and a question only that picture answers (LongVA, LongVILA).

    longvila eval needle --checkpoint DIR --data FOLDER

The film is taken at one frame a second from its start; the needle goes in as an EXTRA frame before frame
int(depth * frames), so a prompt shows frames + 1. Answers are generated, and right when they equal the reference after
normalisation: stricter than the teacher-forced match of LongVA (Zhang et al. 2024) and LongVILA (Chen et al. 2024).

FOLDER/needle/ holds `haystack.mp4` (any video suffix), the pictures in `images/`, and the needles: `needles.jsonl` with
{"image", "question", "answer"} lines, or LongVA's own `dataset.json`, a list of {"path", "prompt", "answer"}.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longvila.errors import ConfigError
from longvila.evaluate.files import check_fields, read_json_lines, read_json_list
from longvila.evaluate.films import check_at_least_one, find_film
from longvila.evaluate.runner import FrameRef, Request
from longvila.media import probe


def requests(
    data: Path,
    frames: tuple[int, ...] = (16, 32, 64, 128, 350, 700, 1400),
    depths: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    answers: int = 20,
    max_new_tokens: int = 12,
) -> list[Request]:
    """`answers` questions for each cell of frames x depth, each with a needle of its own while there are enough.

    Cells take turns through the needles, so that all of them are used. With fewer needles than `answers` a cell asks
    each once, and no more: the same question about the same frames has the same answer.

    Raises:
        ConfigError: an option out of its range, no haystack or needles here, or a film too short for the grid.
    """
    _check_grid(frames, depths)
    check_at_least_one(answers=answers, max_new_tokens=max_new_tokens)
    folder = data / "needle"
    needles = read_needles(folder)
    haystack = find_film([folder], "haystack")
    if not haystack.is_file():
        raise ConfigError(f"{folder}: no haystack.mp4 here")
    duration = probe(haystack, str(haystack)).duration
    if duration < max(frames):
        raise ConfigError(
            f"{haystack}: {duration:.0f} s of film give {int(duration)} frames at 1 a second, but the grid goes to "
            f"{max(frames)}; give a longer film, or -o frames=... up to {int(duration)}"
        )
    film = [FrameRef(str(haystack), float(second)) for second in range(max(frames))]
    grid = []
    for cell, (count, depth) in enumerate((count, depth) for count in frames for depth in depths):
        for turn in range(min(answers, len(needles))):
            index = (cell * answers + turn) % len(needles)
            at = int(depth * count)
            needle = FrameRef(str(folder / "images" / needles[index]["image"]), None)
            grid.append(
                Request(
                    id=f"{count}-{depth:g}-{index}",
                    frames=(*film[:at], needle, *film[at:count]),
                    question=needles[index]["question"].strip(),
                    max_new_tokens=max_new_tokens,
                    metadata={"frames": count, "depth": depth, "at": at, "answer": needles[index]["answer"]},
                )
            )
    return grid


def _check_grid(frames: Sequence[int], depths: Sequence[float]) -> None:
    if not frames or not depths:
        empty = "depths" if frames else "frames"
        raise ConfigError(f"option '{empty}' is empty; give at least one, e.g. -o frames=16,32 -o depths=0,0.5,1")
    check_at_least_one(frames=min(frames))
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ConfigError(f"option 'depths' has {depth:g}; a depth is a share of the film, from 0 to 1")


def read_needles(folder: Path) -> list[dict[str, str]]:
    """Needles as {"image" (below `images/`), "question", "answer"}.

    Raises:
        ConfigError: there are none, an entry lacks a field, or its picture is missing.
    """
    ours, longva = folder / "needles.jsonl", folder / "dataset.json"
    if ours.is_file():
        entries = [(f"{ours}, line {number}", entry) for number, entry in read_json_lines(ours)]
        fields = ("image", "question", "answer")
    elif longva.is_file():
        entries = [(f"{longva}, entry {number}", entry) for number, entry in enumerate(read_json_list(longva), 1)]
        fields = ("path", "prompt", "answer")
    else:
        raise ConfigError(f"{folder}: no needles here; it needs needles.jsonl, or LongVA's dataset.json, and images/")
    if not entries:
        raise ConfigError(f"{folder}: the list of needles is empty")
    needles = []
    for where, entry in entries:
        check_fields(entry, where, dict.fromkeys(fields, str))
        image, question, answer = (entry[name] for name in fields)
        image = image.removeprefix("images/")
        if not (folder / "images" / image).is_file():
            raise ConfigError(f"{where}: the needle {image} has no picture in {folder / 'images'}")
        needles.append({"image": image, "question": question, "answer": answer})
    return needles


def score(requests: Sequence[Request], responses: Mapping[str, str | None]) -> dict[str, Any]:
    """`mean` over cells, `grid` {frames: {depth: share right}}, and `cells` with their counts.

    A request without a response counts as wrong.
    """
    cells: dict[tuple[int, float], list[Request]] = defaultdict(list)
    for request in requests:
        cells[request.metadata["frames"], request.metadata["depth"]].append(request)
    table = [
        {
            "frames": count,
            "depth": depth,
            "answers": len(members),
            "correct": sum(is_correct(member, responses[member.id]) for member in members),
            "no_response": sum(responses[member.id] is None for member in members),
        }
        for (count, depth), members in cells.items()
    ]
    grid: dict[str, dict[str, float]] = defaultdict(dict)
    for cell in table:
        grid[str(cell["frames"])][f"{cell['depth']:g}"] = cell["correct"] / cell["answers"]
    shares = [share for row in grid.values() for share in row.values()]
    return {
        "mean": sum(shares) / len(shares),
        "grid": dict(grid),
        "cells": table,
        "matching": "generated answer equals the reference; case, punctuation and articles aside",
        "examples": _examples(cells, responses),
    }


def is_correct(request: Request, response: str | None) -> bool:
    return response is not None and normalise(response) == normalise(request.metadata["answer"])


def normalise(text: str) -> str:
    """Lower case, words and numbers only, without articles: "The red ball." and "red ball" are equal."""
    words = re.findall(r"\w+", text.lower())
    # "A" alone is a letter of a multiple choice, not an article.
    return " ".join(word for word in words if len(words) == 1 or word not in ("a", "an", "the"))


def _examples(
    cells: Mapping[tuple[int, float], list[Request]], responses: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    """One answer from each of up to four lengths, with the needle between the frames around it."""
    lengths = sorted({count for count, _ in cells})
    chosen = []
    for count in lengths[:: max(1, len(lengths) // 4)][:4]:
        depth = sorted(depth for length, depth in cells if length == count)[len(chosen) % 2 + 1 :][:1] or [0.0]
        members = cells.get((count, depth[0]))
        if members:
            chosen.append(members[len(chosen) % len(members)])
    return [
        {
            "id": request.id,
            "question": request.question,
            "response": responses[request.id],
            "reference": request.metadata["answer"],
            "correct": is_correct(request, responses[request.id]),
            "shown": f"{request.metadata['frames']} frames, needle at depth {request.metadata['depth']:g}",
            "frames": list(request.frames[max(request.metadata["at"] - 1, 0) : request.metadata["at"] + 2]),
        }
        for request in chosen
    ]
