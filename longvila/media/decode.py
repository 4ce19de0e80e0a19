"""Video bytes to small square RGB frames at given moments.

Frames are addressed by time, never by index: indices mean different things when frame rates vary or edit lists exist.
The frame at time t is the last one that begins at or before t. Each wanted frame is resized to (size, size), as
SigLIP's preprocessing does without keeping its shape, inside the decode loop: a film in full size never sits in memory.

Between two wanted frames the decoder runs on, unless the file's index has a key frame at least `SEEK_GAIN` seconds
ahead from which the wanted frame can be reached: then it jumps there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import ExifTags, Image

from longvila.errors import MediaError
from longvila.media.container import (
    LAST_FRAME_SECONDS,
    Media,
    decode_packets,
    open_image,
    open_video,
    read_packets,
    ticks_per_second,
)
from longvila.media.tiles import WHOLE, Tile

SEEK_GAIN = 0.5
"""Seconds of video that a jump must save: after one, the decoder has to fill its reordering queue again."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its orientation (EXIF 2.3, tag 0x0112)."""


def decode_frames(
    media: Media, timestamps: Sequence[float], size: int, name: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Decodes the frames shown at `timestamps` (seconds of video time, in any order).

    Args:
        out: where they go, uint8 (len(timestamps), 3, size, size); `empty_frames` without.

    Returns:
        `out`: RGB, turned upright by the file's rotation.

    Raises:
        MediaError: naming `name`: not a readable video, a wanted frame is damaged, or a time lies past the end.
    """
    out = empty_frames(len(timestamps), size) if out is None else out
    if len(timestamps):
        pixels = out.permute(0, 2, 3, 1).numpy()
        order = sorted(range(len(timestamps)), key=timestamps.__getitem__)
        with open_video(media, name) as (container, stream):
            picture = _Picture(size)
            frames = _frames_at(container, stream, [timestamps[i] for i in order], name)
            for position, frame in zip(order, frames, strict=True):
                pixels[position] = picture.of(frame)
    return out


def decode_tiles(
    media: Media, tiles: Sequence[Tile], size: int, name: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Decodes pieces of a still image (any format Pillow reads), each resized to (size, size).

    Args:
        out: where they go, uint8 (len(tiles), 3, size, size); `empty_frames` without.

    Returns:
        `out`: RGB, upright.

    Raises:
        MediaError: naming `name`, when the data are not an image or are cut short.
    """
    out = empty_frames(len(tiles), size) if out is None else out
    pixels = out.permute(0, 2, 3, 1).numpy()
    with open_image(media, name) as image:
        colours = _upright(image)
        for number, tile in enumerate(tiles):
            box = tile.box(*colours.size)
            pixels[number] = colours.resize((size, size), Image.Resampling.BICUBIC, box)
    return out


def decode_image(media: Media, size: int, name: str) -> torch.Tensor:
    """A still image in one piece, uint8 (3, size, size); see `decode_tiles`."""
    return decode_tiles(media, (WHOLE,), size, name)[0]


def empty_frames(count: int, size: int) -> torch.Tensor:
    """Room for frames, uint8 (count, 3, size, size), a pixel's channels side by side as decoders leave them."""
    return torch.from_numpy(np.empty((count, size, size, 3), dtype=np.uint8)).permute(0, 3, 1, 2)


class FrameMemory:
    """Room for one set of frames after another, in the memory of those that are gone.

    A page that the system has yet to find and clear costs up to as much as writing the pixels.
    """

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self._free: list[np.ndarray] = []

    def take(self, count: int) -> torch.Tensor:
        """As `empty_frames`; the memory comes back when no tensor uses it any more."""
        memory = self._free.pop() if self._free else None
        if memory is None or len(memory) < count:
            memory = np.empty((count, self.image_size, self.image_size, 3), dtype=np.uint8)
        frames = memory[:count]
        weakref.finalize(frames, self._free.append, memory).atexit = False
        return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _upright(image: Image.Image) -> Image.Image:
    """The image in RGB, turned by its orientation.

    `ImageOps.exif_transpose` would also write its EXIF data anew, which fails where a tag is not of the type it says.
    """
    image.load()  # first: that turns a TIFF, and takes its orientation away
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    upright = image if turn is None else image.transpose(turn)
    return upright if upright.mode == "RGB" else upright.convert("RGB")  # which would copy what is RGB already


class _Picture:
    """Turns a decoded frame into an upright RGB array (size, size, 3); the last one is kept for repeats."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reformatter = VideoReformatter()  # keeps its conversion tables between frames
        self.frame: VideoFrame | None = None
        self.pixels = np.empty(0)

    def of(self, frame: VideoFrame) -> np.ndarray:
        if frame is not self.frame:
            small = self.reformatter.reformat(
                frame, self.size, self.size, "rgb24", interpolation=Interpolation.BICUBIC, threads=1
            )
            # A square may be turned after resizing. Rotation is counter-clockwise, as in numpy.
            self.pixels = np.rot90(small.to_ndarray(), frame.rotation // 90)
            self.frame = frame
        return self.pixels


def _frames_at(
    container: InputContainer, stream: VideoStream, timestamps: list[float], name: str
) -> Iterator[VideoFrame]:
    """The frame shown at each of the rising `timestamps`."""
    reader = _Reader(container, stream, name)
    for timestamp in timestamps:
        # Half a millisecond of grace: Matroska stores 2/3 s as 0.667, and asking for 2/3 s must find that frame.
        target = reader.start + int((timestamp + 0.0005) * reader.second)
        reader.advance(target)
        begins, frame = reader.current
        # Damage lasts until the next key frame: frames in between are predicted from damaged ones.
        if any(reader.key <= time <= target for time in reader.damaged):
            raise MediaError(f"{name}: the frame at {timestamp:.2f} s is damaged")
        if reader.following is None and target > begins + max(frame.duration, LAST_FRAME_SECONDS * reader.second):
            last = (begins - reader.start) / reader.second
            raise MediaError(f"{name}: no frame at {timestamp:.2f} s, its last frame begins at {last:.2f} s")
        yield frame


class _Reader:
    """Walks forward through a stream, holding the frame at the current time and the one that follows it.

    Frames come with the time they begin; times are whole ticks of the stream, `second` of them to a second.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, name: str) -> None:
        self.container = container
        self.stream = stream
        self.second = ticks_per_second(stream)
        self.damaged: list[int] = []
        """Times of the damaged frames met so far."""
        self.delay: int | None = None
        """By how much the first key frame is presented after it is decoded. Indexes count in either time."""
        if "matroska" in container.format.name:
            container.seek(0)  # its index is only read at the first seek
        self.frames = self._decode()
        first = next(self.frames, None)
        if first is None:
            raise MediaError(f"{name}: no frame with a timestamp can be decoded")
        self.start = self.key = first[0]
        self.current = first
        self.following = next(self.frames, None)

    def _decode(self) -> Iterator[tuple[int, VideoFrame]]:
        return decode_packets(self._packets(), self.container, self.damaged)

    def _packets(self) -> Iterator[Packet[VideoStream]]:
        for packet in read_packets(self.container, self.stream):
            if self.delay is None and packet.pts is not None and packet.dts is not None:
                self.delay = packet.pts - packet.dts
            yield packet

    def advance(self, target: int) -> None:
        """Moves until `current` is the last frame that begins at or before `target`."""
        if self.following is not None and self.following[0] <= target:
            self._jump(target)
        while self.following is not None and self.following[0] <= target:
            self._show(self.following)
            self.following = next(self.frames, None)

    def _show(self, shown: tuple[int, VideoFrame]) -> None:
        self.current = shown
        if shown[1].key_frame:
            self.key = shown[0]

    def _jump(self, target: int) -> None:
        """Seeks to the last key frame from which `target` can be reached, where that saves decoding."""
        worth = self.current[0] + SEEK_GAIN * self.second
        index = self.stream.index_entries
        # MP4's index holds decoding times, and is sought in by presentation times, which are later.
        delay = self.delay or 0 if "mp4" in self.container.format.name else 0
        limit = target - delay
        while (entry := index.search_timestamp(limit)) >= 0 and index[entry].timestamp + delay > worth:
            self._seek(index[entry].timestamp + delay)
            if self.start <= self.current[0] <= target:
                return
            # The index may hold decoding times all the same: this jump landed past the target.
            limit = index[entry].timestamp - 1
        if limit != target - delay:
            self._seek(self.start)

    def _seek(self, timestamp: int) -> None:
        self.container.seek(timestamp, stream=self.stream)
        self.frames = self._decode()
        self._show(next(self.frames, self.current))
        self.following = next(self.frames, None)
