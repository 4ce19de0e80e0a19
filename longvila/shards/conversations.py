"""Records of conversations about a video or an image, in either of the two usual forms -> samples.

    {"video": "a.mp4", "messages": [{"role": "user", "content": "What happens?"},
                                    {"role": "assistant", "content": "A cat jumps."}]}
    {"id": "7", "image": "b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A bus."}]}

The first are Hugging Face chat messages, the second LLaVA's. `video` or `image` (or `videos`, `images`) is a path, or a
list of several; a record may have both. A conversation says once where the frames of each go: by a part
`{"type": "video"}` or by a marker `<video>` or `<image>`. (Where all media are of one type, both markers mean it:
published video sets write `<image>` as well.) One that does not say has them at the start of its first user turn.

With `"subtitles": "a.srt"` (or `.vtt`), a record of one video has its subtitles behind it, each line with its time.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longvila.errors import DataError
from longvila.media import read_subtitles
from longvila.shards.sample import MEDIA, BadRecord, MediumType, SourceSample, media_markers

MARKER = re.compile(r"\s*<(video|image)>\s*")
PLURALS: dict[MediumType, str] = {"video": "videos", "image": "images"}
"""What other programs' records call the fields of media."""
SUBTITLES = "This video's subtitles are listed below:"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def read_records(path: Path) -> Iterator[Any]:
    """The records of a JSON array (`.json`) or of JSON lines (any other name); a broken line comes as its text.

    Raises:
        DataError: no such file, or a `.json` file that is not an array.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if path.suffix == ".json":
        try:
            records = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}: is not JSON ({error}); JSON lines need the name .jsonl") from error
        if not isinstance(records, list):
            raise DataError(f"{path}: must hold a JSON array of records, not {type(records).__name__}")
        yield from records
        return
    for line in text.split("\n"):  # splitlines would also end a line at U+2028, which JSON may hold
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                yield line


def to_sample(record: Any, number: int, root: Path) -> SourceSample | BadRecord:
    """The sample that record `number` of a file stands for; paths of media are below `root`.

    Fields that are not part of the conversation are kept as metadata.
    """
    key = f"record-{number:07d}"
    try:
        if not isinstance(record, dict):
            raise DataError(f"is not a JSON object: {str(record)[:80]}")
        media = _media(record)
        first = next((paths[0] for paths in media.values() if paths), "text")
        key = f"{_slug(record.get('id') or Path(first).stem)}-{number:07d}"
        metadata = {
            name: value
            for name, value in record.items()
            if name not in ("messages", "conversations", *MEDIA, *PLURALS.values())
        }
        messages = to_messages(record, {kind: len(paths) for kind, paths in media.items()})
        if "subtitles" in record:
            _add_subtitles(messages, record["subtitles"], root)
    except DataError as error:
        return BadRecord(key, str(error))
    kinds: list[MediumType] = [kind for kind, paths in media.items() if paths]
    following = {kind: iter(paths) for kind, paths in media.items()}
    files = [root / next(following[kind]) for kind in media_markers(messages)]
    media_type = "text" if not kinds else kinds[0] if len(kinds) == 1 else "mixed"
    return SourceSample(key, messages, files[0] if len(files) == 1 else files or None, media_type, metadata)


def to_messages(record: dict[str, Any], counts: Mapping[MediumType, int]) -> list[dict[str, Any]]:
    """The conversation of a record as chat messages with a part for each of its media.

    Args:
        counts: media of each type.

    Raises:
        DataError: it has neither form, an unknown role, no answer, or other places than media.
    """
    turns = record.get("messages", record.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise DataError("has no conversation: 'messages' or 'conversations' must be a list of turns")
    kinds: list[MediumType] = [kind for kind, count in counts.items() if count]
    only = kinds[0] if len(kinds) == 1 else None
    messages = [{"role": _role(turn), "content": _parts(turn, only)} for turn in turns]
    if all(message["role"] != "assistant" for message in messages):
        raise DataError("has no answer: no turn of role 'assistant' (or from 'gpt')")
    places = Counter(media_markers(messages))
    if places and not kinds:
        raise DataError("marks a place for media and names no file ('video' or 'image')")
    if not places and kinds:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise DataError(f"has no user turn to show its {' and '.join(kinds)} in")
        first["content"][:0] = [{"type": kind} for kind in kinds for _ in range(counts[kind])]
    elif wrong := [
        f"{places[kind]} places for its {n or 'no'} {kind}" for kind, n in counts.items() if places[kind] != n
    ]:
        raise DataError(f"marks {' and '.join(wrong)}")
    return messages


def _add_subtitles(messages: list[dict[str, Any]], name: Any, root: Path) -> None:
    """Puts the lines of a file of subtitles behind the one video of a conversation."""
    places = [
        (message["content"], number)
        for message in messages
        for number, part in enumerate(message["content"])
        if part["type"] == "video"
    ]
    if not isinstance(name, str) or len(places) != 1:
        raise DataError(f"its subtitles must be one path for its one video, not {str(name)[:80]} for {len(places)}")
    subtitles = read_subtitles(root / name)
    if not subtitles:
        raise DataError(f"{name} holds no subtitle; known are SubRip (.srt) and WebVTT (.vtt)")
    lines = [f"[{_clock(each.begin)}] {each.line}" for each in subtitles]
    content, number = places[0]
    content.insert(number + 1, {"type": "text", "text": "\n".join([SUBTITLES, *lines])})


def _clock(seconds: float) -> str:
    """Minutes and seconds, rounded before they are parted: 59.97 s is 01:00.0."""
    minutes, tenths = divmod(round(seconds * 10), 600)
    return f"{minutes:02d}:{tenths / 10:04.1f}"


def _media(record: dict[str, Any]) -> dict[MediumType, list[str]]:
    """The paths that a record names, by type."""
    named: dict[MediumType, list[str]] = {}
    for kind in MEDIA:
        if record.get(kind) and record.get(PLURALS[kind]):
            raise DataError(f"has both '{kind}' and '{PLURALS[kind]}'; give one list")
        value = record.get(kind) or record.get(PLURALS[kind]) or []
        named[kind] = value if isinstance(value, list) else [value]
        if wrong := [path for path in named[kind] if not isinstance(path, str)]:
            raise DataError(f"its media must be a path or a list of paths, not {str(wrong[0])[:80]}")
    return named


def _role(turn: Any) -> str:
    name = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if name not in ROLES:
        raise DataError(f"a turn has the role {name!r}; known are {', '.join(ROLES)}")
    return ROLES[name]


def _parts(turn: dict[str, Any], only: MediumType | None) -> list[dict[str, Any]]:
    """The content of a turn as typed parts, markers turned into parts: of the type `only`, if that is all there is."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DataError(f"a turn has no text: {str(turn)[:80]}")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("video", "image"):
            parts.append({"type": only or kind})
        elif kind == "text" and isinstance(part.get("text"), str):
            for number, piece in enumerate(MARKER.split(part["text"])):  # texts, with the types between them
                parts += [{"type": only or piece}] if number % 2 else _text(piece)
        else:
            raise DataError(f"a turn has a part that is neither text, video nor image: {str(part)[:80]}")
    return parts


def _text(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def _slug(name: Any) -> str:
    """A name fit for a tar member and a webdataset key."""
    return re.sub(r"[^\w-]+", "_", str(name))[:80].strip("_") or "sample"
