"""The rows of an epoch for one rank: samples -> documents -> packed rows, in an order that can be resumed.

Over indexed shards, which rows an epoch has and in which order is a pure function of (seed, epoch), the same for every
number of data ranks and decoding processes (`windows.py`, `order.py`): `num_data_ranks` consecutive rows make a round,
of which each data rank takes one. Shards without an index are read in sequence (`stream.py`). All ranks of a sequence
group see the same rows; they differ in the frames they decode.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from longvila.config import DataConfig
from longvila.errors import ConfigError, DataError
from longvila.media import Decoder, FrameMemory
from longvila.shards.bad import BadSamples
from longvila.shards.cache import ShardCache
from longvila.shards.document import Document, Encode, to_documents
from longvila.shards.index import Head, index_path, read_head
from longvila.shards.order import Cursor
from longvila.shards.rows import Row, pack, start_row
from longvila.shards.stream import MAX_BUFFER, list_shards, mix, stream_samples
from longvila.shards.windows import PlannedRow, Window, Windows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Dealt:
    """What this rank gets in one round: documents, None where the epoch ends within the round."""

    documents: list[Document] | None
    after: Cursor
    """Where all data ranks stand after the round."""
    digest: int = 0
    """Of the plan of the whole round; 0 without one."""


class RowLoader:
    """Streams the rows of one rank. `bad` counts what could not be used of this data rank's samples."""

    def __init__(
        self,
        data: DataConfig,
        data_root: Path,
        encode: Encode,
        image_size: int,
        data_rank: int = 0,
        num_data_ranks: int = 1,
        sequence_rank: int = 0,
        num_sequence_ranks: int = 1,
        decodes: bool = True,
        seed: int = 0,
    ) -> None:
        """
        Args:
            data_root: folder below which the shards of relative sources lie.
            image_size: height and width of the frames.
            decodes: whether this rank needs frames at all.

        Raises:
            ConfigError: no shards, too few for the data ranks where they have no index, or a source of which nothing
                can be drawn.
            DataError: an index that cannot be read.
        """
        self.data = data
        self.encode = encode
        self.image_size = image_size
        self.data_rank = data_rank
        self.num_data_ranks = num_data_ranks
        self.sequence_rank = sequence_rank
        self.num_sequence_ranks = num_sequence_ranks
        self.decodes = decodes
        self.seed = seed
        self.bad = BadSamples(data.max_bad_share)
        limit = None if data.cache_gib is None else data.cache_gib * 2**30
        self.cache = ShardCache(Path(data.cache) if data.cache else None, limit, data.allow_pipes)
        self.shards = [list_shards(source.shards, data_root, self.cache) for source in data.sources]
        _check_sources(data)
        heads = [self._read_heads(shards) for shards in self.shards]
        known = [[head for head in each if head is not None] for each in heads]
        turn = data_rank * num_sequence_ranks + sequence_rank
        self.windows = None
        if known == heads:
            self.windows = Windows(data, self.shards, known, encode, image_size, seed, self.cache, turn)
        else:
            self._check_sequential(heads)
        self._decoder = Decoder(data.workers, data.decode_timeout)
        self._memory = FrameMemory(image_size)

    def rows(self, start: Cursor) -> Iterator[tuple[Row | None, Cursor]]:
        """The rows of this rank from `start` to the end of its epoch, each with the cursor after its round.

        The last row is None where the epoch has none left for this rank.

        Raises:
            ConfigError: `start` was reached over other shards.
            DataError: too many samples could not be used (`max_bad_share`), or shards cannot be read.
        """
        dealt = self._planned(start) if self.windows else self._streamed(start)
        ahead = self.data.prefetch if self.data.workers else 0
        pending: deque[tuple[Callable[[], Row | None], Cursor]] = deque()
        for each in dealt:
            pending.append((self._start(each), each.after))
            if len(pending) > ahead:
                row, after = pending.popleft()
                yield row(), after
                if self.windows:
                    self.windows.close_before(after.epoch, after.window)
        for row, after in pending:
            yield row(), after

    def _read_heads(self, shards: Sequence[Path]) -> list[Head | None]:
        """The first line of the index of each shard; remote ones are copied, many at a time."""

        def read(shard: Path) -> Head | None:
            self.cache.beside(shard, index_path(shard))
            try:
                self.cache.ensure(index_path(shard))
            except FileNotFoundError:
                return None
            except (OSError, ImportError) as error:  # fsspec says by ImportError which package a protocol needs
                raise DataError(f"the index of a shard: {error}") from error
            return read_head(shard)

        with ThreadPoolExecutor(16) as readers:
            return list(readers.map(read, shards))

    def _start(self, dealt: _Dealt) -> Callable[[], Row | None]:
        if dealt.documents is None:
            return lambda: None
        share = self.sequence_rank if self.decodes else None, self.num_sequence_ranks
        return start_row(dealt.documents, *share, self._decoder, self._memory, dealt.digest)

    def _planned(self, start: Cursor) -> Iterator[_Dealt]:
        assert self.windows is not None
        start = self._continue(start)
        waiting: list[PlannedRow] = []
        documents: list[Document] | None = None
        after = start
        for number in range(start.window, self.windows.num_windows(start.epoch)):
            window = self.windows.plan(start.epoch, number)
            self._count(window)
            first = start.row if number == start.window else 0
            for row in range(first, len(window.rows)):
                if len(waiting) == self.data_rank:
                    # Not at the end of the round, which may lie many windows on: this one's shards are closed by then.
                    documents = [self.windows.document(piece) for piece in window.rows[row]]
                waiting.append(window.rows[row])
                after = replace(start, window=number, row=row + 1)
                if len(waiting) == self.num_data_ranks:
                    yield _Dealt(documents, after, _digest(waiting))
                    waiting, documents = [], None
        if waiting:
            yield _Dealt(documents, after, _digest(waiting))

    def _count(self, window: Window) -> None:
        """Counts the samples of a window that fall to this data rank."""
        assert self.windows is not None
        for place, lengths in window.samples[self.data_rank :: self.num_data_ranks]:
            self.bad.read += 1
            self.bad.shortened += lengths.shortened
            if lengths.fault:
                self.bad.record(self.windows.key(place), lengths.fault)

    def _continue(self, start: Cursor) -> Cursor:
        """`start` with the digests of the sources, which must be those it has."""
        digests = self.windows.digests if self.windows else ()
        names = [source.shards for source in self.data.sources]
        if digests and not start.sources and (start.window, start.row) != (0, 0):
            raise ConfigError(
                f"the run to be continued read its shards in sequence, {start.row} rows of epoch {start.epoch} on each "
                f"data rank; now that all have an index, they come in another order: {', '.join(names)}; move the "
                "indexes (*.index.jsonl) away until the run has ended, or start the stage again"
            )
        if start.sources and start.sources != digests:
            changed = [name for name, was, is_ in zip(names, start.sources, digests, strict=False) if was != is_]
            raise ConfigError(
                f"the run to be continued read other shards (or other indexes of them): {', '.join(changed or names)}; "
                "put them back, or start the stage again"
            )
        return replace(start, sources=digests)

    def _streamed(self, start: Cursor) -> Iterator[_Dealt]:
        start = self._continue(start)
        streams = [
            stream_samples(
                shards,
                seed=self.seed,
                epoch=start.epoch,
                reader=self.data_rank,
                num_readers=self.num_data_ranks,
                shuffle_buffer=min(self.data.window, MAX_BUFFER),
                bad=self.bad,
                cache=self.cache,
            )
            for shards in self.shards
        ]
        rng = random.Random(f"mixture {self.seed} {start.epoch} {self.data_rank}")
        samples = mix(streams, [source.weight for source in self.data.sources], rng)
        documents = to_documents(
            samples, self.encode, self.data.frames, self.image_size, self.data.row_tokens, self.bad
        )
        rows = enumerate(pack(documents, self.data.row_tokens))
        for number, row in islice(rows, start.row, None):
            yield _Dealt(row, replace(start, row=number + 1))

    def _check_sequential(self, heads: list[list[Head | None]]) -> None:
        for source, shards, each in zip(self.data.sources, self.shards, heads, strict=True):
            without = [shard for shard, head in zip(shards, each, strict=True) if head is None]
            if without and self.data_rank == self.sequence_rank == 0:
                log.warning(
                    "%d of %d shards of '%s' have no index, first %s: all are read in sequence; the order will depend "
                    "on the number of data ranks, and going on in mid-epoch reads the epoch again; `longvila data "
                    "index` writes the indexes",
                    len(without), len(shards), source.shards, without[0],
                )  # fmt: skip
            if len(shards) < self.num_data_ranks:
                raise ConfigError(
                    f"source '{source.shards}' has {len(shards)} shards for {self.num_data_ranks} data ranks, each of "
                    "which needs its own where shards have no index; index them with `longvila data index`"
                )
            if (source.repeat, source.limit, self.data.weigh) != (1.0, None, "samples"):
                raise ConfigError(
                    f"source '{source.shards}': repeat, limit and weigh=tokens need an index beside every shard of all "
                    "sources; write them with `longvila data index`"
                )


def _digest(rows: list[PlannedRow]) -> int:
    return int.from_bytes(hashlib.sha256(repr(rows).encode()).digest()[:8], "big") >> 2 | 1


def _check_sources(data: DataConfig) -> None:
    for source in data.sources:
        if not 0 < source.weight < math.inf:
            raise ConfigError(
                f"source '{source.shards}' has the weight {source.weight}; a weight is a number above 0, and a "
                "source that is not wanted is left out of the mixture"
            )
        if not 0 < source.repeat < math.inf or (source.limit is not None and source.limit < 1):
            raise ConfigError(
                f"source '{source.shards}' has repeat={source.repeat} and limit={source.limit}, by which an epoch has "
                "nothing of it; leave it out of the mixture"
            )
    if data.window < 1:
        raise ConfigError(f"data.window is {data.window}; at least one sample makes a window")
    if data.frames.tiles < 1:
        raise ConfigError(f"data.frames.tiles is {data.frames.tiles}; 1 shows images whole, more cuts them into tiles")
