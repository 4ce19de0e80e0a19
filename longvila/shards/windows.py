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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from longvila.config import DataConfig, FrameSampling
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


@dataclass(frozen=True, eq=False)
class _Shard:
    """A shard that is open."""

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
        self._in_use: dict[tuple[int, int], set[tuple[int, int]]] = {}
        """The shards of each window (epoch, number) of which rows may still be read or decoded."""
        self._held: set[Path] = set()
        self._weights = self._sample_weights()
        # No methods in these caches: in a circle with them, `cache` would hold its copies until the next collection.
        self._order = lru_cache(1)(
            partial(EpochOrder, self._sizes, self._amounts, self._weights, self._data.window, self._seed)
        )
        self._read = partial(_read_documents, encode, data.frames, size, data.row_tokens)
        self._texts = lru_cache(16)(self._read)  # the pieces of one text come in many rows

    def num_windows(self, epoch: int) -> int:
        return self._order(epoch).num_windows

    def key(self, place: Place) -> str:
        """Of a sample of the window planned last."""
        shard = self._shards[place.source, place.shard]
        return shard.index.entries[place.entry].key

    def plan(self, epoch: int, number: int) -> Window:
        """The rows of a window, of which documents can be read until it is closed.

        Raises:
            DataError: a shard or its index cannot be read.
        """
        places = self._order(epoch).window(number)
        following = self._order(epoch).window(number + 1) if number + 1 < self.num_windows(epoch) else []
        self._open((epoch, number), _shards_of(places), _shards_of(following))
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

    def close_before(self, epoch: int, number: int) -> None:
        """Closes the windows before this one, none of whose rows is being read or decoded any more."""
        self._in_use = {window: shards for window, shards in self._in_use.items() if window >= (epoch, number)}

    def document(self, piece: Piece) -> Document:
        """Reads and encodes a planned document of a window in use, its media left in the shard.

        One that is damaged, or is not as it was when its length was taken, comes with a `fault`, no target, and the
        length and frames that were planned.

        Raises:
            DataError: its shard cannot be read, which is no fault of the sample.
        """
        shard = self._shards[piece.place.source, piece.place.shard]
        entry = shard.index.entries[piece.place.entry]
        try:
            read = self._texts if entry.media_type == "text" else self._read
            document = read(shard, piece.place.entry)[piece.piece]
            found = len(document.ids), document.num_frames
            if found == (piece.tokens, piece.frames):
                return document
            fault = (
                f"has {found[0]} tokens and {found[1]} frames, {piece.tokens} and {piece.frames} when it was measured"
            )
        except OSError as error:
            raise DataError(f"{shard.path}: cannot be read ({error})") from error
        except (DataError, IndexError) as error:
            fault = str(error)
        ids = placeholder_ids(piece.tokens, piece.frames * self._encode.tokens_per_frame, self._encode.frame_token)
        frames = (Clip("video", None, (0.0,) * piece.frames),) if piece.frames else ()
        return Document(entry.key, ids, [IGNORE] * piece.tokens, frames, f"{entry.key}: {fault}")

    def _open(self, window: tuple[int, int], wanted: set[tuple[int, int]], ahead: set[tuple[int, int]]) -> None:
        """Opens the shards of a window and lets go of those of none in use; begins to copy those of the next one."""
        self._in_use[window] = wanted
        kept = set().union(*self._in_use.values())
        self._shards = {place: shard for place, shard in self._shards.items() if place in kept}
        self._hold(kept | ahead)
        for source, shard in self._in_turn(wanted - self._shards.keys()):
            self._shards[source, shard] = self._read_shard(source, shard)
        self._cache.begin(self._places(ahead))

    def _hold(self, shards: Iterable[tuple[int, int]]) -> None:
        """Keeps the local copies of these shards, and of no others, from being removed."""
        wanted = set(self._places(shards))
        self._cache.release(self._held - wanted)
        self._cache.hold(wanted)
        self._held = wanted

    def _in_turn(self, shards: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        ordered = sorted(shards)
        first = self._turn % max(1, len(ordered))
        return ordered[first:] + ordered[:first]

    def _read_shard(self, source: int, shard: int) -> _Shard:
        """The index and the lengths of a shard, copied where it is remote."""
        path = self._paths[source][shard]
        index = read_index(path)
        if index is None:
            raise DataError(f"{index_path(path)} was there when the run began, and is gone")
        try:
            self._cache.ensure(path)
            if (size := path.stat().st_size) != index.bytes:
                log.warning(
                    "%s has %d bytes, %d when it was indexed: what is amiss will count as bad samples; see "
                    "`longvila data check`",
                    path,
                    size,
                    index.bytes,
                )
            return _Shard(path, index, self._lengths.of(path, index))
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
            lengths: list[SampleLengths] = []
            for place in self._in_turn((source, shard) for shard in range(len(paths))):
                self._hold([place])
                lengths += self._read_shard(*place).lengths
            total = sum(tokens for each in lengths for tokens, _ in each.pieces)
            tokens.append(total / max(1, len(lengths)))
        return [weight / max(1.0, mean) for weight, mean in zip(weights, tokens, strict=True)]


def _read_documents(
    encode: Encode, frames: FrameSampling, size: int, row_tokens: int, shard: _Shard, entry: int
) -> list[Document]:
    sample = read_sample(shard.path, shard.index.entries[entry])
    return make_documents(sample, encode, frames, size, row_tokens)[0]


def _shards_of(places: Iterable[Place]) -> set[tuple[int, int]]:
    return {(place.source, place.shard) for place in places}


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
