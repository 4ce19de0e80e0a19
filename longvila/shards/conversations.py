"""Records of conversations about a video or an image, in either of the two usual forms -> samples.

    {"video": "a.mp4", "messages": [{"role": "user", "content": "What happens?"},
                                    {"role": "assistant", "content": "A cat jumps."}]}
    {"id": "7", "image": "b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A bus."}]}

The first are Hugging Face chat messages, the second LLaVA's. A conversation says once where the frames go: by a part
`{"type": "video"}` or by a marker `<video>` or `<image>`. (Both markers mean the record's one medium: published video
sets write `<image>` as well.) One that does not say has them at the start of its first user turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from longvila.errors import DataError
from longvila.shards.sample import BadRecord, SourceSample

MARKER = re.compile(r"\s*<(?:video|image)>\s*")
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
    for line in text.splitlines():
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
        media_type, path = _medium(record)
        key = f"{_slug(record.get('id') or Path(path or 'text').stem)}-{number:07d}"
        metadata = {
            name: value for name, value in record.items() if name not in ("messages", "conversations", "video", "image")
        }
        messages = to_messages(record, media_type)
    except DataError as error:
        return BadRecord(key, str(error))
    return SourceSample(key, messages, root / path if path else None, media_type, metadata)


def to_messages(record: dict[str, Any], media_type: Literal["video", "image", "text"]) -> list[dict[str, Any]]:
    """The conversation of a record as chat messages with one part for its medium.

    Raises:
        DataError: it has neither form, an unknown role, no answer, or more than one place for its medium.
    """
    turns = record.get("messages", record.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise DataError("has no conversation: 'messages' or 'conversations' must be a list of turns")
    place = {"type": "video" if media_type == "text" else media_type}
    messages = [{"role": _role(turn), "content": _parts(turn, place)} for turn in turns]
    if all(message["role"] != "assistant" for message in messages):
        raise DataError("has no answer: no turn of role 'assistant' (or from 'gpt')")
    places = sum(part["type"] != "text" for message in messages for part in message["content"])
    if places and media_type == "text":
        raise DataError("marks a place for media and names no file ('video' or 'image')")
    if places > 1:
        raise DataError(f"marks {places} places for its one {media_type}")
    if not places and media_type != "text":
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise DataError(f"has no user turn to show its {media_type} in")
        first["content"].insert(0, dict(place))
    return messages


def _medium(record: dict[str, Any]) -> tuple[Literal["video", "image", "text"], str | None]:
    named = {name: record[name] for name in ("video", "image") if record.get(name)}
    paths = [path for value in named.values() for path in (value if isinstance(value, list) else [value])]
    if len(paths) > 1:
        raise DataError(f"names {len(paths)} media files; a sample has one")
    if not paths:
        return "text", None
    if not isinstance(paths[0], str):
        raise DataError(f"its media must be a path, not {str(paths[0])[:80]}")
    return ("video" if "video" in named else "image"), paths[0]


def _role(turn: Any) -> str:
    name = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if name not in ROLES:
        raise DataError(f"a turn has the role {name!r}; known are {', '.join(ROLES)}")
    return ROLES[name]


def _parts(turn: dict[str, Any], place: dict[str, str]) -> list[dict[str, Any]]:
    """The content of a turn as typed parts, markers turned into the part `place`."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DataError(f"a turn has no text: {str(turn)[:80]}")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("video", "image"):
            parts.append(dict(place))
        elif kind == "text" and isinstance(part.get("text"), str):
            before, *others = MARKER.split(part["text"])
            parts += _text(before)
            for text in others:
                parts += [dict(place), *_text(text)]
        else:
            raise DataError(f"a turn has a part that is neither text, video nor image: {str(part)[:80]}")
    return parts


def _text(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def _slug(name: Any) -> str:
    """A name fit for a tar member and a webdataset key."""
    return re.sub(r"[^\w-]+", "_", str(name))[:80].strip("_") or "sample"
