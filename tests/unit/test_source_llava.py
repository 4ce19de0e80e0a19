"""`data/llava.py`: LLaVA's conversation JSON with images, videos, or neither."""

from __future__ import annotations

import json

import pytest

from longvila import content
from longvila.errors import DataError
from longvila.shards import BadRecord, write_shards

from .video_fixtures import make_image, make_video, write


def turns(question):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "A bus."}]


@pytest.fixture
def media(tmp_path):
    write(tmp_path / "media/coco/1.jpg", make_image(format="JPEG"))
    write(tmp_path / "media/coco/2.jpg", make_image(7, format="JPEG"))
    write(tmp_path / "media/clips/2.mp4", make_video(num_frames=3))
    return tmp_path / "media"


RECORDS = [
    {"id": "000000033471", "image": "coco/1.jpg", "conversations": turns("<image>\nWhat is it?")},
    {"id": "2", "video": "clips/2.mp4", "data_source": "x", "conversations": turns("<image>\nWhat is it?")},
    {"id": "3", "conversations": turns("What is a bus?")},
    {"id": "4", "image": ["coco/1.jpg", "clips/../coco/2.jpg"], "conversations": turns("<image> or <image>")},
    {"id": "5", "conversations": turns("<image> Which?")},
]


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_images_videos_and_texts_are_read(media, tmp_path, name):
    lines = json.dumps(RECORDS) if name.endswith("json") else "\n".join(map(json.dumps, RECORDS))
    path = write(tmp_path / name, lines.encode())
    image, video, text, two, placeless = content.entry("data", "llava")(path, media)
    assert (image.key, image.media_type, image.media) == ("000000033471-0000001", "image", media / "coco/1.jpg")
    assert image.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
    ]
    # Published video sets write <image> where the video goes.
    assert (video.media_type, video.messages[0]["content"][0]) == ("video", {"type": "video"})
    assert video.metadata == {"id": "2", "data_source": "x"}
    assert (text.media_type, text.media) == ("text", None)
    assert (two.media_type, two.media) == ("image", [media / "coco/1.jpg", media / "clips/../coco/2.jpg"])
    assert two.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]
    assert placeless == BadRecord("5-0000005", "marks a place for media and names no file ('video' or 'image')")
    report = write_shards([image, video, text, two, placeless], tmp_path / "out")
    assert (report.images, report.videos, report.texts, len(report.bad)) == (3, 1, 1, 1)


def test_files_of_another_form_are_refused_by_name(media, tmp_path):
    read = content.entry("data", "llava")
    with pytest.raises(DataError, match=r"gone.json: cannot be read"):
        list(read(tmp_path / "gone.json", media))
    with pytest.raises(DataError, match=r"broken.json: is not JSON .* JSON lines need the name .jsonl"):
        list(read(write(tmp_path / "broken.json", b'{"a": 1}\n{"a": 2}'), media))
    with pytest.raises(DataError, match=r"object.json: must hold a JSON array of records, not dict"):
        list(read(write(tmp_path / "object.json", b"{}"), media))
    with pytest.raises(DataError, match="nowhere is not a folder"):
        list(read(write(tmp_path / "a.json", b"[]"), tmp_path / "nowhere"))
