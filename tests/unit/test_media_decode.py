"""`longvila.media.decode`: the right frame for each moment, in every container, with and without seeking."""

from __future__ import annotations

import io
import struct

import av
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from longvila.errors import MediaError
from longvila.media import FrameMemory, decode, decode_frames, decode_image, probe

from .video_fixtures import make_image, make_video, number_picture, read_number, write

FORMS = [
    {},
    {"container": "matroska"},
    {"container": "mpegts"},
    {"container": "avi"},
    {"container": "flv"},
    {"container": "webm", "codec": "libvpx"},
    {"container": "webm", "codec": "libvpx", "container_options": {"live": "1"}},
    {"offset": 50},
    {"offset": 50, "container": "matroska"},
    {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    {"extra": {"x264-params": "open-gop=1:keyint=20:bframes=3"}},
]


def numbers(media, timestamps, size=48):
    return [read_number(frame) for frame in decode_frames(media, timestamps, size, "film")]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_moment_gets_the_frame_shown_then(form):
    form = dict(form)
    data = make_video(num_frames=240, fps=4, options={"g": "20", **form.pop("extra", {})}, **form)
    for times in (
        [k / 4 for k in range(0, 240, 3)],
        [k * 5.0 for k in range(12)],  # each on a key frame
        [k * 7.3 for k in range(8)],
        [7.25, 55.5, 55.75, 59.0],
        [59.75],
        [4.99],
    ):
        assert numbers(data, times) == [int(time * 4) for time in times]


def test_distant_frames_are_reached_by_seeking_and_near_ones_are_not(monkeypatch):
    seeks = []
    seek = decode._Reader._seek
    monkeypatch.setattr(decode._Reader, "_seek", lambda self, time: (seeks.append(time), seek(self, time)))
    data = make_video(num_frames=240, fps=4, options={"g": "20"})
    numbers(data, [0.0, 0.5, 1.0, 1.5])
    assert not seeks
    numbers(data, [0.0, 52.0])
    assert len(seeks) == 1


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libx265", "mp4", {"x265-params": "keyint=20:log-level=none"}),
        ("libvpx-vp9", "webm", {"g": "20"}),
        ("libsvtav1", "mp4", {"g": "20", "preset": "12", "svtav1-params": "fast-decode=0"}),
    ],
)
def test_newer_codecs_give_the_same_frames_with_and_without_jumps(codec, container, options):
    data = make_video(num_frames=120, fps=20, width=192, height=128, codec=codec, container=container, options=options)
    assert probe(data, "film").num_frames == 120
    assert numbers(data, [number / 20 for number in range(120)], 96) == list(range(120))
    assert numbers(data, [0.0, 3.05, 3.1, 5.95], 96) == [0, 61, 62, 119]
    jumped = decode_frames(data, [5.5], 96, "film")
    walked = decode_frames(data, [number / 20 for number in range(111)], 96, "film")[110:]
    assert torch.equal(jumped, walked)


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "avi"])
def test_a_jump_lands_on_the_last_key_frame_before_its_time(monkeypatch, container):
    """Frames that are decoded ahead of being presented (B-frames) must not send it one key frame further back."""
    data = make_video(num_frames=200, fps=20, container=container, options={"g": "20"})
    decoded = []
    real = decode.decode_packets

    def counting(*args):
        for each in real(*args):
            decoded.append(each)
            yield each

    monkeypatch.setattr(decode, "decode_packets", counting)
    for times, needed in [([5.0], 1), ([5.45], 10), ([5.95], 20), ([1.0, 5.0, 5.4, 9.0], 12)]:
        decoded.clear()
        assert numbers(data, times) == [int(time * 20 + 0.01) for time in times]
        assert len(decoded) <= needed + 4 * (len(times) + 1), times  # two frames to begin with, two a jump, and ends


def test_times_may_come_in_any_order_and_repeat():
    assert numbers(make_video(num_frames=40), [9.0, 0.0, 5.25, 5.25, 5.3]) == [36, 0, 21, 21, 21]


def test_a_variable_frame_rate_shows_each_frame_until_the_next():
    data = make_video(times=(0, 1, 2, 3, 20, 30, 39), fps=4)
    assert numbers(data, [0.0, 0.6, 4.9, 5.0, 7.4, 7.5, 9.75]) == [0, 2, 3, 4, 4, 5, 6]


def test_thirds_of_a_second_are_found_in_containers_that_count_milliseconds():
    data = make_video(num_frames=30, fps=3, container="matroska")
    assert numbers(data, [k / 3 for k in range(30)]) == list(range(30))


def test_frames_are_square_rgb_whatever_the_shape_of_the_video():
    frames = decode_frames(make_video(width=95, height=63), [0.0, 1.0], 32, "film")
    assert frames.shape == (2, 3, 32, 32)
    assert frames.dtype == torch.uint8
    assert frames.permute(0, 2, 3, 1).is_contiguous()
    red, green, blue = frames[0, :, 29, 16].tolist()
    assert red > 180
    assert max(green, blue) < 70


def test_the_pixels_are_those_that_were_encoded():
    data = make_video(num_frames=4, width=96, height=96, options={"crf": "5"})
    wanted = torch.from_numpy(number_picture(3, 96, 96)).permute(2, 0, 1).float()
    assert (decode_frames(data, [0.75], 96, "film")[0].float() - wanted).abs().mean() < 4


@pytest.mark.parametrize(("rotation", "red"), [(0, (44, 24)), (90, (24, 44)), (180, (4, 24)), (270, (24, 4))])
def test_frames_stand_upright(rotation, red):
    frame = decode_frames(make_video(width=128, height=64, rotation=rotation), [0.0], 48, "film")[0]
    assert frame[0, red[0], red[1]] > 180  # the red bar, stored at the bottom, turned counter-clockwise
    sides = [(44, 24), (24, 44), (4, 24), (24, 4)]
    assert all(frame[0, y, x] < 70 for y, x in sides if (y, x) != red)


def test_no_moments_give_no_frames():
    assert decode_frames(make_video(), [], 32, "film").shape == (0, 3, 32, 32)


def test_a_moment_past_the_end_is_refused():
    data = make_video(num_frames=8, fps=4)
    assert numbers(data, [2.5]) == [7]
    with pytest.raises(MediaError, match=r"film: no frame at 60.00 s, its last frame begins at 1.75 s"):
        decode_frames(data, [0.0, 60.0], 32, "film")


def test_a_file_cut_short_gives_the_frames_before_the_cut_and_refuses_the_others():
    whole = make_video(num_frames=200, options={"g": "20"}, container_options={"movflags": "faststart"})
    cut = whole[: len(whole) * 2 // 3]
    info = probe(cut, "film")
    num_whole = info.num_frames - 4  # frames that refer to one another; the cut goes through the last of them
    assert numbers(cut, [k / 4 for k in range(num_whole)]) == list(range(num_whole))
    with pytest.raises(MediaError, match=r"film: (no frame at|the frame at) 49.00 s"):
        decode_frames(cut, [49.0], 32, "film")


@pytest.mark.parametrize("form", [{}, {"container": "avi", "codec": "mpeg4"}], ids=str)
def test_a_frame_the_decoder_patched_up_is_refused_and_so_are_those_predicted_from_it(form):
    data = make_video(num_frames=60, options={"g": "20", "bf": "0", "sc_threshold": "0"}, **form)
    with av.open(io.BytesIO(data)) as film:
        packets = [bytes(packet) for packet in film.demux(video=0) if packet.size]
    start = data.index(packets[25])
    middle, end = start + len(packets[25]) // 3, start + len(packets[25])
    damaged = data[:middle] + b"\xa5" * (end - middle) + data[end:]
    assert [k for k in range(60) if _decodes(damaged, k / 4)] == [*range(25), *range(40, 60)]


def test_a_damaged_frame_is_refused_and_the_others_are_not():
    data = bytearray(make_video(num_frames=80, codec="libvpx", container="webm", options={"g": "10"}))
    middle = data.find(b"\x9d\x01\x2a", len(data) // 2)  # the start code of a VP8 key frame
    data[middle : middle + 3] = bytes(3)
    frames = [k for k in range(80) if _decodes(bytes(data), k / 4)]
    assert 40 < len(frames) < 80
    assert numbers(bytes(data), [k / 4 for k in frames]) == frames


def _decodes(data, time):
    try:
        decode_frames(data, [time], 32, "film")
    except MediaError as error:
        return "is damaged" not in str(error)
    return True


def test_an_image_is_squashed_to_a_square(tmp_path):
    for data in (make_image(5), make_image(5, format="JPEG"), write(tmp_path / "a.png", make_image(5))):
        frame = decode_image(data, 48, "picture")
        assert frame.shape == (3, 48, 48)
        assert frame.dtype == torch.uint8
        assert read_number(frame) == 5


UNKNOWN_PIXELS = b"DDS " + struct.pack("<19I", 124, 0x1007, 32, 32, *[0] * 15) + bytes(48)


@pytest.mark.parametrize(
    "data", [b"", b"<html>", make_image()[:200], make_image(format="JPEG")[:700], UNKNOWN_PIXELS], ids=range(5)
)
def test_a_broken_image_is_refused_by_name(data):
    with pytest.raises(MediaError, match="picture: cannot be read as an image"):
        decode_image(data, 48, "picture")


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_an_image_is_turned_as_its_orientation_says(mode):
    upright = Image.fromarray(number_picture(5, 96, 64)).convert(mode)
    file, turned, exif = io.BytesIO(), upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be shown turned clockwise by a quarter
    turned.save(file, format="PNG", exif=exif)
    plain = io.BytesIO()
    upright.save(plain, format="PNG")
    assert torch.equal(decode_image(file.getvalue(), 48, "turned"), decode_image(plain.getvalue(), 48, "upright"))
    assert read_number(decode_image(file.getvalue(), 48, "turned")) == 5


def exif(*tags):
    """(tag, type, count, four bytes) of each."""
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def oriented(orientation, *tags, **options):
    file = io.BytesIO()
    picture = Image.fromarray(number_picture(5, 96, 64))
    picture.save(file, "JPEG", exif=exif((0x0112, 3, 1, struct.pack("<HH", orientation, 0)), *tags), **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation):
    data = oriented(orientation)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).resize((48, 48), Image.Resampling.BICUBIC)
    found = decode_image(data, 48, "picture").permute(1, 2, 0)
    assert found.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "tag",
    [
        (282, 2, 3, b"72\0\0"),  # a resolution in letters
        (296, 4, 1, struct.pack("<I", 100_000)),  # a unit of more than two bytes
        (256, 9, 1, struct.pack("<i", -1)),  # a width below 0
    ],
    ids=str,
)
def test_a_turned_image_with_a_tag_that_is_not_of_its_type_is_read(tag):
    assert torch.equal(decode_image(oriented(6, tag), 48, "odd"), decode_image(oriented(6), 48, "plain"))


def test_memory_of_frames_is_used_again_when_no_tensor_uses_it():
    memory = FrameMemory(8)
    first = memory.take(3)
    assert first.shape == (3, 3, 8, 8)
    place, part = first.data_ptr(), first[1:]
    del first
    second = memory.take(2)
    assert second.data_ptr() != place
    del part
    assert memory.take(2).data_ptr() == place
    assert memory.take(4).shape == (4, 3, 8, 8)
