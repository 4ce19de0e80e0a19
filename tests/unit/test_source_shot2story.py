"""The source `shot2story` on a miniature in the release's layout."""

from __future__ import annotations

import json

import pytest

from longvila import content
from longvila.errors import DataError
from longvila.shards import BadRecord, SourceSample, write_shards

from .shards_parts import keys, make_loader, rows_of
from .video_fixtures import make_video, write

RECORDS = [
    {
        "video": "abc.mp4", "image_id": "abc.mp4", "id": 0,
        "whole_caption": " A man opens a door. ", "whole_ASR": "hello",
        "video_names": ["abc_0_4.mp4", "abc_4_8.mp4"], "captions": ["A man.", "A door."],
        "audio_captions": ["", "He says hello."], "ASR": ["", "hello"],
    },
    {"video": "empty.mp4", "id": 1, "whole_caption": "  ", "video_names": ["a.mp4"], "captions": []},
    {"video": "none.mp4", "id": 2},
    {"video": 3, "whole_caption": "x", "video_names": "abc", "captions": "abc"},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "videos/abc.mp4", make_video(8))
    for number in range(2):
        write(tmp_path / f"videos/abc_{4 * number}_{4 * number + 4}.mp4", make_video(4, first_number=4 * number))
    (tmp_path / "train.json").write_text(json.dumps(RECORDS))
    return tmp_path


def samples(folder, **options):
    return list(content.entry("data", "shot2story")(folder / "train.json", folder / "videos", **options))


def test_a_video_is_answered_by_its_whole_caption(folder):
    first, *others = samples(folder)
    assert isinstance(first, SourceSample)
    assert (first.key, first.media, first.media_type) == ("0000001", folder / "videos/abc.mp4", "video")
    assert first.messages[0]["content"][0] == {"type": "video"}
    assert first.messages[1] == {"role": "assistant", "content": "A man opens a door."}
    assert others == [
        BadRecord("0000002", "empty.mp4 has no caption"),
        BadRecord("record-0000003", "is not a record of Shot2Story (KeyError: 'whole_caption')"),
        BadRecord("0000004", "its video and its caption must be text, not 3 and x"),
    ]


def test_shots_come_one_by_one_with_their_own_captions(folder):
    first, second, *others = samples(folder, shots=True)
    assert [first.key, second.key] == ["0000001-0", "0000001-1"]
    assert [sample.media.name for sample in (first, second)] == ["abc_0_4.mp4", "abc_4_8.mp4"]
    assert [sample.messages[1]["content"] for sample in (first, second)] == ["A man.", "A door."]
    assert "ValueError" in others[0].reason  # one name, no caption
    assert "KeyError: 'video_names'" in others[1].reason


def test_the_samples_can_be_packed_and_read(folder, tmp_path):
    assert write_shards(samples(folder, shots=True)[:2], tmp_path / "data").videos == 2
    assert sorted(keys(rows_of(make_loader(tmp_path)))) == ["0000001-0", "0000001-1"]


def test_a_missing_folder_or_file_is_refused(folder, tmp_path):
    read = content.entry("data", "shot2story")
    with pytest.raises(DataError, match="gone is not a folder"):
        list(read(folder / "train.json", tmp_path / "gone"))
    with pytest.raises(DataError, match=r"gone\.json: cannot be read"):
        list(read(tmp_path / "gone.json", folder / "videos"))
