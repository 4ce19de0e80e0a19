"""The data bench: its figures come from what ran, and faults put into the data path show in them."""

import os
import random
import signal

import pytest

from longvila.bench import damage, data, loaders
from longvila.bench.films import make_film, write_films
from longvila.shards import stream
from longvila.shards.loader import RowLoader
from longvila.shards.windows import Windows


def survived(rows):
    return sum(row["survived"] for row in rows), sum(row["files"] for row in rows)


def test_damaged_files_of_every_kind_are_survived():
    rows = damage.measure(19)
    assert len(rows) == 19
    assert survived(rows) == (19, 19)
    assert sum(row["counted"] for row in rows) >= 12


def test_samples_lost_in_silence_are_not_survived(monkeypatch):
    monkeypatch.setattr(stream._Shards, "_check_end", lambda *_: None)
    lost = [row for row in damage.measure(19 * 3) if row["damaged"] == "tar"]
    done, files = survived(lost)
    assert done < files
    assert "lost and not counted" in " ".join(row["why_not"] for row in lost)


def test_a_crash_and_a_file_outside_are_not_survived(monkeypatch):
    monkeypatch.setitem(damage.MEDIA, "empty", lambda film, rng: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setitem(damage.TARS, "names with ..", lambda shard, rng: (shard.parents[2] / "evil").write_bytes(b""))
    rows = {(row["kind"], row["damaged"]): row for row in damage.measure(19)}
    assert rows["empty", "packed"]["why_not"] == "crashed (-9)"
    assert rows["names with ..", "tar"]["why_not"] == "a file outside the output folder: a/b/evil"
    assert survived(rows.values()) == (16, 19)


def test_resuming_is_counted_as_exact_only_where_it_is(tmp_path, monkeypatch):
    rows = data.measure_resumes(tmp_path, 4)
    assert sum(row["exact"] for row in rows) == sum(row["interrupted"] for row in rows) == 4
    assert max(row["state_kb"] for row in rows) < 1

    real = Windows.plan

    def unseeded(self, epoch, number):
        window = real(self, epoch, number)
        rows = list(window.rows)
        random.shuffle(rows)
        return type(window)(window.samples, tuple(rows))

    monkeypatch.setattr(Windows, "plan", unseeded)
    (tmp_path / "again").mkdir()
    assert sum(row["exact"] for row in data.measure_resumes(tmp_path / "again", 2)) == 0


def test_frames_are_counted_where_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "write_films", lambda root, count, seconds, per_shard: write_films(root, 1, 4, 1))
    rows = data.measure_shares(tmp_path, quick=True)
    assert [row["ranks"] for row in rows] == [1, 2, 4]
    assert rows[0]["share"] == 1
    assert rows[1]["share"] < 0.7
    monkeypatch.setattr(RowLoader, "_start", whole_group(RowLoader._start))
    (tmp_path / "again").mkdir()
    assert data.measure_shares(tmp_path / "again", quick=True)[1]["share"] == 1  # each rank decodes everything


def whole_group(start):
    def every_frame(self, dealt):
        self.sequence_rank, self.num_sequence_ranks = 0, 1
        return start(self, dealt)

    return every_frame


def test_packing_is_measured_on_whole_epochs():
    rows = data.measure_packing()
    assert [row["mix"] for row in rows][1:] == ["lognormal", "pareto"]
    for row in rows:
        assert 0.97 <= row["window"] <= 1
        assert row["padded_singly"] < row["sequential"] < row["window"]
        assert row["documents"] > 1000


def test_memory_is_read_while_films_are_streamed():
    rows = data.measure_memory(60)
    assert rows[-1]["samples"] == 60
    assert rows[0]["resident_mb"] > 50
    for row in rows:
        assert row["growth"] == row["resident_mb"] / rows[0]["resident_mb"] - 1


@pytest.mark.parametrize("seconds", [1, 2])
def test_the_films_of_the_bench_are_films(seconds):
    from longvila.media import probe

    info = probe(make_film(seconds, 0), "film")
    assert (info.num_frames, info.width, info.height, info.codec) == (24 * seconds, 640, 360, "h264")


def test_loaders_are_asked_the_same_questions(tmp_path):
    write_films(tmp_path / "films", 6, 1, per_shard=2)
    ours, webdataset = loaders.compare(tmp_path, "films", 3)[:2]
    assert (ours["loader"], ours["goes_on_exactly"], ours["on_two_ranks"], ours["read_again"]) == (
        "longvila", True, True, 0,
    )  # fmt: skip
    assert (webdataset["goes_on_exactly"], webdataset["on_two_ranks"], webdataset["read_again"]) == (True, False, 3)
    assert ours["read_without_exception"] == ours["spoilt"] == 3
    assert webdataset["read_without_exception"] < 3


def test_a_loader_that_starts_again_does_not_go_on_exactly(tmp_path, monkeypatch):
    write_films(tmp_path / "films", 6, 1, per_shard=2)
    monkeypatch.setattr(loaders.Longvila, "go_on", lambda self, folder, after, ranks: (list(self.read(folder)), 0))
    ours, _ = loaders.compare(tmp_path, "films", 0)[:2]
    assert (ours["goes_on_exactly"], ours["on_two_ranks"]) == (False, False)
