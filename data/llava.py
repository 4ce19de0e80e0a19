"""Conversations in the JSON of LLaVA and its many descendants (ShareGPT4V, LLaVA-Video, ShareGPTVideo, ...).

    longvila pack llava -o annotations=llava_v1_5_mix665k.json -o media=images --out runs/mine/data/llava

    [{"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat are the colors of the bus?"},
                        {"from": "gpt", "value": "White and red."}]}, ...]

A record names an `image` or a `video`, several of either (a list), or neither (a text conversation).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longvila.errors import DataError
from longvila.shards.conversations import read_records, to_sample
from longvila.shards.sample import BadRecord, SourceSample


def samples(annotations: Path, media: Path) -> Iterator[SourceSample | BadRecord]:
    """One sample for each record.

    Args:
        annotations: a `.json` file with an array of records, or `.jsonl` with one a line.
        media: the folder that the paths in `image` and `video` start from.

    Raises:
        DataError: no such file or folder, or a file that is not of this form.
    """
    if not media.is_dir():
        raise DataError(f"{media} is not a folder; `media` is where the images and videos of the records are")
    for number, record in enumerate(read_records(annotations), start=1):
        yield to_sample(record, number, media)
