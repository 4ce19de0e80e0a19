"""A folder of videos with a file of conversations about them, one JSON object a line.

    longvila pack folder -o folder=my_videos --out runs/mine/data/my_videos

    my_videos/conversations.jsonl
        {"video": "cats/1.mp4", "messages": [{"role": "user", "content": "What happens?"},
                                             {"role": "assistant", "content": "A cat jumps."}]}

`video` is a path below the folder. The conversation is either Hugging Face chat `messages` or LLaVA `conversations`
(`longvila/shards/conversations.py` states both). Other fields are kept as metadata. A video may have several lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longvila.errors import DataError
from longvila.shards.conversations import read_records, to_sample
from longvila.shards.sample import VIDEO_EXTENSIONS, BadRecord, SourceSample


def samples(folder: Path, conversations: str = "conversations.jsonl") -> Iterator[SourceSample | BadRecord]:
    """One sample for each line; then one bad record for each video that no line names.

    Args:
        folder: where the videos are, at any depth.
        conversations: the file of conversations, below the folder (or an absolute path).

    Raises:
        DataError: no such folder, no video in it, or no file of conversations.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    videos = {path for path in folder.rglob("*") if path.suffix[1:].lower() in VIDEO_EXTENSIONS}
    if not videos:
        raise DataError(f"{folder} holds no video; known extensions: {', '.join(VIDEO_EXTENSIONS)}")
    if not (folder / conversations).is_file():
        raise DataError(
            f"{folder / conversations} does not exist; write one JSON object a line, for example "
            '{"video": "a.mp4", "messages": [{"role": "user", "content": "What happens?"}, '
            '{"role": "assistant", "content": "A cat jumps."}]}'
        )
    named: set[Path | bytes] = set()
    for number, record in enumerate(read_records(folder / conversations), start=1):
        sample = to_sample(record, number, folder)
        if isinstance(sample, SourceSample):
            named.update(sample.files)
        yield sample
    for path in sorted(videos.difference(named)):
        yield BadRecord(str(path.relative_to(folder)), f"no usable line of {conversations} uses it")
