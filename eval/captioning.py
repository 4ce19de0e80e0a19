"""Captions of whole films, against what is known to happen in them.

    longvila eval captioning --checkpoint DIR --data FOLDER

FOLDER/captions.jsonl holds {"video", "caption", "events"} lines: the film (below FOLDER/videos/ or FOLDER), a reference
caption, and, where they are known, phrases for what happens. The prompt is LongVILA's (Chen et al. 2024), whose 0-5
judge is a closed model. Measured here:

- event recall: the share of events named in the caption. An event is named when its words stand in the caption one
  after the other; case and punctuation aside. Recall is taken over all events of all films, and is null where none has
  any.
- ROUGE-L, F-measure with stemming (Lin 2004; rouge-score), mean over films, 0 to 1.
- chrF of the whole set of captions (Popovic 2015; sacrebleu), 0 to 100.
- how many captions differ: one caption for every film is no caption.

`-o swap=true` shows each film's question with the frames of another film: what a caption owes to guessing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF

from longvila.errors import ConfigError
from longvila.evaluate.files import check_fields, read_json_lines
from longvila.evaluate.films import check_at_least_one, derangement, film_refs, film_sampling, find_film, spread
from longvila.evaluate.runner import Request

PROMPT = "Elaborate on the visual and narrative elements of the video in detail."


def requests(
    data: Path, frames: int = 256, fps: float | None = 1.0, swap: bool = False, max_new_tokens: int = 256
) -> list[Request]:
    """One request a film.

    Args:
        frames: the most frames of a film, as many as stage 5 trains; past it, and always where `fps` is none, that many
            are spread over it.
        fps: frames a second.
        swap: shows the frames of another film.

    Raises:
        ConfigError: an option out of its range, no captions.jsonl, a line that is not as it must be, a film that is
            listed twice or has several files, or a swap with a single film.
    """
    sampling = film_sampling(frames, fps)
    check_at_least_one(max_new_tokens=max_new_tokens)
    films = read_captions(data)
    shown = derangement(list(films)) if swap else {name: name for name in films}
    return [
        Request(
            id=name,
            frames=film_refs(find_film((data / "videos", data), shown[name]), sampling),
            question=PROMPT,
            max_new_tokens=max_new_tokens,
            metadata={"caption": film["caption"], "events": film["events"], "shown": shown[name]},
        )
        for name, film in films.items()
    ]


def read_captions(data: Path) -> dict[str, dict[str, Any]]:
    """The lines of captions.jsonl by film name."""
    path = data / "captions.jsonl"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; it holds {{video, caption}} lines, with events where they are known")
    films: dict[str, dict[str, Any]] = {}
    lines: dict[str, int] = {}
    for number, film in read_json_lines(path):
        _check_line(film, f"{path}, line {number}")
        name = film["video"]
        if name in films:
            raise ConfigError(f"{path}, lines {lines[name]} and {number}: the film '{name}' is listed twice; keep one")
        films[name], lines[name] = {"caption": film["caption"], "events": film.get("events") or []}, number
    return films


def _check_line(film: Any, where: str) -> None:
    """Raises ConfigError where a line cannot be scored: that is not to be found out after the last film."""
    check_fields(film, where, {"video": str, "caption": str})
    if film.get("events") is not None:
        check_fields(film, where, {"events": list[str]})
    for text in (film["caption"], *(film.get("events") or ())):
        if not _words(text):
            raise ConfigError(f"{where}: {text!r} has no word that a caption could have; mend or remove it")


def score(requests: Sequence[Request], responses: Mapping[str, str | None]) -> dict[str, Any]:
    """Event recall, ROUGE-L, chrF, and how many captions differ. A film without a caption counts as an empty one."""
    captions = {request.id: responses[request.id] or "" for request in requests}
    references = {request.id: request.metadata["caption"] for request in requests}
    found = {request.id: named_events(captions[request.id], request.metadata["events"]) for request in requests}
    num_events = sum(len(request.metadata["events"]) for request in requests)
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    rouge_l = [rouge.score(references[name], captions[name])["rougeL"].fmeasure for name in captions]
    chrf = CHRF().corpus_score(list(captions.values()), [list(references.values())]).score
    return {
        "event_recall": sum(map(len, found.values())) / num_events if num_events else None,
        "num_events": num_events,
        "rouge_l": sum(rouge_l) / len(rouge_l),
        "chrf": chrf,
        "num_films": len(captions),
        "num_distinct": len(set(captions.values())),
        "num_distinct_references": len(set(references.values())),
        "no_response": sum(responses[name] is None for name in captions),
        "matching": "an event counts when its words stand in the caption in a row; case and punctuation aside",
        "examples": [_example(request, captions[request.id], found[request.id]) for request in requests[:4]],
    }


def named_events(caption: str, events: Sequence[str]) -> list[str]:
    """The events whose words stand in `caption` one after the other."""
    text = f" {_words(caption)} "
    return [event for event in events if _words(event) and f" {_words(event)} " in text]


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _example(request: Request, caption: str, found: list[str]) -> dict[str, Any]:
    return {
        "id": request.id,
        "question": request.question,
        "response": caption,
        "reference": request.metadata["caption"],
        "events": request.metadata["events"],
        "found": found,
        "shown": f"{len(request.frames)} frames of {request.metadata['shown']}",
        "frames": spread(request.frames, 4),
    }
