"""The source `sharegpt_video` on a miniature in the release's layout: folders of frames."""

from __future__ import annotations

import json
import zlib

import pytest

from longvila import content
from longvila.errors import DataError
from longvila.media import decode_frames, probe
from longvila.shards import BadRecord, write_shards

from .shards_parts import make_loader, rows_of
from .video_fixtures import make_image, make_video, read_number, write


def record(key, video):
    turns = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]
    return {"id": key, "video": video, "conversations": turns}


def broken_png():
    """Its pixels are in two chunks, and the second has no name: Pillow finds out while it reads them."""
    picture = make_image(1, format="PNG")
    start = picture.index(b"IDAT") - 4
    length = int.from_bytes(picture[start : start + 4], "big")
    pixels = picture[start + 8 : start + 8 + length]
    parts = []
    for name, part in ((b"IDAT", pixels[: length // 2]), (bytes(4), pixels[length // 2 :])):
        parts.append(len(part).to_bytes(4, "big") + name + part + zlib.crc32(name + part).to_bytes(4, "big"))
    return picture[:start] + b"".join(parts) + picture[start + 12 + length :]


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        name = f"frames/activitynet/v_abc/c01_{number + 1:04}.jpeg"
        write(tmp_path / name, make_image(100 + number, format="JPEG"))
    write(tmp_path / "frames/activitynet/v_abc/readme.txt", b"no frame")
    (tmp_path / "frames/empty").mkdir()
    write(tmp_path / "frames/broken/c01_0001.png", broken_png())
    write(tmp_path / "frames/film.mp4", make_video(4))
    records = [
        record("v_abc-0", "activitynet/v_abc"), record("film", "film.mp4"), record("empty", "empty"),
        record("broken", "broken"), record("gone", "gone"), {"id": "none"},
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def samples(folder, **options):
    return list(content.entry("data", "sharegpt_video")(folder / "train.jsonl", folder / "frames", **options))


@pytest.mark.parametrize("fps", [1.0, 0.5, 29.97])
def test_a_folder_of_frames_becomes_a_video_in_the_order_of_their_names(folder, fps):
    first, *_ = samples(folder, fps=fps)
    assert (first.key, first.media_type) == ("v_abc-0-0000001", "video")
    facts = probe(first.media, "film")
    assert facts.num_frames == 12
    assert facts.fps == pytest.approx(fps, rel=0.01)
    frames = decode_frames(first.media, [number / fps for number in range(12)], 96, "film")
    assert [read_number(frame) for frame in frames] == list(range(100, 112))
    assert first.messages[1]["content"] == [{"type": "text", "text": "A bus."}]


def test_the_same_frames_give_the_same_bytes(folder):
    assert samples(folder)[0].media == samples(folder)[0].media


def test_files_stay_files_and_what_holds_no_frame_is_told(folder):
    _, film, empty, broken, gone, none = samples(folder)
    assert film.media == folder / "frames/film.mp4"
    assert isinstance(empty, BadRecord)
    assert "empty holds no frame" in empty.reason
    assert "a frame of" in broken.reason
    assert gone.media == folder / "frames/gone"  # which the pack finds missing
    assert isinstance(none, BadRecord)
    report = write_shards(samples(folder), folder / "data")
    assert (report.videos, len(report.bad)) == (2, 4)


def test_the_samples_can_be_read(folder):
    write_shards(samples(folder)[:1], folder / "data")
    (row,) = rows_of(make_loader(folder, row_tokens=50))
    assert [read_number(frame) for frame in row.frames] == list(range(100, 112))


def test_a_missing_folder_or_a_rate_of_nothing_is_refused(folder):
    read = content.entry("data", "sharegpt_video")
    with pytest.raises(DataError, match="gone is not a folder"):
        list(read(folder / "train.jsonl", folder / "gone"))
    with pytest.raises(DataError, match="fps is 0"):
        samples(folder, fps=0.0)
