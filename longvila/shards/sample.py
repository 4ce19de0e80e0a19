"""One sample, before it is written to a shard (`SourceSample`) and after it is read from one (`Sample`).

In a shard a sample is up to two files, `KEY.mp4` (or the media's own extension; absent for text) and `KEY.json`:

    {"key": ..., "media_type": "video" | "image" | "text", "messages": [...], "media": {...} | null, "metadata": {...}}

`messages` are Hugging Face chat messages; `{"type": "video"}` or `{"type": "image"}` in a message's content marks
where the frames go. `media` holds the probed facts of a video (`VideoInfo`). Plain text, whose every token is a target,
has no messages and keeps its text in `metadata["text"]`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from longvila.errors import DataError
from longvila.media import VideoInfo

VIDEO_EXTENSIONS = ("mp4", "mkv", "webm", "mov", "m4v", "avi", "ts", "mpg", "mpeg", "flv", "gif")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")


@dataclass(frozen=True)
class SourceSample:
    """What a source file in `data/` yields."""

    key: str
    """Unique in its pack; no dots and no slashes, since a tar member is named KEY.EXTENSION."""
    messages: list[dict[str, Any]]
    media: Path | bytes | None
    media_type: Literal["video", "image", "text"]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadRecord:
    """What a source yields in place of a sample it cannot form; counted and listed by the pack."""

    key: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """A sample as streamed from a shard, its media still encoded."""

    key: str
    messages: list[dict[str, Any]]
    media: bytes | None
    media_type: Literal["video", "image", "text"]
    info: VideoInfo | None
    """The probed facts of a video; None for images and text."""
    metadata: dict[str, Any] = field(default_factory=dict)


def check_sample(sample: SourceSample | Sample) -> None:
    """Raises DataError when the parts of a sample contradict each other."""
    markers = media_markers(sample.messages)
    if sample.media_type == "text":
        if markers or sample.media is not None:
            raise DataError("a text sample has media")
        if not sample.messages and not isinstance(sample.metadata.get("text"), str):
            raise DataError('has neither messages nor metadata["text"]')
    elif sample.media is None:
        raise DataError(f"a {sample.media_type} sample without its media")
    elif markers != [sample.media_type]:
        raise DataError(f"its messages must mark the place of one {sample.media_type}, and mark {markers or 'none'}")


def media_markers(messages: list[dict[str, Any]]) -> list[str]:
    """The types of the media parts in chat messages, in order. Raises DataError on messages of another form."""
    markers = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"a message must be {{'role': ..., 'content': ...}}, not {str(message)[:80]}")
        content = message["content"]
        if isinstance(content, str):
            continue
        if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
            raise DataError(f"a message's content must be text or a list of typed parts, not {str(content)[:80]}")
        markers += [part["type"] for part in content if part["type"] != "text"]
    return markers


def to_json(sample: SourceSample, info: VideoInfo | None) -> bytes:
    """The JSON member of a sample in a shard."""
    content = {
        "key": sample.key,
        "media_type": sample.media_type,
        "messages": sample.messages,
        "media": dataclasses.asdict(info) if info else None,
        "metadata": sample.metadata,
    }
    return json.dumps(content, ensure_ascii=False).encode()


def from_members(key: str, text: bytes, media: bytes | None) -> Sample:
    """Inverse of `to_json`, with the media member beside it. Raises DataError when they are not a sample."""
    try:
        content = json.loads(text)
        sample = Sample(
            key=key,
            messages=content["messages"],
            media=media,
            media_type=content["media_type"],
            info=VideoInfo(**content["media"]) if content["media"] else None,
            metadata=content["metadata"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"its JSON is not that of a sample ({type(error).__name__}: {error})") from error
    if media is None and sample.media_type != "text":
        raise DataError(f"JSON without its {sample.media_type}")
    if sample.media_type == "video" and sample.info is None:
        raise DataError("its JSON has no facts about the video ('media'); write the shard with `longvila pack`")
    check_sample(sample)
    return sample
