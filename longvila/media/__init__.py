"""Video and image bytes to frames: probing, choosing timestamps, decoding. Knows no shards, tokens or ranks."""

from longvila.media.container import FileRange, Media
from longvila.media.decode import FrameMemory, decode_frames, decode_image, empty_frames
from longvila.media.encode import Encoding, encode_video
from longvila.media.pool import Decoded, Decoder, Processes
from longvila.media.probe import VideoInfo, probe
from longvila.media.sampling import sample_timestamps
from longvila.media.subtitles import Subtitle, read_subtitles

__all__ = [
    "Decoded",
    "Decoder",
    "Encoding",
    "FileRange",
    "FrameMemory",
    "Media",
    "Processes",
    "Subtitle",
    "VideoInfo",
    "decode_frames",
    "decode_image",
    "empty_frames",
    "encode_video",
    "probe",
    "read_subtitles",
    "sample_timestamps",
]
