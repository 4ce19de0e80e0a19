"""The source `slimpajama` on a miniature in the release's layout."""

from __future__ import annotations

import json

import pytest
import zstandard

from longvila import content
from longvila.errors import DataError
from longvila.shards import BadRecord, SourceSample, write_shards

from .shards_parts import keys, make_loader, rows_of
from .video_fixtures import write


def samples(folder, **options):
    return list(content.entry("data", "slimpajama")(folder, **options))


def lines(*records) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def record(text: str, source: str) -> dict:
    return {"text": text, "meta": {"redpajama_set_name": source}}


@pytest.fixture
def folder(tmp_path):
    first = lines(record("one two", "RedPajamaBook"), record("drei für\u2028vier", "RedPajamaArXiv"))
    write(tmp_path / "train/chunk1/example_train_0.jsonl.zst", zstandard.compress(first))
    write(tmp_path / "train/chunk2/example_train_0.jsonl", lines(record("five", "RedPajamaBook")))
    return tmp_path / "train"


def test_each_line_becomes_a_text(folder):
    found = samples(folder)
    assert [sample.key for sample in found] == [
        "chunk1-example_train_0-0000001",
        "chunk1-example_train_0-0000002",
        "chunk2-example_train_0-0000001",
    ]
    assert [sample.metadata["text"] for sample in found] == ["one two", "drei für\u2028vier", "five"]
    assert found[1].metadata["source"] == "RedPajamaArXiv"


def test_the_samples_can_be_packed_and_read(folder, tmp_path):
    assert write_shards(samples(folder), tmp_path / "data").texts == 3
    # A text of one word has no target.
    assert len(keys(rows_of(make_loader(tmp_path)))) == 2


def test_sets_choose_by_where_a_text_comes_from(folder):
    found = samples(folder, sets=("RedPajamaBook",))
    assert [sample.metadata["text"] for sample in found] == ["one two", "five"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken\n", "is not a text of SlimPajama"),
        (b"[1]\n", "is not a text of SlimPajama"),
        (b'{"meta": {}}\n', "KeyError: 'text'"),
        (b'{"text": " "}\n', "its text is empty"),
        (b'{"text": 7}\n', "its text is empty"),
        (b"\xff\xfe\n", "is not a text of SlimPajama"),
    ],
)
def test_a_line_that_is_no_text_is_told_and_the_next_is_read(folder, line, reason):
    write(folder / "more.jsonl", line + lines(record("six", "RedPajamaBook")))
    *_, told, last = samples(folder)
    assert isinstance(told, BadRecord)
    assert (told.key, last.metadata["text"]) == ("more-0000001", "six")
    assert reason in told.reason


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_file_that_is_cut_is_told(tmp_path, keep):
    whole = lines(*(record(f"text {number} " + str(number**99), "RedPajamaC4") for number in range(5000)))
    packed = zstandard.compress(whole)
    write(tmp_path / "a.jsonl.zst", packed[: int(len(packed) * keep)])
    found = samples(tmp_path)
    assert isinstance(found[-1], BadRecord)
    assert all(isinstance(sample, SourceSample) for sample in found[:-1])


def test_a_file_of_several_frames_is_read_to_its_end(tmp_path):
    frames = [zstandard.compress(lines(record(f"text {number}", "RedPajamaC4"))) for number in range(3)]
    write(tmp_path / "a.jsonl.zst", b"".join(frames))
    assert [sample.metadata["text"] for sample in samples(tmp_path)] == ["text 0", "text 1", "text 2"]


def test_a_file_that_is_cut_where_a_line_ends_is_told(tmp_path):
    compressor = zstandard.ZstdCompressor().compressobj()
    data = compressor.compress(lines(record("one", "RedPajamaC4"))) + compressor.flush(
        zstandard.COMPRESSOBJ_FLUSH_BLOCK
    )
    write(tmp_path / "a.jsonl.zst", data)
    text, told = samples(tmp_path)
    assert text.metadata["text"] == "one"
    assert "ends in the middle" in told.reason


def test_a_file_that_is_not_compressed_as_its_name_says_is_told(folder):
    write(folder / "wrong.jsonl.zst", b"hello, hello, hello, hello")
    (told,) = [sample for sample in samples(folder) if isinstance(sample, BadRecord)]
    assert told.reason.startswith(str(folder / "wrong.jsonl.zst"))


def test_a_folder_without_texts_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.jsonl\.zst"):
        samples(tmp_path)
