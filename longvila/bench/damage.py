"""Damaged inputs: what a seed does to real files, and what the pack and the loader then do.

Cases run in a process beside, so that a crash or a hang is seen as what it is. A case is survived when no file lies
anywhere but in the output folder, and, where not all samples were read, something was listed as bad or the shards were
refused in one line. Where a film was damaged, the good films beside it must be read; damage to a tar may take them too,
and what is listed is not compared with what was lost.
"""

from __future__ import annotations

import concurrent.futures
import io
import logging
import multiprocessing
import os
import random
import struct
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
from pebble import ProcessExpired, ProcessPool

from longvila.bench.films import film_sample, make_film
from longvila.config import DataConfig, FrameSampling, SourceConfig
from longvila.errors import LongvilaError
from longvila.shards import RowLoader, SourceSample, write_shards
from longvila.shards.index import index_path, read_index
from longvila.shards.order import Cursor

TIMEOUT = 120.0
GOOD = ("good0", "good1")


def measure(count: int) -> list[dict[str, Any]]:
    """`count` cases of all kinds in turn, in a row for each kind."""
    films = [make_film(4, seed, fps=12, width=320, height=180, key_frames=12) for seed in range(3)]
    kinds = [*((kind, place) for kind in MEDIA for place in ("packed", "in the shard")), *((k, "tar") for k in TARS)]
    table: dict[tuple[str, str], dict[str, Any]] = {}
    with ProcessPool(1, initializer=_hush, context=multiprocessing.get_context("fork")) as pool:  # type: ignore[arg-type]
        for number in range(count):
            kind, place = kinds[number % len(kinds)]
            future = pool.schedule(_survive, (kind, place, films, number), timeout=TIMEOUT)
            row = table.setdefault(
                (kind, place),
                {"kind": kind, "damaged": place, "files": 0, "survived": 0, "counted": 0, "read": 0, "why_not": ""},
            )
            row["files"] += 1
            try:
                fate = future.result()
            except concurrent.futures.TimeoutError:
                row["why_not"] = f"hung for {TIMEOUT:g} s"
            except ProcessExpired as error:
                row["why_not"] = f"crashed ({error.exitcode})"
            except Exception as error:
                row["why_not"] = f"{type(error).__name__}: {error}"
            else:
                row["survived"] += fate in ("counted", "read")
                row["counted"] += fate == "counted"
                row["read"] += fate == "read"
                row["why_not"] = row["why_not"] if fate in ("counted", "read") else fate
    return list(table.values())


def _hush() -> None:
    """What the cases warn of is what they are for."""
    logging.disable(logging.WARNING)


def _survive(kind: str, place: str, films: list[bytes], number: int) -> str:
    """What became of the damaged sample: counted, read, or what went wrong."""
    rng = random.Random(number)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        out = root / "a" / "b" / "out"
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(out / "cache")}):
            good = [film_sample(key, film, f"a film {key}") for key, film in zip(GOOD, films[1:], strict=True)]
            if place == "packed":
                bad = film_sample("bad", MEDIA[kind](films[0], rng), "a film bad")
                listed, keys = _pack_and_read([good[0], bad, good[1]], out)
            elif place == "in the shard":
                whole = film_sample("bad", films[0], "a film bad")
                listed, keys = _pack_and_read([good[0], whole, good[1]], out, lambda s: _spoil_member(s, kind, rng))
            else:
                whole = film_sample("bad", films[0], "a film bad")
                listed, keys = _pack_and_read([good[0], whole, good[1]], out, lambda s: TARS[kind](s, rng))
        strangers = [path for path in root.rglob("*") if path.is_file() and out not in path.parents]
        if strangers:
            return f"a file outside the output folder: {strangers[0].relative_to(root)}"
        if place != "tar" and not set(GOOD) <= set(keys):
            return f"a good sample was lost: only {sorted(keys)} were read"
        if len(keys) < 1 + len(GOOD) and not listed:
            return f"lost and not counted: only {sorted(keys)} were read"
        return "counted" if listed else "read"


def _pack_and_read(
    samples: list[SourceSample], out: Path, spoil: Callable[[Path], object] | None = None
) -> tuple[list[str], list[str]]:
    """What was counted as bad in the pack and in reading, and the keys that were read; indexed, and in sequence."""
    report = write_shards(samples, out / "data")
    listed = list(report.bad)
    for shard in sorted((out / "data").glob("*.tar")):
        if spoil is not None:
            spoil(shard)
    bad, keys = _read(out)
    for index in (out / "data").glob("*.index.jsonl"):
        index.unlink()
    bad_in_sequence, keys_in_sequence = _read(out)
    missed = set(keys) ^ set(keys_in_sequence)
    return [*listed, *bad, *(bad_in_sequence if missed else [])], sorted(set(keys) & set(keys_in_sequence))


def _read(out: Path) -> tuple[list[str], list[str]]:
    data = DataConfig((SourceConfig("data"),), FrameSampling("fps", 16, 2.0), row_tokens=4096, max_bad_share=1.0)
    try:
        loader = RowLoader(data, out, WordEncoder(), 32)
        rows = [row for row, _ in loader.rows(Cursor()) if row is not None]
    except LongvilaError as error:  # refused in one line, which is an answer too
        return [f"refused: {error}"], []
    failed = {row.keys[document] for row in rows for document, _ in row.failed}
    return [*loader.bad.listed, *failed], [key for row in rows for key in row.keys if key not in failed]


class WordEncoder:
    """Stands for a tokenizer where only lengths count: a token for every five letters, four for a frame."""

    frame_token, tokens_per_frame, fingerprint = 1, 4, "words"

    def __call__(
        self, messages: list[dict[str, Any]], text: str | None, frames: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        words = len(str(messages) + (text or "")) // 5
        return [1] * (4 * sum(frames)) + [2] * words, [-100] * (4 * sum(frames)) + [2] * words


def _spoil_member(shard: Path, kind: str, rng: random.Random) -> None:
    """Overwrites the film where it lies, as rot on a disk would; its probed facts stay those of the whole film."""
    index = read_index(shard)
    assert index is not None, "the pack wrote it"
    offset, size = next(entry for entry in index.entries if entry.key == "bad").members["mp4"]
    data = bytearray(shard.read_bytes())
    spoilt = MEDIA[kind](bytes(data[offset : offset + size]), rng)[:size]
    data[offset : offset + size] = spoilt + bytes(size - len(spoilt))
    shard.write_bytes(data)


def _truncate(film: bytes, rng: random.Random) -> bytes:
    return film[: rng.randrange(1, len(film))]


def _flip(film: bytes, rng: random.Random) -> bytes:
    data = bytearray(film)
    for _ in range(rng.choice([1, 10, 100, 1000])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _zero_middle(film: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(film) // 2)
    length = rng.randrange(1, len(film) // 2)
    return film[:start] + bytes(length) + film[start + length :]


def _wrong_container(film: bytes, rng: random.Random) -> bytes:
    page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    return rng.choice(
        [page, rng.randbytes(4096), b"RIFF" + film[4:], b"GIF89a" + rng.randbytes(500), b"\x1a\x45\xdf\xa3"]
    )


def _empty(film: bytes, rng: random.Random) -> bytes:
    return b""


def _audio_only(film: bytes, rng: random.Random) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024 * rng.randint(1, 20)), dtype=np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))  # type: ignore[arg-type]
        output.mux(stream.encode(None))  # type: ignore[arg-type]
    return file.getvalue()


def _huge(film: bytes, rng: random.Random) -> bytes:
    """The container says that the picture is up to 65,535 pixels wide and high."""
    data, at = bytearray(film), film.index(b"avc1", film.index(b"stsd")) + 4 + 24
    data[at : at + 4] = struct.pack(">HH", rng.choice([0, 1, 16_384, 65_535]), rng.choice([0, 1, 16_384, 65_535]))
    return bytes(data)


def _broken_times(film: bytes, rng: random.Random) -> bytes:
    """Random durations in the table of times, or a random unit of time."""
    data = bytearray(film)
    at = film.index(rng.choice([b"stts", b"mdhd", b"ctts"] if b"ctts" in film else [b"stts", b"mdhd"])) + 8
    for place in range(at, at + 24, 4):
        if rng.random() < 0.5:
            data[place : place + 4] = rng.choice([bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", rng.randbytes(4)])
    return bytes(data)


def _cut_tar(shard: Path, rng: random.Random) -> None:
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        header = rng.choice(tar.getmembers()).offset
    shard.write_bytes(data[: header + rng.randrange(512)])


def _spoil_header(shard: Path, rng: random.Random) -> None:
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        header = rng.choice(tar.getmembers()).offset
    for _ in range(rng.choice([1, 5, 50])):
        data[header + rng.randrange(512)] = rng.randrange(256)
    shard.write_bytes(data)


def _climb(shard: Path, rng: random.Random) -> None:
    """Members whose names lead out of every folder."""
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]
    # To folders that `_survive` looks into.
    climbing = rng.choice(["../../", "../" * 3, f"{shard.parents[4]}/", "a/../../../"])
    with tarfile.open(shard, "w") as tar:
        for member, content in members:
            if member.name.startswith("bad."):
                member.name = climbing + member.name
            tar.addfile(member, io.BytesIO(content))
    index_path(shard).unlink()


MEDIA: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": _truncate,
    "bits flipped": _flip,
    "middle zeroed": _zero_middle,
    "another format": _wrong_container,
    "empty": _empty,
    "sound only": _audio_only,
    "huge picture": _huge,
    "broken times": _broken_times,
}
TARS: dict[str, Callable[[Path, random.Random], None]] = {
    "tar cut in a header": _cut_tar,
    "tar header spoilt": _spoil_header,
    "names with ..": _climb,
}
