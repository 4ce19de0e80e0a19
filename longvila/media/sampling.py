"""Which moments of a video the model sees. Pure arithmetic on the probed facts: no file is opened."""

from __future__ import annotations

import math

from longvila.config import FrameSampling
from longvila.media.probe import VideoInfo


def sample_timestamps(info: VideoInfo | None, sampling: FrameSampling) -> tuple[float, ...]:
    """Seconds of video time of the frames to decode, rising; at least one, never more than the video has frames.

    `fps` mode takes 0, 1/fps, 2/fps, ... to the last frame. `uniform` mode, and `fps` mode past its cap, cuts the video
    into equal parts and takes the middle of each. `info` None stands for a still image: (0.0,).
    """
    if info is None:
        return (0.0,)
    limit = max(1, min(sampling.frames, info.num_frames))
    if sampling.mode == "fps":
        # The last frame begins one frame before the end; half a frame of tolerance absorbs rounded durations.
        num_steps = max(1, math.ceil((info.duration - 0.5 / info.fps) * sampling.fps))
        if num_steps <= limit:
            return tuple(step / sampling.fps for step in range(num_steps))
    return tuple((part + 0.5) * info.duration / limit for part in range(limit))
