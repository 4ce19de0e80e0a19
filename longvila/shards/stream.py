"""Webdataset shards without an index -> samples in sequence, split by data rank, mixed and shuffled in a buffer.

What comes where depends on the number of data ranks, and going on in mid-epoch means reading again. The split is done
here and not by webdataset's own `split_by_node`, which goes by the global rank whenever RANK is set and would give the
ranks of one sequence group different samples.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from braceexpand import braceexpand
from webdataset.tariterators import group_by_keys, tar_file_expander

from longvila.errors import ConfigError, DataError
from longvila.shards.bad import BadSamples
from longvila.shards.cache import ShardCache, is_remote
from longvila.shards.sample import Sample, from_members, split_name
from longvila.shards.tar import find_end_fault

MAX_BUFFER = 256
"""Samples held by one shuffle buffer."""
MAX_BUFFER_BYTES = 1 << 30
"""Encoded media held by one shuffle buffer; reached before its sample count when videos are long."""


def list_shards(shards: str, root: Path, cache: ShardCache | None = None) -> tuple[Path, ...]:
    """The tar files that a source names: a folder, or a brace pattern like `talks/{000000..000099}.tar`.

    With a cache also the places of remote ones: a pattern of URLs (`s3://bucket/talks/{000000..000099}.tar`), or of
    commands that write a tar (`pipe:gunzip -c talks/{0..9}.tar.gz`).

    Raises:
        ConfigError: there is none, or a local one that the pattern names is missing.
    """
    if cache and is_remote(shards):
        return tuple(cache.place(name) for name in braceexpand(shards))
    path = root / shards
    if path.is_dir():
        found = tuple(sorted(path.glob("*.tar")))
        if not found:
            raise ConfigError(f"{path} holds no .tar shard; write some with `longvila pack`")
        return found
    found = tuple(Path(name) for name in braceexpand(str(path)))
    missing = [name for name in found if not name.is_file()]
    if missing:
        raise ConfigError(f"{len(missing)} of {len(found)} shards of '{shards}' are missing, first {missing[0]}")
    return found


def stream_samples(
    shards: Sequence[Path],
    *,
    seed: int,
    epoch: int,
    reader: int,
    num_readers: int,
    shuffle_buffer: int,
    bad: BadSamples,
    cache: ShardCache | None = None,
) -> Iterator[Sample]:
    """Every sample of the shards that fall to `reader` in `epoch`, once, in an order set by (seed, epoch, reader).

    All readers shuffle the same list of shards in the same way and take every `num_readers`-th. Shards that end early,
    JSON without media and the like go to `bad`.
    """
    rng = random.Random(f"shards {seed} {epoch}")
    order = list(shards)
    rng.shuffle(order)
    samples = read_samples(order[reader::num_readers], bad, cache)
    yield from shuffle(samples, shuffle_buffer, random.Random(f"samples {seed} {epoch} {reader}"))


def shuffle(samples: Iterable[Sample], size: int, rng: random.Random) -> Iterator[Sample]:
    """Yields a random one of a buffer of `size` samples (and at most MAX_BUFFER_BYTES of media) at a time."""
    buffer: list[Sample] = []
    held = 0
    for sample in samples:
        buffer.append(sample)
        held += _size(sample)
        while len(buffer) > size or held > MAX_BUFFER_BYTES:
            position = rng.randrange(len(buffer))
            buffer[position], buffer[-1] = buffer[-1], buffer[position]
            chosen = buffer.pop()
            held -= _size(chosen)
            yield chosen
    rng.shuffle(buffer)
    yield from buffer


def _size(sample: Sample) -> int:
    return sum(len(each.data) for each in sample.media if isinstance(each.data, bytes))


def mix(streams: Sequence[Iterator[Sample]], weights: Sequence[float], rng: random.Random) -> Iterator[Sample]:
    """Draws from the streams by weight until each is exhausted; the weights set the order, not the amount."""
    lasting = list(zip(streams, weights, strict=True))
    while lasting:
        (position,) = rng.choices(range(len(lasting)), [weight for _, weight in lasting])
        try:
            yield next(lasting[position][0])
        except StopIteration:
            del lasting[position]


def read_samples(shards: Iterable[Path], bad: BadSamples, cache: ShardCache | None = None) -> Iterator[Sample]:
    """The samples of the shards in stored order. Those that cannot be used go to `bad`, and so do damaged shards."""
    opened = _Shards(shards, bad, cache)
    members = tar_file_expander(opened, handler=opened.note_error)
    for group in group_by_keys(members, keys=split_name, handler=opened.note_error):
        bad.read += 1
        key = group["__key__"]
        try:
            yield from_members(key, {name: data for name, data in group.items() if isinstance(data, bytes)})
        except DataError as error:
            bad.record(key, f"{error} (in {group['__url__']})")


class _Shards:
    """Opens shards one after the other for webdataset, and notes each that is damaged, once."""

    def __init__(self, shards: Iterable[Path], bad: BadSamples, cache: ShardCache | None) -> None:
        self.shards = shards
        self.bad = bad
        self.cache = cache
        self.current = Path()
        self.noted = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for shard in self.shards:
            self.current, self.noted = shard, False
            try:
                with self._open(shard) as stream:
                    self._check_end(stream)
                    yield {"url": str(shard), "stream": stream}
            except OSError as error:
                self.note_error(error)

    def _open(self, shard: Path) -> BinaryIO:
        if self.cache is None:
            return shard.open("rb")
        self.cache.hold([shard])
        try:
            self.cache.ensure(shard)
            return shard.open("rb")  # once it is open it can be read, even if its copy is removed
        finally:
            self.cache.release([shard])

    def _check_end(self, stream: BinaryIO) -> None:
        """Notes what webdataset would pass over."""
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                if fault := find_end_fault(tar):
                    self.note_error(DataError(f"the shard {fault}; the samples before it are used"))
        except tarfile.TarError as error:
            self.note_error(DataError(f"the shard is not a tar ({error})"))
        stream.seek(0)

    def note_error(self, error: Exception) -> bool:
        """Records the first error of the current shard; True tells webdataset to go on."""
        if not self.noted:
            self.noted = True
            self.bad.record(str(self.current), str(error.args[0] if error.args else error))
        return True
