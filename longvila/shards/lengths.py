"""How many tokens and frames each sample of a shard makes, so that rows are packed before anything is decoded.

They follow from a sample's JSON, the sizes of its images, the tokenizer with its chat template, the frame sampling, the
size of a frame and the row's budget. They are kept by the shard's checksum and a digest of the rest, in
`$XDG_CACHE_HOME/longvila/lengths` (else `~/.cache`), and taken again where that cannot be written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from longvila.config import FrameSampling
from longvila.errors import DataError
from longvila.shards.cache import cache_folder
from longvila.shards.document import Encode, make_documents
from longvila.shards.index import ShardIndex, read_sample

VERSION = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleLengths:
    """What one sample comes to."""

    pieces: tuple[tuple[int, int], ...]
    """Tokens and frames of each of its documents."""
    shortened: bool = False
    """It gets fewer frames than asked, because a row has no room for more."""
    fault: str = ""
    """Why it has no document."""


class Lengths:
    """Measures the samples of shards, or looks up what was measured before."""

    def __init__(self, encode: Encode, sampling: FrameSampling, size: int, row_tokens: int) -> None:
        self._encode, self._sampling, self._size, self._row_tokens = encode, sampling, size, row_tokens
        settings = json.dumps([VERSION, encode.fingerprint, asdict(sampling), size, row_tokens])
        self._folder = cache_folder() / "lengths" / hashlib.sha256(settings.encode()).hexdigest()[:16]

    def of(self, shard: Path, index: ShardIndex) -> tuple[SampleLengths, ...]:
        """The lengths of every sample of `shard`, in stored order.

        Raises:
            OSError: the shard cannot be read.
        """
        path = self._folder / f"{index.sha256}.json"
        known = _read(path) or ()
        if len(known) == len(index.entries):
            # A fault may have been of a disk or of a copy that was damaged, and not of the sample.
            found = tuple(self._measure(shard, index, number) if one.fault else one for number, one in enumerate(known))
        else:
            found = tuple(self._measure(shard, index, number) for number in range(len(index.entries)))
        # What a damaged copy holds is not what the checksum stands for.
        if found != known and shard.stat().st_size == index.bytes:
            _write(path, found)
        return found

    def _measure(self, shard: Path, index: ShardIndex, number: int) -> SampleLengths:
        try:
            sample = read_sample(shard, index.entries[number])
            documents, shortened = make_documents(sample, self._encode, self._sampling, self._size, self._row_tokens)
        except DataError as error:
            return SampleLengths((), fault=str(error))
        return SampleLengths(tuple((len(each.ids), each.num_frames) for each in documents), shortened)


def _read(path: Path) -> tuple[SampleLengths, ...] | None:
    try:
        lines = json.loads(path.read_text())
        return tuple(
            SampleLengths(tuple((tokens, frames) for tokens, frames in pieces), shortened, fault)
            for pieces, shortened, fault in lines
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s cannot be used (%s); its lengths are taken again", path, error)
        return None


def _write(path: Path, lengths: tuple[SampleLengths, ...]) -> None:
    """Whole or not at all: other ranks may write the same file."""
    lines = [(each.pieces, each.shortened, each.fault) for each in lengths]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(lines, file)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("%s cannot be written (%s); lengths will be taken again by the next run", path, error)
