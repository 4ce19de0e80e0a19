"""The source `mmc4` on a miniature in the release's layout."""

from __future__ import annotations

import json
import zipfile

import pytest

from longvila import content
from longvila.errors import DataError
from longvila.model.chat import ChatEncoder, prepare_tokenizer
from longvila.shards import BadRecord, write_shards

from .model_parts import byte_tokenizer
from .shards_parts import FRAME, FRAME_TOKENS, make_loader, rows_of
from .video_fixtures import make_image, read_number, write


def samples(folder, **options):
    return list(content.entry("data", "mmc4")(folder, **options))


def image(name, sentence, similarity):
    return {"image_name": name, "matched_text_index": sentence, "matched_sim": similarity, "raw_url": "http://a/b"}


DOCUMENTS = [
    {
        "text_list": ["Lock the door.", "Press the switch.", "All lock."],
        "url": "http://a",
        "image_info": [image("a.jpg", 2, 0.2), image("b.jpg", 1, 0.3), image("gone.jpg", 0, 0.4)],
    },
    {"text_list": ["Nothing here."], "url": "http://b", "image_info": [image("gone.jpg", 0, 0.4)]},
    {
        "text_list": ["Two at once.", "End."],
        "url": "http://c",
        "image_info": [image("b.jpg", 0, 0.1), image("a.jpg", 0, 0.5)],
    },
]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mmc4"
    lines = b"\n".join(json.dumps(each).encode() for each in DOCUMENTS) + b"\n"
    folder.mkdir()
    with zipfile.ZipFile(folder / "docs_no_face_shard_0_v3.jsonl.zip", "w") as archive:
        archive.writestr("docs_no_face_shard_0_v3.jsonl", lines)
    write(folder / "docs_no_face_shard_0_v3_images/a.jpg", make_image(1, format="JPEG"))
    write(folder / "docs_no_face_shard_0_v3_images/b.jpg", make_image(2, format="JPEG"))
    return folder


def test_images_stand_before_their_sentences_and_lost_ones_are_left_out(folder):
    first, none, third = samples(folder)
    assert first.key == "docs_no_face_shard_0_v3-0000000"
    assert [part.get("text", part["type"]) for part in first.messages[0]["content"]] == [
        "Lock the door.", "image", "Press the switch.", "image", "All lock.",
    ]  # fmt: skip
    assert [path.name for path in first.media] == ["b.jpg", "a.jpg"]
    assert first.metadata == {"url": "http://a", "images_left_out": 1}
    assert none == BadRecord(
        "docs_no_face_shard_0_v3-0000001", "1 images, 1 of them similar enough, none in docs_no_face_shard_0_v3_images"
    )
    assert [path.name for path in third.media] == ["a.jpg", "b.jpg"]  # the better matched first


def test_similarity_and_number_choose_the_images(folder):
    first, _, third = samples(folder, min_similarity=0.15, max_images=1)
    assert [path.name for path in first.media] == ["b.jpg"]
    assert [path.name for path in third.media] == ["a.jpg"]


def test_unzipped_documents_and_images_elsewhere_are_read_too(folder, tmp_path):
    with zipfile.ZipFile(folder / "docs_no_face_shard_0_v3.jsonl.zip") as archive:
        archive.extractall(tmp_path / "plain")
    images = folder / "docs_no_face_shard_0_v3_images"
    assert samples(tmp_path / "plain", images=images)[0] == samples(folder)[0]


def test_documents_can_be_packed_and_every_word_is_a_target(folder, tmp_path):
    report = write_shards(samples(folder), tmp_path / "data")
    assert (report.samples, report.images) == (2, 4)
    (row,) = rows_of(make_loader(tmp_path))
    start = row.keys.index("docs_no_face_shard_0_v3-0000000")
    first = sum(row.num_frames[:start])
    assert [read_number(frame) for frame in row.frames[first : first + 2]] == [2, 1]
    is_frame = row.input_ids == FRAME
    assert is_frame.sum() == 4 * FRAME_TOKENS
    targets = sum(1 for document in DOCUMENTS[::2] for sentence in document["text_list"] for _ in sentence.split())
    assert ((row.labels != -100) & (row.labels != FRAME)).sum() >= targets - 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "JSONDecodeError"),
        (b"[]", "TypeError"),
        (b'{"text_list": ["a"]}', "KeyError: 'image_info'"),
        (json.dumps({"text_list": ["a"], "image_info": [image("a.jpg", 7, 0.1)]}).encode(), "matched to none"),
        (json.dumps({"text_list": [3], "image_info": []}).encode(), "sentences that are no text"),
    ],
)
def test_lines_of_another_form_are_told(tmp_path, line, reason):
    write(tmp_path / "docs/x.jsonl", line + b"\n\n")
    (found,) = samples(tmp_path / "docs")
    assert found.key == "x-0000000"
    assert reason in found.reason


def test_a_folder_without_documents_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        samples(tmp_path)


def test_an_image_whose_name_no_file_can_have_costs_one_document(folder):
    expected = samples(folder)
    bad = {"text_list": ["Far too long."], "image_info": [image("n" * 300 + ".jpg", 0, 0.5)]}
    lines = [json.dumps(each).encode() for each in (DOCUMENTS[0], bad, *DOCUMENTS[1:])]
    (archive,) = folder.glob("*.zip")
    archive.unlink()
    write(folder / "docs_no_face_shard_0_v3.jsonl", b"\n".join(lines))
    first, found, *rest = samples(folder)
    assert "its images cannot be looked for (OSError: File name too long)" in found.reason
    assert [each.key[-1] for each in (first, *rest)] == ["0", "2", "3"]
    assert len(rest) + 1 == len(expected)


def test_an_archive_that_cannot_be_read_to_its_end_is_told_and_the_others_are_read(folder):
    expected = samples(folder)
    (good,) = folder.glob("*.zip")
    data = bytearray(good.read_bytes())
    data[60:90] = bytes(30)
    write(folder / "a.jsonl.zip", b"no archive")
    write(folder / "b.jsonl.zip", bytes(data))
    first, second, *rest = samples(folder)
    assert [each.key for each in (first, second)] == ["a.jsonl.zip", "b.jsonl.zip"]
    assert all("cannot be read to its end" in each.reason for each in (first, second))
    assert rest == expected


def test_documents_are_encoded_by_a_chat_template(folder, tmp_path):
    tokenizer = byte_tokenizer()
    prepare_tokenizer(tokenizer)
    write_shards(samples(folder), tmp_path / "data")
    loader = make_loader(tmp_path, encode=ChatEncoder(tokenizer, FRAME_TOKENS), row_tokens=400)
    rows = rows_of(loader)
    assert loader.bad.listed == {}
    targets = [tokenizer.decode(row.labels[row.labels != -100]) for row in rows]
    for sentence in (*DOCUMENTS[0]["text_list"], *DOCUMENTS[2]["text_list"]):
        assert sum(text.count(sentence) for text in targets) == 1
