"""`longvila.shards.write`: what goes into the shards, what is left out, and that both are told."""

from __future__ import annotations

import json
import tarfile

import pytest

from longvila.errors import ConfigError, DataError
from longvila.media import probe
from longvila.shards import BadRecord, SourceSample, write_shards

from .shards_parts import all_kinds, conversation, packed, video
from .video_fixtures import make_audio, make_image, make_video, write


def test_a_pack_holds_each_sample_once_and_says_how_many(tmp_path):
    report = write_shards(all_kinds(12, 6, 6), tmp_path / "out", max_samples=5)
    assert (report.samples, report.videos, report.images, report.texts) == (24, 12, 6, 6)
    assert report.shards == [f"shard-{index:06d}.tar" for index in range(5)]
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert index["samples"] == 24
    assert index["bad"] == 0
    assert not (tmp_path / "out/bad.jsonl").exists()


def test_a_sample_is_its_media_and_a_json_with_the_probed_facts(tmp_path):
    sample = video("cat")
    packed(tmp_path / "out", [sample])
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert sorted(members) == ["cat.json", "cat.mp4"]
    assert members["cat.mp4"] == sample.media
    content = json.loads(members["cat.json"])
    assert content["messages"] == sample.messages
    assert content["metadata"] == {"number": 0}
    assert content["media"] == probe(sample.media, "cat").__dict__


def test_media_keep_their_own_extension(tmp_path):
    film = write(tmp_path / "a.MKV", make_video(container="matroska"))
    pictures = [SourceSample(f, conversation("", "image"), make_image(format=f), "image") for f in ("JPEG", "PNG")]
    packed(tmp_path / "out", [SourceSample("film", conversation(""), film, "video"), *pictures])
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        names = tar.getnames()
    assert [name for name in names if not name.endswith("json")] == ["film.mkv", "JPEG.jpeg", "PNG.png"]


def test_packing_again_gives_the_same_bytes(tmp_path):
    samples = list(all_kinds(4, 2, 2))
    first, second = packed(tmp_path / "a", samples), packed(tmp_path / "b", samples)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_what_cannot_be_used_is_left_out_counted_and_listed_by_key(tmp_path):
    wrong_place = [{"role": "user", "content": "no place for the film"}]
    bad = {
        "empty": (SourceSample("empty", conversation(""), b"", "video"), "empty"),
        "sound": (SourceSample("sound", conversation(""), make_audio(), "video"), "only audio"),
        "gone": (SourceSample("gone", conversation(""), tmp_path / "gone.mp4", "video"), "gone.mp4: No such file"),
        "html": (SourceSample("html", conversation("", "image"), b"<html>", "image"), "cannot be read as an image"),
        "a.b": (SourceSample("a.b", conversation(""), make_video(), "video"), "without dots"),
        "blind": (SourceSample("blind", wrong_place, make_video(), "video"), "must mark the place of one video"),
        "bare": (SourceSample("bare", conversation(""), None, "video"), "without its media"),
        "mute": (SourceSample("mute", [], None, "text"), "neither messages nor"),
        "form": (SourceSample("form", [{"text": "hello"}], None, "text"), "a message must be"),
        "refused": (BadRecord("refused", "the source said so"), "the source said so"),
    }
    report = write_shards([video("good"), *(sample for sample, _ in bad.values())], tmp_path / "out")
    assert report.samples == 1
    listed = [json.loads(line) for line in (tmp_path / "out/bad.jsonl").read_text().splitlines()]
    assert [line["key"] for line in listed] == list(bad)
    for line in listed:
        assert bad[line["key"]][1] in line["reason"]
    assert json.loads((tmp_path / "out/index.json").read_text())["bad"] == len(bad)


def test_a_key_that_comes_twice_is_told(tmp_path):
    report = write_shards([video("a"), video("a")], tmp_path / "out")
    assert report.samples == 1
    assert report.bad == {"a": "key 'a' comes twice"}


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    packed(tmp_path / "out", [video("a")])
    with pytest.raises(ConfigError, match="out is not empty"):
        write_shards([video("b")], tmp_path / "out")


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    with pytest.raises(DataError, match=r"nothing to pack: 1 samples, none usable \(a: a: the file is empty"):
        write_shards([SourceSample("a", conversation(""), b"", "video")], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_pack_leaves_no_folder_and_can_be_repeated(tmp_path):
    def interrupted():
        yield video("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert write_shards([video("b")], tmp_path / "out").samples == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
