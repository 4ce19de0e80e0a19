"""What a video is: duration, frame count, size. Read from its packets, because headers may be absent or lie."""

from __future__ import annotations

from dataclasses import dataclass

from longvila.errors import MediaError
from longvila.media.container import (
    LAST_FRAME_SECONDS,
    Media,
    decode_packets,
    open_video,
    read_packets,
    ticks_per_second,
)


@dataclass(frozen=True)
class VideoInfo:
    """Facts about one video stream, enough to choose frames without opening the file again."""

    duration: float
    """Seconds from the first frame's start to the last frame's end."""
    fps: float
    """Mean frames per second: num_frames / duration."""
    num_frames: int
    """Frames that the file really holds (a truncated file holds fewer than its header says)."""
    width: int
    """Of the stored frames in pixels, before rotation."""
    height: int
    codec: str
    rotation: int
    """Degrees, counter-clockwise, by which a player turns the stored frames: 0, 90, 180 or 270."""


def probe(media: Media, name: str) -> VideoInfo:
    """Reads every packet of the video and decodes one frame.

    Args:
        media: the file, its bytes, or the place where it lies in another file.
        name: what to call it in errors.

    Raises:
        MediaError: the file is missing, empty, not a video, without a video stream, or none of its frames decodes.
    """
    shown: list[tuple[int, int]] = []  # (presentation time, duration) of each packet, in ticks of the stream
    with open_video(media, name) as (container, stream):

        def noted_packets():
            for packet in read_packets(container, stream):
                if packet.size and not packet.is_discard:
                    time = packet.pts if packet.pts is not None else packet.dts
                    if time is None:
                        raise MediaError(f"{name}: its packets carry no timestamps; put it in a container (mp4, mkv)")
                    shown.append((time, packet.duration or 0))
                yield packet

        packets = noted_packets()
        first = next(decode_packets(packets, container, damaged=[]), None)
        if first is None:
            raise MediaError(f"{name}: none of its {len(shown)} video packets can be decoded")
        start, frame = first
        for _ in packets:
            pass  # the rest is counted, not decoded
        second, rate, codec = ticks_per_second(stream), stream.average_rate, stream.codec_context.name
    # Leading frames that cannot be decoded precede the first shown one, and are not counted.
    shown = [(time, duration) for time, duration in shown if time >= start]
    last, last_duration = max(shown)
    if not last_duration and len(shown) > 1:
        last_duration = min((last - start) / (len(shown) - 1), LAST_FRAME_SECONDS * second)
    duration = (last + last_duration - start) / second or 1 / float(rate or 1)
    return VideoInfo(
        duration=duration,
        fps=len(shown) / duration,
        num_frames=len(shown),
        width=frame.width,
        height=frame.height,
        codec=codec,
        rotation=frame.rotation % 360,
    )
