"""Films and shards for the data bench: made here, from a seed, so that every machine measures the same."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from longvila.shards import SourceSample, write_shards

SENTENCE = "a camera moves over a wall of many colours and past a door while rain falls on the street"


def make_film(
    seconds: int, seed: int, fps: int = 24, width: int = 640, height: int = 360, key_frames: int = 48
) -> bytes:
    """H.264 in MP4: a camera that moves over a painted wall, with noise; a key frame every `key_frames` frames."""
    rng = np.random.default_rng(seed)
    wall = Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8), "RGB")
    picture = np.asarray(wall.resize((2 * width, 2 * height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-6, 7, (height, width, 3), dtype=np.int16)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=fps, options={"preset": "veryfast", "threads": "1"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size = key_frames
        for number in range(seconds * fps):
            turn = 2 * np.pi * number / (20 * fps)
            x, y = int((1 + np.cos(turn)) * width / 2), int((1 + np.sin(turn)) * height / 2)
            seen = picture[y : y + height, x : x + width] + np.roll(grain, 7 * number, axis=1)
            frame = av.VideoFrame.from_ndarray(seen.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def make_picture(seed: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8), "RGB").resize((width, height))
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=90)
    return file.getvalue()


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(SENTENCE.split(), words))


def film_sample(key: str, media: bytes, answer: str) -> SourceSample:
    question = [{"type": "video"}, {"type": "text", "text": "Describe the video."}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return SourceSample(key, messages, media, "video")


def picture_sample(key: str, media: bytes, answer: str) -> SourceSample:
    question = [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return SourceSample(key, messages, media, "image")


def write_films(folder: Path, count: int, seconds: int, per_shard: int = 4) -> list[bytes]:
    """Shards of films with captions; returns the films in stored order."""
    rng = np.random.default_rng(0)
    films = [make_film(seconds, seed) for seed in range(count)]
    samples = (film_sample(f"film{i:04}", film, sentence(rng, 40)) for i, film in enumerate(films))
    write_shards(samples, folder, max_samples=per_shard)
    return films


def write_pictures(folder: Path, count: int, per_shard: int = 64) -> list[bytes]:
    """Shards of pictures with captions; returns the pictures in stored order."""
    rng = np.random.default_rng(0)
    pictures = [make_picture(seed) for seed in range(count)]
    samples = (picture_sample(f"picture{i:04}", each, sentence(rng, 20)) for i, each in enumerate(pictures))
    write_shards(samples, folder, max_samples=per_shard)
    return pictures


def text_samples(count: int, seed: int = 0) -> Iterator[SourceSample]:
    """Plain texts of 5 to 60 words."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        text = f"{number} {sentence(rng, int(rng.integers(5, 60)))}"
        yield SourceSample(f"text{number:05}", [], None, "text", {"text": text})
