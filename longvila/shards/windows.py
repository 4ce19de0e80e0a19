"""Indexed shards -> packed rows: which documents share a row is a pure function of (seed, epoch, window).

A window is so many consecutive samples of the epoch's order. Their lengths are known before anything is decoded, so
rows are packed by best fit over all of them, longest first, and shuffled. Every rank plans every row; data ranks deal
them out among themselves. To go on, a run of any number of ranks needs to know the window and how many of its rows are
gone.
"""

from __future__ import annotations

import hashlib
import logging
import random
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from longvila.config import DataConfig
from longvila.errors import DataError
from longvila.shards.cache import ShardCache
from longvila.shards.document import IGNORE, Clip, Document, Encode, make_documents
from longvila.shards.index import Head, ShardIndex, index_path, read_index, read_sample
from longvila.shards.lengths import Lengths, SampleLengths
from longvila.shards.order import EpochOrder, Place

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """One document of a planned row: piece `piece` of the sample at `place`."""

    place: Place
    piece: int
    tokens: int
    frames: int


PlannedRow = tuple[Piece, ...]


@dataclass(frozen=True)
class Window:
    """The plan of a window."""

    samples: tuple[tuple[Place, SampleLengths], ...]
    """Its samples in the order of the epoch."""
    rows: tuple[PlannedRow, ...]


@dataclass(frozen=True)
class _Shard:
    path: Path
    index: ShardIndex
    lengths: tuple[SampleLengths, ...]


class Windows:
    """Plans the rows of every epoch over indexed shards, and reads their documents."""

    def __init__(
        self,
        data: DataConfig,
        shards: Sequence[Sequence[Path]],
        heads: Sequence[Sequence[Head]],
        encode: Encode,
        size: int,
        seed: int,
        cache: ShardCache,
        turn: int = 0,
    ) -> None:
        """
        Args:
            shards: the tars of each source.
            heads: the first line of the index of each.
            size: pixels along a side of a frame.
            cache: makes local copies of remote shards, of the next window in the background.
            turn: a number of this process among those that read the same. Each begins with other shards, so that
                together they measure each shard once where they share `cache_folder()`.
        """
        self._data, self._paths, self._encode, self._seed, self._cache = data, shards, encode, seed, cache
        self._size = size
        self._sizes = [[head.samples for head in each] for each in heads]
        self._amounts = [
            amount_of(sum(sizes), source.repeat, source.limit)
            for sizes, source in zip(self._sizes, data.sources, strict=True)
        ]
        self.digests = tuple(_digest([head.sha256 for head in each])[:8] for each in heads)
        """What the shards of each source are, in short."""
        self._lengths = Lengths(encode, data.frames, size, data.row_tokens)
        self._turn = turn
        self._shards: dict[tuple[int, int], _Shard] = {}
        # Rows are dealt across windows, and some are decoded ahead: the shards of the windows before are still in use.
        self._recent: deque[set[tuple[int, int]]] = deque(maxlen=1 + max(1, data.prefetch))
        self._weights = self._sample_weights()
        self._order = lru_cache(1)(self._make_order)
        self.plan = lru_cache(2)(self._plan)
        self._texts = lru_cache(16)(self._read)  # the pieces of one text come in many rows

    def num_windows(self, epoch: int) -> int:
        return self._order(epoch).num_windows

    def key(self, place: Place) -> str:
        """Of a sample of the windows planned last."""
        shard = self._shards[place.source, place.shard]
        return shard.index.entries[place.entry].key

    def document(self, piece: Piece) -> Document:
        """Reads and encodes a planned document, its media left in the shard.

        One that is damaged, or is not as it was when its length was taken, comes with a `fault`, no target, and the
        length and frames that were planned.

        Raises:
            DataError: its shard cannot be read, which is no fault of the sample.
        """
        entry = self._shards[piece.place.source, piece.place.shard].index.entries[piece.place.entry]
        try:
            document = (self._texts if entry.media_type == "text" else self._read)(piece.place)[piece.piece]
            found = len(document.ids), document.num_frames
            if found == (piece.tokens, piece.frames):
                return document
            fault = (
                f"has {found[0]} tokens and {found[1]} frames, {piece.tokens} and {piece.frames} when it was measured"
            )
        except OSError as error:
            raise DataError(
                f"{self._paths[piece.place.source][piece.place.shard]}: cannot be read ({error})"
            ) from error
        except (DataError, IndexError) as error:
            fault = str(error)
        ids = placeholder_ids(piece.tokens, piece.frames * self._encode.tokens_per_frame, self._encode.frame_token)
        frames = (Clip("video", None, (0.0,) * piece.frames),) if piece.frames else ()
        return Document(entry.key, ids, [IGNORE] * piece.tokens, frames, f"{entry.key}: {fault}")

    def _read(self, place: Place) -> list[Document]:
        shard = self._shards[place.source, place.shard]
        sample = read_sample(shard.path, shard.index.entries[place.entry])
        return make_documents(sample, self._encode, self._data.frames, self._size, self._data.row_tokens)[0]

    def _make_order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self._sizes, self._amounts, self._weights, self._data.window, self._seed, epoch)

    def _plan(self, epoch: int, number: int) -> Window:
        places = self._order(epoch).window(number)
        self._open({(place.source, place.shard) for place in places})
        if number + 1 < self.num_windows(epoch):
            following = {(place.source, place.shard) for place in self._order(epoch).window(number + 1)}
            self._cache.begin(self._places(following), keep=self._places(self._shards.keys() | following))
        samples = tuple((place, self._shards[place.source, place.shard].lengths[place.entry]) for place in places)
        pieces = [
            Piece(place, piece, tokens, frames)
            for place, lengths in samples
            for piece, (tokens, frames) in enumerate(lengths.pieces)
        ]
        rows = [
            tuple(pieces[i] for i in row) for row in best_fit([each.tokens for each in pieces], self._data.row_tokens)
        ]
        random.Random(f"rows {self._seed} {epoch} {number}").shuffle(rows)
        return Window(samples, tuple(rows))

    def _open(self, wanted: set[tuple[int, int]]) -> None:
        """Holds the index and the lengths of these shards, and still those of the windows before."""
        self._recent.append(wanted)
        kept = set().union(*self._recent)
        self._shards = {place: shard for place, shard in self._shards.items() if place in kept}
        missing = sorted(wanted - self._shards.keys())
        first = self._turn % max(1, len(missing))
        for source, shard in missing[first:] + missing[:first]:
            path = self._paths[source][shard]
            index = read_index(path)
            if index is None:
                raise DataError(f"{index_path(path)} was there when the run began, and is gone")
            try:
                self._cache.ensure(path, keep=self._places(kept))
                if (size := path.stat().st_size) != index.bytes:
                    log.warning(
                        "%s has %d bytes, %d when it was indexed: what is amiss will count as bad samples; see "
                        "`longvila data check`",
                        path,
                        size,
                        index.bytes,
                    )
                self._shards[source, shard] = _Shard(path, index, self._lengths.of(path, index))
            except OSError as error:
                raise DataError(f"{path}: its samples cannot be read ({error})") from error

    def _places(self, shards: Iterable[tuple[int, int]]) -> list[Path]:
        return [self._paths[source][shard] for source, shard in sorted(shards)]

    def _sample_weights(self) -> list[float]:
        """The weight of each source's samples: as configured, or shared out by tokens."""
        weights = [source.weight for source in self._data.sources]
        if self._data.weigh == "samples":
            return weights
        tokens = []
        for source, paths in enumerate(self._paths):
            self._open({(source, shard) for shard in range(len(paths))})
            lengths = [each for shard in range(len(paths)) for each in self._shards[source, shard].lengths]
            total = sum(tokens for each in lengths for tokens, _ in each.pieces)
            tokens.append(total / max(1, len(lengths)))
        return [weight / max(1.0, mean) for weight, mean in zip(weights, tokens, strict=True)]


def amount_of(samples: int, repeat: float, limit: int | None) -> int:
    """Samples of a source in an epoch."""
    amount = round(samples * repeat)
    return amount if limit is None else min(limit, amount)


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Best fit decreasing: positions in `lengths` grouped so that each group's sum is at most `room`.

    Each goes, longest first, to the group in which it leaves the least room (Johnson 1973: at most 11/9 of the fewest
    groups and a constant). Within a group, positions rise.
    """
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, group), rising
    for position in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        length = lengths[position]
        assert length <= room, "a document is made to fit a row"
        at = bisect_left(rooms, (length, -1))
        if at == len(rooms):
            left, group = room, len(groups)
            groups.append([])
        else:
            left, group = rooms.pop(at)
        groups[group].append(position)
        insort(rooms, (left - length, group))
    return [sorted(group) for group in groups]


def placeholder_ids(tokens: int, frame_tokens: int, frame_token: int) -> list[int]:
    """What stands for a document that was dropped: the places of its frames, and token 0."""
    return [frame_token] * frame_tokens + [0] * (tokens - frame_tokens)


def _digest(parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
