"""Streaming loaders that users would pick instead, on the same shards with the same decoder.

webdataset as its documentation shows it, and Megatron-Energon where it is installed (`pip install megatron-energon`).
MosaicML streaming and litdata are not asked: they read formats of their own, into which films are encoded again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import logging
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from webdataset.compat import WebDataset  # pyright: ignore

from longvila.bench.damage import TARS, WordEncoder
from longvila.config import DataConfig, FrameSampling, SourceConfig
from longvila.media import VideoInfo, decode_frames, sample_timestamps
from longvila.shards import RowLoader
from longvila.shards.order import Cursor

SAMPLING = FrameSampling("fps", 256, 2.0)
SIZE = 384
PREPARE = "import sys; from megatron.energon.cli.main import main; sys.argv[0] = 'energon'; main()"


class Loader(Protocol):
    """One loader on one folder of shards, one sample at a time, decoded."""

    name: str

    def read(self, folder: Path) -> Iterator[str]:
        """Keys, in the order of the epoch."""
        ...

    def go_on(self, folder: Path, after: int, ranks: int) -> tuple[list[str], int]:
        """Keys of the rest of the epoch once `after` samples were read by one data rank, now read by `ranks`, and how
        many samples had to be read again. Raises where it cannot go on."""
        ...


def compare(root: Path, source: str, damaged: int) -> list[dict[str, Any]]:
    """Throughput, resuming and damage of each loader on the films in `root`/`source`.

    Args:
        damaged: copies of the shards of which one tar is spoilt, each read whole.
    """
    loaders: list[Loader] = [Longvila(), Webdataset()]
    if importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.energon"):
        loaders.append(Energon())
        command = ["prepare", str(root / source), "--non-interactive", "--no-progress", "--num-workers", "1"]
        names = ",".join(path.stem.removeprefix("shard-") for path in sorted((root / source).glob("*.tar")))
        command += ["--split-parts", f"train:shard-{{{names}}}.tar", "--sample-type", "CrudeWebdataset"]
        subprocess.run([sys.executable, "-c", PREPARE, *command], check=True, capture_output=True)
    spoilt = [_spoil(root / source, root / f"spoilt{number}", number) for number in range(damaged)]
    return [_ask(loader, root / source, spoilt) for loader in loaders]


def _ask(loader: Loader, folder: Path, spoilt: list[Path]) -> dict[str, Any]:
    with _hushed():
        started = time.process_time()
        order = list(loader.read(folder))
        seconds = time.process_time() - started
        half = len(order) // 2
        exact, again = _goes_on(loader, folder, order, half, 1)
        elastic, _ = _goes_on(loader, folder, order, half, 2)
        whole = sum(_reads(loader, copy) for copy in spoilt)
    return {
        "loader": loader.name,
        "samples_per_cpu_second": len(order) / seconds,
        "goes_on_exactly": exact,
        "on_two_ranks": elastic,
        "read_again": again,
        "spoilt": len(spoilt),
        "read_without_exception": whole,
    }


def _goes_on(loader: Loader, folder: Path, order: list[str], after: int, ranks: int) -> tuple[bool, int]:
    """Whether the rest of the epoch is read, each sample once, and in its order on one rank."""
    try:
        keys, again = loader.go_on(folder, after, ranks)
    except Exception:
        return False, 0
    return (keys if ranks == 1 else sorted(keys)) == (order[after:] if ranks == 1 else sorted(order[after:])), again


def _reads(loader: Loader, folder: Path) -> bool:
    try:
        list(loader.read(folder))
    except Exception:
        return False
    return True


class Longvila:
    """This project's."""

    name = "longvila"

    def _loader(self, folder: Path, rank: int = 0, ranks: int = 1) -> RowLoader:
        data = DataConfig((SourceConfig(str(folder)),), SAMPLING, row_tokens=1 << 20, max_bad_share=1.0)
        wide = RowLoader(data, Path(), WordEncoder(), SIZE)
        if wide.windows:  # a row has room for one film, so that each can be gone on from
            pieces = [piece.tokens for row in wide.windows.plan(0, 0).rows for piece in row]
            data = dataclasses.replace(data, row_tokens=max(pieces, default=1))
        return RowLoader(data, Path(), WordEncoder(), SIZE, data_rank=rank, num_data_ranks=ranks)

    def read(self, folder: Path) -> Iterator[str]:
        for row, _ in self._loader(folder).rows(Cursor()):
            yield from row.keys if row else ()

    def go_on(self, folder: Path, after: int, ranks: int) -> tuple[list[str], int]:
        *_, (_, cursor) = islice(self._loader(folder).rows(Cursor()), after)
        parts = zip(*(self._loader(folder, rank, ranks).rows(cursor) for rank in range(ranks)), strict=True)
        return [key for together in parts for row, _ in together if row for key in row.keys], 0


class Webdataset:
    """It keeps no state: to go on, it is run to where it stood."""

    name = "webdataset"

    def read(self, folder: Path) -> Iterator[str]:
        return self._read(folder, 0)

    def _read(self, folder: Path, skip: int) -> Iterator[str]:
        shards = [str(path) for path in sorted(folder.glob("*.tar"))]
        pipeline: Any = WebDataset(shards, shardshuffle=100, seed=0).shuffle(256, seed=0)
        samples = iter(pipeline)
        for _ in islice(samples, skip):
            pass
        for sample in samples:
            _decode(sample["json"], sample["mp4"])
            yield sample["__key__"]

    def go_on(self, folder: Path, after: int, ranks: int) -> tuple[list[str], int]:
        if ranks > 1:
            raise NotImplementedError("ranks of another number read other samples")
        return list(self._read(folder, after)), after


class Energon:
    """NVIDIA's Megatron-Energon, with its savable loader."""

    name = "energon"

    def _loader(self, folder: Path, rank: int = 0, ranks: int = 1) -> Any:
        energon = importlib.import_module("megatron.energon")
        film = dataclasses.make_dataclass("Film", [("frames", int)], bases=(energon.Sample,))

        @energon.stateless
        def cook(sample: dict[str, Any]) -> Any:
            frames = _decode(
                json.dumps(sample["json"]) if isinstance(sample["json"], dict) else sample["json"], sample["mp4"]
            )
            return film(**energon.basic_sample_keys(sample), frames=frames)

        encoder = type("Films", (energon.DefaultTaskEncoder,), {"cookers": [energon.Cooker(cook)], "decoder": None})()
        workers = energon.WorkerConfig(rank=rank, world_size=ranks, num_workers=0)
        return energon.get_savable_loader(
            energon.get_train_dataset(
                str(folder), worker_config=workers, batch_size=None, task_encoder=encoder, shuffle_buffer_size=4,
                max_samples_per_sequence=4, repeat=False,
            )
        )  # fmt: skip

    def read(self, folder: Path) -> Iterator[str]:
        return (sample.__key__ for sample in self._loader(folder))

    def go_on(self, folder: Path, after: int, ranks: int) -> tuple[list[str], int]:
        loader = self._loader(folder)
        reading = iter(loader)
        for _ in range(after):
            next(reading)
        state = loader.save_state_rank()
        keys = []
        for rank in range(ranks):
            other = self._loader(folder, rank, ranks)
            other.restore_state_rank(state)
            keys += [sample.__key__ for sample in other]
        return keys, 0


def _decode(facts: bytes | str, film: bytes) -> int:
    times = sample_timestamps(VideoInfo(**json.loads(facts)["media"]), SAMPLING)
    return len(decode_frames(film, times, SIZE, "film"))


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """What loaders print of damage is not what is asked."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
    logging.disable(before)


def _spoil(folder: Path, copy: Path, number: int) -> Path:
    """A copy of the shards in which one tar is spoilt after it was prepared for every loader."""
    shutil.copytree(folder, copy)
    shards = sorted(copy.glob("*.tar"))
    kinds = list(TARS.values())
    kinds[number % len(kinds)](shards[number % len(shards)], random.Random(number))
    return copy
