"""Indexes beside shards, and `longvila data check`: each way in which a folder of shards can be wrong is told."""

from __future__ import annotations

import gzip
import json
import tarfile

import pytest
from typer.testing import CliRunner

from longvila.cli import app
from longvila.errors import ConfigError, DataError
from longvila.media import probe
from longvila.shards import SourceSample
from longvila.shards.check import check_shards
from longvila.shards.index import index_path, make_index, read_index, write_index

from .shards_parts import all_kinds, conversation, packed, video
from .video_fixtures import make_image


@pytest.fixture
def folder(tmp_path):
    """Three shards: four videos, two images and two texts."""
    return packed(tmp_path / "data", all_kinds(4, 2, 2), max_samples=3)


def faults(folder, **options):
    return check_shards(folder, **options).faults


def spoil(path, old: bytes, new: bytes):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def test_an_entry_says_where_each_member_of_a_sample_lies(tmp_path):
    samples = {sample.key: sample for sample in all_kinds(4, 2, 2)}
    folder = packed(tmp_path / "data", samples.values(), max_samples=3)
    for shard in sorted(folder.glob("*.tar")):
        index = read_index(shard)
        assert index is not None
        assert index.bytes == shard.stat().st_size
        content = shard.read_bytes()
        for entry in index.entries:
            sample = samples.pop(entry.key)
            parts = {name: content[start : start + size] for name, (start, size) in entry.members.items()}
            assert json.loads(parts.pop("json"))["messages"] == sample.messages
            assert tuple(parts.values()) == sample.files
            assert entry.media_type == sample.media_type
            assert entry.media == tuple(probe(m, "") if entry.media_type == "video" else None for m in sample.files)
    assert not samples


def test_names_too_long_for_a_plain_tar_header_are_found_too(tmp_path):
    key, image = "a_" * 150 + "é\u2028", make_image(format="PNG")
    folder = packed(tmp_path / "data", [SourceSample(key, conversation("", "image"), image, "image")])
    shard = folder / "shard-000000.tar"
    (entry,) = read_index(shard).entries
    start, size = entry.members["png"]
    assert (entry.key, shard.read_bytes()[start : start + size]) == (key, image)


def test_what_was_packed_is_whole(folder):
    report = check_shards(folder)
    assert report.faults == []
    assert (report.shards, report.without_index, report.samples) == (3, 0, 8)
    assert report.seconds == pytest.approx(3 + 4 + 5 + 6)


def test_a_changed_byte_is_told_even_where_nothing_is_decoded(folder):
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    start, size = read_index(shard).entries[0].members["mp4"]
    content[start + size // 2] ^= 1
    shard.write_bytes(content)
    ((where, what),) = faults(folder, decode=False)
    assert where == shard.name
    assert "its bytes have changed" in what


def test_a_shard_that_is_cut_is_told_by_its_size_and_by_its_end(folder):
    shard = folder / "shard-000001.tar"
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size // 2)
    told = faults(folder, decode=False)
    assert {where.split(":")[0] for where, _ in told} == {shard.name}
    assert any("when it was packed" in what for _, what in told)
    assert any("cut short" in what for _, what in told)


def test_a_missing_shard_is_told_by_its_index_and_by_the_folder(folder):
    (folder / "shard-000002.tar").unlink()
    assert faults(folder) == [
        ("shard-000002.index.jsonl", "an index whose shard is missing"),
        ("shard-000002.tar", "a shard that index.json names is missing"),
    ]


def test_without_an_index_samples_are_checked_and_it_is_said(folder):
    for path in folder.glob("*.index.jsonl"):
        path.unlink()
    report = check_shards(folder)
    assert (report.without_index, report.samples, report.faults) == (3, 8, [])


def test_facts_that_are_not_those_of_the_video_are_told(folder):
    shard = folder / "shard-000000.tar"
    spoil(shard, b'"num_frames": 4', b'"num_frames": 9')
    write_index(shard)
    assert faults(folder) == [(f"{shard.name}: video-1", "its video has num_frames 4, its JSON says 9")]
    assert faults(folder, decode=False) == []


def test_a_key_in_two_shards_is_told(tmp_path):
    folder = packed(tmp_path / "data", [video("cat")])
    other = packed(tmp_path / "other", [video("cat", number=32)])
    (other / "shard-000000.tar").rename(folder / "more.tar")
    assert faults(folder) == [("shard-000000.tar: cat", "the same key is in more.tar")]


def test_media_without_its_json_is_told_and_cannot_be_indexed(folder, tmp_path):
    (tmp_path / "lonely.mp4").write_bytes(video("cat").media)
    with tarfile.open(folder / "other.tar", "w") as tar:
        tar.add(tmp_path / "lonely.mp4", "lonely.mp4")
    ((where, what),) = faults(folder)
    assert (where, "media without its JSON" in what) == ("other.tar: lonely", True)
    with pytest.raises(DataError, match="lonely has no JSON"):
        make_index(folder / "other.tar")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"version": 1', b'"version": 7', "has the version 7; known is 1"),
        (b'"shard": "shard-000000.tar"', b'"shard": "shard-000009.tar"', "is of shard-000009.tar"),
        (b'"samples": 3', b'"samples": 4', "says 4 samples and lists 3"),
        (b'"sha256"', b'"sha1"', "is not an index of a shard"),
        (b'"version": 1}', b'"version": 1', "is not an index of a shard"),
    ],
)
def test_an_index_that_cannot_be_used_is_told(folder, old, new, message):
    shard = folder / "shard-000000.tar"
    spoil(index_path(shard), old, new)
    with pytest.raises(DataError, match=message):
        read_index(shard)
    ((where, what),) = faults(folder, decode=False)
    assert where == shard.name
    assert message in what


def test_an_index_with_other_places_is_told(folder):
    shard = folder / "shard-000000.tar"
    spoil(index_path(shard), b'"key": "video-1"', b'"key": "video-x"')
    ((where, what),) = faults(folder, decode=False)
    assert where == shard.name
    assert "does not list the samples" in what


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no \.tar shard"):
        check_shards(tmp_path)


def test_the_command_prints_each_fault_and_fails(folder):
    whole = CliRunner().invoke(app, ["data", "check", str(folder)])
    assert (whole.exit_code, whole.stdout) == (0, "8 samples in 3 shards, 18 s of video\n")
    (folder / "shard-000002.tar").unlink()
    broken = CliRunner().invoke(app, ["data", "check", str(folder), "--quick"])
    assert broken.exit_code == 1
    assert "shard-000002.tar: a shard that index.json names is missing" in broken.stdout
    assert f"2 faults in {folder}" in " ".join(broken.stderr.split())


def test_a_member_without_an_extension_cannot_be_indexed(folder, tmp_path):
    (tmp_path / "README").write_text("hello")
    with tarfile.open(folder / "other.tar", "w") as tar:
        tar.add(tmp_path / "README", "README")
    with pytest.raises(DataError, match="'README' has no extension"):
        make_index(folder / "other.tar")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda tar, third: tar[:third] + b"\xff" * 512 + tar[third + 512 :], "has a damaged header at byte {third}"),
        (lambda tar, third: tar[:third], "is cut short at byte {size}"),  # between two members
        (lambda tar, third: tar[: third + 700], "is cut short at byte {size}"),  # within one
        (lambda tar, third: tar + tar, "goes on behind its end, at byte {whole}"),
    ],
    ids=["header", "between", "within", "appended"],
)
def test_a_tar_of_which_an_index_would_leave_out_a_part_is_refused_by_name_and_byte(folder, spoil, told):
    shard = folder / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[4].offset  # of the third sample
    whole = shard.read_bytes()
    shard.write_bytes(spoil(whole, third))
    told = told.format(third=third, size=shard.stat().st_size, whole=len(whole))
    index_path(shard).unlink()
    with pytest.raises(DataError, match=rf"shard-000000\.tar: {told}: an index would leave out what lies behind"):
        write_index(shard)
    assert not index_path(shard).exists()
    assert f"the shard {told}; the samples before it are used" in dict(faults(folder, decode=False)).values()


def test_a_compressed_tar_cannot_be_indexed(folder):
    """Places in what it holds are no places in the file."""
    shard = folder / "shard-000000.tar"
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(DataError, match=r"shard-000000\.tar: cannot be indexed \(ReadError"):
        make_index(shard)


def test_the_command_index_writes_what_is_missing_and_no_more(folder):
    expected = {path: path.read_bytes() for path in folder.glob("*.index.jsonl")}
    kept, *missing = sorted(expected)
    for path in missing:
        path.unlink()
    before = kept.stat().st_mtime_ns
    result = CliRunner().invoke(app, ["data", "index", str(folder)])
    assert result.exit_code == 0
    assert "2 indexes written" in result.output
    assert {path: path.read_bytes() for path in folder.glob("*.index.jsonl")} == expected
    assert kept.stat().st_mtime_ns == before


def test_extensions_in_capitals_are_read_as_without_an_index(folder, tmp_path):
    shard = folder / "shard-000000.tar"
    expected = read_index(shard).entries
    with tarfile.open(shard) as tar, tarfile.open(tmp_path / "new.tar", "w") as new:
        for member in tar.getmembers():
            data = tar.extractfile(member)
            stem, _, extension = member.name.rpartition(".")
            member.name = f"{stem}.{extension.upper()}"
            new.addfile(member, data)
    (tmp_path / "new.tar").replace(shard)
    index_path(shard).unlink()
    write_index(shard)
    assert [(each.key, sorted(each.members)) for each in read_index(shard).entries] == [
        (each.key, sorted(each.members)) for each in expected
    ]


def test_a_key_that_comes_twice_in_a_row_cannot_be_indexed(folder, tmp_path):
    shard = folder / "shard-000000.tar"
    with tarfile.open(shard) as tar, tarfile.open(tmp_path / "new.tar", "w") as new:
        for member in [each for each in tar.getmembers()[:2] for _ in range(2)]:
            new.addfile(member, tar.extractfile(member))
    with pytest.raises(DataError, match=r"new\.tar: .* comes twice, or has two files of one kind"):
        make_index(tmp_path / "new.tar")
