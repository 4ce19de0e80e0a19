"""`longvila.shards.cache`: shards in storage that fails now and then, commands, and copies that must make room."""

from __future__ import annotations

import multiprocessing

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from longvila.config import SourceConfig
from longvila.errors import ConfigError, DataError
from longvila.media import Decoder
from longvila.shards import cache
from longvila.shards.cache import ShardCache
from longvila.shards.order import Cursor

from .shards_parts import all_kinds, keys, make_loader, packed, rows_of, video, without_indexes


class Bucket(LocalFileSystem):
    """Remote storage whose opens fail as told: `failures` errors are raised, one an open, before one succeeds."""

    protocol = "bucket"
    root = ""
    failures: list[Exception] = []  # noqa: RUF012
    opened: list[str] = []  # noqa: RUF012
    short = 0
    """Copies that come out of another size than is said."""

    @classmethod
    def _strip_protocol(cls, path):
        return cls.root + "/" + str(path).removeprefix("bucket://").removeprefix(cls.root).lstrip("/")

    def open(self, path, mode="rb", **kwargs):
        self.opened.append(path.rpartition("/")[2])
        if self.failures:
            raise self.failures.pop(0)
        return super().open(path, mode, **kwargs)

    def info(self, path, **kwargs):
        is_short, Bucket.short = Bucket.short > 0, Bucket.short - 1
        return {**super().info(path, **kwargs), **({"size": 1} if is_short else {})}


fsspec.register_implementation("bucket", Bucket, clobber=True)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "PATIENCE", 0.001)
    for name, value in {"root": str(tmp_path / "remote"), "failures": [], "opened": [], "short": 0}.items():
        monkeypatch.setattr(Bucket, name, value)
    packed(tmp_path / "remote" / "talks", max_samples=3)
    return tmp_path


URL = "bucket://talks/shard-{000000..000007}.tar"


def test_remote_shards_are_read_as_local_ones_and_copied_once(bucket):
    expected = [
        (row.keys, row.input_ids.tolist()) for row in rows_of(make_loader(bucket / "remote", SourceConfig("talks")))
    ]
    for _ in range(2):
        for workers in (0, 2):
            rows = rows_of(make_loader(bucket, SourceConfig(URL), workers=workers))
            assert not any(row.failed for row in rows)
            assert [(row.keys, row.input_ids.tolist()) for row in rows] == expected
    assert len(Bucket.opened) == 16
    assert len(set(Bucket.opened)) == 16


def test_a_run_goes_on_with_only_the_shards_it_still_needs(bucket):
    _, cursor = list(make_loader(bucket, SourceConfig(URL)).rows(Cursor()))[-2]
    copies = list((bucket / "cache").rglob("*.tar"))
    assert len(copies) == 8
    for copy in copies:
        copy.unlink()
    Bucket.opened.clear()
    rows_of(make_loader(bucket, SourceConfig(URL)), cursor)
    assert 1 <= len(Bucket.opened) <= 3  # the shards of the last window of eight samples


@pytest.mark.parametrize("indexed", [True, False])
def test_failing_storage_is_tried_again_and_that_is_said(bucket, caplog, indexed):
    if not indexed:
        without_indexes(bucket / "remote" / "talks")
    Bucket.failures[:] = [ConnectionError("reset"), TimeoutError("slow")]
    rows = rows_of(make_loader(bucket, SourceConfig(URL)))
    assert sorted(keys(rows)) == sorted(sample.key for sample in all_kinds())
    assert caplog.text.count("trying again") == 2
    assert "reset" in caplog.text


def test_storage_that_goes_on_failing_is_one_error(bucket):
    loader = make_loader(bucket, SourceConfig(URL))
    Bucket.failures[:] = [ConnectionError("reset")] * 1000
    with pytest.raises(DataError, match=r"shard-\d+\.tar: its samples cannot be read \(.* after 5 tries \(reset\)\)"):
        rows_of(loader)


def test_a_copy_that_ends_early_is_made_again(bucket, caplog):
    Bucket.short = 2
    rows = rows_of(make_loader(bucket, SourceConfig(URL)))
    assert sorted(keys(rows)) == sorted(sample.key for sample in all_kinds())
    assert caplog.text.count("of 1 bytes came; trying again") == 2


def test_copies_that_go_on_ending_early_are_an_error_and_are_not_kept(bucket):
    Bucket.short = 1000
    with pytest.raises(DataError, match=r"of 1 bytes came"):
        make_loader(bucket, SourceConfig(URL))
    assert not list((bucket / "cache").rglob("*.jsonl"))


def test_a_remote_shard_that_is_missing_is_named(bucket):
    (bucket / "remote" / "talks" / "shard-000003.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000003\.tar"):
        rows_of(make_loader(bucket, SourceConfig(URL)))


def test_copies_make_room_for_others_but_not_those_in_use(bucket, caplog):
    sizes = {path.name: path.stat().st_size for path in (bucket / "remote").rglob("*.tar")}
    whole, largest = sum(sizes.values()), max(sizes.values())
    expected = sorted(sample.key for sample in all_kinds())
    for limit in (whole * 0.8, 1):
        loader = make_loader(bucket, SourceConfig(URL), cache_gib=limit / 2**30, workers=2, window=3)
        rows = rows_of(loader)
        assert sorted(keys(rows)) == expected
        assert not any(row.failed for row in rows)
        loader.cache._ahead.shutdown()
        held = sum(sizes[path.name] for path in (bucket / "cache").rglob("*.tar"))
        # Of eight: windows of one shard each, up to four of them in use and one ahead.
        assert 0 < held <= max(limit, 5 * largest) < whole
    assert "shards in use take" in caplog.text


def test_copying_ahead_removes_nothing_that_is_held(bucket):
    copies = ShardCache(limit=1)
    first, second, third = (copies.place(f"bucket://talks/shard-00000{number}.tar") for number in range(3))
    copies.hold([first, second])
    copies.ensure(first)
    copies.begin([second])
    copies._ahead.shutdown()
    assert first.exists()
    assert second.exists()
    copies.release([first])
    copies.hold([third])
    copies.ensure(third)
    assert not first.exists()
    assert second.exists()


def test_a_validation_removes_no_copy_that_the_training_reads(bucket):
    packed(bucket / "remote" / "others", all_kinds(6, 0, 0), max_samples=3)
    others = SourceConfig("bucket://others/shard-{000000..000001}.tar")
    loader = make_loader(bucket, SourceConfig(URL), cache_gib=2**-30, window=24)
    rows = loader.rows(Cursor())
    read = [next(rows)[0] for _ in range(2)]
    assert len(list((bucket / "cache").rglob("shard-*.tar"))) == 8
    assert len(rows_of(make_loader(bucket, others, cache_gib=2**-30, window=24))) > 0
    read += [row for row, _ in rows]
    assert sorted(keys(read)) == sorted(sample.key for sample in all_kinds())
    assert not any(row.failed for row in read)
    del loader, rows  # and with them what they hold
    copies = ShardCache(limit=1)
    copies.ensure(copies.place("bucket://others/index.json"))
    assert not list((bucket / "cache").rglob("shard-*.tar"))


def hold_until(stop, place, held):
    """A process that reads a shard."""
    copies = ShardCache()
    copies.place("bucket://talks/shard-000000.tar")
    copies.hold([place])
    copies.ensure(place)
    held.set()
    stop.wait(60)


def test_no_process_removes_a_copy_that_another_reads(bucket):
    context = multiprocessing.get_context("fork")
    held, stop = context.Event(), context.Event()
    copies = ShardCache(limit=1)
    first, second, third = (copies.place(f"bucket://talks/shard-00000{number}.tar") for number in range(3))
    other = context.Process(target=hold_until, args=(stop, first, held))
    other.start()
    try:
        assert held.wait(60)
        copies.hold([second])
        copies.ensure(second)
        assert first.exists()
    finally:
        stop.set()
        other.join(60)
    copies.ensure(third)  # a lock goes with its process
    assert not first.exists()
    assert second.exists()


def test_rows_that_wait_for_their_frames_hold_their_shards(bucket):
    """Rounds of four ranks span four windows of one shard each, and two rounds wait behind the one in use."""
    packed(bucket / "remote" / "films", (video(f"v{index}", 3, 16 * index) for index in range(16)), max_samples=1)
    source = SourceConfig("bucket://films/shard-{000000..000015}.tar")
    options = {"window": 1, "prefetch": 2, "workers": 1, "num_data_ranks": 4, "row_tokens": 40}
    loader = make_loader(bucket, source, cache_gib=2**-30, **options)
    loader._decoder = Decoder()  # which decodes when a row is waited for, as late as can be
    rows = rows_of(loader)
    assert len(rows) == 4
    assert not any(row.failed for row in rows)


def test_a_folder_without_locks_is_refused_with_the_way_out(bucket, monkeypatch):
    def no_locks(file, kind):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    copies = ShardCache()
    with pytest.raises(DataError, match=r"shard-0\.tar: cannot be locked .* data\.cache must be a folder"):
        copies.hold([copies.place("bucket://talks/shard-0.tar")])


def test_two_ranks_that_want_a_shard_at_once_copy_it_once(bucket):
    from concurrent.futures import ThreadPoolExecutor

    caches = [ShardCache() for _ in range(8)]
    place, *_ = [each.place("bucket://talks/shard-000000.tar") for each in caches]
    with ThreadPoolExecutor(8) as ranks:
        list(ranks.map(lambda each: each.ensure(place), caches))
    assert Bucket.opened == ["shard-000000.tar"]
    assert place.read_bytes() == (bucket / "remote/talks/shard-000000.tar").read_bytes()


def test_a_protocol_that_needs_a_package_says_which(bucket):
    with pytest.raises((DataError, ImportError), match=r"(?i)gcsfs|install"):
        make_loader(bucket, SourceConfig("gs://somewhere/{0..1}.tar"))


def test_commands_run_where_they_are_allowed_and_only_there(bucket, caplog):
    folder = bucket / "remote" / "talks"
    pipe = f"pipe:cat {folder}/shard-{{000000..000007}}.tar"
    with pytest.raises(ConfigError, match=r"would run a command; allow that with data\.allow_pipes=true"):
        make_loader(bucket, SourceConfig(pipe))
    rows = rows_of(make_loader(bucket, SourceConfig(pipe), allow_pipes=True))
    assert sorted(keys(rows)) == sorted(sample.key for sample in all_kinds())
    assert "have no index" in caplog.text
    loader = make_loader(bucket, SourceConfig("pipe:cat nothing-{0..1}.tar >&2; exit 3"), allow_pipes=True)
    assert rows_of(loader) == []
    assert all("exit code 3" in reason for reason in loader.bad.listed.values())
    assert len(loader.bad.listed) == 2
