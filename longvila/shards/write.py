"""Samples of a source -> webdataset tar shards with their indexes, and a list of what could not be used."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset.writer import TarWriter

from longvila.errors import ConfigError, DataError
from longvila.media import Encoding, Processes, VideoInfo, decode_image, encode_video, probe
from longvila.shards.index import write_index
from longvila.shards.sample import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    BadRecord,
    MediumType,
    SourceSample,
    check_sample,
    member_name,
    to_json,
)

TIMEOUT = 3600.0
"""Seconds after which preparing one sample counts as hung: encoding a film of hours takes minutes."""
log = logging.getLogger(__name__)


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
    samples: Iterable[SourceSample | BadRecord],
    out: Path,
    max_samples: int = 500,
    max_bytes: int = 1 << 30,
    encoding: Encoding | None = None,
    workers: int = 0,
    origin: str = "",
) -> PackReport:
    """Writes `out/shard-000000.tar`, ... (each with its index), `out/index.json` and, where needed, `out/bad.jsonl`.

    Every video is probed and every image decoded. A missing or unreadable one is skipped, counted and listed, and so is
    a sample with the media and the conversation of an earlier one. The folder appears only when all is written. A pack
    that was interrupted leaves `OUT.partial`; the same call goes on after its last finished shard. The bytes written
    depend neither on interruptions nor on `workers`.

    Args:
        max_samples: samples in one shard.
        max_bytes: a shard is closed once it holds this much.
        encoding: what every video is encoded to; None keeps the files as they are.
        workers: processes that probe and encode; a medium that crashes or hangs one is listed as bad. With 0, that is
            done in the calling process.
        origin: where the samples come from, in words that differ where the samples do.

    Raises:
        ConfigError: `out` exists and is not an empty folder, or what lies in `OUT.partial` is of another pack.
        DataError: not one sample could be used.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; choose another folder or delete it first")
    arguments = {"origin": origin, "max_samples": max_samples, "max_bytes": max_bytes, "encoding": str(encoding)}
    pack = _Pack(out.with_name(out.name + ".partial"), arguments)
    processes = Processes(workers, TIMEOUT)
    prepared: deque[tuple[SourceSample | BadRecord, Callable[[], _Prepared]]] = deque()
    with closing(pack):
        for item in pack.skip(iter(samples)):
            prepared.append((item, _start(item, encoding, processes)))
            if len(prepared) > 2 * workers:
                pack.add(*prepared.popleft(), max_samples, max_bytes)
        for item, waits in prepared:
            pack.add(item, waits, max_samples, max_bytes)
        report = pack.finish()
    if not report.samples:
        first = "; ".join(f"{key}: {reason}" for key, reason in list(report.bad.items())[:3])
        shutil.rmtree(pack.folder)
        raise DataError(f"nothing to pack: {len(report.bad)} samples, none usable ({first or 'the source is empty'})")
    _finish(pack.folder, out, report)
    return report


class _Pack:
    """A pack under way in `folder`: the open shard, what the report says so far, and what went in.

    `progress.jsonl` has a line for the arguments, then one for each finished shard: all that is needed to go on.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any]) -> None:
        self.folder = folder
        self.report = PackReport()
        self._keys: set[str] = set()
        self._digests: dict[str, str] = {}
        """Key of each sample by the digest of what it teaches."""
        self._taken = 0
        """Items of the source that were taken; `_source` is a digest of their keys."""
        self._source = hashlib.sha256()
        self._shard: TarWriter | None = None
        self._in_shard, self._bytes = 0, 0
        self._news: dict[str, Any] = {"digests": {}, "bad": {}}
        self._expected: list[dict[str, Any]] = []
        self._progress = folder / "progress.jsonl"
        if self._progress.exists() and b"\n" in self._progress.read_bytes():
            self._resume(arguments)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._note(arguments)

    def _resume(self, arguments: dict[str, Any]) -> None:
        # A line that was being written has no end yet.
        head, *self._expected = map(json.loads, self._progress.read_bytes().split(b"\n")[:-1])
        changed = [
            f"{name} was {head.get(name)!r}, is {value!r}"
            for name, value in arguments.items()
            if head.get(name) != value
        ]
        if changed:
            raise ConfigError(
                f"{self.folder} is of an interrupted pack with other arguments ({'; '.join(changed)}); delete it to "
                "start again"
            )
        for line in self._expected:
            self.report.bad |= line["bad"]
            self._digests |= line["digests"]
        if self._expected:
            lists = {"bad": self.report.bad, "shards": [line["shard"] for line in self._expected]}
            self.report = PackReport(**{**self._expected[-1]["report"], **lists})
        self._keys = set(self._digests.values())
        finished = {line["shard"] for line in self._expected}
        for path in self.folder.glob("shard-*"):
            if path.name.split(".")[0] + ".tar" not in finished:
                path.unlink()
        if finished:
            log.info("%s: %d shards are written, going on after them", self.folder, len(finished))

    def skip(self, samples: Iterator[SourceSample | BadRecord]) -> Iterator[SourceSample | BadRecord]:
        """The samples that finished shards do not hold."""
        for line in self._expected:
            for item in islice(samples, line["taken"] - self._taken):
                self._take(item)
            if (self._taken, self._source.hexdigest()) != (line["taken"], line["source"]):
                raise ConfigError(
                    f"the source yields other samples than before {self.folder / line['shard']} was written; delete "
                    f"{self.folder} to start again"
                )
        return samples

    def _take(self, item: SourceSample | BadRecord) -> None:
        self._taken += 1
        self._source.update(item.key.encode(errors="surrogatepass") + b"\0")

    def add(
        self, item: SourceSample | BadRecord, waits: Callable[[], _Prepared], max_samples: int, max_bytes: int
    ) -> None:
        """Writes a sample, or notes why it cannot be used. A shard that is full is finished at once."""
        self._take(item)
        try:
            if item.key in self._keys:
                raise DataError(f"key '{item.key}' comes twice")
            prepared = waits()
            if prepared.digest in self._digests:
                raise DataError(f"is the same as {self._digests[prepared.digest]}: equal media and conversation")
        except DataError as error:
            self.report.bad[item.key] = self._news["bad"][item.key] = str(error)
            return
        self._keys.add(item.key)
        self._digests[prepared.digest] = self._news["digests"][prepared.digest] = item.key
        if self._shard is None:
            self._name = f"shard-{len(self.report.shards):06d}.tar"
            # A fixed time, so that packing the same samples again gives the same bytes.
            self._shard = TarWriter(str(self.folder / self._name), mtime=0, encoder=False, format="PAX_FORMAT")
        self._bytes += self._shard.write({"__key__": item.key, "json": prepared.json, **prepared.members})
        self._in_shard += 1
        report, infos = self.report, prepared.infos
        report.samples += 1
        report.videos += sum(info is not None for info in infos)
        report.images += sum(info is None for info in infos)
        report.texts += not infos
        report.seconds += sum(info.duration for info in infos if info)
        report.media_bytes += sum(map(len, prepared.members.values()))
        if self._in_shard >= max_samples or self._bytes >= max_bytes:
            self._finish_shard()

    def _finish_shard(self) -> None:
        assert self._shard is not None, "it is open"
        self._shard.close()
        write_index(self.folder / self._name)
        self.report.shards.append(self._name)
        figures = {name: value for name, value in asdict(self.report).items() if name not in ("bad", "shards")}
        self._note(
            {
                "shard": self._name,
                "taken": self._taken,
                "source": self._source.hexdigest(),
                "report": figures,
                **self._news,
            }
        )
        self._shard, self._in_shard, self._bytes = None, 0, 0
        self._news = {"digests": {}, "bad": {}}

    def finish(self) -> PackReport:
        """Finishes the shard that is open."""
        if self._shard is not None:
            self._finish_shard()
        return self.report

    def close(self) -> None:
        """Lets go of a shard that was not finished."""
        if self._shard is not None:
            self._shard.close()

    def _note(self, line: dict[str, Any]) -> None:
        with self._progress.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class _Prepared:
    """A sample that can be written."""

    json: bytes
    members: dict[str, bytes]
    infos: list[VideoInfo | None]
    digest: str


def _start(item: SourceSample | BadRecord, encoding: Encoding | None, processes: Processes) -> Callable[[], _Prepared]:
    """Begins to prepare a sample; what is returned waits for it, and raises DataError where it cannot be used."""
    if isinstance(item, BadRecord):
        return partial(_raise, item.reason)
    return processes.start(item.key, _prepare, item, encoding)


def _raise(reason: str) -> Any:
    raise DataError(reason)


def _prepare(item: SourceSample, encoding: Encoding | None) -> _Prepared:
    if not item.key or "." in item.key or "/" in item.key:
        raise DataError(f"key '{item.key}' must be a name without dots or slashes")
    members, infos = _read_all_media(item, encoding)
    return _Prepared(to_json(item, infos), members, infos, _digest(item, members))


def _digest(sample: SourceSample, members: dict[str, bytes]) -> str:
    """Of what a sample teaches: its media and its conversation or text, whatever it is called."""
    text = json.dumps([sample.messages, None if sample.messages else sample.metadata.get("text")], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for data in members.values():
        digest.update(data)
    return digest.hexdigest()


def _read_all_media(sample: SourceSample, encoding: Encoding | None) -> tuple[dict[str, bytes], list[VideoInfo | None]]:
    """The media members {extension: bytes} and the facts of each. Raises DataError when one cannot be used."""
    types = check_sample(sample.messages, sample.media_type, len(sample.files), sample.metadata)
    members, infos = {}, []
    for number, (media, kind) in enumerate(zip(sample.files, types, strict=True)):
        name = str(media) if isinstance(media, Path) else sample.key
        extension, data, info = _read_media(media, kind, name)
        if kind == "video" and encoding:
            extension, data = "mp4", encode_video(data, encoding, name)
            info = probe(data, name)
        members[member_name(number, len(types), extension)] = data
        infos.append(info)
    return members, infos


def _read_media(media: Path | bytes, kind: MediumType, name: str) -> tuple[str, bytes, VideoInfo | None]:
    """Extension, bytes and facts of one video or image. Raises DataError when it cannot be used."""
    try:
        data = media.read_bytes() if isinstance(media, Path) else media
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or error}") from error
    suffix = media.suffix[1:].lower() if isinstance(media, Path) else None
    if kind == "video":
        extension = "mp4" if suffix is None else suffix
        if extension not in VIDEO_EXTENSIONS:
            raise DataError(f"{name}: not a video extension; known: {', '.join(VIDEO_EXTENSIONS)}")
        return extension, data, probe(data, name)
    decode_image(data, 8, name)
    extension = (Image.open(io.BytesIO(data)).format or "").lower() if suffix is None else suffix
    if extension not in IMAGE_EXTENSIONS:
        raise DataError(f"{name}: not an image extension; known: {', '.join(IMAGE_EXTENSIONS)}")
    return extension, data, None


def _finish(folder: Path, out: Path, report: PackReport) -> None:
    """Writes the list of bad samples and the counts, then moves the folder into place."""
    if report.bad:
        lines = (json.dumps({"key": key, "reason": reason}) for key, reason in report.bad.items())
        (folder / "bad.jsonl").write_text("".join(f"{line}\n" for line in lines))
    index = {**asdict(report), "bad": len(report.bad)}
    (folder / "index.json").write_text(json.dumps(index, indent=2))
    (folder / "progress.jsonl").unlink()
    if out.exists():
        out.rmdir()
    folder.rename(out)
