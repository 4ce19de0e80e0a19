"""Documents with images among their sentences, as Multimodal C4 publishes them (Zhu et al. 2023).

    longvila pack mmc4 -o folder=mmc4 --out runs/mine/data/mmc4

    mmc4/
        docs_no_face_shard_0_v3.jsonl.zip           as released, or unzipped to .jsonl
        docs_no_face_shard_0_v3_images/
            b9040a0dbb22.jpg                        the images, by their `image_name`

    {"text_list": ["When you lock the door ...", "Press the switch ..."], "url": "...",
     "image_info": [{"image_name": "b9040a0dbb22.jpg", "matched_text_index": 1, "matched_sim": 0.32, ...}]}

The release holds addresses of images and not the images. Those that were not downloaded are left out of their document;
a document that loses all of them is told. An image stands before the sentence it is matched to, and every word is a
target: a document is one turn of the assistant.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longvila.errors import DataError
from longvila.shards.sample import BadRecord, SourceSample


def samples(
    folder: Path, images: Path | None = None, min_similarity: float = 0.0, max_images: int = 6
) -> Iterator[SourceSample | BadRecord]:
    """One sample for each document with an image.

    Args:
        folder: where the shards of documents are.
        images: the folder of images; by default that of each shard, named like it with `_images`.
        min_similarity: images whose `matched_sim` is lower are left out.
        max_images: images of a document; the best matched stay.

    Raises:
        DataError: no such folder, or no shard in it.
    """
    shards = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.zip")])
    if not shards:
        raise DataError(f"{folder} holds no .jsonl or .jsonl.zip of documents")
    for shard in shards:
        stem = shard.name.partition(".jsonl")[0]
        place = images or folder / f"{stem}_images"
        try:
            for number, line in enumerate(_lines(shard)):
                if line.strip():
                    yield _sample(line, f"{stem}-{number:07d}".replace(".", "_"), place, min_similarity, max_images)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            yield BadRecord(shard.name, f"cannot be read to its end ({type(error).__name__}: {error})")


def _lines(shard: Path) -> Iterator[bytes]:
    if shard.suffix == ".jsonl":
        with shard.open("rb") as file:
            yield from file
        return
    with zipfile.ZipFile(shard) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                yield from file


def _sample(line: bytes, key: str, images: Path, min_similarity: float, max_images: int) -> SourceSample | BadRecord:
    try:
        document = json.loads(line)
        sentences, url = document["text_list"], document.get("url")
        matched = [
            (float(each["matched_sim"]), int(each["matched_text_index"]), str(each["image_name"]))
            for each in document["image_info"]
        ]
        if not all(isinstance(each, str) for each in sentences) or any(
            not 0 <= index < len(sentences) for _, index, _ in matched
        ):
            raise ValueError("sentences that are no text, or an image that is matched to none")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return BadRecord(key, f"is not a document of MMC4 ({type(error).__name__}: {error})")
    similar = [each for each in matched if each[0] >= min_similarity]
    try:
        there = [each for each in similar if (images / each[2]).is_file()]
    except OSError as error:  # a name that no file can have, or a folder that may not be looked into
        return BadRecord(key, f"its images cannot be looked for ({type(error).__name__}: {error.strerror})")
    if not there:
        return BadRecord(key, f"{len(matched)} images, {len(similar)} of them similar enough, none in {images.name}")
    chosen = sorted(there, reverse=True)[:max_images]
    content: list[dict[str, Any]] = []
    files = []
    for index, sentence in enumerate(sentences):
        for _, _, name in sorted((each for each in chosen if each[1] == index), reverse=True):
            content.append({"type": "image"})
            files.append(images / name)
        content.append({"type": "text", "text": sentence})
    metadata = {"url": url, "images_left_out": len(matched) - len(files)}
    return SourceSample(key, [{"role": "assistant", "content": content}], files, "image", metadata)
