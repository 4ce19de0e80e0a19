"""Turns a script into pictures and into an H.264 file: film frames, scenery, and what happens over them."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable

import av
import numpy as np
from PIL import Image

from .backdrops import SIZE, Backdrop
from .draw import draw_needle, draw_number, draw_object, draw_scenery, fade
from .script import Needle, Number, Script

KEYFRAME_INTERVAL = 16  # frames: a reader that wants few of them seeks, and decodes 15 for nothing at worst


def draw_frame(script: Script, backdrop: np.ndarray, time: float) -> np.ndarray:
    """What is seen at `time` seconds over one film frame: uint8 (SIZE, SIZE, 3), a new array."""
    frame = fade(backdrop)
    if script.place is not None:
        draw_scenery(frame, script.place)
    for event in script.events:
        if not event.start <= time < event.end:
            continue
        what = event.what
        if isinstance(what, Needle):
            draw_needle(frame, what.content, what.centre, what.size)
        elif isinstance(what, Number):
            draw_number(frame, what.value, what.centre, what.size)
        else:
            draw_object(frame, what.colour, what.shape, what.centre(event.progress(time)), what.size)
    return frame


def make_film(script: Script, backdrop: Backdrop, rng: random.Random) -> bytes:
    """The script over real film, as an mp4 at `frame_rate(script)` frames a second."""
    fps = frame_rate(script)
    shots = backdrop.shots(rng, script.seconds * fps, fps)
    return encode((draw_frame(script, shot, k / fps) for k, shot in enumerate(shots)), fps)


def frame_rate(script: Script) -> int:
    """4 frames a second in short films, 2 in longer ones."""
    return 4 if script.seconds <= 20 else 2


def encode(frames: Iterable[np.ndarray], fps: int) -> bytes:
    """An mp4 (H.264, 4:2:0) of uint8 (SIZE, SIZE, 3) frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"preset": "ultrafast", "crf": "27", "x264-params": "threads=1:scenecut=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = KEYFRAME_INTERVAL
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def picture(frame: np.ndarray, kind: str) -> bytes:
    """The frame as an image file, `kind` "JPEG" or "PNG"."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return buffer.getvalue()
