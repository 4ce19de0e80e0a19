"""`longvila.shards.write`: what goes into the shards, what is left out, and that both are told."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from dataclasses import replace

import pytest

from longvila.errors import ConfigError, DataError
from longvila.media import Encoding, probe
from longvila.shards import BadRecord, SourceSample, write_shards
from longvila.shards import write as writing

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
        "torn": (SourceSample("torn", [], None, "text", {"text": "a cat \ud83d"}), "half of a surrogate pair"),
        "name \udcff": (BadRecord("name \udcff", "no name of a file in UTF-8"), "no name of a file"),
    }
    report = write_shards([video("good"), *(sample for sample, _ in bad.values())], tmp_path / "out")
    assert report.samples == 1
    listed = [json.loads(line) for line in (tmp_path / "out/bad.jsonl").read_text().splitlines()]
    assert [line["key"] for line in listed] == list(bad)
    for line in listed:
        assert bad[line["key"]][1] in line["reason"]
    assert json.loads((tmp_path / "out/index.json").read_text())["bad"] == len(bad)


def test_a_sample_that_comes_again_under_another_key_is_left_out_and_told(tmp_path):
    film = video("first")
    other_words = [{**film.messages[0]}, {**film.messages[1], "content": "another answer"}]
    samples = [
        film,
        replace(film, key="again", metadata={"id": 7}),
        replace(film, key="asked-otherwise", messages=other_words),
        replace(video("other-film", number=32), messages=film.messages),
        SourceSample("text", [], None, "text", {"text": "one"}),
        SourceSample("same-text", [], None, "text", {"text": "one", "id": 8}),
        SourceSample("other-text", [], None, "text", {"text": "two"}),
    ]
    report = write_shards(samples, tmp_path / "out")
    assert report.samples == 5
    assert report.bad == {
        "again": "is the same as first: equal media and conversation",
        "same-text": "is the same as text: equal media and conversation",
    }


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


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def with_bad_ones():
    """Twenty-four good samples, with repeats, keys that come twice, and two that cannot be used."""
    samples = list(all_kinds())
    for number, sample in enumerate(samples):
        yield sample
        if number == 5:
            yield replace(sample, key="repeat")
            yield SourceSample("sound", conversation(""), make_audio(), "video")
        if number == 17:
            yield BadRecord("told", "the source said so")
            yield sample
    yield replace(samples[0], key="late-repeat")
    yield samples[1]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_processes_change_nothing_in_what_is_written(tmp_path, workers):
    samples = list(with_bad_ones())
    write_shards(samples, tmp_path / "alone", max_samples=5)
    write_shards(samples, tmp_path / "many", max_samples=5, workers=workers)
    assert contents(tmp_path / "many") == contents(tmp_path / "alone")
    assert len(contents(tmp_path / "alone")["bad.jsonl"].splitlines()) == 6


def ended(samples, after):
    for number, sample in enumerate(samples):
        if number == after:
            raise KeyboardInterrupt
        yield sample


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_pack_goes_on_after_its_last_finished_shard(tmp_path, monkeypatch, workers):
    samples = list(with_bad_ones())
    write_shards(samples, tmp_path / "whole", max_samples=5)
    prepared = []
    real = writing._prepare
    if not workers:
        monkeypatch.setattr(writing, "_prepare", lambda item, *rest: (prepared.append(item.key), real(item, *rest))[1])
    for after in (3, 12, 12, 27):
        with pytest.raises(KeyboardInterrupt):
            write_shards(ended(samples, after), tmp_path / "out", max_samples=5, workers=workers)
        assert not (tmp_path / "out").exists()
    prepared.clear()
    write_shards(samples, tmp_path / "out", max_samples=5, workers=workers)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    if not workers:
        assert len(prepared) <= 12  # of 30: four shards of five were finished


def test_a_killed_pack_goes_on_too(tmp_path):
    samples = list(with_bad_ones())
    write_shards(samples, tmp_path / "whole", max_samples=5)

    def die_in_the_third_shard():
        for number, sample in enumerate(samples):
            if number == 14:
                os.kill(os.getpid(), signal.SIGKILL)
            yield sample

    child = os.fork()
    if not child:
        write_shards(die_in_the_third_shard(), tmp_path / "out", max_samples=5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    finished = sorted(path.name for path in (tmp_path / "out.partial").glob("*.index.jsonl"))
    assert finished == ["shard-000000.index.jsonl", "shard-000001.index.jsonl"]
    progress = tmp_path / "out.partial" / "progress.jsonl"
    assert "shard-000000" not in progress.read_text().splitlines()[-1], "lines must not grow with the shards before"
    progress.write_bytes(progress.read_bytes() + b'{"shard": "shard-0000')  # it was being written
    write_shards(samples, tmp_path / "out", max_samples=5)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_interrupted_pack_of_other_arguments_or_samples_is_not_gone_on_with(tmp_path):
    samples = list(all_kinds())
    with pytest.raises(KeyboardInterrupt):
        write_shards(ended(samples, 12), tmp_path / "out", max_samples=5, origin="folder=a")
    with pytest.raises(ConfigError, match=r"other arguments \(max_samples was 5, is 4\); delete it"):
        write_shards(samples, tmp_path / "out", max_samples=4, origin="folder=a")
    with pytest.raises(ConfigError, match=r"other arguments \(origin was 'folder=a', is 'folder=b'\)"):
        write_shards(samples, tmp_path / "out", max_samples=5, origin="folder=b")
    with pytest.raises(ConfigError, match=r"encoding was 'None', is 'Encoding\(height=32"):
        write_shards(samples, tmp_path / "out", max_samples=5, origin="folder=a", encoding=Encoding(32))
    with pytest.raises(
        ConfigError, match=r"the source yields other samples than before .*shard-000000.tar was written"
    ):
        write_shards(samples[1:], tmp_path / "out", max_samples=5, origin="folder=a")


def test_a_medium_that_hangs_or_kills_its_process_costs_one_sample(tmp_path, monkeypatch):
    fifo = tmp_path / "film.mp4"
    os.mkfifo(fifo)  # reading it waits for a writer
    monkeypatch.setattr(writing, "TIMEOUT", 5.0)
    samples = [video("a"), SourceSample("hangs", conversation(""), fifo, "video"), video("b", number=16)]
    report = write_shards(samples, tmp_path / "out", workers=1)
    assert report.samples == 2
    assert report.bad == {"hangs": "hangs: decoding took longer than 5 s"}


def test_videos_are_encoded_where_that_is_asked_and_images_are_not(tmp_path):
    film, image = video("film", 12), SourceSample("image", conversation("", "image"), make_image(7), "image")
    write_shards([film, image], tmp_path / "out", encoding=Encoding(height=32, fps=0.5))
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    facts = json.loads(members["film.json"])["media"]
    assert (facts["height"], facts["num_frames"]) == (32, 6)
    assert probe(members["film.mp4"], "film").__dict__ == facts
    assert members["image.png"] == image.media
