"""`longvila.media.probe`: what a file holds, whatever its header says; and refusals by name."""

from __future__ import annotations

import random

import pytest

from longvila.errors import MediaError
from longvila.media import decode_frames, probe

from .video_fixtures import make_audio, make_image, make_video, write


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"container": "matroska"},
        {"container": "mpegts"},
        {"container": "avi"},
        {"container": "avi", "codec": "mpeg4"},
        {"container": "webm", "codec": "libvpx-vp9"},
        {"container": "webm", "codec": "libvpx", "container_options": {"live": "1"}},
        {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
        {"offset": 20},
        {"offset": 20, "container": "matroska"},
        {"width": 95, "height": 63},
    ],
    ids=str,
)
def test_the_facts_do_not_depend_on_the_container(form):
    info = probe(make_video(num_frames=8, fps=4, **form), "film")
    assert (info.num_frames, info.rotation) == (8, 0)
    assert info.duration == pytest.approx(2.0, abs=0.01)
    assert info.fps == pytest.approx(4.0, abs=0.01)
    assert (info.width, info.height) == (form.get("width", 96), form.get("height", 64))


def test_a_file_and_its_bytes_give_the_same_facts(tmp_path):
    data = make_video()
    assert probe(write(tmp_path / "film.mp4", data), "film") == probe(data, "film")


def test_one_frame_is_a_video():
    info = probe(make_video(num_frames=1), "film")
    assert info.num_frames == 1
    assert info.duration == pytest.approx(0.25)


def test_a_variable_frame_rate_gives_the_mean_rate():
    info = probe(make_video(times=(0, 1, 2, 3, 20, 30, 39), fps=4, container="matroska"), "film")
    assert info.num_frames == 7
    assert info.fps == pytest.approx(7 / info.duration)
    assert info.duration == pytest.approx(10.0, abs=0.5)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_the_rotation_that_players_apply_is_read(rotation):
    assert probe(make_video(rotation=rotation), "film").rotation == rotation


def test_a_file_cut_short_holds_the_frames_before_the_cut():
    whole = make_video(num_frames=200, container_options={"movflags": "faststart"})
    info = probe(whole[: len(whole) * 2 // 3], "film")
    assert 20 < info.num_frames < 190
    assert info.duration == pytest.approx(info.num_frames / 4, abs=1.0)


def test_a_damaged_fragment_ends_the_film_before_it():
    options = {"movflags": "frag_keyframe+empty_moov"}
    data = bytearray(make_video(num_frames=120, options={"g": "20"}, container_options=options))
    sizes = data.rfind(b"trun") + 16  # the table of frame sizes of the last fragment
    data[sizes : sizes + 24] = b"\x7f" * 24
    assert 80 <= probe(bytes(data), "film").num_frames < 120


def test_frames_before_the_first_key_frame_are_not_counted():
    data = make_video(num_frames=80, container="mpegts", options={"g": "20"})
    packets = data[188 * 3 :]
    info = probe(data[: 188 * 3] + packets[len(packets) // 188 // 2 * 188 :], "film")
    assert info.duration == pytest.approx(info.num_frames / 4)
    assert len(decode_frames(data, [k / 4 for k in range(info.num_frames)], 32, "film")) == info.num_frames


@pytest.mark.parametrize(
    "form",
    [
        {"options": {"g": "10"}},
        {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
        {"container": "matroska"},
        {"container": "mpegts"},
        {"container": "flv"},
    ],
    ids=str,
)
def test_random_damage_ends_in_frames_or_in_a_media_error(form):
    whole = make_video(num_frames=60, **form)
    for seed in range(40):
        rng = random.Random(seed)
        start = rng.randrange(100, len(whole) - 50)
        # Bytes are not only changed, but also lost and added.
        damaged = whole[:start] + rng.randbytes(rng.choice([1, 30, 300])) + whole[start + rng.choice([1, 30, 300]) :]
        try:
            info = probe(damaged, "film")
            decode_frames(damaged, [0.0, info.duration / 2], 32, "film")
        except MediaError as error:
            assert str(error).startswith("film: ")  # noqa: PT017 - whether it is refused depends on where it is hit


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (bytes(range(256)) * 40, "cannot be read as a video"),
        (b"<!DOCTYPE html><html><body>404 not found</body></html>" * 20, "cannot be read as a video"),
        (make_video(num_frames=40)[:1500], "cannot be read as a video"),  # its index is at the end, and is missing
        (make_audio(), "no video stream, only audio"),
        (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
            "cannot be read as a video",
        ),
    ],
    ids=["zero bytes", "random bytes", "html", "cut before the index", "audio only", "playlist"],
)
def test_what_is_not_a_video_is_refused_by_name(data, reason, tmp_path):
    for media in (data, write(tmp_path / "film.mp4", data)):
        with pytest.raises(MediaError, match=f"^film.mp4: .*{reason}"):
            probe(media, "film.mp4")


def test_an_unknown_codec_is_refused():
    data = make_video(container="matroska").replace(b"V_MPEG4/ISO/AVC", b"V_NOBODY/KNOWS1")
    with pytest.raises(MediaError, match="film: its video has an unknown codec; re-encode it"):
        probe(data, "film")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(MediaError, match=r"film: no such file: .*gone.mp4"):
        probe(tmp_path / "gone.mp4", "film")


def test_a_cover_picture_is_not_a_video():
    import io

    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output, av.open(io.BytesIO(make_audio())) as sound:
        track = output.add_stream_from_template(sound.streams.audio[0])
        cover = output.add_stream("png", rate=1)
        assert isinstance(cover, av.VideoStream)
        cover.disposition = av.stream.Disposition.attached_pic
        cover.width = cover.height = 96
        cover.pix_fmt = "rgb24"
        with av.open(io.BytesIO(make_image())) as image:
            output.mux(cover.encode(next(image.decode(video=0)).reformat(format="rgb24")))
            output.mux(cover.encode(None))
        for packet in sound.demux(audio=0):
            if packet.dts is not None:
                packet.stream = track
                output.mux(packet)
    with pytest.raises(MediaError, match="no video stream"):
        probe(file.getvalue(), "song.m4a")
