"""`data/folder.py`: a folder of videos and a file of conversations."""

from __future__ import annotations

import json

import pytest

from longvila import content
from longvila.errors import DataError
from longvila.shards import BadRecord, SourceSample, write_shards

from .video_fixtures import make_video, write

TURNS = [{"role": "user", "content": "What happens?"}, {"role": "assistant", "content": "A cat jumps."}]
PLACE = {"type": "video"}


def text(words):
    return {"type": "text", "text": words}


def samples(folder, records, **options):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    write(folder / "conversations.jsonl", "\n".join(lines).encode())
    return list(content.entry("data", "folder")(folder, **options))


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a.mp4", "deep/b.mp4")):
        write(tmp_path / "films" / name, make_video(num_frames=3, first_number=number))
    return tmp_path / "films"


def test_each_line_becomes_a_sample_of_its_video(folder):
    records = [{"video": "a.mp4", "messages": TURNS, "topic": "cats"}, {"video": "deep/b.mp4", "messages": TURNS}]
    first, second = samples(folder, records)
    assert (first.key, second.key) == ("a-0000001", "b-0000002")
    assert (first.media, second.media) == (folder / "a.mp4", folder / "deep/b.mp4")
    assert first.metadata == {"topic": "cats"}
    assert first.messages == [
        {"role": "user", "content": [PLACE, text("What happens?")]},
        {"role": "assistant", "content": [text("A cat jumps.")]},
    ]


def test_both_forms_of_conversation_mean_the_same(folder):
    llava = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "A cat jumps."}]
    marked = [{"role": "user", "content": [PLACE, text("What happens?")]}, TURNS[1]]
    records = [{"video": "a.mp4", "messages": TURNS}, {"video": "a.mp4", "conversations": llava}]
    found = samples(folder, [*records, {"video": "deep/b.mp4", "messages": marked}])
    assert found[0].messages == found[1].messages == found[2].messages


def test_the_frames_stand_where_the_conversation_says(folder):
    turns = [{"role": "user", "content": "Look: <video> What happens?"}, TURNS[1]]
    sample = samples(folder, [{"video": "a.mp4", "messages": turns}])[0]
    assert sample.messages[0]["content"] == [text("Look:"), PLACE, text("What happens?")]


def test_a_line_ends_at_a_line_feed_and_at_nothing_else(folder):
    turns = [TURNS[0], {"role": "assistant", "content": "one\u2028two\x85three"}]
    line = json.dumps({"video": "a.mp4", "messages": turns}, ensure_ascii=False)
    first, second, _ = samples(folder, [line + "\r", line])
    assert first.messages == second.messages
    assert first.messages[1]["content"] == [text("one\u2028two\x85three")]


def test_the_samples_can_be_packed(folder, tmp_path):
    records = [{"video": "a.mp4", "messages": TURNS}, {"video": "deep/b.mp4", "messages": TURNS}]
    assert write_shards(samples(folder, records), tmp_path / "out").videos == 2


def test_a_video_that_no_line_names_is_told(folder):
    *_, last = samples(folder, [{"video": "a.mp4", "messages": TURNS}])
    assert last == BadRecord("deep/b.mp4", "no usable line of conversations.jsonl uses it")


def test_every_video_of_a_line_that_names_several_is_used(folder):
    found = samples(folder, [{"video": ["a.mp4", "deep/b.mp4"], "messages": TURNS}])
    assert [sample.files for sample in found] == [(folder / "a.mp4", folder / "deep/b.mp4")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{not json", "is not a JSON object: {not json"),
        ([1], r"is not a JSON object: \[1\]"),
        ({"video": "a.mp4"}, "has no conversation"),
        ({"video": "a.mp4", "messages": []}, "has no conversation"),
        ({"video": "a.mp4", "messages": TURNS[:1]}, "has no answer"),
        ({"video": "a.mp4", "messages": TURNS[1:]}, "has no user turn to show its video in"),
        ({"video": "a.mp4", "messages": [{"role": "robot", "content": "x"}]}, "has the role 'robot'; known are human"),
        ({"video": "a.mp4", "messages": ["hello"]}, "has the role None"),
        ({"video": "a.mp4", "messages": [{"role": "user"}, TURNS[1]]}, "a turn has no text"),
        ({"video": "a.mp4", "messages": [{"role": "user", "content": "<video> <video>"}, TURNS[1]]}, "marks 2 places"),
        ({"video": "a.mp4", "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "neither text, video nor"),
        ({"video": ["a.mp4", 8], "messages": TURNS}, "its media must be a path or a list of paths, not 8"),
        ({"video": 7, "messages": TURNS}, "its media must be a path or a list of paths, not 7"),
        (
            {"video": ["a.mp4", "a.mp4"], "messages": [{"role": "user", "content": "<video>"}, TURNS[1]]},
            "marks 1 places for its 2 video",
        ),
        (
            {
                "video": "a.mp4",
                "image": "a.jpg",
                "messages": [{"role": "user", "content": "<video> <video>"}, TURNS[1]],
            },
            "marks 2 places for its 1 video and 0 places for its 1 image",
        ),
    ],
)
def test_a_line_that_is_no_conversation_is_told(folder, record, reason):
    bad, *_ = samples(folder, [record])
    assert isinstance(bad, BadRecord)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(bad.reason)


def test_a_missing_video_is_left_to_the_pack_to_list(folder, tmp_path):
    records = [{"video": "a.mp4", "messages": TURNS}, {"video": "gone.mp4", "messages": TURNS}]
    report = write_shards(samples(folder, records), tmp_path / "out")
    assert report.samples == 1
    assert "gone.mp4: No such file" in report.bad["gone-0000002"]


def test_folders_that_cannot_be_a_source_are_refused(tmp_path):
    read = content.entry("data", "folder")
    with pytest.raises(DataError, match="nowhere is not a folder"):
        list(read(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no video; known extensions: mp4"):
        list(read(tmp_path))
    write(tmp_path / "a.mp4", b"x")
    with pytest.raises(DataError, match=r"conversations.jsonl does not exist; write one JSON object a line"):
        list(read(tmp_path))


def test_keys_are_fit_for_a_shard_whatever_the_names(folder):
    write(folder / "día 1.part/ü.x.mp4", make_video(num_frames=2))
    sample, *_ = samples(folder, [{"video": "día 1.part/ü.x.mp4", "messages": TURNS}])
    assert isinstance(sample, SourceSample)
    assert sample.key == "ü_x-0000001"
