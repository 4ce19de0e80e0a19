"""Webdataset shards -> samples, split by data rank and loader worker, shuffled by (seed, epoch) alone.

The split is done here and not by webdataset's own `split_by_node`, which goes by the global rank whenever RANK is set
and would give the ranks of one sequence group different samples.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from braceexpand import braceexpand
from webdataset.tariterators import group_by_keys, tar_file_expander

from longvila.errors import ConfigError, DataError
from longvila.shards.bad import BadSamples
from longvila.shards.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Sample, from_members

MAX_BUFFER_BYTES = 1 << 30
"""Encoded media held by one shuffle buffer; reached before its sample count when videos are long."""
TAR_END = 1024


def list_shards(shards: str, root: Path) -> tuple[Path, ...]:
    """The tar files that a source names: a folder, or a brace pattern like `talks/{000000..000099}.tar`.

    Raises:
        ConfigError: there is none, or one that the pattern names is missing.
    """
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
) -> Iterator[Sample]:
    """Every sample of the shards that fall to `reader` in `epoch`, once, in an order set by (seed, epoch, reader).

    All readers shuffle the same list of shards in the same way and take every `num_readers`-th. A reader is one loader
    worker of one data rank. Shards that end early, JSON without media and the like go to `bad`.
    """
    rng = random.Random(f"shards {seed} {epoch}")
    order = list(shards)
    rng.shuffle(order)
    samples = _read(order[reader::num_readers], bad)
    yield from shuffle(samples, shuffle_buffer, random.Random(f"samples {seed} {epoch} {reader}"))


def shuffle(samples: Iterable[Sample], size: int, rng: random.Random) -> Iterator[Sample]:
    """Yields a random one of a buffer of `size` samples (and at most MAX_BUFFER_BYTES of media) at a time."""
    buffer: list[Sample] = []
    held = 0
    for sample in samples:
        buffer.append(sample)
        held += len(sample.media or b"")
        while len(buffer) > size or held > MAX_BUFFER_BYTES:
            position = rng.randrange(len(buffer))
            buffer[position], buffer[-1] = buffer[-1], buffer[position]
            chosen = buffer.pop()
            held -= len(chosen.media or b"")
            yield chosen
    rng.shuffle(buffer)
    yield from buffer


def mix(streams: Sequence[Iterator[Sample]], weights: Sequence[float], rng: random.Random) -> Iterator[Sample]:
    """Draws from the streams by weight until each is exhausted; the weights set the order, not the amount."""
    lasting = list(zip(streams, weights, strict=True))
    while lasting:
        (position,) = rng.choices(range(len(lasting)), [weight for _, weight in lasting])
        try:
            yield next(lasting[position][0])
        except StopIteration:
            del lasting[position]


def _read(shards: Iterable[Path], bad: BadSamples) -> Iterator[Sample]:
    """The samples of the shards in stored order."""
    opened = _Shards(shards, bad)
    members = tar_file_expander(opened, handler=opened.note_error)
    for group in group_by_keys(members, keys=_split_name, handler=opened.note_error):
        bad.read += 1
        key = group["__key__"]
        try:
            yield _to_sample(key, group)
        except DataError as error:
            bad.record(key, f"{error} (in {group['__url__']})")


class _Shards:
    """Opens shards one after the other for webdataset, and notes each that is damaged, once."""

    def __init__(self, shards: Iterable[Path], bad: BadSamples) -> None:
        self.shards = shards
        self.bad = bad
        self.current = Path()
        self.noted = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for shard in self.shards:
            self.current, self.noted = shard, False
            try:
                with shard.open("rb") as stream:
                    self._check_end(stream)
                    yield {"url": str(shard), "stream": stream}
            except OSError as error:
                self.note_error(error)

    def _check_end(self, stream: BinaryIO) -> None:
        """A whole tar ends in two blocks of zeros. One cut between two members is not noticed by `tarfile`."""
        size = stream.seek(0, 2)
        stream.seek(max(0, size - TAR_END))
        if stream.read() != bytes(TAR_END):
            self.note_error(DataError("the shard is cut short; the samples before the cut are used"))
        stream.seek(0)

    def note_error(self, error: Exception) -> bool:
        """Records the first error of the current shard; True tells webdataset to go on."""
        if not self.noted:
            self.noted = True
            self.bad.record(str(self.current), str(error.args[0] if error.args else error))
        return True


def _split_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """A member's key and extension, parted at the last dot. (Webdataset parts at the first: keys with dots break.)"""
    key, dot, extension = name.rpartition(".")
    return (key, extension) if dot else (None, None)


def _to_sample(key: str, group: dict[str, Any]) -> Sample:
    media = [group[extension] for extension in group if extension in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS]
    if len(media) > 1:
        raise DataError(f"has {len(media)} media files; a sample has one")
    if "json" not in group:
        raise DataError("media without its JSON")
    return from_members(key, group["json"], media[0] if media else None)
