"""What the tests of shards share: samples of every kind, an encoder of one token a word, and packed folders."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longvila.config import DataConfig, FrameSampling, SourceConfig
from longvila.shards import Row, RowLoader, SourceSample, write_shards
from longvila.shards.order import Cursor

from .video_fixtures import make_image, make_video

FRAME = 1
"""Token id of a frame place."""
FRAME_TOKENS = 3
IMAGE_SIZE = 48


def conversation(answer: str, medium: str = "video") -> list[dict[str, Any]]:
    question = [{"type": medium}, {"type": "text", "text": "What is it"}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def video(key: str, num_frames: int = 6, number: int = 0) -> SourceSample:
    """A film at one frame per second, whose frames are numbered from `number`."""
    data = make_video(num_frames=num_frames, fps=1, first_number=number)
    return SourceSample(key, conversation(f"film {number}"), data, "video", {"number": number})


def all_kinds(num_videos: int = 12, num_images: int = 6, num_texts: int = 6) -> Iterator[SourceSample]:
    for index in range(num_videos):
        yield video(f"video-{index}", 3 + index % 5, number=index * 16)
    for index in range(num_images):
        yield SourceSample(f"image-{index}", conversation("picture", "image"), make_image(2000 + index), "image")
    for index in range(num_texts):
        yield SourceSample(f"text-{index}", [], None, "text", {"text": "word " * (2 + index)})


class WordEncoder:
    """One token a word (its length + 100); answers are targets, and so is all of a plain text."""

    frame_token = FRAME
    tokens_per_frame = FRAME_TOKENS
    fingerprint = "words"

    def __call__(self, messages: list[dict[str, Any]], text: str | None, frames: Sequence[int]) -> Any:
        return encode_words(messages, text, frames)


encode = WordEncoder()


def encode_words(
    messages: list[dict[str, Any]], text: str | None, frames: Sequence[int]
) -> tuple[list[int], list[int]]:
    if text is not None:
        ids = [len(word) + 100 for word in text.split()]
        return ids, list(ids)
    ids, labels, counts = [], [], iter(frames)
    for message in messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            tokens = [len(word) + 100 for word in part.get("text", "").split()]
            if part["type"] != "text":
                tokens = [FRAME] * (next(counts) * FRAME_TOKENS)
            ids += tokens
            labels += tokens if message["role"] == "assistant" else [-100] * len(tokens)
    return ids, labels


def packed(folder: Path, samples: Any = None, max_samples: int = 4) -> Path:
    write_shards(all_kinds() if samples is None else samples, folder, max_samples=max_samples)
    return folder


def make_loader(folder: Path, *sources: SourceConfig, frames: FrameSampling | None = None, **kwargs: Any) -> RowLoader:
    """A loader over `folder`/data; keywords go to DataConfig or to the loader, whichever knows them."""
    names = (
        "row_tokens",
        "window",
        "workers",
        "prefetch",
        "decode_timeout",
        "max_bad_share",
        "weigh",
        "cache_gib",
        "allow_pipes",
    )
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    options = {"row_tokens": 40, "window": 8, **options}
    config = DataConfig(sources or (SourceConfig("data"),), frames or FrameSampling("fps", 99, 1.0), **options)
    return RowLoader(config, folder, kwargs.pop("encode", encode), IMAGE_SIZE, **kwargs)


def rows_of(loader: RowLoader, start: Cursor | None = None) -> list[Row]:
    """The rows of an epoch for one rank."""
    return [row for row, _ in loader.rows(start or Cursor()) if row is not None]


def without_indexes(folder: Path) -> Path:
    for path in folder.glob("*.index.jsonl"):
        path.unlink()
    return folder


def keys(rows: list[Row]) -> list[str]:
    return [key for row in rows for key in row.keys]


def rewrite(shard: Path, change: Any) -> None:
    """Replaces a tar by one with each member (name, data) passed through `change`, which may return None to drop it."""
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as tar:
        for member, data in members:
            changed = change(member.name, data)
            if changed is not None:
                member.name, data = changed
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
