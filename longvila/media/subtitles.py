"""Subtitles in SubRip (`.srt`) or WebVTT (`.vtt`) files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from longvila.errors import MediaError

CLOCK = r"(?:(\d+):)?(\d+):(\d+)[,.](\d{1,3})"
LINE = r"(?![ \t]*(?:\n|\Z))(?![ \t]*(?:\d+:)?\d+:\d+[,.]\d{1,3}[ \t]*-->)[^\n]*(?:\n|\Z)"
"""Neither blank nor times. Of what Unicode calls spaces some begin a line that is shown, as in Japanese."""
ENTRY = re.compile(rf"{CLOCK}[ \t]*-->[ \t]*{CLOCK}[^\n]*\n((?:{LINE})*)")


@dataclass(frozen=True)
class Subtitle:
    """What is shown from `begin` to `end`, in seconds."""

    begin: float
    end: float
    line: str
    """Without mark-up, in one line."""


def read_subtitles(path: Path) -> list[Subtitle]:
    """The subtitles of a file in their order; those without words are left out.

    Raises:
        MediaError: it cannot be read.
    """
    try:
        text = re.sub(r"\r+\n|\r", "\n", path.read_bytes().decode("utf-8-sig", errors="replace"))
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror or error}") from error
    found = []
    for match in ENTRY.finditer(text):
        times = match.groups()
        line = re.sub(r"<[^>]*>", "", times[8]).replace("\n", " ").strip()
        if line:
            found.append(Subtitle(_seconds(*times[:4]), _seconds(*times[4:8]), line))
    return found


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    return 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds) + int(fraction) / 10 ** len(fraction)
