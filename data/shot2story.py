"""Captions of videos of several shots, as Shot2Story publishes them (Han et al. 2023); LongVILA's stage 5 builds on it.

    longvila pack shot2story -o annotations=43k_human_train.json -o media=videos --out runs/mine/data/shot2story

    [{"video": "abc.mp4", "id": 0, "whole_caption": "A man opens ...", "whole_ASR": "...",
      "video_names": ["abc_0_120.mp4", "abc_120_300.mp4"], "captions": ["A man ...", "The door ..."], ...}, ...]

The annotations come from its page on the hub, the videos separately. A record becomes one sample, whose answer is the
caption of the whole video; with `shots`, one for each shot that was cut to a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longvila.errors import DataError
from longvila.shards.conversations import read_records
from longvila.shards.sample import BadRecord, SourceSample

QUESTION = "Describe the video in detail."


def samples(annotations: Path, media: Path, shots: bool = False) -> Iterator[SourceSample | BadRecord]:
    """One sample for each video, or for each shot.

    Args:
        annotations: a file of the release with captions.
        media: the folder of the videos (of the shots, with `shots`).
        shots: take the shots, their files and their captions, and not the videos.

    Raises:
        DataError: no such file or folder, or a file that is not of this form.
    """
    if not media.is_dir():
        raise DataError(f"{media} is not a folder; `media` is where the videos are")
    for number, record in enumerate(read_records(annotations), start=1):
        try:
            pairs = _shots(record) if shots else [(record["video"], record["whole_caption"])]
        except (KeyError, TypeError, ValueError) as error:
            yield BadRecord(f"record-{number:07d}", f"is not a record of Shot2Story ({type(error).__name__}: {error})")
            continue
        for place, (name, caption) in enumerate(pairs):
            yield _sample(f"{number:07d}-{place}" if shots else f"{number:07d}", name, caption, media)


def _shots(record: dict[str, Any]) -> list[tuple[Any, Any]]:
    return list(zip(record["video_names"], record["captions"], strict=True))


def _sample(key: str, name: Any, caption: Any, media: Path) -> SourceSample | BadRecord:
    if not isinstance(name, str) or not isinstance(caption, str):
        return BadRecord(key, f"its video and its caption must be text, not {str(name)[:40]} and {str(caption)[:40]}")
    if not caption.strip():
        return BadRecord(key, f"{name} has no caption")
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": caption.strip()},
    ]
    return SourceSample(key, messages, media / name, "video", {"video": name})
