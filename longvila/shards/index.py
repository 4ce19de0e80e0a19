"""The index beside a shard: where each sample lies, what its video is, and the checksum of the tar.

`shard-000000.index.jsonl` beside `shard-000000.tar` has one line about the tar, then one a sample in stored order:

    {"shard": "shard-000000.tar", "bytes": 81920, "sha256": "...", "samples": 2, "version": 1}
    {"key": "cat", "media_type": "video", "members": {"mp4": [1536, 70211], "json": [512, 420]}, "media": {...}}

`members` gives the offset and the size of each member's content in the tar, in bytes; `media` the probed facts of a
video (`VideoInfo`), null for images and texts, a list where there are several. The tar stays a plain webdataset shard,
readable without its index.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from longvila.errors import DataError
from longvila.media import FileRange, VideoInfo
from longvila.shards.sample import MediaType, Sample, from_members, infos_from_json, infos_to_json, split_name
from longvila.shards.tar import find_end_fault

VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One sample of a shard."""

    key: str
    media_type: MediaType
    members: dict[str, tuple[int, int]]
    """Offset and size of each member's content in the tar, in bytes, by its extension."""
    media: tuple[VideoInfo | None, ...]
    """The probed facts of each of its media, None for images."""


@dataclass(frozen=True)
class Head:
    """What the first line of an index says of its tar."""

    bytes: int
    """Size of the tar."""
    sha256: str
    samples: int


@dataclass(frozen=True)
class ShardIndex(Head):
    """One shard."""

    entries: tuple[Entry, ...]
    """Its samples, in stored order."""


def index_path(shard: Path) -> Path:
    """Where the index of `shard` lies."""
    return shard.with_suffix(".index.jsonl")


def make_index(shard: Path) -> ShardIndex:
    """Reads a whole tar.

    Raises:
        DataError: it cannot be read to its end, or holds a sample without a JSON as `longvila pack` writes it.
    """
    try:
        with shard.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        with tarfile.open(shard, "r:") as tar:
            if fault := find_end_fault(tar):
                raise DataError(
                    f"{shard}: {fault}: an index would leave out what lies behind; pack or download the shard again, "
                    "or move it away"
                )
            members = list(_members(tar, shard))
            entries = [
                _entry(key, [(extension, member) for _, extension, member in group], tar, shard)
                for key, group in groupby(members, key=lambda item: item[0])
            ]
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{shard}: cannot be indexed ({type(error).__name__}: {error})") from error
    return ShardIndex(shard.stat().st_size, digest, len(entries), tuple(entries))


def write_index(shard: Path) -> None:
    """Indexes `shard` and writes the index beside it. Raises as `make_index` does."""
    index = make_index(shard)
    head = {
        "shard": shard.name,
        "bytes": index.bytes,
        "sha256": index.sha256,
        "samples": index.samples,
        "version": VERSION,
    }
    entries = ({**dataclasses.asdict(entry), "media": infos_to_json(entry.media)} for entry in index.entries)
    lines = [head, *entries]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    index_path(shard).write_text(text, encoding="utf-8")


def read_head(shard: Path) -> Head | None:
    """The first line of the index beside `shard`, or None where there is none. Raises as `read_index` does."""
    path = index_path(shard)
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            return _head(json.loads(file.readline()), shard)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_index(path, error) from error


def read_index(shard: Path) -> ShardIndex | None:
    """The index beside `shard`, or None where there is none. The tar itself is not opened.

    Raises:
        DataError: it is damaged, of another shard, or of a version that is not known.
    """
    path = index_path(shard)
    if not path.exists():
        return None
    try:
        first, *rest = map(json.loads, path.read_bytes().splitlines())
        head = _head(first, shard)
        if head.samples != len(rest):
            raise DataError(f"{path}: says {head.samples} samples and lists {len(rest)}")
        return ShardIndex(head.bytes, head.sha256, head.samples, tuple(_from_line(line) for line in rest))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_index(path, error) from error


def read_sample(shard: Path, entry: Entry) -> Sample:
    """One sample, its media left where they lie.

    Raises:
        DataError: it cannot be used, or is not where the index says.
        OSError: the shard cannot be read.
    """
    return from_members(entry.key, {name: FileRange(shard, *place) for name, place in entry.members.items()})


def _head(line: dict, shard: Path) -> Head:
    path = index_path(shard)
    if line["version"] != VERSION:
        raise DataError(f"{path}: has the version {line['version']}; known is {VERSION}")
    if line["shard"] != shard.name:
        raise DataError(f"{path}: is of {line['shard']}, not of {shard.name}")
    return Head(int(line["bytes"]), str(line["sha256"]), int(line["samples"]))


def _no_index(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: is not an index of a shard ({type(error).__name__}: {error})")


def _from_line(line: dict) -> Entry:
    members = {extension: (offset, size) for extension, (offset, size) in line["members"].items()}
    return Entry(line["key"], line["media_type"], members, infos_from_json(line["media"], len(members) - 1))


def _members(tar: tarfile.TarFile, shard: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension and header of each file of a tar."""
    for member in tar:
        if member.isfile():
            key, extension = split_name(member.name)
            if key is None or extension is None:
                raise DataError(f"{shard}: the name '{member.name}' has no extension")
            yield key, extension.lower(), member  # as webdataset reads them, where there is no index


def _entry(key: str, group: list[tuple[str, tarfile.TarInfo]], tar: tarfile.TarFile, shard: Path) -> Entry:
    members = dict(group)
    if len(members) < len(group):
        raise DataError(f"{shard}: {key} comes twice, or has two files of one kind: {', '.join(dict(group))}")
    content = tar.extractfile(members["json"]) if "json" in members else None
    if content is None:
        raise DataError(f"{shard}: {key} has no JSON beside it")
    places = {extension: [member.offset_data, member.size] for extension, member in members.items()}
    return _from_line({**json.load(content), "key": key, "members": places})
