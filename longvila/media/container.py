"""Opens a video or an image for reading, the same way for probing and for decoding.

Video time is counted from the first frame that is presented: 0 seconds is that frame, whatever the file calls it.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from longvila.errors import MediaError

LAST_FRAME_SECONDS = 1.0
"""How long the last frame stands, at most, where the file does not say."""


@dataclass(frozen=True)
class FileRange:
    """A file inside a file: `size` bytes of `path` from `offset` on, as a member lies in a tar. Nothing is copied."""

    path: Path
    offset: int
    size: int

    def open(self) -> BinaryIO:
        """A stream over the range alone. Raises OSError as opening the file does."""
        return io.BufferedReader(_RangeReader(self))  # type: ignore[return-value]

    def read(self) -> bytes:
        """The whole range, shorter where the file ends before it. Raises OSError as reading the file does."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


Media = bytes | Path | FileRange
"""An encoded video or image."""


def open_media(media: Media) -> BinaryIO:
    """A stream of the encoded bytes. Raises OSError."""
    return (
        io.BytesIO(media) if isinstance(media, bytes) else media.open("rb") if isinstance(media, Path) else media.open()
    )


def _size(media: Media) -> int:
    return (
        media.stat().st_size if isinstance(media, Path) else media.size if isinstance(media, FileRange) else len(media)
    )


class _RangeReader(io.RawIOBase):
    def __init__(self, place: FileRange) -> None:
        self.place, self.position = place, 0
        self.file = place.path.open("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, offset + (0, self.position, self.place.size)[whence])
        return self.position

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        left = max(0, self.place.size - self.position)
        self.file.seek(self.place.offset + self.position)
        count = self.file.readinto(memoryview(buffer)[:left]) or 0
        self.position += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def open_video(media: Media, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens the first real video stream of `media` (a cover picture is not one), decoding on one thread.

    One thread: loaders already run one process per core. The container is closed on leaving; one left open would
    deadlock FFmpeg in worker processes forked later.

    Raises:
        MediaError: naming `name`, when the file is missing, empty, not a video or without a video stream, and for any
            FFmpeg error inside the `with` block.
    """
    if isinstance(media, Path) and not media.is_file():
        raise MediaError(f"{name}: no such file: {media}")
    if not _size(media):
        raise MediaError(f"{name}: the file is empty (0 bytes)")
    try:
        with (
            nullcontext(str(media.resolve())) if isinstance(media, Path) else open_media(media) as source,
            av.open(source, "r", metadata_errors="replace") as container,
        ):
            videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not videos:
                kinds = sorted({stream.type for stream in container.streams})
                raise MediaError(f"{name}: has no video stream, only {', '.join(kinds) or 'nothing'}")
            if videos[0].codec_context is None:  # so PyAV says that FFmpeg has no decoder for it
                raise MediaError(f"{name}: its video has an unknown codec; re-encode it, for example as H.264")
            videos[0].codec_context.thread_count = 1
            yield container, videos[0]
    except (FFmpegError, OSError) as error:
        raise MediaError(f"{name}: cannot be read as a video ({error.strerror or error})") from error


@contextmanager
def open_image(media: Media, name: str) -> Iterator[Image.Image]:
    """Opens a still image (any format Pillow reads), its pixels not read yet.

    Raises:
        MediaError: naming `name`, when the data are not an image or are cut short, and for any error inside the `with`
            block.
    """
    try:
        with open_media(media) as source, Image.open(source) as image:
            yield image
    except Exception as error:  # Pillow's readers raise whatever damage leads them to: struct.error, RuntimeError, ...
        raise MediaError(f"{name}: cannot be read as an image ({error})") from error


def ticks_per_second(stream: VideoStream) -> float:
    """Ticks are the units in which the container counts this stream's times."""
    assert stream.time_base is not None, "every demuxed stream has a time base"
    return float(1 / stream.time_base)


def read_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """The packets of `stream` from the current position; a file that is cut or damaged ends where that stops FFmpeg.

    (PyAV itself raises IndexError when damage looks like one more stream.)
    """
    packets = container.demux(stream)
    while True:
        try:
            yield next(packets)
        except (StopIteration, FFmpegError, IndexError):
            return


def decode_packets(
    packets: Iterator[Packet[VideoStream]], container: InputContainer, damaged: list[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with the time each begins (ticks of the stream), in that order; the times of damaged ones go to `damaged`.

    AVI stores no presentation times, and FFmpeg reports the order of storage instead. There the n-th frame that leaves
    the decoder takes the time of the n-th packet that entered it.
    """
    stored_order = deque() if container.format.name == "avi" else None
    for packet in packets:
        time = packet.pts if packet.pts is not None else packet.dts
        try:
            frames = packet.decode()
        except InvalidDataError:
            damaged.append(time or 0)
            continue
        if stored_order is not None and packet.size:
            stored_order.append(time)
        for frame in frames:
            begins = stored_order.popleft() if stored_order else frame.pts
            if begins is not None:
                if frame.is_corrupt:  # the decoder has patched it up from its neighbours
                    damaged.append(begins)
                yield begins, frame
