"""Makes tiny real media files for the tests, with the frame number readable from the pixels."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

NUM_BITS = 12


def number_picture(number: int, width: int, height: int) -> np.ndarray:
    """uint8 (height, width, 3): the frame's number as NUM_BITS black or white columns, lowest bit on the left.

    The bottom quarter is red, so that a rotation can be told.
    """
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    for bit in range(NUM_BITS):
        if number >> bit & 1:
            picture[:, bit * width // NUM_BITS : (bit + 1) * width // NUM_BITS] = 255
    picture[height * 3 // 4 :] = (220, 30, 30)
    return picture


def read_number(frame: torch.Tensor) -> int:
    """Inverse of `number_picture` for one decoded frame (3, S, S)."""
    size = frame.shape[-1]
    row = frame[:, size // 8 : size // 2].float().mean(dim=(0, 1))
    return sum(1 << bit for bit in range(NUM_BITS) if row[int((bit + 0.5) * size / NUM_BITS)] > 127)


def make_video(
    num_frames: int = 8,
    fps: int = 4,
    width: int = 96,
    height: int = 64,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    first_number: int = 0,
    offset: int = 0,
) -> bytes:
    """Encodes frames numbered from `first_number`.

    Args:
        times: presentation time of each frame in units of 1/fps seconds, for a variable frame rate.
        rotation: counter-clockwise degrees that players are told to turn the picture.
        offset: start of the first frame, in units of 1/fps seconds.
    """
    file = Path(tempfile.mkdtemp()) / f"film.{container}"  # some muxers read back what they wrote
    with av.open(str(file), "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=fps, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p" if width % 2 == 0 and height % 2 == 0 else "yuv444p"
        stream.codec_context.time_base = Fraction(1, fps)
        if rotation:
            stream.set_display_rotation(rotation)
        for position, time in enumerate(times if times is not None else range(num_frames)):
            picture = number_picture(first_number + position, width, height)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = offset + time
            frame.time_base = Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    # SVT-AV1, run as root, leaves its caller at real-time priority: ranks forked from it would starve all else.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    data = file.read_bytes()
    shutil.rmtree(file.parent)
    return data


def make_audio(seconds: int = 1) -> bytes:
    """An mp4 with a sound track and no picture."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        assert isinstance(stream, av.AudioStream)
        for start in range(0, seconds * 8000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def make_image(number: int = 5, size: int = 96, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(number_picture(number, size, size)).save(file, format=format)
    return file.getvalue()


def make_mosaic(columns: int, rows: int, format: str = "PNG", side: int = 96) -> bytes:
    """A picture of `columns` x `rows` pictures, numbered from 1 row by row."""
    cells = [
        [number_picture(1 + row * columns + column, side, side) for column in range(columns)] for row in range(rows)
    ]
    file = io.BytesIO()
    Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in cells])).save(file, format=format)
    return file.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
