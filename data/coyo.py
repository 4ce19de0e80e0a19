"""Images with their alternative texts, downloaded by img2dataset as webdataset: COYO-700M and everything fetched so.

    img2dataset --url_list coyo-700m --input_format parquet --url_col url --caption_col text --output_folder coyo \\
        --output_format webdataset --image_size 384 --resize_mode keep_ratio --resize_only_if_bigger True
    longvila pack coyo -o folder=coyo --out runs/mine/data/coyo

    coyo/00000.tar      000000000.jpg  000000000.txt (the text)  000000000.json (url, width, height, sha256, ...)

The text is the answer to the image alone: no question is made up. COYO-700M itself (Byeon et al. 2022) is a list of
addresses under CC-BY-4.0; each image has the licence of its page.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from longvila.errors import DataError
from longvila.shards.sample import IMAGE_EXTENSIONS, BadRecord, SourceSample, split_name
from longvila.shards.tar import find_end_fault


def samples(folder: Path, min_similarity: float = 0.0) -> Iterator[SourceSample | BadRecord]:
    """One sample for each image with a text; one bad record for each without, and for each tar that is damaged or cut.

    Args:
        folder: where img2dataset wrote its tars.
        min_similarity: leave out pairs whose `clip_similarity_vitb32`, a column of COYO, is below; it must have been
            kept by --save_additional_columns. 0 keeps all.

    Raises:
        DataError: no such folder, or no tar in it.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"{folder} holds no .tar; download with img2dataset and --output_format webdataset")
    for path in tars:
        try:
            with tarfile.open(path) as tar:
                for key, members in groupby(
                    filter(tarfile.TarInfo.isfile, tar), key=lambda member: split_name(member.name)[0]
                ):
                    parts = {split_name(member.name)[1] or "": _read(tar, member) for member in members}
                    yield _to_sample(f"{path.stem}-{key}", parts, min_similarity)
                if fault := find_end_fault(tar):
                    yield BadRecord(path.name, f"the tar {fault}, and what lies behind it is lost; download it again")
        except (OSError, tarfile.TarError, EOFError) as error:
            yield BadRecord(path.name, f"the tar cannot be read on ({error}); download it again")


def _to_sample(name: str, parts: dict[str, bytes], min_similarity: float) -> SourceSample | BadRecord:
    key = re.sub(r"[^\w-]+", "_", name)
    image = next((parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts), None)
    try:
        text = parts.get("txt", b"").decode().strip()
        facts = json.loads(parts.get("json", b"{}"))
    except ValueError as error:
        return BadRecord(key, f"its text or JSON cannot be read ({error})")
    if image is None:
        return BadRecord(key, f"has no image, only {', '.join(sorted(parts))}")
    if not text:
        return BadRecord(key, "its image has no text")
    if min_similarity:
        similarity = facts.get("clip_similarity_vitb32") if isinstance(facts, dict) else None
        if not isinstance(similarity, (int, float)):
            return BadRecord(key, "its JSON has no clip_similarity_vitb32, which min_similarity asks for")
        if similarity < min_similarity:
            return BadRecord(key, f"its clip_similarity_vitb32 of {similarity} is below {min_similarity}")
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": text}]
    return SourceSample(key, messages, image, "image", {"source": facts})


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    assert content is not None, "only files are asked for"
    return content.read()
