"""The texts of SlimPajama-627B as it is released, for stage 4 (context extension).

    longvila pack slimpajama -o folder=SlimPajama-627B/train/chunk1 --out runs/mine/data/slimpajama

    SlimPajama-627B/train/chunk1/example_train_0.jsonl.zst, one text a line:
        {"text": "...", "meta": {"redpajama_set_name": "RedPajamaBook"}}

Every token of a text is a target; training cuts texts longer than a row into pieces. SlimPajama (Soboleva et al. 2023)
keeps the licences of its seven sources. Files of the same form that are not compressed (`.jsonl`) are read too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from longvila.errors import DataError
from longvila.shards.sample import BadRecord, SourceSample

READ_BYTES = 1 << 20


def samples(folder: Path, sets: tuple[str, ...] = ()) -> Iterator[SourceSample | BadRecord]:
    """One sample for each line; one bad record for each line that is not a text, and for each file that is damaged.

    Args:
        folder: where the files are, at any depth.
        sets: read only texts of these sources, e.g. RedPajamaBook,RedPajamaArXiv; none given means all.

    Raises:
        DataError: no such folder, or no file of texts in it.
    """
    paths = sorted([*folder.rglob("*.jsonl.zst"), *folder.rglob("*.jsonl")])
    if not paths:
        raise DataError(f"{folder} holds no .jsonl.zst and no .jsonl file")
    for path in paths:
        name = "-".join(path.relative_to(folder).parts).split(".jsonl")[0].replace(".", "_")
        number = 0
        try:
            with path.open("rb") as stream:
                lines = _lines(_decompressed(stream)) if path.suffix == ".zst" else stream
                for number, line in enumerate(lines, start=1):
                    item = _to_sample(f"{name}-{number:07d}", line, sets)
                    if item is not None:
                        yield item
            if not number:
                yield BadRecord(name, f"{path} is empty")
        except (OSError, EOFError, zstandard.ZstdError) as error:
            yield BadRecord(f"{name}-{number:07d}-on", f"{path} cannot be read on ({error}); download it again")


def _decompressed(stream: BinaryIO) -> Iterator[bytes]:
    """The content of the Zstandard frames of a file. (The library's own reader takes a frame that is cut for whole.)"""
    frame = None
    while data := stream.read(READ_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it ends in the middle of its data")


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _to_sample(key: str, line: bytes, sets: tuple[str, ...]) -> SourceSample | BadRecord | None:
    try:
        record = json.loads(line)
        text, source = record["text"], record.get("meta", {}).get("redpajama_set_name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return BadRecord(key, f"is not a text of SlimPajama ({type(error).__name__}: {error})")
    if sets and source not in sets:
        return None
    if not isinstance(text, str) or not text.strip():
        return BadRecord(key, "its text is empty")
    return SourceSample(key, [], None, "text", {"text": text, "source": source})
