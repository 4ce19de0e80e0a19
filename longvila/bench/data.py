"""`longvila bench data`: what the data path promises, measured. Sections, tables and bars.

CPU time is that of the measuring process (`time.process_time`), everything on one thread.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from longvila.bench import balance, damage, loaders
from longvila.bench.bars import at_least, at_most, sections
from longvila.bench.films import SENTENCE, film_sample, make_film, text_samples, write_films, write_pictures
from longvila.config import DataConfig, FrameSampling, SourceConfig
from longvila.media import decode, decode_frames, decode_image
from longvila.model.chat import ChatEncoder
from longvila.parallel.launch import run_ranks
from longvila.shards import Row, RowLoader, write_shards
from longvila.shards.order import Cursor
from longvila.shards.rows import pack
from longvila.shards.windows import best_fit
from longvila.train.pretrain import train_tokenizer

Rows = list[dict[str, Any]]

EFFICIENCY, PACKING, GROWTH = 0.9, 0.97, 0.05
SHARES = {2: 0.55, 4: 0.30}
IMAGE_SIZE, TOKENS_PER_FRAME = 384, 196
RESUMES, DAMAGED, STREAMED = 50, 200, 10_000


def run(quick: bool, show: Callable[[str, Rows, str], None]) -> dict[str, Any]:
    """Runs all sections and returns what is written as JSON.

    Args:
        quick: fewer films, interruptions, damaged files and streamed samples; about a minute on two cores.
        show: called with (title, rows, note) as each section is done.
    """
    figures: dict[str, Any] = {"quick": quick}

    section = sections(figures, show)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, _own_cache(Path(temporary) / "cache"):
        root = Path(temporary)
        speeds = section(
            "decoding", measure_efficiency(root, quick), "CPU time of the pipeline beside the bare decoder"
        )
        shares = section("shares", measure_shares(root, quick), "frames that a rank of a sequence group decodes")
        packing = section(
            "packing", measure_packing(), "rows of 65,536 tokens; lognormal and pareto are models of mixes"
        )
        count = 10 if quick else RESUMES
        resumes = section("resume", measure_resumes(root, count), "interrupted, and continued by other ranks")
        damaged = section("damage", damage.measure(20 if quick else DAMAGED), "files spoilt by a seed")
        memory = section("memory", measure_memory(1000 if quick else STREAMED), "of a process that reads and decodes")
        section("peers", loaders.compare(root, "films", 6 if quick else 24), "one process, the same films and decoder")
    figures["bars"] = [
        at_least("decoder_efficiency", min(row["efficiency"] for row in speeds), EFFICIENCY),
        *(
            at_most(f"frames_decoded_share_p{parts}", max(r["share"] for r in shares if r["ranks"] == parts), bound)
            for parts, bound in SHARES.items()
        ),
        at_least("packing_efficiency", min(row["window"] for row in packing), PACKING),
        at_least("resume_exact", sum(row["exact"] for row in resumes), count),
        at_least("damaged_survived", sum(row["survived"] for row in damaged), sum(row["files"] for row in damaged)),
        at_most("worker_memory_growth", memory[-1]["growth"], GROWTH),
    ]
    return figures


def make_encoder() -> ChatEncoder:
    """A real tokenizer with a chat template, trained on the words at hand."""
    return ChatEncoder(train_tokenizer([SENTENCE] * 10, 400), TOKENS_PER_FRAME)


def make_loader(root: Path, source: str, encode: ChatEncoder, size: int = IMAGE_SIZE, **options: Any) -> RowLoader:
    """A loader over `root`/`source`; options are those of the loader, or of `DataConfig`."""
    ranks = ("data_rank", "num_data_ranks", "sequence_rank", "num_sequence_ranks")
    mine = {name: options.pop(name) for name in ranks if name in options}
    options = {"row_tokens": 32_768, "frames": FrameSampling("fps", 256, 2.0), **options}
    return RowLoader(DataConfig((SourceConfig(source),), **options), root, encode, size, **mine)


def read_all(loader: RowLoader, start: Cursor | None = None) -> list[Row]:
    return [row for row, _ in loader.rows(start or Cursor()) if row is not None]


def measure_efficiency(root: Path, quick: bool) -> Rows:
    """The pipeline (plan, tokenize, decode, build rows) beside the bare decoder on the same frames, row by row in turn.

    The bar is on a run's later epochs, by the median of them; the first one, which opens shards, measures lengths and
    finds memory, is printed too.
    """
    encode = make_encoder()
    films = write_films(root / "films", 4 if quick else 12, 10 if quick else 20)
    pictures = write_pictures(root / "pictures", 64 if quick else 512)
    times = [step / 2 for step in range(2 * (10 if quick else 20))]

    def bare_film(key: str) -> None:
        decode_frames(films[int(key.removeprefix("film"))], times, IMAGE_SIZE, key)

    def bare_picture(key: str) -> None:
        decode_image(pictures[int(key.removeprefix("picture"))], IMAGE_SIZE, key)

    table = []
    for source, count, bare in (("films", len(films), bare_film), ("pictures", len(pictures), bare_picture)):
        with _own_cache(root / f"lengths-{source}"):
            loader = make_loader(root, source, encode)
            first, *later = [_in_turn(loader, epoch, bare) for epoch in range(6 if quick else 12)]
        table.append(
            {
                "source": source,
                "samples": count,
                "bare_per_cpu_second": count / statistics.median(alone for alone, _ in later),
                "pipeline_per_cpu_second": count / statistics.median(whole for _, whole in later),
                "efficiency": statistics.median(alone / whole for alone, whole in later),
                "efficiency_least": min(alone / whole for alone, whole in later),
                "efficiency_most": max(alone / whole for alone, whole in later),
                "efficiency_of_first_epoch": first[0] / first[1],
            }
        )
    return table


def _in_turn(loader: RowLoader, epoch: int, bare: Callable[[str], None]) -> tuple[float, float]:
    """CPU seconds of the bare decoder and of the pipeline, which takes each row just before.

    A machine shared with others changes its speed within seconds; this way both see the same of it.
    """
    alone = whole = 0.0
    rows = loader.rows(Cursor(epoch))
    while True:
        begin = time.process_time()
        row, _ = next(rows, (None, None))
        whole += time.process_time() - begin
        if row is None:
            return alone, whole
        keys = row.keys
        del row
        begin = time.process_time()
        for key in keys:
            bare(key)
        alone += time.process_time() - begin


def measure_shares(root: Path, quick: bool) -> Rows:
    """Frames that leave the decoder on each rank of a sequence group, as a share of those of one process."""
    encode = make_encoder()
    seconds = 20 if quick else 60
    write_films(root / "long", 2, seconds, per_shard=1)
    table = []
    whole = 0
    for ranks in (1, 2, 4):
        counts = []
        for rank in range(ranks):
            loader = make_loader(root, "long", encode, 64, sequence_rank=rank, num_sequence_ranks=ranks)
            with _counted_frames() as count:
                read_all(loader)
            counts.append(count())
        whole = whole or counts[0]
        wanted = sum(sum(row.num_frames) for row in read_all(make_loader(root, "long", encode, 64)))
        table.append(
            {
                "ranks": ranks,
                "frames_wanted": wanted,
                "decoded_by_each": " ".join(str(each) for each in counts),
                "share": max(counts) / whole,
                "key_frame_overhead": sum(counts) / whole - 1,
            }
        )
    return table


def measure_packing() -> Rows:
    """Tokens in rows, over rows times their budget, for a whole epoch in windows of 1,024 samples."""
    budget, window = 65_536, DataConfig(()).window
    table = []
    for mix, lengths in _length_mixes(budget):
        windows = [lengths[start : start + window] for start in range(0, len(lengths), window)]
        total = sum(lengths)
        rows = {
            "window": sum(len(best_fit(each, budget)) for each in windows),
            "look_ahead_16": sum(1 for _ in pack(_Lengths.of(lengths), budget)),
            "sequential": _sequential(lengths, budget),
            "padded_singly": len(lengths),
        }
        shares = {name: total / (count * budget) for name, count in rows.items()}
        held = {"window_held_kb": len(json.dumps(windows[0])) / 1024}
        table.append({"mix": mix, "documents": len(lengths), "mean": total / len(lengths), **shares, **held})
    return table


def measure_resumes(root: Path, count: int) -> Rows:
    """Reads an epoch with an interruption, by other numbers of data ranks and processes before and after it."""
    encode = make_encoder()
    write_shards(text_samples(400), root / "texts", max_samples=32)
    options = {"row_tokens": 256, "window": 64}
    combinations = [(ranks, workers) for ranks in (1, 2, 4) for workers in (0, 2)]
    rng = random.Random(0)
    table: dict[tuple[int, int], dict[str, Any]] = {}
    whole = {}
    for number in range(count):
        epoch = number % 3
        before, after = combinations[number % len(combinations)], rng.choice(combinations)
        if epoch not in whole:
            whole[epoch] = [row for row, _ in _rounds(root, encode, (1, 0), Cursor(epoch), options)]
        first = list(_rounds(root, encode, before, Cursor(epoch), options))
        ends = [end for end, (_, cursor) in enumerate(first) if end + 1 == len(first) or first[end + 1][1] != cursor]
        end = rng.choice(ends)
        state = json.dumps(asdict(first[end][1]))
        cursor = Cursor(**{**json.loads(state), "sources": tuple(json.loads(state)["sources"])})
        found = [row for row, _ in first[: end + 1]]
        found += [row for row, _ in _rounds(root, encode, after, cursor, options)]
        row = table.setdefault(
            before, {"data_ranks": before[0], "workers": before[1], "interrupted": 0, "exact": 0, "state_kb": 0.0}
        )
        row["interrupted"] += 1
        row["exact"] += found == whole[epoch]
        row["state_kb"] = max(row["state_kb"], len(state) / 1024)
    return list(table.values())


def measure_memory(count: int) -> Rows:
    """Resident memory of a process that streams `count` samples, each a short film."""
    return run_ranks(_stream_films, 1, count, timeout=1800.0)[0]


def _stream_films(count: int) -> Rows:
    encode = make_encoder()
    film = make_film(2, 0, fps=4, width=96, height=64)
    table: Rows = []
    with tempfile.TemporaryDirectory() as temporary, _own_cache(Path(temporary) / "cache"):
        root = Path(temporary)
        samples = (film_sample(f"film{i:05}", film, f"film {i} {SENTENCE}") for i in range(count))
        write_shards(samples, root / "many", max_samples=500)
        loader = make_loader(root, "many", encode, 48, window=512)
        seen = 0
        for row, _ in loader.rows(Cursor()):
            assert row is not None, "one data rank has every row"
            due = (len(table) + 2) * count // 10
            seen += len(row.keys)
            if seen >= due:
                table.append({"samples": seen, "resident_mb": _resident_mb()})
    first = table[0]["resident_mb"]
    for each in table:
        each["growth"] = each["resident_mb"] / first - 1
    return table


def _rounds(
    root: Path, encode: ChatEncoder, readers: tuple[int, int], start: Cursor, options: dict[str, Any]
) -> Iterator[tuple[Any, Cursor]]:
    """Every row that `readers` (data ranks, processes of each) read from `start`, with the cursor behind its round."""
    ranks, workers = readers
    loaders_ = [
        make_loader(root, "texts", encode, 32, data_rank=rank, num_data_ranks=ranks, workers=workers, **options)
        for rank in range(ranks)
    ]
    for together in zip(*(loader.rows(start) for loader in loaders_), strict=True):
        for row, cursor in together:
            if row is not None:
                yield (row.keys, row.input_ids.tolist()), cursor


def _length_mixes(budget: int) -> Iterator[tuple[str, list[int]]]:
    """Document lengths in tokens: real files, and two models."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) + sorted(
        Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py")
    )
    sizes = [path.stat().st_size // 4 for path in library if "site-packages" not in path.parts]
    lengths = [min(size, budget) for size in sizes if size]
    random.Random(0).shuffle(lengths)
    yield "files of Python's library, 4 bytes a token", lengths
    for mix in balance.MIXES:
        rows = [balance.pack(mix, seed) for seed in range(128)]
        yield mix, [length for row in rows for length in row[:-1]]  # the last is cut to fit


class _Lengths:
    """Stands for a document where only its length counts."""

    def __init__(self, length: int) -> None:
        self.ids = range(length)

    @classmethod
    def of(cls, lengths: list[int]) -> Any:
        return (cls(length) for length in lengths)


def _sequential(lengths: list[int], budget: int) -> int:
    """Rows that are closed when the next document does not fit."""
    rows, room = 0, 0
    for length in lengths:
        if length > room:
            rows, room = rows + 1, budget
        room -= length
    return rows


@contextmanager
def _counted_frames() -> Iterator[Callable[[], int]]:
    """Counts the frames that leave the decoder inside the block."""
    seen = []
    real = decode.decode_packets

    def counting(*args: Any) -> Iterator[Any]:
        for each in real(*args):
            seen.append(None)
            yield each

    with mock.patch.object(decode, "decode_packets", counting):
        yield lambda: len(seen)


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder)}):
        yield


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
