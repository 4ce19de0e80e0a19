"""Frame tokens by address: each frame is decoded and encoded once, however many requests show it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longvila.errors import DataError, MediaError
from longvila.evaluate.request import FrameRef, Request
from longvila.generate.answer import Answerer
from longvila.media import decode_frames, decode_image

DECODE_FRAMES = 256
"""Frames decoded together: what raw pixels may take up at one time."""


class FrameTokens:
    """A bounded cache (least recently used out first) from FrameRef to frame tokens (T, D).

    A film is read in one pass for all the requests that will need it, as far as the bound allows. The frames of the
    largest request so far are kept even where they are more than `max_bytes`: the next question is about the same film,
    and would find none of the oldest.
    """

    def __init__(self, answerer: Answerer, requests: Iterable[Request], max_bytes: int = 2 << 30):
        self._answerer = answerer
        self._max_bytes = max_bytes
        self._largest = 0  # frames of a request
        self._tokens: OrderedDict[FrameRef, Tensor] = OrderedDict()
        self._failed: dict[str, str] = {}
        wanted: dict[str, dict[FrameRef, None]] = {}
        for request in requests:
            for ref in request.frames:
                wanted.setdefault(ref.path, {})[ref] = None
        self._wanted = {path: sorted(refs, key=lambda ref: ref.order) for path, refs in wanted.items()}

    def __call__(self, refs: Sequence[FrameRef]) -> Tensor:
        """Frame tokens (F, T, D), in the order of `refs`.

        Raises:
            MediaError: a file cannot be decoded. It is not tried again: the next request gets the same error.
        """
        if not refs:
            raise DataError("a request without frames")
        found = {ref: self._tokens[ref] for ref in refs if ref in self._tokens}
        missing = sorted({ref for ref in refs if ref not in found}, key=lambda ref: ref.order)
        for path in dict.fromkeys(ref.path for ref in missing):
            found.update(self._read(path, [ref for ref in missing if ref.path == path]))
        self._tokens.update(found)
        for ref in refs:  # what was read ahead goes before what was asked for
            self._tokens.move_to_end(ref)
        self._largest = max(self._largest, len(set(refs)))
        self._evict()
        return torch.stack([found[ref] for ref in refs])

    def _read(self, path: str, needed: list[FrameRef]) -> dict[FrameRef, Tensor]:
        """Tokens of the frames `needed` now, and of those wanted later from the same file while they fit."""
        if path in self._failed:
            raise MediaError(self._failed[path])
        read: dict[FrameRef, Tensor] = {}
        try:
            read.update(self._encode(path, needed[:DECODE_FRAMES]))
            room = self._max_bytes // 2 // next(iter(read.values())).nbytes - len(needed)
            needed_set = set(needed)
            later = [ref for ref in self._wanted.get(path, []) if ref not in self._tokens and ref not in needed_set]
            rest = sorted([*needed[DECODE_FRAMES:], *later[: max(room, 0)]], key=lambda ref: ref.order)
            for start in range(0, len(rest), DECODE_FRAMES):
                read.update(self._encode(path, rest[start : start + DECODE_FRAMES]))
        except MediaError as error:
            if any(ref not in read for ref in needed):
                self._failed[path] = str(error)
                raise
        return read

    def _encode(self, path: str, refs: list[FrameRef]) -> dict[FrameRef, Tensor]:
        size = self._answerer.model.vision.image_size
        tokens = self._answerer.encode_film(
            lambda: (len(refs), lambda start, stop: decode_refs(path, refs[start:stop], size))
        )
        return dict(zip(refs, (each.clone() for each in tokens), strict=True))

    def _evict(self) -> None:
        num_kept = max(self._largest, self._max_bytes // next(iter(self._tokens.values())).nbytes)
        while len(self._tokens) > num_kept:
            self._tokens.popitem(last=False)


def decode_refs(path: str, refs: Sequence[FrameRef], size: int) -> Tensor:
    """uint8 frames (F, 3, size, size) of one file. Raises MediaError naming it."""
    try:
        if refs[0].seconds is None:
            return torch.stack([decode_image(Path(path), size, path)] * len(refs))
        return decode_frames(Path(path), [ref.seconds for ref in refs if ref.seconds is not None], size, path)
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file") from None
