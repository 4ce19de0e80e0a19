"""Captions of video files: one file, or every video and image in a folder.

Frames are sampled, the question is asked, and the answer is handed on in pieces while it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from longvila.config import FrameSampling
from longvila.errors import ConfigError, DataError
from longvila.generate.answer import Answerer
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
    """What `caption` did. `captions` and `failed` (reasons) are by file, and cover every file found."""

    captions: dict[Path, str] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)


def caption(
    answerer: Answerer,
    path: Path,
    sampling: FrameSampling,
    question: str = QUESTION,
    max_new_tokens: int = 256,
    on_file: Callable[[Path], None] = lambda path: None,
    on_text: Callable[[str], None] = lambda text: None,
    on_failure: Callable[[Path, str], None] = lambda path, reason: None,
) -> CaptionReport:
    """Answers `question` about `path`, or about each video and image below it when it is a folder.

    Args:
        on_file: called with a file before its caption begins.
        on_text: called with each piece of the caption.
        on_failure: called with a file of a folder that could not be captioned, and the reason.

    Raises:
        ConfigError: `path` does not exist.
        DataError: a single file that cannot be captioned, a folder without videos or images, or one where each failed.
    """
    report = CaptionReport()
    files = find_media(path)
    for file in files:
        try:
            frames = load_frames(file, sampling, answerer.model.vision.image_size)
            on_file(file)
            pieces = []
            for piece in answerer.stream(frames, question, max_new_tokens):
                pieces.append(piece)
                on_text(piece)
            report.captions[file] = "".join(pieces).strip()
        except DataError as error:
            if not path.is_dir():
                raise
            report.failed[file] = str(error)
            on_failure(file, str(error))
    if not report.captions:
        file, reason = next(iter(report.failed.items()))
        raise DataError(f"{path}: none of its {len(files)} files could be captioned; the first, {file.name}: {reason}")
    return report


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


def load_frames(path: Path, sampling: FrameSampling, size: int) -> Tensor:
    """uint8 frames (F, 3, size, size) of a video, or the tiles of an image. Raises MediaError naming the file."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        tiles = choose_tiles(*image_extent(path, str(path)), size, sampling.tiles)
        return decode_tiles(path, tiles, size, str(path))
    timestamps = sample_timestamps(probe(path, str(path)), sampling)
    return decode_frames(path, timestamps, size, str(path))
