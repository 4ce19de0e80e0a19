"""What a benchmark asks: questions about frames, addressed so that each frame is decoded and encoded once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FrameRef:
    """One frame: the file and the time in it. Equal refs are one frame, whatever request they stand in."""

    path: str
    seconds: float | None
    """Time of the frame in the video; None for an image file."""

    @property
    def order(self) -> tuple[str, float]:
        """Sorts refs by file, then time."""
        return self.path, -1.0 if self.seconds is None else self.seconds


@dataclass(frozen=True)
class Request:
    """One question about frames, in the order the model sees them."""

    id: str
    frames: tuple[FrameRef, ...]
    question: str
    max_new_tokens: int
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)
    """For the benchmark's own `score`: the reference answer, the cell, the film."""


def request_key(request: Request, fingerprint: str) -> str:
    """Identifies an answer: the checkpoint, the question, and the frames with the size and date of their files.

    A stored answer is used again only under the same key.
    """
    paths = dict.fromkeys(ref.path for ref in request.frames)
    files = [(path, Path(path).stat()) for path in paths if Path(path).exists()]
    content = [
        fingerprint,
        request.id,
        request.question,
        request.max_new_tokens,
        [[ref.path, ref.seconds] for ref in request.frames],
        [[path, stat.st_size, stat.st_mtime_ns] for path, stat in files],
    ]
    return sha256(json.dumps(content).encode()).hexdigest()[:24]


def evaluation_order(requests: list[Request]) -> list[Request]:
    """Requests such that neighbours share as long a beginning as they can: frames, then question, in sorted order."""
    return sorted(requests, key=lambda request: ([ref.order for ref in request.frames], request.question, request.id))


def share_of_rank(requests: list[Request], rank: int, world: int) -> list[Request]:
    """The requests of one rank: a stretch of `requests`, with about 1/world of the work.

    The work of a request is a constant and, for each frame that it does not share with the one before it, the linear
    layers and the attention to all its frames; the two are about equal at 400 frames.
    Depends on nothing but the arguments, so that ranks need not talk to agree.
    """
    costs = [
        16 + _num_new_frames(before, after) * (1 + len(after.frames) / 400)
        for before, after in zip([None, *requests], requests, strict=False)
    ]
    total, done, share = sum(costs), 0.0, []
    for request, cost in zip(requests, costs, strict=True):
        if int((done + cost / 2) / total * world) == rank:  # the rank in whose part the middle of the request falls
            share.append(request)
        done += cost
    return share


def _num_new_frames(before: Request | None, after: Request) -> int:
    shared = 0
    for left, right in zip(before.frames if before else (), after.frames, strict=False):
        if left != right:
            break
        shared += 1
    return len(after.frames) - shared
