"""The rows of an epoch for one rank: shards -> mixture -> documents -> packed rows, in an order that can be resumed.

The order is a pure function of (seed, epoch, data rank, number of data ranks, number of workers). All ranks of a
sequence group read the same shards and see the same rows; they differ in the frames they decode. With loader processes,
each worker packs its own share of the shards, and rows are taken from the workers in turn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from longvila.config import DataConfig
from longvila.errors import ConfigError, DataError, LongvilaError
from longvila.shards.bad import BadNews, BadSamples
from longvila.shards.document import Document, Encode, to_documents
from longvila.shards.rows import Row, build_row, pack
from longvila.shards.stream import list_shards, mix, stream_samples

T = TypeVar("T")


class RowLoader:
    """Streams the rows of one rank. `bad` counts what could not be used, in all loader processes together."""

    def __init__(
        self,
        data: DataConfig,
        data_root: Path,
        encode: Encode,
        frame_tokens: int,
        image_size: int,
        data_rank: int = 0,
        num_data_ranks: int = 1,
        sequence_rank: int = 0,
        num_sequence_ranks: int = 1,
        seed: int = 0,
    ) -> None:
        """
        Args:
            data_root: folder below which the shards of relative sources lie.
            frame_tokens: tokens that the model makes of one frame.
            image_size: height and width of the frames.

        Raises:
            ConfigError: no shards, or too few for the data ranks and loader workers.
        """
        self.data = data
        self.encode = encode
        self.frame_tokens = frame_tokens
        self.image_size = image_size
        self.data_rank = data_rank
        self.sequence_rank = sequence_rank
        self.num_sequence_ranks = num_sequence_ranks
        self.seed = seed
        self.bad = BadSamples(data.max_bad_share)
        self.readers_per_rank = max(1, data.workers)
        self.num_readers = num_data_ranks * self.readers_per_rank
        self.shards = [list_shards(source.shards, data_root) for source in data.sources]
        for source, shards in zip(data.sources, self.shards, strict=True):
            if len(shards) < self.num_readers:
                raise ConfigError(
                    f"source '{source.shards}' has {len(shards)} shards for {num_data_ranks} data ranks x "
                    f"{self.readers_per_rank} loader processes = {self.num_readers} readers, each of which needs its "
                    "own; pack it again with fewer samples in a shard, or use fewer workers"
                )

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Row]:
        """The rows of `epoch` from row `skip` on. Skipped rows are planned again but not decoded.

        Raises:
            DataError: too many samples could not be used (`max_bad_share`).
        """
        if self.data.workers:
            return self._rows_of_workers(epoch, skip)
        packed = islice(self.packed(epoch, 0, self.bad), skip, None)
        return (self.build(documents) for documents in packed)

    def packed(self, epoch: int, worker: int, bad: BadSamples) -> Iterator[list[Document]]:
        """The documents of each row that `worker` of this rank makes in `epoch`; nothing is decoded."""
        reader = self.data_rank * self.readers_per_rank + worker
        streams = [
            stream_samples(
                shards,
                seed=self.seed,
                epoch=epoch,
                reader=reader,
                num_readers=self.num_readers,
                shuffle_buffer=self.data.shuffle_buffer // self.readers_per_rank,
                bad=bad,
            )
            for shards in self.shards
        ]
        rng = random.Random(f"mixture {self.seed} {epoch} {reader}")
        samples = mix(streams, [source.weight for source in self.data.sources], rng)
        row_tokens = self.data.row_tokens
        documents = to_documents(samples, self.encode, self.data.frames, row_tokens, self.frame_tokens, bad)
        return pack(documents, row_tokens)

    def build(self, documents: list[Document]) -> Row:
        return build_row(documents, self.sequence_rank, self.num_sequence_ranks, self.image_size)

    def _rows_of_workers(self, epoch: int, skip: int) -> Iterator[Row]:
        # Forked, so that `encode` need not be picklable; nothing in a worker touches a GPU. The seed that torch gives
        # its workers is not drawn from the training's generator: a run resumed inside an epoch would draw once more.
        deliveries = DataLoader(
            _WorkerRows(self, epoch, skip),
            batch_size=None,
            num_workers=self.data.workers,
            collate_fn=_unchanged,
            multiprocessing_context="fork",
            generator=torch.Generator().manual_seed(self.seed),
        )
        position = 0
        for delivery in _from_workers(deliveries):
            self.bad.absorb(delivery.news)
            if delivery.error is not None:
                raise delivery.error
            if delivery.is_row:
                position += 1
                if position > skip:
                    yield delivery.row


@dataclass
class _Delivery:
    """What a loader process sends: a row (None if it is to be skipped), and what it counted on the way."""

    news: BadNews
    is_row: bool = False
    row: Row | None = None
    error: LongvilaError | None = None


class _WorkerRows(IterableDataset):
    def __init__(self, loader: RowLoader, epoch: int, skip: int) -> None:
        self.loader = loader
        self.epoch = epoch
        self.skip = skip

    def __iter__(self) -> Iterator[_Delivery]:
        info = get_worker_info()
        assert info is not None
        bad = BadSamples()
        try:
            for count, documents in enumerate(self.loader.packed(self.epoch, info.id, bad)):
                # Rows are taken in turn, so this one comes at this place of the epoch, or earlier once another worker
                # has run dry. If even this place is skipped, the row need not be decoded.
                skipped = count * info.num_workers + info.id < self.skip
                row = None if skipped else self.loader.build(documents)
                yield _Delivery(bad.take(), is_row=True, row=row)
        except LongvilaError as error:
            yield _Delivery(bad.take(), error=error)
        else:
            yield _Delivery(bad.take())


def _from_workers(deliveries: DataLoader) -> Iterator[Any]:
    try:
        yield from deliveries
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"a loader process died ({reason}); if the machine ran out of memory, use fewer of them (data.workers), or "
            f"a smaller data.shuffle_buffer"
        ) from error


def _unchanged(item: T) -> T:
    return item
