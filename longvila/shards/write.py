"""Samples of a source -> webdataset tar shards, an index, and a list of what could not be used."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image
from webdataset.writer import ShardWriter

from longvila.errors import ConfigError, DataError
from longvila.media import VideoInfo, decode_image, probe
from longvila.shards.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, BadRecord, SourceSample, check_sample, to_json


@dataclass
class PackReport:
    """What `write_shards` wrote, and what it left out."""

    samples: int = 0
    videos: int = 0
    images: int = 0
    texts: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    """The reason for each key that was left out."""
    shards: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """Of video, in all."""
    media_bytes: int = 0


def write_shards(
    samples: Iterable[SourceSample | BadRecord], out: Path, max_samples: int = 500, max_bytes: int = 1 << 30
) -> PackReport:
    """Writes `out/shard-000000.tar`, ..., `out/index.json` and, if a sample was unusable, `out/bad.jsonl`.

    Every video is probed and every image decoded. A missing or unreadable one is skipped, counted and listed. The
    folder appears only when all is written; what an interrupted pack leaves, `OUT.partial`, is replaced by the next.

    Args:
        max_samples: samples in one shard. A run needs at least (data ranks x loader workers) shards.
        max_bytes: a shard is closed once it holds this much.

    Raises:
        ConfigError: `out` exists and is not an empty folder.
        DataError: not one sample could be used.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; choose another folder or delete it first")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    report = PackReport()
    pattern = str(partial / "shard-%06d.tar").replace("%", "%%").replace("%%06d", "%06d")
    # A fixed time, so that packing the same samples again gives the same bytes.
    writer = ShardWriter(
        pattern, maxcount=max_samples, maxsize=max_bytes, verbose=0, mtime=0, encoder=False, format="PAX_FORMAT"
    )
    with closing(writer):
        seen: set[str] = set()
        for item in samples:
            _write_one(item, writer, report, seen)
    if not report.samples:
        first = "; ".join(f"{key}: {reason}" for key, reason in list(report.bad.items())[:3])
        shutil.rmtree(partial)
        raise DataError(f"nothing to pack: {len(report.bad)} samples, none usable ({first or 'the source is empty'})")
    _finish(partial, out, report)
    return report


def _write_one(item: SourceSample | BadRecord, writer: ShardWriter, report: PackReport, seen: set[str]) -> None:
    if isinstance(item, BadRecord):
        report.bad[item.key] = item.reason
        return
    try:
        check_sample(item)
        if not item.key or "." in item.key or "/" in item.key:
            raise DataError(f"key '{item.key}' must be a name without dots or slashes")
        if item.key in seen:
            raise DataError(f"key '{item.key}' comes twice")
        members, info = _read_media(item)
    except DataError as error:
        report.bad[item.key] = str(error)
        return
    seen.add(item.key)
    writer.write({"__key__": item.key, "json": to_json(item, info), **members})
    report.samples += 1
    report.videos += item.media_type == "video"
    report.images += item.media_type == "image"
    report.texts += item.media_type == "text"
    report.seconds += info.duration if info else 0.0
    report.media_bytes += sum(map(len, members.values()))


def _read_media(sample: SourceSample) -> tuple[dict[str, bytes], VideoInfo | None]:
    """The media member {extension: bytes} and the facts of a video. Raises DataError when it cannot be used."""
    if sample.media is None:
        return {}, None
    name = str(sample.media) if isinstance(sample.media, Path) else sample.key
    try:
        data = sample.media.read_bytes() if isinstance(sample.media, Path) else sample.media
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or error}") from error
    suffix = sample.media.suffix[1:].lower() if isinstance(sample.media, Path) else None
    if sample.media_type == "video":
        extension = "mp4" if suffix is None else suffix
        if extension not in VIDEO_EXTENSIONS:
            raise DataError(f"{name}: not a video extension; known: {', '.join(VIDEO_EXTENSIONS)}")
        return {extension: data}, probe(data, name)
    decode_image(data, 8, name)
    extension = (Image.open(io.BytesIO(data)).format or "").lower() if suffix is None else suffix
    if extension not in IMAGE_EXTENSIONS:
        raise DataError(f"{name}: not an image extension; known: {', '.join(IMAGE_EXTENSIONS)}")
    return {extension: data}, None


def _finish(partial: Path, out: Path, report: PackReport) -> None:
    """Writes the index and the list of bad samples, then moves the folder into place."""
    report.shards = sorted(path.name for path in partial.glob("*.tar"))
    if report.bad:
        lines = (json.dumps({"key": key, "reason": reason}, ensure_ascii=False) for key, reason in report.bad.items())
        (partial / "bad.jsonl").write_text("".join(f"{line}\n" for line in lines))
    index = {**asdict(report), "bad": len(report.bad)}
    (partial / "index.json").write_text(json.dumps(index, indent=2))
    if out.exists():
        out.rmdir()
    partial.rename(out)
