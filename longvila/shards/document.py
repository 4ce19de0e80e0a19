"""Samples -> documents: token ids and shifted labels, with the moments of the frames still to be decoded.

The length of a document follows from the probed facts alone, so rows can be planned, skipped and divided among the
ranks of a sequence group before a single frame is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from longvila.config import FrameSampling
from longvila.errors import DataError
from longvila.media import WHOLE, FileRange, Views, choose_tiles, image_extent, sample_timestamps
from longvila.shards.bad import BadSamples
from longvila.shards.sample import Medium, MediumType, Sample

IGNORE = -100
"""Label of a token that is no target."""


class Encode(Protocol):
    """Turns a conversation (or, when there are no messages, a text) into token ids and labels of the same tokens."""

    @property
    def frame_token(self) -> int:
        """The token that holds the place of a part of a frame."""
        ...

    @property
    def tokens_per_frame(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides how many tokens a sample has."""
        ...

    def __call__(
        self, messages: list[dict[str, Any]], text: str | None, frames: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """`frames`: how many frames (tiles of an image) each medium has that the messages mark."""
        ...


@dataclass(frozen=True)
class Clip:
    """What a document shows of one video or image. Each view is one frame."""

    type: MediumType
    media: bytes | FileRange | None
    """None where this rank could not read it."""
    views: Views
    """Seconds of video time, or tiles of an image."""


@dataclass(frozen=True)
class Document:
    """One sample (or one piece of a long text) as tokens."""

    key: str
    ids: list[int]
    labels: list[int]
    """labels[i] is the target after token i; IGNORE where there is none, as after the last token."""
    clips: tuple[Clip, ...] = ()
    """In the order of their places."""
    fault: str = ""
    """Why this rank could not read it; what stands here then has its length and no target."""

    @property
    def num_frames(self) -> int:
        return sum(len(clip.views) for clip in self.clips)


def to_documents(
    samples: Iterable[Sample], encode: Encode, sampling: FrameSampling, size: int, row_tokens: int, bad: BadSamples
) -> Iterator[Document]:
    """The documents of each sample, see `make_documents`. What cannot be used goes to `bad`."""
    for sample in samples:
        try:
            documents, shortened = make_documents(sample, encode, sampling, size, row_tokens)
        except DataError as error:
            bad.record(sample.key, str(error))
        else:
            bad.shortened += shortened
            yield from documents


def make_documents(
    sample: Sample, encode: Encode, sampling: FrameSampling, size: int, row_tokens: int
) -> tuple[list[Document], bool]:
    """Encodes a sample to fit a row of `row_tokens`, and says whether it got fewer frames than asked.

    Where a row is too short, images get fewer tiles, all by the same limit, and when none has any left videos get fewer
    frames, the longest first; a plain text is cut into as many pieces as it needs.

    Args:
        size: pixels along a side of a frame.

    Raises:
        DataError: its text (with its images, and a frame of each video) is too long, or it has no target.
    """
    shortened = False
    if not sample.media and not sample.messages:
        documents = _split_text(sample, encode, row_tokens)
    else:
        document, shortened = _encode_one(sample, encode, sampling, size, row_tokens)
        documents = [document]
    if any(max(document.labels, default=IGNORE) == IGNORE for document in documents):
        raise DataError("has no answer to learn from: none of its tokens is a target")
    return documents, shortened


def _encode_one(
    sample: Sample, encode: Encode, sampling: FrameSampling, size: int, row_tokens: int
) -> tuple[Document, bool]:
    # Headers of images are read once, however often fewer tiles are tried.
    extents = [
        image_extent(each.data, sample.key) if each.type == "image" and sampling.tiles > 1 else None
        for each in sample.media
    ]

    def choose(tiles: int, frames: int) -> tuple[Clip, ...]:
        fewer = replace(sampling, tiles=tiles, frames=frames)
        return tuple(
            Clip(each.type, each.data, _views(each, extent, fewer, size))
            for each, extent in zip(sample.media, extents, strict=True)
        )

    clips = choose(sampling.tiles, sampling.frames)
    ids, labels = encode(sample.messages, None, [len(clip.views) for clip in clips])
    shortened = len(ids) > row_tokens
    if shortened:
        num_text = len(ids) - sum(len(clip.views) for clip in clips) * encode.tokens_per_frame
        fewer = _fit(choose, sampling, (row_tokens - num_text) // encode.tokens_per_frame)
        if fewer is None:
            least = f" and {_frames(len(clips))} {len(clips) * encode.tokens_per_frame}" if clips else ""
            raise DataError(f"its text has {num_text} tokens{least}, more than a row of {row_tokens}")
        clips = fewer
        ids, labels = encode(sample.messages, None, [len(clip.views) for clip in clips])
    return Document(sample.key, ids, _shift(labels), clips), shortened


def _views(medium: Medium, extent: tuple[int, int] | None, sampling: FrameSampling, size: int) -> Views:
    if medium.type == "video":
        return sample_timestamps(medium.info, sampling)
    return (WHOLE,) if extent is None else choose_tiles(*extent, size, sampling.tiles)


def _fit(choose: Callable[[int, int], tuple[Clip, ...]], sampling: FrameSampling, room: int) -> tuple[Clip, ...] | None:
    """The most views, by limits of tiles and frames, that are no more than `room`; None where media alone are more."""
    clips: tuple[Clip, ...] = ()
    for tiles in range(sampling.tiles, 0, -1):
        clips = choose(tiles, sampling.frames)
        if sum(len(clip.views) for clip in clips) <= room:
            return clips
    videos = [len(clip.views) for clip in clips if clip.type == "video"]
    room -= len(clips) - len(videos)
    if not videos or room < len(videos):
        return None
    return choose(1, _level(videos, room))


def _level(amounts: list[int], room: int) -> int:
    """The largest cap for each of `amounts` (one at least) by which their sum is no more than `room`."""
    left = room
    for number, amount in enumerate(sorted(amounts)):
        share = left // (len(amounts) - number)
        if amount > share:
            return share
        left -= amount
    return max(amounts)


def _frames(count: int) -> str:
    return "one frame" if count == 1 else f"{count} frames"


def _split_text(sample: Sample, encode: Encode, row_tokens: int) -> list[Document]:
    """Pieces of at most `row_tokens`; each begins with the last token of the one before, so no target is lost."""
    ids, labels = encode([], sample.metadata["text"], ())
    starts = range(0, max(1, len(ids) - 1), row_tokens - 1)
    pieces = [slice(start, start + row_tokens) for start in starts]
    return [Document(sample.key, ids[piece], _shift(labels[piece])) for piece in pieces]


def _shift(labels: list[int]) -> list[int]:
    return [*labels[1:], IGNORE]
