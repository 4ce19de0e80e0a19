"""Samples -> documents: token ids and shifted labels, with the moments of the frames still to be decoded.

The length of a document follows from the probed facts alone, so rows can be planned, skipped and divided among the
ranks of a sequence group before a single frame is decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from longvila.config import FrameSampling
from longvila.errors import DataError
from longvila.media import FileRange, sample_timestamps
from longvila.shards.bad import BadSamples
from longvila.shards.sample import MediumType, Sample

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
        """`frames`: how many frames each medium has that the messages mark."""
        ...


@dataclass(frozen=True)
class Clip:
    """The frames that a document has of one video or image."""

    type: MediumType
    media: bytes | FileRange | None
    """None where this rank could not read it."""
    timestamps: tuple[float, ...]
    """Seconds of video time of its frames; (0.0,) for an image."""


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
        return sum(len(clip.timestamps) for clip in self.clips)


def to_documents(
    samples: Iterable[Sample], encode: Encode, sampling: FrameSampling, row_tokens: int, bad: BadSamples
) -> Iterator[Document]:
    """The documents of each sample, see `make_documents`. What cannot be used goes to `bad`."""
    for sample in samples:
        try:
            documents, shortened = make_documents(sample, encode, sampling, row_tokens)
        except DataError as error:
            bad.record(sample.key, str(error))
        else:
            bad.shortened += shortened
            yield from documents


def make_documents(
    sample: Sample, encode: Encode, sampling: FrameSampling, row_tokens: int
) -> tuple[list[Document], bool]:
    """Encodes a sample to fit a row of `row_tokens`, and says whether it got fewer frames than asked.

    Videos too long for a row get fewer frames, the longest first; a plain text is cut into as many pieces as it needs.

    Raises:
        DataError: its text (with its images, and a frame of each video) is too long, or it has no target.
    """
    shortened = False
    if not sample.media and not sample.messages:
        documents = _split_text(sample, encode, row_tokens)
    else:
        document, shortened = _encode_one(sample, encode, sampling, row_tokens)
        documents = [document]
    if any(max(document.labels, default=IGNORE) == IGNORE for document in documents):
        raise DataError("has no answer to learn from: none of its tokens is a target")
    return documents, shortened


def _encode_one(sample: Sample, encode: Encode, sampling: FrameSampling, row_tokens: int) -> tuple[Document, bool]:
    clips = _sample_frames(sample, sampling)
    ids, labels = encode(sample.messages, None, [len(clip.timestamps) for clip in clips])
    shortened = len(ids) > row_tokens
    if shortened:
        num_frames, per_frame = sum(len(clip.timestamps) for clip in clips), encode.tokens_per_frame
        num_text = len(ids) - num_frames * per_frame
        videos = [len(clip.timestamps) for clip in clips if clip.type == "video"]
        room = (row_tokens - num_text) // per_frame - (len(clips) - len(videos))
        if not videos or room < len(videos):
            least = f" and {_frames(len(clips))} {len(clips) * per_frame}" if clips else ""
            raise DataError(f"its text has {num_text} tokens{least}, more than a row of {row_tokens}")
        clips = _sample_frames(sample, replace(sampling, frames=_level(videos, room)))
        ids, labels = encode(sample.messages, None, [len(clip.timestamps) for clip in clips])
    return Document(sample.key, ids, _shift(labels), clips), shortened


def _sample_frames(sample: Sample, sampling: FrameSampling) -> tuple[Clip, ...]:
    return tuple(Clip(each.type, each.data, sample_timestamps(each.info, sampling)) for each in sample.media)


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
