"""Samples of several videos and images: packed, indexed, read, shared out, shortened, and damaged in one medium."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longvila.config import FrameSampling
from longvila.errors import ConfigError, DataError
from longvila.media import read_subtitles
from longvila.shards import BadRecord, SourceSample, document, write_shards
from longvila.shards.check import check_shards
from longvila.shards.conversations import to_sample
from longvila.shards.index import read_index
from longvila.shards.sample import Medium, Sample, split_name

from .shards_parts import (
    FRAME,
    FRAME_TOKENS,
    conversation,
    encode,
    keys,
    make_loader,
    rewrite,
    rows_of,
    video,
    without_indexes,
)
from .video_fixtures import make_image, make_mosaic, make_video, read_number


def mixed(key="mixed", first=3, last=4):
    """A film from number 0, a picture, and a film from number 100."""
    content = [
        {"type": "video"}, {"type": "text", "text": "then"}, {"type": "image"}, {"type": "text", "text": "or"},
        {"type": "video"},
    ]  # fmt: skip
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "the last"}]
    media = [make_video(first, fps=1), make_image(2000), make_video(last, fps=1, first_number=100)]
    return SourceSample(key, messages, media, "mixed")


def pictures(key="pictures", count=4):
    content = [{"type": "image"}] * count
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "all of them"}]
    return SourceSample(key, messages, [make_image(3000 + number) for number in range(count)], "image")


@pytest.fixture
def folder(tmp_path):
    report = write_shards([mixed(), pictures(), video("plain", 4, 500)], tmp_path / "data")
    assert (report.samples, report.videos, report.images) == (3, 3, 5)
    return tmp_path


NUMBERS = {
    "mixed": [0, 1, 2, 2000, 100, 101, 102, 103],
    "pictures": [3000, 3001, 3002, 3003],
    "plain": [500, 501, 502, 503],
}


def test_members_are_numbered_and_keys_stay_whole():
    assert split_name("film.part.media12.jpg") == ("film.part", "media12.jpg")
    assert split_name("film.part.mp4") == ("film.part", "mp4")
    assert split_name("film.mediaX.mp4") == ("film.mediaX", "mp4")
    assert split_name("plain") == (None, None)


def test_the_index_lists_every_medium(folder):
    index = read_index(folder / "data" / "shard-000000.tar")
    assert index is not None
    entry = index.entries[0]
    assert set(entry.members) == {"json", "media0.mp4", "media1.png", "media2.mp4"}
    first, picture, last = entry.media
    assert (first.num_frames, picture, last.num_frames) == (3, None, 4)
    assert check_shards(folder / "data").faults == []


@pytest.mark.parametrize("indexed", [True, False])
def test_frames_come_in_the_order_of_their_places(folder, indexed):
    if not indexed:
        without_indexes(folder / "data")
    rows = rows_of(make_loader(folder, row_tokens=60))
    assert sorted(keys(rows)) == sorted(NUMBERS)
    for row in rows:
        frames = iter(row.frames)
        for key, num_frames in zip(row.keys, row.num_frames, strict=True):
            assert [read_number(next(frames)) for _ in range(num_frames)] == NUMBERS[key]
        assert (row.input_ids == FRAME).sum() == FRAME_TOKENS * len(row.frames)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_the_frames_of_all_media(folder, ranks):
    whole = rows_of(make_loader(folder, row_tokens=60))
    shares = [
        rows_of(make_loader(folder, row_tokens=60, sequence_rank=rank, num_sequence_ranks=ranks))
        for rank in range(ranks)
    ]
    for row, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([part.frames for part in parts]), row.frames)


def test_the_longest_videos_lose_frames_first(tmp_path):
    write_shards([mixed(first=3, last=20)], tmp_path / "data")
    loader = make_loader(tmp_path, row_tokens=34)  # 4 words, and 10 frames of 3 tokens
    (row,) = rows_of(loader)
    numbers = [read_number(frame) for frame in row.frames]
    assert numbers[:4] == [0, 1, 2, 2000]
    assert numbers[4:] == [101, 105, 108, 111, 115, 118]
    assert loader.bad.shortened == 1


@pytest.mark.parametrize(
    ("row_tokens", "reason"), [(12, "its text has 4 tokens and 3 frames 9, more than a row of 12")]
)
def test_what_does_not_fit_with_a_frame_each_is_refused(tmp_path, row_tokens, reason):
    write_shards([mixed()], tmp_path / "data")
    loader = make_loader(tmp_path, row_tokens=row_tokens)
    assert rows_of(loader) == []
    assert loader.bad.listed == {"mixed": reason}
    (row,) = rows_of(make_loader(tmp_path, row_tokens=13))
    assert len(row.frames) == 3


def test_one_damaged_medium_drops_its_sample_alone(folder):
    shard = folder / "data" / "shard-000000.tar"
    entry = read_index(shard).entries[0]
    offset, size = entry.members["media2.mp4"]
    data = bytearray(shard.read_bytes())
    data[offset : offset + size] = bytes(size)
    shard.write_bytes(data)
    rows = rows_of(make_loader(folder, row_tokens=60))
    assert {row.keys[document] for row in rows for document, _ in row.failed} == {"mixed"}
    assert any("mixed" in where for where, _ in check_shards(folder / "data").faults)


def test_a_pack_says_which_medium_it_cannot_use(tmp_path):
    broken = mixed("broken")
    broken.media[1] = b"no picture"
    short = mixed("short")
    del short.media[2]
    plain = mixed("plain")
    report = write_shards([broken, short, plain], tmp_path / "data")
    assert report.samples == 1
    assert "cannot be read as an image" in report.bad["broken"]
    assert "must mark the place of 2 media (video or image)" in report.bad["short"]


def test_records_name_several_media(tmp_path):
    turns = [{"from": "human", "value": "<image> <video> and <image>"}, {"from": "gpt", "value": "yes"}]
    found = to_sample({"image": ["a.jpg", "b.jpg"], "video": "c.mp4", "conversations": turns}, 1, tmp_path)
    assert isinstance(found, SourceSample)
    assert found.media_type == "mixed"
    assert found.media == [tmp_path / "a.jpg", tmp_path / "c.mp4", tmp_path / "b.jpg"]
    unmarked = [{"from": "human", "value": "which?"}, {"from": "gpt", "value": "yes"}]
    found = to_sample({"video": ["c.mp4", "d.mp4"], "conversations": unmarked}, 1, tmp_path)
    assert found.media == [tmp_path / "c.mp4", tmp_path / "d.mp4"]
    assert [part["type"] for part in found.messages[0]["content"]] == ["video", "video", "text"]


SRT = """\ufeff1\r
00:00:01,500 --> 00:00:03,000\r
<i>A cat</i>\r
jumps.\r
\r
2\r
00:00:04,000 --> 00:00:05,000\r
\r
3\r
00:00:59,970 --> 00:01:01,000\r
It rolls.\r
 \r
4\r
01:02:03,004 --> 01:02:05,000 X1:0\r
It sleeps."""
VTT = """WEBVTT

00:01.5 --> 00:03.000
A cat jumps.

00:04.000 --> 00:05.000

00:05.000 --> 00:06.000
00:59.970 --> 01:01.000
It rolls.

1:02:03.004 --> 1:02:05.000
It sleeps.
"""


def test_media_may_be_named_in_the_plural():
    turns = [{"role": "user", "content": "<video><image>?"}, {"role": "assistant", "content": "yes"}]
    found = to_sample({"videos": ["a.mp4"], "images": ["b.jpg"], "messages": turns}, 1, Path("root"))
    assert (found.media_type, found.files) == ("mixed", (Path("root/a.mp4"), Path("root/b.jpg")))
    assert found.metadata == {}
    both = to_sample({"video": "a.mp4", "videos": ["c.mp4"], "messages": turns}, 1, Path("root"))
    assert "has both 'video' and 'videos'" in both.reason


@pytest.mark.parametrize(("name", "text"), [("a.srt", SRT), ("a.vtt", VTT)])
def test_subtitles_stand_behind_their_video_with_their_times(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    turns = [{"from": "human", "value": "See <video> and say"}, {"from": "gpt", "value": "yes"}]
    found = to_sample({"video": "c.mp4", "subtitles": name, "conversations": turns}, 1, tmp_path)
    assert [part.get("text", part["type"]) for part in found.messages[0]["content"]] == [
        "See", "video",
        "This video's subtitles are listed below:\n[00:01.5] A cat jumps.\n[01:00.0] It rolls.\n[62:03.0] It sleeps.",
        "and say",
    ]  # fmt: skip
    assert found.metadata == {"subtitles": name}
    assert [(each.begin, each.end) for each in read_subtitles(tmp_path / name)] == [
        (1.5, 3.0), (59.97, 61.0), (3723.004, 3725.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\u3000元気です\n", "元気です"),
        ("元気\n\u3000です\n", "元気 \u3000です"),
        ("\u00a0Yes\n", "Yes"),
        ("press A --> B\nnow\n", "press A --> B now"),
        ("one\ntwo\n \nno more\n", "one two"),
    ],
)
def test_lines_of_subtitles_end_where_one_is_blank_and_not_before(tmp_path, text, line):
    path = tmp_path / "a.srt"
    for newline in ("\n", "\r\n", "\r\r\n", "\r"):
        times = "1\n00:00:01,000 --> 00:00:02,000\n", "\n2\n00:00:03,000 --> 00:00:04,000\nLast\n"
        path.write_bytes(text.join(times).replace("\n", newline).encode())
        assert [each.line for each in read_subtitles(path)] == [line, "Last"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"video": "c.mp4", "subtitles": "gone.srt"}, "gone.srt: No such file"),
        ({"video": "c.mp4", "subtitles": "empty.srt"}, "empty.srt holds no subtitle"),
        ({"video": ["c.mp4", "d.mp4"], "subtitles": "empty.srt"}, "one path for its one video, not empty.srt for 2"),
        ({"image": "c.jpg", "subtitles": "empty.srt"}, "one path for its one video, not empty.srt for 0"),
        ({"video": "c.mp4", "subtitles": 3}, "one path for its one video, not 3 for 1"),
    ],
)
def test_subtitles_that_cannot_be_used_are_told(tmp_path, record, reason):
    (tmp_path / "empty.srt").write_text("no times here")
    turns = [{"from": "human", "value": "say"}, {"from": "gpt", "value": "yes"}]
    found = to_sample({**record, "conversations": turns}, 1, tmp_path)
    assert isinstance(found, BadRecord)
    assert reason in found.reason


def test_media_that_are_not_numbered_are_refused(folder):
    from longvila.shards.sample import from_members

    with pytest.raises(DataError, match=r"has 2 media files that are not numbered: jpg, mp4"):
        from_members("k", {"jpg": b"", "mp4": b"", "json": b"{}"})


def album(key="album"):
    """A film, and two pictures of 3 x 2 and 2 x 1 parts."""
    content = [{"type": kind} for kind in ("video", "image", "image")]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "seen"}]
    media = [make_video(4, fps=1, first_number=100), make_mosaic(3, 2), make_mosaic(2, 1)]
    return SourceSample(key, messages, media, "mixed")


FILM, WIDE, LOW = [100, 101, 102, 103], [None, 1, 2, 3, 4, 5, 6], [None, 1, 2]
TILES = FrameSampling("fps", 99, 1.0, tiles=6)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize(("frames", "expected"), [
    (14, FILM + WIDE + LOW),
    (10, [*FILM, None, None, None, *LOW]),  # two tiles at most; in those of the first picture numbers are cut
    (6, [*FILM, None, None]),  # tiles go before frames
    (5, [100, 102, 103, None, None]),
])  # fmt: skip
@pytest.mark.parametrize("spare", [0, 2])
def test_pictures_lose_their_tiles_before_films_lose_frames(tmp_path, indexed, frames, spare, expected):
    write_shards([album()], tmp_path / "data")
    if not indexed:
        without_indexes(tmp_path / "data")
    loader = make_loader(tmp_path, frames=TILES, row_tokens=1 + FRAME_TOKENS * frames + spare)
    (row,) = rows_of(loader)
    assert len(row.frames) == len(expected)
    found = [None if each is None else read_number(frame) for frame, each in zip(row.frames, expected, strict=True)]
    assert found == expected
    assert (row.input_ids == FRAME).sum() == FRAME_TOKENS * len(expected)
    assert loader.bad.shortened == (len(expected) < 14)


def test_an_images_header_is_read_once_however_often_fewer_tiles_are_tried(monkeypatch):
    opened = []
    monkeypatch.setattr(document, "image_extent", lambda *args: opened.append(args) or (288, 192))
    media = (Medium("image", b"", None),) * 2
    sample = Sample("two", [{"role": "user", "content": [{"type": "image"}] * 2}, *conversation("seen")[1:]], media)
    ((made,), shortened) = document.make_documents(sample, encode, TILES, 48, 1 + 2 * FRAME_TOKENS)
    assert (made.num_frames, shortened, len(opened)) == (2, True, 2)


def test_ranks_share_the_tiles_of_one_picture(tmp_path):
    write_shards([album()], tmp_path / "data")
    options = {"frames": TILES, "row_tokens": 99}
    parts = [
        rows_of(make_loader(tmp_path, sequence_rank=rank, num_sequence_ranks=3, **options))[0].frames
        for rank in range(3)
    ]
    (whole,) = rows_of(make_loader(tmp_path, **options))
    assert [len(part) for part in parts] == [4, 5, 5]
    assert torch.equal(torch.cat(parts), whole.frames)


def test_lengths_are_taken_anew_for_other_tiles(tmp_path):
    write_shards([album()], tmp_path / "data")
    counts = [
        rows_of(make_loader(tmp_path, frames=replace(TILES, tiles=most), row_tokens=99))[0].num_frames
        for most in (1, 2, 6, 1)
    ]
    assert counts == [(6,), (10,), (14,), (6,)]


def test_a_picture_whose_size_cannot_be_read_is_a_bad_sample(tmp_path):
    write_shards([album(), video("plain", 4, 500)], tmp_path / "data")
    rewrite(
        tmp_path / "data" / "shard-000000.tar",
        lambda name, data: (name, b"?" * len(data) if name.endswith("png") else data),
    )
    loader = make_loader(tmp_path, frames=TILES, max_bad_share=1.0)
    assert keys(rows_of(loader)) == ["plain"]
    assert "cannot be read as an image" in loader.bad.listed["album"]


def test_less_than_one_tile_is_refused(folder):
    with pytest.raises(ConfigError, match=r"data\.frames\.tiles is 0"):
        make_loader(folder, frames=replace(TILES, tiles=0))
