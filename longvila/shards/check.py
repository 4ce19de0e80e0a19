"""Verifies a folder of shards: checksums, every sample's JSON, every video and image, keys, and what is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from longvila.errors import ConfigError, DataError
from longvila.media import decode_image, probe
from longvila.shards.bad import BadSamples
from longvila.shards.index import index_path, make_index, read_index
from longvila.shards.sample import Medium
from longvila.shards.stream import read_samples


@dataclass
class CheckReport:
    """What `check_shards` found."""

    shards: int = 0
    without_index: int = 0
    """Shards that have no index beside them: their samples were checked, their bytes could not be."""
    samples: int = 0
    seconds: float = 0.0
    """Of video, in all."""
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(where, what): a shard or an index, or a sample by shard and key."""


def check_shards(folder: Path, decode: bool = True) -> CheckReport:
    """Checks every shard of `folder`, and that none is missing.

    Args:
        decode: probe every video and decode every image again, and compare with the facts in the JSON.

    Raises:
        ConfigError: no such folder, or no shard in it.
    """
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ConfigError(f"{folder} holds no .tar shard; write some with `longvila pack`")
    report = CheckReport(shards=len(shards))
    present = {index_path(shard).name for shard in shards} | {shard.name for shard in shards}
    for path in sorted(folder.glob("*.index.jsonl")):
        if path.name not in present:
            report.faults.append((path.name, "an index whose shard is missing"))
    for name in _packed(folder, report):
        if name not in present:
            report.faults.append((name, "a shard that index.json names is missing"))
    seen: dict[str, str] = {}
    for shard in shards:
        _check_index(shard, report)
        bad = BadSamples()
        for sample in read_samples([shard], bad):
            report.samples += 1
            report.seconds += sum(each.info.duration for each in sample.media if each.info)
            where = f"{shard.name}: {sample.key}"
            if sample.key in seen:
                report.faults.append((where, f"the same key is in {seen[sample.key]}"))
            seen[sample.key] = shard.name
            if decode:
                report.faults += [(where, fault) for each in sample.media if (fault := _check_media(each, sample.key))]
        report.faults += [(_where(shard, key), reason) for key, reason in bad.listed.items()]
    return report


def _packed(folder: Path, report: CheckReport) -> list[str]:
    """The shards that `longvila pack` says it wrote."""
    path = folder / "index.json"
    if not path.exists():
        return []
    try:
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        report.faults.append((path.name, f"cannot be read ({type(error).__name__}: {error})"))
        return []


def _check_index(shard: Path, report: CheckReport) -> None:
    """Compares a shard with its index: size, then checksum, then every place."""
    try:
        expected = read_index(shard)
        if expected is None:
            report.without_index += 1
            return
        size = shard.stat().st_size
        if size != expected.bytes:
            raise DataError(f"{shard}: has {size} bytes, {expected.bytes} when it was packed")
        found = make_index(shard)
        if found.sha256 != expected.sha256:
            raise DataError(f"{shard}: its bytes have changed since it was packed (sha256)")
        if found.entries != expected.entries:
            raise DataError(f"{index_path(shard)}: does not list the samples of the shard as they lie in it")
    except (OSError, DataError) as error:
        report.faults.append((shard.name, str(error)))


def _check_media(medium: Medium, key: str) -> str | None:
    """What is wrong with a video or an image, if anything."""
    try:
        if medium.info is None:
            decode_image(medium.data, 8, key)
            return None
        found = probe(medium.data, key)
    except DataError as error:
        return str(error)
    for name in ("num_frames", "width", "height", "rotation"):
        is_, said = getattr(found, name), getattr(medium.info, name)
        if is_ != said:
            return f"its video has {name} {is_}, its JSON says {said}"
    return None


def _where(shard: Path, key: str) -> str:
    return shard.name if key == str(shard) else f"{shard.name}: {key}"
