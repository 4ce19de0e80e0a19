"""Video and image bytes to frames: probing, choosing timestamps, decoding. Knows no shards, tokens or ranks."""

from longvila.media.container import FileRange, Media
from longvila.media.decode import FrameMemory, decode_frames, decode_image, decode_tiles, empty_frames
from longvila.media.encode import Encoding, encode_video
from longvila.media.pool import Decoded, Decoder, Processes
from longvila.media.probe import VideoInfo, probe
from longvila.media.sampling import sample_timestamps
from longvila.media.subtitles import Subtitle, read_subtitles
from longvila.media.tiles import WHOLE, Tile, Views, choose_tiles, image_extent

__all__ = [
    "WHOLE",
    "Decoded",
    "Decoder",
    "Encoding",
    "FileRange",
    "FrameMemory",
    "Media",
    "Processes",
    "Subtitle",
    "Tile",
    "VideoInfo",
    "Views",
    "choose_tiles",
    "decode_frames",
    "decode_image",
    "decode_tiles",
    "empty_frames",
    "encode_video",
    "image_extent",
    "probe",
    "read_subtitles",
    "sample_timestamps",
]
