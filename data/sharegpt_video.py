"""Conversations about videos kept as folders of frames, as ShareGPTVideo publishes them (Zhang et al. 2024).

    longvila pack sharegpt_video -o annotations=train.jsonl -o media=train_300k --out runs/mine/data/sharegpt_video

    {"id": "v_abc-0", "video": "activitynet/v_abc",
     "conversations": [{"from": "human", "value": "<video>\\nDescribe it."}, {"from": "gpt", "value": "A man ..."}]}
    train_300k/activitynet/v_abc/c01_0001.jpeg, c01_0002.jpeg, ...

The frames of a folder, in the order of their names, are encoded as a video of `fps` frames a second: the release does
not say how far apart they were. A record may name a video file as well.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av

from longvila.errors import DataError
from longvila.media.container import open_image
from longvila.shards.conversations import read_records, to_sample
from longvila.shards.sample import IMAGE_EXTENSIONS, BadRecord, SourceSample


def samples(annotations: Path, media: Path, fps: float = 1.0) -> Iterator[SourceSample | BadRecord]:
    """One sample for each record.

    Args:
        annotations: a `.jsonl` of the release, or a `.json` with an array of its records.
        media: the folder that the paths in `video` start from.
        fps: frames per second of video time that a folder of frames is taken to have.

    Raises:
        DataError: no such file or folder, a file that is not of this form, or an `fps` that is not above 0.
    """
    if not media.is_dir():
        raise DataError(f"{media} is not a folder; `media` is where the frames are")
    if not 0 < fps <= 1000:
        raise DataError(f"fps is {fps}; it must be above 0")
    for number, record in enumerate(read_records(annotations), start=1):
        sample = to_sample(record, number, media)
        if isinstance(sample, SourceSample) and isinstance(sample.media, Path) and sample.media_type == "video":
            sample = _with_video(sample, sample.media, fps)
        yield sample


def _with_video(sample: SourceSample, path: Path, fps: float) -> SourceSample | BadRecord:
    """The sample with a video in place of a folder of frames."""
    if not path.is_dir():
        return sample
    frames = sorted(each for each in path.iterdir() if each.suffix[1:].lower() in IMAGE_EXTENSIONS)
    if not frames:
        return BadRecord(sample.key, f"{path} holds no frame; known are {', '.join(IMAGE_EXTENSIONS)}")
    try:
        return dataclasses.replace(sample, media=_encode(frames, fps))
    except (DataError, OSError, ValueError) as error:
        return BadRecord(sample.key, f"a frame of {path} cannot be read ({error})")


def _encode(frames: list[Path], fps: float) -> bytes:
    """H.264 in MP4, the size of the first frame; a key frame every tenth frame, to seek to."""
    file = io.BytesIO()
    rate = Fraction(fps).limit_denominator(1000)
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=rate, options={"g": "10", "crf": "18", "threads": "1"})
        assert isinstance(stream, av.VideoStream)
        for number, path in enumerate(frames):
            with open_image(path, path.name) as image:
                picture = image.convert("RGB")
            if not number:
                stream.width, stream.height = (max(2, side // 2 * 2) for side in picture.size)
                stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_image(picture.resize((stream.width, stream.height)))
            frame.pts, frame.time_base = number, 1 / rate
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()
