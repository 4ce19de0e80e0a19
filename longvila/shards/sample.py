"""One sample, before it is written to a shard (`SourceSample`) and after it is read from one (`Sample`).

In a shard a sample is up to two files, `KEY.mp4` (or the media's own extension; absent for text) and `KEY.json`:

    {"key": ..., "media_type": "video" | "image" | "mixed" | "text", "messages": [...], "media": {...} | null,
     "metadata": {...}}

`messages` are Hugging Face chat messages; `{"type": "video"}` or `{"type": "image"}` in a message's content marks
where the frames go. `media` holds the probed facts of a video (`VideoInfo`). A sample of several media has the files
`KEY.media0.jpg`, `KEY.media1.mp4` and so on, one for each mark in the messages, in that order, and a list in `media`.
Plain text, whose every token is a target, has no messages and keeps its text in `metadata["text"]`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from longvila.errors import DataError
from longvila.media import FileRange, VideoInfo

VIDEO_EXTENSIONS = ("mp4", "mkv", "webm", "mov", "m4v", "avi", "ts", "mpg", "mpeg", "flv", "gif")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
MediumType = Literal["video", "image"]
MEDIA: tuple[MediumType, ...] = ("video", "image")
MediaType = Literal["video", "image", "mixed", "text"]
"""What a sample has: one video or several, one image or several, some of both, or none."""


@dataclass(frozen=True)
class SourceSample:
    """What a source file in `data/` yields."""

    key: str
    """Unique in its pack; no dots and no slashes, since a tar member is named KEY.EXTENSION."""
    messages: list[dict[str, Any]]
    media: Path | bytes | Sequence[Path | bytes] | None
    """One or several, in the order in which the messages mark their places."""
    media_type: MediaType
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path | bytes, ...]:
        """Its media, however many."""
        if self.media is None:
            return ()
        return (self.media,) if isinstance(self.media, Path | bytes) else tuple(self.media)


@dataclass(frozen=True)
class BadRecord:
    """What a source yields in place of a sample it cannot form; counted and listed by the pack."""

    key: str
    reason: str


@dataclass(frozen=True)
class Medium:
    """One video or image of a sample, still encoded, or still in the shard."""

    type: MediumType
    data: bytes | FileRange
    info: VideoInfo | None
    """The probed facts of a video; None for an image."""


@dataclass(frozen=True)
class Sample:
    """A sample as read from a shard."""

    key: str
    messages: list[dict[str, Any]]
    media: tuple[Medium, ...]
    """In the order in which the messages mark their places."""
    metadata: dict[str, Any] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """A member's key and extension, parted at the last dot, or before `media0.`. (Webdataset parts at the first dot:
    keys with dots break.)"""
    stem, dot, extension = name.rpartition(".")
    if not dot:
        return None, None
    key, number, found = stem.rpartition(".media")
    return (key, f"media{found}.{extension}") if number and found.isdecimal() else (stem, extension)


def member_name(number: int, count: int, extension: str) -> str:
    """The extension in a shard of medium `number` of `count`."""
    return extension if count == 1 else f"media{number}.{extension}"


def check_sample(messages: list[dict[str, Any]], media_type: Any, num_media: int, metadata: Any) -> list[MediumType]:
    """The types of the media of a sample, in order. Raises DataError when its parts contradict each other."""
    if media_type not in get_args(MediaType):
        raise DataError(f"its media_type is {media_type!r}; known are {', '.join(get_args(MediaType))}")
    if not isinstance(metadata, dict):
        raise DataError(f"its metadata must be an object, not {str(metadata)[:80]}")
    markers = media_markers(messages)
    if media_type == "text":
        if markers or num_media:
            raise DataError("a text sample has media")
        if not messages and not isinstance(metadata.get("text"), str):
            raise DataError('has neither messages nor metadata["text"]')
        return []
    if not num_media:
        raise DataError(f"a {media_type} sample without its media")
    allowed = get_args(MediumType) if media_type == "mixed" else (media_type,)
    if len(markers) != num_media or not set(markers) <= set(allowed):
        wanted = f"one {media_type}" if num_media == 1 else f"{num_media} media ({' or '.join(allowed)})"
        raise DataError(f"its messages must mark the place of {wanted}, and mark {markers or 'none'}")
    return markers


def media_markers(messages: list[dict[str, Any]]) -> list[Any]:
    """The types of the media parts in chat messages, in order. Raises DataError on messages of another form."""
    if not isinstance(messages, list):
        raise DataError(f"its messages must be a list, not {str(messages)[:80]}")
    markers = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"a message must be {{'role': ..., 'content': ...}}, not {str(message)[:80]}")
        content = message["content"]
        if isinstance(content, str):
            continue
        if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
            raise DataError(f"a message's content must be text or a list of typed parts, not {str(content)[:80]}")
        if wordless := [part for part in content if part["type"] == "text" and not isinstance(part.get("text"), str)]:
            raise DataError(f"a message's part of text has no text: {str(wordless[0])[:80]}")
        markers += [part["type"] for part in content if part["type"] != "text"]
    return markers


def to_json(sample: SourceSample, infos: Sequence[VideoInfo | None]) -> bytes:
    """The JSON member of a sample in a shard.

    Args:
        infos: the facts of each of its media, None for images.

    Raises:
        DataError: its text is not Unicode.
    """
    content = {
        "key": sample.key,
        "media_type": sample.media_type,
        "messages": sample.messages,
        "media": infos_to_json(infos),
        "metadata": sample.metadata,
    }
    try:
        return json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"its text holds half of a surrogate pair ({error})") from error


def from_members(key: str, members: Mapping[str, bytes] | Mapping[str, FileRange]) -> Sample:
    """A sample from its members by extension, the inverse of `to_json` with the media beside it.

    Raises:
        DataError: they are not a sample.
        OSError: the shard cannot be read.
    """
    places = sorted(name for name in members if name.rpartition(".")[2] in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS)
    places.sort(key=_number)
    if len(places) > 1 and any(_number(name) != number for number, name in enumerate(places)):
        raise DataError(f"has {len(places)} media files that are not numbered: {', '.join(places)}")
    if "json" not in members:
        raise DataError("media without its JSON")
    text = members["json"]
    try:
        content = json.loads(text.read() if isinstance(text, FileRange) else text)
        messages, media_type, metadata = content["messages"], content["media_type"], content["metadata"]
        metadata = {} if metadata is None else metadata
        infos = infos_from_json(content["media"], len(places))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"its JSON is not that of a sample ({type(error).__name__}: {error})") from error
    if not places and media_type in ("video", "image"):
        raise DataError(f"JSON without its {media_type}")
    facts = "its JSON has no facts about the video ('media'); write the shard with `longvila pack`"
    if len(infos) != len(places) or (media_type == "video" and None in infos):
        raise DataError(facts)
    types = check_sample(messages, media_type, len(places), metadata)
    if any(kind == "video" and info is None for kind, info in zip(types, infos, strict=True)):
        raise DataError(facts)
    media = [Medium(kind, members[name], info) for kind, name, info in zip(types, places, infos, strict=True)]
    return Sample(key, messages, tuple(media), metadata)


def infos_to_json(infos: Sequence[VideoInfo | None]) -> Any:
    """The facts of a sample's media: an object or null where there is at most one, else a list."""
    written = [dataclasses.asdict(info) if info else None for info in infos]
    return written if len(written) > 1 else written[0] if written else None


def infos_from_json(written: Any, num_media: int) -> tuple[VideoInfo | None, ...]:
    """Inverse of `infos_to_json`. Raises TypeError where that cannot have written it."""
    if num_media == 0:
        return ()
    listed = written if isinstance(written, list) else [written]
    return tuple(VideoInfo(**facts) if facts else None for facts in listed)


def _number(name: str) -> int:
    """Of a medium, by its extension in a shard."""
    number = name.partition(".")[0].removeprefix("media")
    return int(number) if number.isdecimal() else -1
