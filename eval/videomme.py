"""VideoMME (Fu et al. 2024): multiple-choice questions on short, medium and long films.

    longvila eval videomme --checkpoint DIR --data FOLDER

FOLDER holds `videomme.json` in the layout of the official result file (without "response"; fields in the spelling of
2025 or of 2024, see `EARLIER`), `videos/` with films named by "video_id", and `subtitles/` with .srt files of the same
names. Or it is the release as it lies on the hub, unpacked: `videomme/test-*.parquet` with a row for each question,
`data/` and `subtitle/` with files named by "videoID". Rows may also stand in videomme.json, and parquet beside it;
either name and either folder will do. The prompt is the official one. What the official script reads is written beside
the scores, in the spelling that was read: `videomme-result.json`.

Two protocols are in use, and both are reported, since they may differ on the same answers:

- official: some lead-ins are removed and the first of A, B, C, D in the text counts, so "Clearly B" is read as C. An
  answer without any of them leaves the denominator.
- lmms-eval (0.7): formats in order of trust, the last place of the best format; without a letter the answer is wrong.

The unanswered count of each stands beside its accuracy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longvila.errors import ConfigError
from longvila.evaluate.files import check_fields, read_json_list, read_parquet_rows
from longvila.evaluate.films import check_at_least_one, derangement, film_refs, film_sampling, find_film, spread
from longvila.evaluate.runner import FrameRef, Request
from longvila.media import read_subtitles

INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
DURATIONS = ("short", "medium", "long")

FILM = {"video_id": str, "duration": str, "domain": str, "sub_category": str, "questions": list}
QUESTION = {"question_id": str, "task_type": str, "question": str, "options": list[str], "answer": str}
OF_RELEASE = ("url", "videoID")
"""Further fields of a film, in the rows of the release."""
EARLIER = {
    "duration": "duration_category",
    "domain": "video_category",
    "sub_category": "video_subcategory",
    "options": "choices",
}
"""Fields by their names in the official layout of 2025, and what that of 2024 called them."""


def requests(
    data: Path,
    frames: int = 256,
    fps: float | None = 1.0,
    subtitles: bool = False,
    swap: bool = False,
    max_new_tokens: int = 12,
) -> list[Request]:
    """One request a question.

    Args:
        frames: the most frames of a film, as many as stage 5 trains; past it, and always where `fps` is none, that many
            are spread over it.
        fps: frames a second.
        subtitles: puts the lines shown at the sampled moments before the question.
        swap: shows the frames of another film of the same length class (subtitles stay the film's own): what the text
            alone gives away.

    Raises:
        ConfigError: an option out of its range, questions missing or not as official or released, a film with several
            files, or a class to swap in with one film.
    """
    sampling = film_sampling(frames, fps)
    check_at_least_one(max_new_tokens=max_new_tokens)
    films = read_films(data)
    shown = _swapped(films) if swap else {film["video_id"]: film["video_id"] for film in films}
    refs = {film["video_id"]: film_refs(film_file(data, film), sampling) for film in films}
    asked = []
    for film in films:
        video_id = film["video_id"]
        lines = _subtitles(data, film, refs[video_id]) if subtitles else []
        for question in film["questions"]:
            metadata = {"film": {key: value for key, value in film.items() if key != "questions"}}
            asked.append(
                Request(
                    id=f"{video_id}/{question['question_id']}",
                    frames=refs[shown[video_id]],
                    question=prompt(question, lines),
                    max_new_tokens=max_new_tokens,
                    metadata={**metadata, "question": question, "shown": shown[video_id]},
                )
            )
    return asked


def read_films(data: Path) -> list[dict[str, Any]]:
    """The films of videomme.json, or else of the release's parquet, each checked for the fields of the official layout.

    Where a file has a row for each question, the rows of a film are put together.
    """
    path = data / "videomme.json"
    if path.is_file():
        named = [(f"{path}, film {number}", entry) for number, entry in enumerate(read_json_list(path), 1)]
    else:
        files = sorted(file for folder in (data, data / "videomme") for file in folder.glob("test-*.parquet"))
        named = [
            (f"{file}, row {number}", row)
            for file in files
            for number, row in enumerate(read_parquet_rows(file, path), 1)
        ]
        if not files:
            raise ConfigError(
                f"{path}: no such file; it holds the questions in VideoMME's official layout (the release's "
                f"test-*.parquet is taken as well, here or in {data / 'videomme'})"
            )
    if named and isinstance(named[0][1], dict) and "question_id" in named[0][1]:
        named = _group(named)
    for where, film in named:
        _check(film, where, FILM)
        for place, question in enumerate(film["questions"], 1):
            _check(question, f"{path}, film {film['video_id']}, question {place}", QUESTION)
    return [film for _, film in named]


def _group(rows: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Films from rows of one question each, with the place of their first row."""
    films: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, row in rows:
        _check(row, where, {name: kind for name, kind in {**FILM, **QUESTION}.items() if name != "questions"})
        names = {*(spelling(row, name) for name in FILM), *OF_RELEASE}
        film = {name: value for name, value in row.items() if name in names}
        first, known = films.setdefault(row["video_id"], (where, {**film, "questions": []}))
        if {**known, "questions": []} != {**film, "questions": []}:
            raise ConfigError(f"{where}: film {row['video_id']} is not as in {first}; one of the rows is wrong")
        known["questions"].append({name: value for name, value in row.items() if name not in names})
    return list(films.values())


def film_names(film: Mapping[str, Any]) -> list[str]:
    """What the files of a film may be called."""
    return [str(film[name]) for name in ("videoID", "video_id") if film.get(name)]


def film_file(data: Path, film: Mapping[str, Any]) -> Path:
    """The file of a film; where there is none, where it would be."""
    folders = [data / name for name in ("videos", "data") if (data / name).is_dir()] or [data / "videos"]
    files = [find_film(folders, name) for name in film_names(film)]
    return next((file for file in files if file.is_file()), files[0])


def _check(entry: Any, where: str, fields: Mapping[str, Any]) -> None:
    names = entry if isinstance(entry, dict) else {}
    check_fields(entry, where, {spelling(names, name): kind for name, kind in fields.items()})


def spelling(entry: Mapping[str, Any], name: str) -> str:
    """What a film or a question calls a field. The name of 2024 goes first: beside it, a `duration` may be anything."""
    earlier = EARLIER.get(name, name)
    return earlier if earlier in entry else name


def field(entry: Mapping[str, Any], name: str) -> Any:
    """A field of a film or a question, in either spelling."""
    return entry[spelling(entry, name)]


def prompt(question: Mapping[str, Any], subtitles: Sequence[str]) -> str:
    """The official prompt. Where there are no subtitles, their part is left out, as the official instructions say."""
    lines = ["This video's subtitles are listed below:", *subtitles] if subtitles else []
    return "\n".join([*lines, INSTRUCTION, question["question"], *field(question, "options"), "The best answer is:"])


def official_letter(response: str) -> str:
    """The letter that the official script (as of 2025) reads, with its quirks; "" for none.

    Two pairs of its lead-ins lack the comma between them and are one string each, so that neither works alone.
    """
    text = response.strip()
    for lead_in in (
        "The best answer is",
        "The correct answer is",
        "The answer is",
        "The answer",
        "The best option isThe correct option is",
        "Best answer:Best option:",
        "Answer:",
        "Option:",
        "The correct answer",
        "The correct option",
    ):
        text = text.replace(lead_in, "")
    match = re.search("[ABCD]", text)
    return match.group() if match else ""


_NOUNS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
LMMS_PHRASES = (
    *(f"{article}{noun} is" for noun in _NOUNS for article in ("", "the ")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def lmms_letter(response: str) -> str:
    """The letter that lmms-eval 0.7 reads; "" for none."""
    text = response.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    body, text = text.strip(), f" {text} "
    found: list[tuple[int, int, str]] = []  # (trust in the format, place, letter)
    for letter in "ABCD":
        alone = len(body) == 1
        if body.startswith(letter) and (alone or not body[1].isalpha()):
            found.append((10, 0, letter))
        if body.endswith(letter) and (alone or not body[-2].isalpha()):
            found.append((9, len(text) - 1, letter))
        for phrase in LMMS_PHRASES:
            after = text.lower().find(phrase)
            place = text.find(letter, after + len(phrase)) if after >= 0 else -1
            found.append((7, place, letter))
        written = (f"({letter})", f"{letter}.", f"{letter}:", f"{letter})", f"{letter} ", letter)
        found.extend((trust, text.rfind(form), letter) for trust, form in zip((6, 5, 4, 3, 2, 0), written, strict=True))
    found = [candidate for candidate in found if candidate[1] >= 0]
    return max(found, key=lambda candidate: candidate[:2])[2] if found else ""


PROTOCOLS: dict[str, Callable[[str], str]] = {"official": official_letter, "lmms_eval": lmms_letter}


def score(requests: Sequence[Request], responses: Mapping[str, str | None]) -> dict[str, Any]:
    """Accuracy under both protocols: overall, by length and by task type, each with its counts."""
    scores: dict[str, Any] = {name: _tables(name, requests, responses) for name in PROTOCOLS}
    scores["no_response"] = sum(responses[request.id] is None for request in requests)
    scores["num_films"] = len({request.metadata["film"]["video_id"] for request in requests})
    scores["examples"] = _examples(requests, responses)
    return scores


def export(requests: Sequence[Request], responses: Mapping[str, str | None], out: Path) -> None:
    """Writes the official result file. A question without an answer gets an empty response."""
    films: dict[str, dict[str, Any]] = {}
    for request in requests:
        film = request.metadata["film"]
        entry = films.setdefault(film["video_id"], {**film, "missing": False, "questions": []})
        entry["questions"].append({**request.metadata["question"], "response": responses[request.id] or ""})
    text = json.dumps(list(films.values()), indent=2, ensure_ascii=False)
    (out / "videomme-result.json").write_text(text + "\n", encoding="utf-8")


def _tables(protocol: str, requests: Sequence[Request], responses: Mapping[str, str | None]) -> dict[str, Any]:
    def table(members: list[Request]) -> dict[str, Any]:
        letters = [PROTOCOLS[protocol](responses[member.id] or "") for member in members]
        correct = sum(
            letter == member.metadata["question"]["answer"] for letter, member in zip(letters, members, strict=True)
        )
        unanswered = letters.count("")
        counted = len(members) - unanswered if protocol == "official" else len(members)
        accuracy = correct / counted if counted else 0.0
        return {
            "accuracy": accuracy,
            "correct": correct,
            "counted": counted,
            "unanswered": unanswered,
            "lower_95": wilson_lower(correct, counted),
        }

    def by(group: Callable[[Request], str]) -> dict[str, Any]:
        names = list(dict.fromkeys(map(group, requests)))
        return {name: table([request for request in requests if group(request) == name]) for name in names}

    by_duration = by(lambda request: field(request.metadata["film"], "duration"))
    return {
        "overall": table(list(requests)),
        "by_duration": dict(sorted(by_duration.items(), key=lambda item: _duration_rank(item[0]))),
        "by_task_type": by(lambda request: request.metadata["question"]["task_type"]),
        "by_domain": by(lambda request: field(request.metadata["film"], "domain")),
    }


def wilson_lower(correct: int, counted: int) -> float:
    """Lower end of the 95 % interval of a share (Wilson 1927)."""
    if counted == 0:
        return 0.0
    z, share = 1.96, correct / counted
    middle = share + z * z / (2 * counted)
    spread = z * math.sqrt(share * (1 - share) / counted + z * z / (4 * counted * counted))
    return (middle - spread) / (1 + z * z / counted)


def _duration_rank(name: str) -> int:
    return DURATIONS.index(name) if name in DURATIONS else len(DURATIONS)


def _swapped(films: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    shown: dict[str, str] = {}
    for duration in dict.fromkeys(field(film, "duration") for film in films):
        names = dict.fromkeys(film["video_id"] for film in films if field(film, "duration") == duration)
        shown.update(derangement(list(names)))
    return shown


def _subtitles(data: Path, film: Mapping[str, Any], refs: Sequence[FrameRef]) -> list[str]:
    """Lines shown at any of the sampled moments, once each, in order. Not every film has a file."""
    files = [data / folder / f"{name}.srt" for name in film_names(film) for folder in ("subtitles", "subtitle")]
    path = next(filter(Path.is_file, files), None)
    if path is None:
        return []
    moments = [ref.seconds or 0.0 for ref in refs]
    shown = [each.line for each in read_subtitles(path) if any(each.begin <= moment < each.end for moment in moments)]
    return list(dict.fromkeys(shown))


def _examples(requests: Sequence[Request], responses: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Two questions of each length class, with four frames spread over what was shown; right as lmms-eval reads."""
    chosen = []
    for duration in dict.fromkeys(field(request.metadata["film"], "duration") for request in requests):
        members = [request for request in requests if field(request.metadata["film"], "duration") == duration]
        chosen.extend(members[:: max(1, len(members) // 2)][:2])
    return [_example(request, responses[request.id]) for request in chosen]


def _example(request: Request, response: str | None) -> dict[str, Any]:
    question = request.metadata["question"]
    return {
        "id": request.id,
        "question": "\n".join([question["question"], *field(question, "options")]),
        "response": response,
        "reference": question["answer"],
        "correct": lmms_letter(response or "") == question["answer"],
        "shown": f"{len(request.frames)} frames of {request.metadata['shown']}",
        "frames": spread(request.frames, 4),
    }
