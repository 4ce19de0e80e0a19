"""`longvila.media.encode`: the right frame at each time, whatever the source is like, and the same bytes each time."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from longvila.errors import MediaError
from longvila.media import Encoding, decode_frames, encode_video, probe

from .video_fixtures import make_video, read_number


def numbers(data, times):
    return [read_number(frame) for frame in decode_frames(data, times, 96, "film")]


def key_frames(data):
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        return [round(float(packet.pts * packet.time_base), 3) for packet in packets if packet.is_keyframe]


def test_frames_keep_their_times_and_get_key_frames_by_the_second():
    film = make_video(60, fps=10, width=192, height=128, options={"g": "60"})
    found = encode_video(film, Encoding(height=64, key_frames=1.5), "film")
    facts = probe(found, "film")
    assert (facts.width, facts.height, facts.num_frames, facts.codec) == (96, 64, 60, "h264")
    assert facts.duration == pytest.approx(6.0, abs=0.02)
    assert numbers(found, [number / 10 for number in range(60)]) == list(range(60))
    assert key_frames(found) == [0.0, 1.5, 3.0, 4.5]


def test_frames_are_dropped_evenly_and_those_that_stay_keep_their_times():
    film = make_video(60, fps=30)
    found = encode_video(film, Encoding(fps=12), "film")
    facts = probe(found, "film")
    assert facts.num_frames == 24
    shown = numbers(found, [number / 12 + 0.04 for number in range(24)])
    assert shown == [-(-30 * number // 12) for number in range(24)]  # the first frame at or after each twelfth
    assert probe(encode_video(film, Encoding(fps=60), "film"), "film").num_frames == 60


def test_a_varying_rate_stays_as_it_is():
    times = [0, 1, 2, 10, 11, 30, 31, 60]
    found = encode_video(make_video(8, fps=10, times=times), Encoding(), "film")
    assert numbers(found, [time / 10 for time in times]) == list(range(8))
    assert numbers(found, [0.5, 2.5, 5.9]) == [2, 4, 6]
    slow = encode_video(make_video(8, fps=10, times=times), Encoding(fps=1), "film")
    assert numbers(slow, [0, 1.0, 3.0, 6.0]) == [0, 3, 5, 7]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_turned_film_becomes_upright(rotation):
    film = make_video(4, width=192, height=128, rotation=rotation, first_number=9)
    found = encode_video(film, Encoding(), "film")
    facts = probe(found, "film")
    assert facts.rotation == 0
    assert (facts.width, facts.height) == ((192, 128) if rotation == 180 else (128, 192))
    before, after = (decode_frames(data, [0.5], 96, "film").float() for data in (film, found))
    assert (before - after).abs().mean() < 6


def test_odd_sizes_become_even_and_nothing_is_scaled_up():
    facts = probe(encode_video(make_video(4, width=97, height=65), Encoding(height=500), "film"), "film")
    assert (facts.width, facts.height) == (96, 64)


def test_ten_bits_become_eight():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("libx265", rate=10, options={"x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        for number in range(6):
            pixels = np.full((64, 96, 3), 40 * number, dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv420p10le")))
        output.mux(stream.encode(None))
    found = encode_video(file.getvalue(), Encoding(), "film")
    with av.open(io.BytesIO(found)) as container:
        assert container.streams.video[0].pix_fmt == "yuv420p"
    for data in (file.getvalue(), found):
        means = decode_frames(data, [number / 10 for number in range(6)], 32, "film").float().mean((1, 2, 3))
        assert means.tolist() == pytest.approx([0, 40, 80, 120, 160, 200], abs=4)


def test_the_same_film_gives_the_same_bytes_and_its_index_comes_first():
    film = make_video(30, fps=10)
    found = encode_video(film, Encoding(fps=5), "film")
    assert found == encode_video(film, Encoding(fps=5), "film")
    assert found.index(b"moov") < found.index(b"mdat")


def test_frames_are_not_held(monkeypatch):
    from longvila.media import encode

    held = []
    real = encode.decode_packets

    def counting(*args):
        for begins, frame in real(*args):
            held.append(begins)
            yield begins, frame
            held.pop()

    monkeypatch.setattr(encode, "decode_packets", counting)
    most = []
    scale = encode._Picture.of
    monkeypatch.setattr(encode._Picture, "of", lambda self, frame: (most.append(len(held)), scale(self, frame))[1])
    encode_video(make_video(40), Encoding(), "film")
    assert len(most) == 40
    assert max(most) == 1


def test_what_is_no_film_or_damaged_is_said_by_name():
    with pytest.raises(MediaError, match="talk: cannot be read as a video"):
        encode_video(b"not a film", Encoding(), "talk")
    film = bytearray(make_video(60, fps=10, width=320, height=240, options={"g": "10", "bf": "0"}))
    middle = film.index(b"mdat") + 3000
    film[middle : middle + 1500] = bytes(1500)
    with pytest.raises(MediaError, match=r"talk: the frame at \d+\.\d\d s is damaged"):
        encode_video(bytes(film), Encoding(), "talk")
