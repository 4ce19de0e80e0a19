"""`longvila.shards.windows`, `lengths` and the loader over indexed shards: the same rows, resumed anywhere."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longvila.config import SourceConfig
from longvila.errors import ConfigError, DataError
from longvila.shards import SourceSample, write_shards
from longvila.shards import lengths as lengths_module
from longvila.shards.index import write_index
from longvila.shards.order import Cursor
from longvila.shards.windows import best_fit

from .shards_parts import (
    FRAME,
    WordEncoder,
    all_kinds,
    keys,
    make_loader,
    packed,
    rewrite,
    rows_of,
    video,
    without_indexes,
)


@pytest.fixture
def folder(tmp_path):
    packed(tmp_path / "data", max_samples=3)
    return tmp_path


def rounds(folder, ranks=1, start=None, **options):
    """All rows from a cursor to the end of its epoch as (keys, tokens), each with the cursor after its round."""
    loaders = [make_loader(folder, data_rank=rank, num_data_ranks=ranks, **options) for rank in range(ranks)]
    for together in zip(*(loader.rows(start or Cursor()) for loader in loaders), strict=True):
        assert len({cursor for _, cursor in together}) == 1
        yield [(row.keys, tuple(row.input_ids.tolist())) for row, _ in together if row], together[0][1]


def flat(dealt):
    return [row for each, _ in dealt for row in each]


@pytest.mark.parametrize("seed", range(10))
def test_a_run_goes_on_from_anywhere_on_any_number_of_data_ranks_and_processes(folder, seed):
    """The order of all rows together is one, and no row is lost or comes twice where the number of ranks changes."""
    rng = random.Random(seed)
    whole = flat(rounds(folder, start=Cursor(seed)))
    assert sorted(key for row, _ in whole for key in row) == sorted(sample.key for sample in all_kinds())
    read, cursor, ended = [], Cursor(seed), False
    while not ended:
        ranks, workers, length = rng.choice([1, 2, 3, 4]), rng.choice([0, 0, 2]), rng.randint(1, 3)
        part = list(rounds(folder, ranks, cursor, workers=workers))
        ended = len(part) <= length
        read += flat(part[:length])
        cursor = part[min(length, len(part)) - 1][1]
        cursor = Cursor(**{**json.loads(json.dumps(vars(cursor))), "sources": cursor.sources})
    assert read == whole
    assert list(rounds(folder, start=cursor)) == []


def test_data_ranks_end_an_epoch_with_the_same_round(folder):
    num_rows = len(flat(rounds(folder)))
    for ranks in (2, 3, 4, 5):
        dealt = list(rounds(folder, ranks))
        assert len(dealt) == -(-num_rows // ranks)
        assert [len(rows) for rows, _ in dealt[:-1]] == [ranks] * (len(dealt) - 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_round_may_span_more_windows_than_are_kept(tmp_path, workers):
    texts = [SourceSample(f"t{i}", [], None, "text", {"text": f"a b c{i}"}) for i in range(64)]
    packed(tmp_path / "data", texts, max_samples=4)
    options = {"window": 4, "row_tokens": 12, "workers": workers}  # a row of all four texts a window
    whole = flat(rounds(tmp_path, **options))
    assert [len(row) for row, _ in whole] == [4] * 16
    for ranks in (3, 4, 8):
        dealt = list(rounds(tmp_path, ranks, **options))
        assert flat(dealt) == whole
        assert dealt[1][1] == replace(dealt[1][1], window=2 * ranks - 1, row=1)
        assert flat(rounds(tmp_path, 1, dealt[1][1], **options)) == whole[2 * ranks :]


def test_going_on_reads_nothing_of_what_was_read(tmp_path, monkeypatch):
    texts = [SourceSample(f"t{i}", [], None, "text", {"text": f"a b c{i}"}) for i in range(64)]
    packed(tmp_path / "data", texts, max_samples=4)
    cursors = [cursor for _, cursor in make_loader(tmp_path, row_tokens=6).rows(Cursor())]
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: (opened.append(path.name), real(path, *a, **k))[1])
    loader = make_loader(tmp_path, row_tokens=6)
    assert sorted(opened) == [f"shard-{number:06}.index.jsonl" for number in range(16)]  # their first lines
    opened.clear()
    next(loader.rows(cursors[-3]))
    assert len({name for name in opened if name.endswith(".tar")}) <= 2  # a window has two shards


def test_a_run_over_other_shards_is_refused_by_the_name_of_the_source(folder):
    packed(folder / "more", all_kinds(0, 0, 6))
    sources = SourceConfig("data"), SourceConfig("more")
    _, cursor = next(make_loader(folder, *sources).rows(Cursor()))
    for path in (folder / "more").iterdir():
        path.unlink()
    (folder / "more").rmdir()
    packed(folder / "more", all_kinds(0, 0, 5))
    with pytest.raises(ConfigError, match=r"read other shards \(or other indexes of them\): more;"):
        next(make_loader(folder, *sources).rows(cursor))
    (folder / "more" / "shard-000000.index.jsonl").unlink()
    with pytest.raises(ConfigError, match="read other shards"):
        next(make_loader(folder, *sources).rows(cursor))


def test_a_run_that_began_without_indexes_is_not_continued_with_them(folder):
    """The place it reached means other rows in the order that indexes give."""
    without_indexes(folder / "data")
    loader = make_loader(folder)
    _, cursor = [dealt for dealt in loader.rows(Cursor())][4]
    streamed = rows_of(loader, cursor)
    for shard in (folder / "data").glob("*.tar"):
        write_index(shard)
    with pytest.raises(ConfigError, match=r"in sequence, 5 rows of epoch 0 .*: data; move the indexes .* away"):
        next(make_loader(folder).rows(cursor))
    assert len(rows_of(make_loader(folder), Cursor(epoch=1))) > 0  # between epochs nothing is lost
    without_indexes(folder / "data")
    assert keys(rows_of(make_loader(folder), cursor)) == keys(streamed)


def test_lengths_are_measured_once_and_kept(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = flat(rounds(folder))
    assert len(list((tmp_path / "cache/longvila/lengths").glob("*/*.json"))) == 8
    monkeypatch.setattr(lengths_module.Lengths, "_measure", None)  # must not be needed
    assert flat(rounds(folder)) == first

    class Other(WordEncoder):
        fingerprint = "other words"

    with pytest.raises(TypeError):
        flat(rounds(folder, encode=Other()))
    with pytest.raises(TypeError):
        flat(rounds(folder, row_tokens=41))


def test_ranks_that_share_a_cache_share_the_measuring(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured = []
    real = lengths_module.Lengths.of
    monkeypatch.setattr(
        lengths_module.Lengths, "of", lambda self, path, index: (measured.append(path), real(self, path, index))[1]
    )
    for rank in range(4):
        make_loader(folder, data_rank=rank, num_data_ranks=4, window=24).windows.plan(0, 0)
    orders = [measured[8 * rank : 8 * rank + 8] for rank in range(4)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({order[0] for order in orders}) == 4


def test_lengths_are_measured_again_where_they_cannot_be_kept_or_read(folder, monkeypatch, tmp_path, caplog):
    expected = flat(rounds(folder))
    (tmp_path / "cache").write_text("a file, where a folder is wanted")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert flat(rounds(folder)) == expected
    assert "cannot be" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    flat(rounds(folder))
    for path in (tmp_path / "other/longvila/lengths").glob("*/*.json"):
        path.write_text(path.read_text()[:-5])
    assert flat(rounds(folder)) == expected


def test_a_sample_that_is_not_what_was_measured_leaves_a_hole(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flat(rounds(folder))
    for path in (tmp_path / "cache/longvila/lengths").glob("*/*.json"):
        lines = json.loads(path.read_text())
        lines[0][0][0][0] += 1
        path.write_text(json.dumps(lines))
    rows = rows_of(make_loader(folder))
    assert sorted(keys(rows)) == sorted(sample.key for sample in all_kinds())
    failed = [(row, document, reason) for row in rows for document, reason in row.failed]
    assert len(failed) == 8
    for row, document, reason in failed:
        assert "when it was measured" in reason
        start = sum(row.lengths[:document])
        ids, labels = (each[start : start + row.lengths[document]] for each in (row.input_ids, row.labels))
        assert (labels == -100).all()
        assert (ids == FRAME).sum() == 3 * row.num_frames[document]
        first = sum(row.num_frames[:document])
        assert not row.frames[first : first + row.num_frames[document]].any()


def test_a_shard_that_is_cut_loses_what_lay_behind_the_cut_and_says_so(folder, caplog, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shard = folder / "data" / "shard-000000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    loader = make_loader(folder)
    rows = rows_of(loader)
    lost = set(loader.bad.listed) | {row.keys[document] for row in rows for document, _ in row.failed}
    assert 1 <= len(lost) <= 2
    assert f"shard-000000.tar has {len(data) // 2} bytes, {len(data)} when it was indexed" in caplog.text
    assert len(list((tmp_path / "cache").glob("*/*/*/*.json"))) == 7  # what the cut one held is not kept under its name


def test_a_shard_that_this_rank_cannot_read_is_an_error_where_rows_depend_on_it(folder):
    (folder / "data" / "shard-000000.tar").unlink()
    loader = make_loader(folder / "data", SourceConfig("."))  # listed: seven shards, all there
    assert len(keys(rows_of(loader))) == 21
    packed(folder / "late", all_kinds(0, 0, 6), max_samples=3)
    loader = make_loader(folder, SourceConfig("late"))
    (folder / "late" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar: its samples cannot be read"):
        rows_of(loader)


def test_a_shard_that_is_lost_after_it_was_measured_is_an_error_and_no_hole(folder):
    rows_of(make_loader(folder))
    loader = make_loader(folder)
    (folder / "data" / "shard-000003.tar").rename(folder / "elsewhere")
    with pytest.raises(DataError, match=r"shard-000003\.tar: (its samples )?cannot be read"):
        rows_of(loader)
    (folder / "elsewhere").rename(folder / "data" / "shard-000003.tar")
    loader = make_loader(folder)
    rows = loader.rows(Cursor())
    next(rows)
    for path in (folder / "data").glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"\.tar: (its samples )?cannot be read"):
        list(rows)


def test_bad_jsons_are_counted_with_their_reason_and_the_rest_is_read(tmp_path):
    packed(tmp_path / "data", [video(f"v{index}", number=16 * index) for index in range(6)])
    wrong = {
        "v1": (rb'"video"', rb'"radio"', "radio"),
        "v3": (rb'"messages": \[.*\]', rb'"messages": null', "its messages must be a list, not None"),
        "v4": (rb'"metadata": {[^}]*}', rb'"metadata": 0', "its metadata must be an object, not 0"),
        "v5": (rb'"text": ', rb'"txet": ', "a message's part of text has no text"),
    }

    def spoil(name, data):
        key, _, extension = name.rpartition(".")
        if extension != "json" or key not in wrong:
            return name, data
        spoilt = re.sub(*wrong[key][:2], data)
        assert spoilt != data
        return name, spoilt.ljust(len(data))  # every member keeps its place

    for shard in (tmp_path / "data").glob("*.tar"):
        rewrite(shard, spoil)
    for indexed in (True, False):
        if not indexed:
            without_indexes(tmp_path / "data")
        loader = make_loader(tmp_path)
        assert sorted(keys(rows_of(loader))) == ["v0", "v2"]
        assert sorted(loader.bad.listed) == sorted(wrong)
        for key, (_, _, reason) in wrong.items():
            assert reason in loader.bad.listed[key]


def test_an_index_written_later_serves_as_well(folder):
    expected = flat(rounds(folder))
    for shard in (folder / "data").glob("*.tar"):
        shard.with_suffix(".index.jsonl").unlink()
        write_index(shard)
    assert flat(rounds(folder)) == expected


def test_best_fit_fills_rows_and_puts_every_document_in_one():
    rng = random.Random(0)
    lengths = [min(1000, max(1, int(rng.lognormvariate(4.5, 1.0)))) for _ in range(1024)]
    rows = best_fit(lengths, 1000)
    assert sorted(position for row in rows for position in row) == list(range(1024))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 1000
    assert sum(lengths) / (1000 * len(rows)) > 0.985
    assert best_fit([6, 1, 5, 9, 4, 3], 10) == [[1, 3], [0, 4], [2, 5]]
    assert best_fit([], 10) == []


def test_sources_share_tokens_where_that_is_asked(tmp_path):
    for name, words in (("short", 5), ("long", 20)):
        texts = (SourceSample(f"{name}-{i}", [], None, "text", {"text": "w " * words + f"x{i}"}) for i in range(64))
        write_shards(texts, tmp_path / name, max_samples=16)
    sources = SourceConfig("short"), SourceConfig("long")
    for weigh, share in (("samples", 21 / 27), ("tokens", 0.5)):
        rows = make_loader(tmp_path, *sources, row_tokens=42, window=60, weigh=weigh).windows.plan(0, 0).rows
        tokens = [sum(piece.tokens for row in rows for piece in row if piece.place.source == s) for s in range(2)]
        assert tokens[1] / sum(tokens) == pytest.approx(share, abs=0.01)


def test_a_source_comes_as_often_as_asked_and_no_more_than_its_limit(tmp_path):
    for name in ("a", "b"):
        packed(tmp_path / name, (SourceSample(f"{name}{i}", [], None, "text", {"text": f"x y{i}"}) for i in range(6)))
    read = keys(rows_of(make_loader(tmp_path, SourceConfig("a", repeat=2.0), SourceConfig("b", limit=4))))
    assert sorted(read) == sorted([f"a{i}" for i in range(6)] * 2 + [key for key in read if key.startswith("b")])
    assert len([key for key in read if key.startswith("b")]) == 4
    for wrong in (SourceConfig("a", repeat=0.0), SourceConfig("a", repeat=float("nan")), SourceConfig("a", limit=0)):
        with pytest.raises(ConfigError, match="by which an epoch has nothing of it"):
            make_loader(tmp_path, wrong)


def test_ranks_that_plan_other_rows_have_other_digests(folder):
    digests = [
        [row.plan for row, _ in make_loader(folder, data_rank=rank, num_data_ranks=2, seed=seed).rows(Cursor()) if row]
        for rank, seed in ((0, 0), (1, 0), (1, 1))
    ]
    assert all(a == b for a, b in zip(digests[0], digests[1], strict=False))
    assert digests[0][0] != digests[2][0]


def test_a_window_of_nothing_is_refused(folder):
    with pytest.raises(ConfigError, match=r"data\.window is 0"):
        make_loader(folder, window=0)


def test_the_pieces_of_a_long_text_are_all_there(tmp_path):
    words = " ".join("x" * (1 + index) for index in range(25))
    packed(tmp_path / "data", [SourceSample("text", [], None, "text", {"text": words})])
    rows = rows_of(make_loader(tmp_path, row_tokens=8))
    targets = sorted(label for row in rows for label in row.labels.tolist() if label != -100)
    assert targets == [101 + index for index in range(1, 25)]
    assert torch.cat([row.input_ids for row in rows]).shape == (28,)
    assert replace(Cursor(), row=1) != Cursor()


def test_a_fault_is_looked_at_again_and_all_else_is_not(folder, monkeypatch, tmp_path):
    """It may have been the disk's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = flat(rounds(folder))
    (path, *_) = sorted((tmp_path / "cache/longvila/lengths").glob("*/*.json"))
    lines = json.loads(path.read_text())
    path.write_text(json.dumps([[[], 0, "Input/output error"], *lines[1:]]))
    measured = []
    real = lengths_module.Lengths._measure
    monkeypatch.setattr(
        lengths_module.Lengths, "_measure", lambda self, *place: (measured.append(place[-1]), real(self, *place))[1]
    )
    assert flat(rounds(folder)) == expected
    assert measured == [0]
