"""Video to H.264 in MP4, as training likes to read it: small, upright, in 8 bits, and with key frames to seek to."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from longvila.errors import MediaError
from longvila.media.container import Media, decode_packets, open_video, read_packets, ticks_per_second

QUALITY = "20"
"""x264's constant rate factor."""


@dataclass(frozen=True)
class Encoding:
    """What a video becomes."""

    height: int | None = None
    """Lines at most; None keeps them. Never scaled up, and the aspect is kept."""
    fps: float | None = None
    """Frames per second at most; None keeps them all. Frames are dropped, those that stay keep their times."""
    key_frames: float = 2.0
    """Seconds from one key frame to the next."""


def encode_video(media: Media, encoding: Encoding, name: str) -> bytes:
    """Encodes the first video stream of `media` again, without sound. The same input gives the same bytes.

    One frame is in memory at a time; the result is written to a temporary file before it is returned.

    Raises:
        MediaError: naming `name`: it cannot be read as a video, or a frame of it is damaged.
    """
    with tempfile.TemporaryDirectory() as folder, open_video(media, name) as (source, stream):
        path = Path(folder) / "film.mp4"
        second = ticks_per_second(stream)
        with av.open(str(path), "w", options={"movflags": "+faststart"}) as output:
            # Key frames are asked for one by one, by time: an interval in frames means nothing at a varying rate.
            options = {"preset": "veryfast", "crf": QUALITY, "threads": "1", "g": "1000000", "sc_threshold": "0"}
            target = output.add_stream("libx264", rate=stream.average_rate or 25, options=options)
            assert isinstance(target, av.VideoStream)
            base = stream.time_base
            target.codec_context.time_base = base  # pyright: ignore
            picture, start, due, key = _Picture(encoding.height), None, 0.0, 0.0
            damaged: list[int] = []
            for begins, frame in decode_packets(read_packets(source, stream), source, damaged):
                start = begins if start is None else start
                time = (begins - start) / second
                if damaged:
                    raise MediaError(f"{name}: the frame at {max(0.0, (damaged[0] - start) / second):.2f} s is damaged")
                if encoding.fps and time < due - 0.0005:
                    continue
                while encoding.fps and due <= time + 0.0005:
                    due += 1 / encoding.fps
                small = picture.of(frame)
                if target.width != small.width or target.height != small.height:
                    if target.codec_context.is_open:
                        raise MediaError(f"{name}: its pictures change in size at {time:.2f} s; encode it beforehand")
                    target.width, target.height, target.pix_fmt = small.width, small.height, "yuv420p"
                small.pts, small.time_base = begins - start, base
                small.pict_type = PictureType.NONE
                if time >= key - 0.0005:
                    small.pict_type = PictureType.I
                    key = time + encoding.key_frames
                output.mux(target.encode(small))
            if start is None:
                raise MediaError(f"{name}: no frame with a timestamp can be decoded")
            output.mux(target.encode(None))
        return path.read_bytes()


class _Picture:
    """Frames made upright, at most `height` lines high, of even sizes, in 8-bit 4:2:0."""

    def __init__(self, height: int | None) -> None:
        self.height = height
        self.reformatter = VideoReformatter()

    def of(self, frame: VideoFrame) -> VideoFrame:
        turns = frame.rotation // 90 % 4
        width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
        scale = min(1.0, self.height / height) if self.height else 1.0
        width, height = _even(width * scale), _even(height * scale)
        if not turns:
            return self._scale(frame, width, height, "yuv420p")
        before = (height, width) if turns % 2 else (width, height)
        pixels: Any = np.rot90(self._scale(frame, *before, "rgb24").to_ndarray(), turns)
        return self._scale(VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24"), width, height, "yuv420p")

    def _scale(self, frame: VideoFrame, width: int, height: int, form: str) -> VideoFrame:
        return self.reformatter.reformat(frame, width, height, form, interpolation=Interpolation.BICUBIC, threads=1)


def _even(size: float) -> int:
    return max(2, 2 * round(size / 2))
