"""Video and image bytes to frames: probing, choosing timestamps, decoding. Knows no shards, tokens or ranks."""

from longvila.media.decode import decode_frames, decode_image
from longvila.media.probe import VideoInfo, probe
from longvila.media.sampling import sample_timestamps

__all__ = ["VideoInfo", "decode_frames", "decode_image", "probe", "sample_timestamps"]
