"""Subtitles in SubRip (`.srt`) or WebVTT (`.vtt`) files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from longvila.errors import MediaError

CLOCK = r"(?:(\d+):)?(\d+):(\d+)[,.](\d{1,3})"
ENTRY = re.compile(rf"{CLOCK}[ \t]*-->[ \t]*{CLOCK}[^\n]*\n((?:(?![^\n]*-->)[ \t]*\S[^\n]*(?:\n|\Z))*)")
"""Times, and the lines up to one that is blank or has times again."""


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
        text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n")
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
