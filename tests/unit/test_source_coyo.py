"""The source `coyo` on a miniature in img2dataset's layout."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from longvila import content
from longvila.errors import DataError
from longvila.shards import BadRecord, write_shards

from .shards_parts import keys, make_loader, rows_of
from .video_fixtures import make_image


def samples(folder, **options):
    return list(content.entry("data", "coyo")(folder, **options))


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def pair(key: str, number: int, text: str, **facts) -> dict[str, bytes]:
    facts = {"key": key, "url": "https://example.com/a.jpg", "status": "success", "caption": text, **facts}
    image = make_image(number, format="JPEG")
    return {f"{key}.jpg": image, f"{key}.txt": text.encode(), f"{key}.json": json.dumps(facts).encode()}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "coyo"
    folder.mkdir()
    first = pair("000000000", 1, "a cat\n", clip_similarity_vitb32=0.31)
    second = pair("000000001", 2, "ein Hund à Paris", clip_similarity_vitb32=0.2)
    write_tar(folder / "00000.tar", first | second)
    write_tar(folder / "00001.tar", pair("000010000", 3, "a bus", clip_similarity_vitb32=0.4))
    (folder / "00000_stats.json").write_text("{}")
    (folder / "00000.parquet").write_bytes(b"PAR1")
    return folder


def test_each_image_is_answered_by_its_text(folder):
    first, second, third = samples(folder)
    assert [first.key, second.key, third.key] == ["00000-000000000", "00000-000000001", "00001-000010000"]
    assert first.media == make_image(1, format="JPEG")
    assert first.messages[0] == {"role": "user", "content": [{"type": "image"}]}
    answers = [sample.messages[1]["content"] for sample in (first, second, third)]
    assert answers == ["a cat", "ein Hund à Paris", "a bus"]
    assert first.metadata["source"]["url"] == "https://example.com/a.jpg"


def test_the_samples_can_be_packed_and_read(folder, tmp_path):
    assert write_shards(samples(folder), tmp_path / "data").images == 3
    assert len(keys(rows_of(make_loader(tmp_path)))) == 3


def test_pairs_below_a_similarity_are_left_out_and_told(folder):
    kept, told, also_kept = samples(folder, min_similarity=0.3)
    assert (kept.key, also_kept.key) == ("00000-000000000", "00001-000010000")
    assert told == BadRecord("00000-000000001", "its clip_similarity_vitb32 of 0.2 is below 0.3")


def test_a_similarity_that_was_not_downloaded_is_told(folder):
    write_tar(folder / "00002.tar", pair("000020000", 4, "a tree"))
    assert "has no clip_similarity_vitb32" in samples(folder, min_similarity=0.1)[-1].reason


@pytest.mark.parametrize(
    ("member", "data", "reason"),
    [
        ("1.txt", b" \n", "its image has no text"),
        ("1.txt", b"\xff\xfe", "cannot be read"),
        ("1.json", b"{", "cannot be read"),
        ("1.jpg", None, "has no image, only json, txt"),
    ],
)
def test_what_is_not_a_pair_is_told_by_key(folder, member, data, reason):
    members = pair("1", 4, "a tree") | {member: data}
    write_tar(folder / "00002.tar", {name: data for name, data in members.items() if data is not None})
    last = samples(folder)[-1]
    assert last.key == "00002-1"
    assert reason in last.reason


def test_a_tar_that_is_cut_is_told_and_the_rest_is_read(folder):
    with (folder / "00000.tar").open("r+b") as stream:
        stream.truncate(2048)
    found = samples(folder)
    assert [sample.key for sample in found if isinstance(sample, BadRecord)] == ["00000.tar"]
    assert found[-1].key == "00001-000010000"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda tar, second: tar[:second] + b"\xff" * 512 + tar[second + 512 :], "has a damaged header at byte"),
        (lambda tar, second: tar[:second], "is cut short at byte"),
    ],
)
def test_a_tar_that_ends_early_without_an_error_is_told(folder, spoil, told):
    path = folder / "00000.tar"
    with tarfile.open(path) as tar:
        second = tar.getmembers()[3].offset  # of the second image
    path.write_bytes(spoil(path.read_bytes(), second))
    first, bad, third = samples(folder)
    assert (first.key, third.key) == ("00000-000000000", "00001-000010000")
    assert bad == BadRecord("00000.tar", f"the tar {told} {second}, and what lies behind it is lost; download it again")


def test_a_folder_without_tars_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.tar; download with img2dataset"):
        samples(tmp_path)
