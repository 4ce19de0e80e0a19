"""Captions of video files: one file, or every video and image in a folder.

Frames are sampled, the question is asked, and the answer is handed on in pieces while it is written. Captions may also
go to a JSONL file, from which the same call goes on where it was stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from longvila.config import FrameSampling
from longvila.errors import ConfigError, DataError
from longvila.generate.answer import Answerer, Film
from longvila.media import choose_tiles, decode_frames, decode_tiles, image_extent, probe, sample_timestamps

QUESTION = "Elaborate on the visual and narrative elements of the video in detail."
"""The captioning question of LongVILA (Chen et al. 2024)."""
VIDEO_SUFFIXES = (
    *(".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg"),
    *(".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv", ".gif"),
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass
class CaptionReport:
    """What `caption` did. `captions`, `failed` (reasons) and `known` (already in `out`) cover every file found."""

    captions: dict[Path, str] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)
    known: list[Path] = field(default_factory=list)


def caption(
    answerer: Answerer,
    path: Path,
    sampling: FrameSampling,
    question: str = QUESTION,
    max_new_tokens: int = 256,
    on_file: Callable[[Path], None] = lambda path: None,
    on_text: Callable[[str], None] = lambda text: None,
    on_cut: Callable[[Path], None] = lambda path: None,
    on_failure: Callable[[Path, str], None] = lambda path, reason: None,
    out: Path | None = None,
) -> CaptionReport:
    """Answers `question` about `path`, or about each video and image below it when it is a folder.

    Args:
        on_file: called with a file that could be opened, before its frames are decoded.
        on_text: called with each piece of the caption.
        on_cut: called with a file whose caption ended at `max_new_tokens`, after its last piece.
        on_failure: called with a file of a folder that could not be captioned, and the reason.
        out: a JSONL file that gets a line for each caption as soon as it is whole: video, question, caption, whether it
            was cut, number of frames. Files that it has with the same question, under the same name, are left out.

    Raises:
        ConfigError: `path` does not exist, or `out` is no file for captions.
        DataError: a single file that cannot be captioned, a folder without videos or images, or one where each failed.
    """
    report = CaptionReport()
    files = answerer.on_first(lambda: find_media(path))
    known = answerer.on_first(lambda: begin_captions(out)) if out is not None else set()
    for file in files:
        if (str(file), question) in known:
            report.known.append(file)
            continue
        try:
            tokens = watch(answerer, file, sampling, on_file)
            pieces = []
            for piece in answerer.stream(tokens, question, max_new_tokens):
                pieces.append(piece)
                on_text(piece)
            report.captions[file] = "".join(pieces).strip()
            if answerer.was_cut:
                on_cut(file)
            if out is not None and answerer.group_rank == 0:
                line = {"video": str(file), "question": question, "caption": report.captions[file]}
                line |= {"cut": answerer.was_cut, "frames": len(tokens)}
                with out.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(line) + "\n")
        except DataError as error:
            if not path.is_dir():
                raise
            report.failed[file] = str(error)
            on_failure(file, str(error))
    if not report.captions and not report.known:
        file, reason = next(iter(report.failed.items()))
        raise DataError(f"{path}: none of its {len(files)} files could be captioned; the first, {file.name}: {reason}")
    return report


def begin_captions(out: Path) -> set[tuple[str, str]]:
    """Films and questions of the captions that a file has; an empty file is made where there is none.

    Half a line, left by a process that was killed, is no caption, and is ended so that the next one has its own line.

    Raises:
        ConfigError: it cannot be read or written, or holds something else.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a+", encoding="utf-8", errors="replace") as file:
            file.seek(0)
            text = file.read()
            known = _read_captions(text)
            if text.strip() and not known:  # a film, say: nothing must be written into it
                raise ConfigError(f"{out}: holds no captions; give the name of a new file")
            if text and not text.endswith("\n"):
                file.write("\n")
    except OSError as error:
        raise ConfigError(f"{out}: captions cannot be written there: {error.strerror}") from error
    return known


def _read_captions(text: str) -> set[tuple[str, str]]:
    known = set()
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            known.add((entry["video"], entry["question"]))
        except (ValueError, KeyError, TypeError):
            continue
    return known


def find_media(path: Path) -> list[Path]:
    """The file itself, or the videos and images below a folder, sorted.

    Raises:
        ConfigError: no such path.
        DataError: a folder that holds neither.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in suffixes)
    if not files:
        raise DataError(f"{path}: no video or image in this folder (files ending in {' '.join(suffixes)})")
    return files


def watch(
    answerer: Answerer, path: Path, sampling: FrameSampling, on_file: Callable[[Path], None] = lambda path: None
) -> Tensor:
    """Frame tokens (F, T, D) of a video, or of the tiles of an image, for any number of questions about it.

    Args:
        on_file: called with the file once it could be opened, before its frames are decoded.

    Raises:
        MediaError: naming the file.
    """

    def open_file() -> Film:
        film = open_film(path, sampling, answerer.model.vision.image_size)
        on_file(path)
        return film

    return answerer.encode_film(open_file)


def open_film(path: Path, sampling: FrameSampling, size: int) -> Film:
    """The frames of a video, or the tiles of an image: how many, and what decodes some of them, (first, last + 1) ->
    uint8 (F, 3, size, size). Both raise MediaError naming the file."""
    name = str(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        tiles = choose_tiles(*image_extent(path, name), size, sampling.tiles)
        return len(tiles), lambda start, stop: decode_tiles(path, tiles[start:stop], size, name)
    timestamps = sample_timestamps(probe(path, name), sampling)
    return len(timestamps), lambda start, stop: decode_frames(path, timestamps[start:stop], size, name)
