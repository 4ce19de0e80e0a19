"""Samples -> documents: token ids and shifted labels, with the moments of the frames still to be decoded.

The length of a document follows from the probed facts alone, so rows can be planned, skipped and divided among the
ranks of a sequence group before a single frame is decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from longvila.config import FrameSampling
from longvila.errors import DataError
from longvila.media import sample_timestamps
from longvila.shards.bad import BadSamples
from longvila.shards.sample import Sample

IGNORE = -100
"""Label of a token that is no target."""


class Encode(Protocol):
    """Turns a conversation (or, when there are no messages, a text) into token ids and labels of the same tokens."""

    def __call__(
        self, messages: list[dict[str, Any]], text: str | None, num_frames: int
    ) -> tuple[list[int], list[int]]: ...


@dataclass(frozen=True)
class Document:
    """One sample (or one piece of a long text) as tokens."""

    key: str
    ids: list[int]
    labels: list[int]
    """labels[i] is the target after token i; IGNORE where there is none, as after the last token."""
    media_type: Literal["video", "image", "text"]
    media: bytes | None
    timestamps: tuple[float, ...]
    """Seconds of video time of its frames; (0.0,) for an image, () for text."""


def to_documents(
    samples: Iterable[Sample],
    encode: Encode,
    sampling: FrameSampling,
    row_tokens: int,
    frame_tokens: int,
    bad: BadSamples,
) -> Iterator[Document]:
    """Encodes each sample to fit a row of `row_tokens`.

    A video too long for a row gets fewer frames (counted in `bad.shortened`); one whose text alone is too long goes to
    `bad`, and so does a sample without a target. A plain text is cut into as many pieces as it needs.
    """
    for sample in samples:
        try:
            if sample.media_type == "text" and not sample.messages:
                documents = _split_text(sample, encode, row_tokens)
            else:
                documents = [_encode_one(sample, encode, sampling, row_tokens, frame_tokens, bad)]
            for document in documents:
                if all(label == IGNORE for label in document.labels):
                    raise DataError("has no answer to learn from: none of its tokens is a target")
        except DataError as error:
            bad.record(sample.key, str(error))
        else:
            yield from documents


def _encode_one(
    sample: Sample, encode: Encode, sampling: FrameSampling, row_tokens: int, frame_tokens: int, bad: BadSamples
) -> Document:
    timestamps = sample_timestamps(sample.info, sampling) if sample.media is not None else ()
    ids, labels = encode(sample.messages, None, len(timestamps))
    if len(ids) > row_tokens:
        num_text = len(ids) - len(timestamps) * frame_tokens
        num_frames = (row_tokens - num_text) // frame_tokens
        if num_frames < 1 or not timestamps:
            one = f" and one frame {frame_tokens}" if timestamps else ""
            raise DataError(f"its text has {num_text} tokens{one}, more than a row of {row_tokens}")
        timestamps = sample_timestamps(sample.info, replace(sampling, frames=num_frames))
        ids, labels = encode(sample.messages, None, len(timestamps))
        bad.shortened += 1
    return Document(sample.key, ids, _shift(labels), sample.media_type, sample.media, timestamps)


def _split_text(sample: Sample, encode: Encode, row_tokens: int) -> list[Document]:
    """Pieces of at most `row_tokens`; each begins with the last token of the one before, so no target is lost."""
    ids, labels = encode([], sample.metadata["text"], 0)
    starts = range(0, max(1, len(ids) - 1), row_tokens - 1)
    pieces = [slice(start, start + row_tokens) for start in starts]
    return [Document(sample.key, ids[piece], _shift(labels[piece]), "text", None, ()) for piece in pieces]


def _shift(labels: list[int]) -> list[int]:
    return [*labels[1:], IGNORE]
