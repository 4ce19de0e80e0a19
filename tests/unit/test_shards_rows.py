"""`longvila.shards.rows`, `document` and `loader`: packed rows, and each rank's share of the frames."""

from __future__ import annotations

import pytest
import torch

from longvila.config import FrameSampling, SourceConfig
from longvila.errors import ConfigError, DataError
from longvila.media import WHOLE, Decoder, FrameMemory
from longvila.shards import BadSamples, SourceSample
from longvila.shards.document import Clip, Document, to_documents
from longvila.shards.order import Cursor
from longvila.shards.rows import LOOK_AHEAD, pack, start_row

from .shards_parts import (
    FRAME,
    FRAME_TOKENS,
    IMAGE_SIZE,
    all_kinds,
    conversation,
    encode,
    keys,
    make_loader,
    packed,
    rows_of,
    video,
    without_indexes,
)
from .video_fixtures import read_number


def build_row(documents, rank, num_ranks, image_size):
    return start_row(documents, rank, num_ranks, Decoder(), FrameMemory(image_size))()


def same(first, second):
    """Equal in everything, frames included."""
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(first).values(), vars(second).values(), strict=True)
    )


def test_every_sample_is_in_one_row_of_an_epoch(tmp_path):
    packed(tmp_path / "data")
    loader = make_loader(tmp_path)
    assert sorted(keys(rows_of(loader))) == sorted(sample.key for sample in all_kinds())
    assert (loader.bad.read, loader.bad.count) == (24, 0)


def test_a_row_is_laid_out_document_by_document(tmp_path):
    packed(tmp_path / "data")
    for row in rows_of(make_loader(tmp_path)):
        assert sum(row.lengths) == len(row.input_ids) == len(row.labels) == len(row.position_ids) <= 40
        assert sum(row.num_frames) == len(row.frames)
        assert (row.input_ids == FRAME).sum() == FRAME_TOKENS * len(row.frames)
        assert row.position_ids.tolist() == [place for length in row.lengths for place in range(length)]
        ids, labels = row.input_ids.split(row.lengths), row.labels.split(row.lengths)
        for key, document_ids, document_labels in zip(row.keys, ids, labels, strict=True):
            targets = [label for label in document_labels.tolist() if label != -100]
            assert document_labels[-1] == -100
            if key.startswith("text"):
                assert targets == document_ids[1:].tolist()
            else:
                assert targets == document_ids[-len(targets) :].tolist()
                assert 1 <= len(targets) <= 2


def test_frames_are_those_of_their_document_at_the_sampled_moments(tmp_path):
    packed(tmp_path / "data")
    for row in rows_of(make_loader(tmp_path)):
        frames = iter(row.frames)
        for key, num_frames in zip(row.keys, row.num_frames, strict=True):
            kind, index = key.split("-")
            first = {"video": int(index) * 16, "image": 2000 + int(index), "text": 0}[kind]
            assert [read_number(next(frames)) for _ in range(num_frames)] == list(range(first, first + num_frames))
            assert num_frames == {"video": 3 + int(index) % 5, "image": 1, "text": 0}[kind]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_of_a_sequence_group_see_the_same_rows_and_share_the_frames(tmp_path, num_ranks):
    packed(tmp_path / "data")
    whole = rows_of(make_loader(tmp_path))
    shares = [
        rows_of(make_loader(tmp_path, sequence_rank=rank, num_sequence_ranks=num_ranks)) for rank in range(num_ranks)
    ]
    for row, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([part.frames for part in parts]), row.frames)
        assert max(len(part.frames) for part in parts) - min(len(part.frames) for part in parts) <= 1
        for part in parts:
            part.frames = row.frames
            assert same(part, row)


def test_a_rank_opens_only_the_videos_it_has_frames_of(monkeypatch):
    opened = []

    def decode(media, timestamps, size, name, out):
        opened.append((name, tuple(timestamps)))
        out.zero_()

    monkeypatch.setattr("longvila.media.pool.decode_frames", decode)
    documents = [Document(key, [1], [-100], (Clip("video", b"film", (0.0, 1.0, 2.0)),)) for key in ("a", "b")]
    build_row(documents, 0, 3, 8)
    build_row(documents, 1, 3, 8)
    build_row(documents, 2, 3, 8)
    assert opened == [("a", (0.0, 1.0)), ("a", (2.0,)), ("b", (0.0,)), ("b", (1.0, 2.0))]


def test_what_cannot_be_decoded_shows_nothing_of_the_row_before():
    memory = FrameMemory(8)
    memory.take(2).fill_(7)
    broken = [
        Document(key, [1], [-100], (Clip("image", media, (WHOLE,)),)) for key, media in (("a", b"?"), ("b", None))
    ]
    row = start_row(broken, 0, 1, Decoder(), memory)()
    assert not row.frames.any()
    assert [index for index, _ in row.failed] == [0]


def test_data_ranks_read_disjoint_samples(tmp_path):
    packed(tmp_path / "data")
    first, second = (keys(rows_of(make_loader(tmp_path, data_rank=rank, num_data_ranks=2))) for rank in range(2))
    assert not set(first) & set(second)
    assert len(first) + len(second) == 24


def test_epochs_differ_in_order_and_agree_in_content(tmp_path):
    packed(tmp_path / "data")
    loader = make_loader(tmp_path)
    first, second = keys(rows_of(loader, Cursor(0))), keys(rows_of(loader, Cursor(1)))
    assert first != second
    assert sorted(first) == sorted(second)


def test_what_cannot_be_used_is_counted_once_by_the_data_rank_it_falls_to(tmp_path):
    samples = [*all_kinds(8, 0, 0), SourceSample("long", conversation("word " * 50), video("x").media, "video")]
    packed(tmp_path / "data", samples, max_samples=3)
    for ranks, workers in [(1, 0), (1, 2), (3, 0)]:
        loaders = [make_loader(tmp_path, data_rank=r, num_data_ranks=ranks, workers=workers) for r in range(ranks)]
        assert sum(len(keys(rows_of(loader))) for loader in loaders) == 8
        assert sum(loader.bad.read for loader in loaders) == 9
        assert [key for loader in loaders for key in loader.bad.listed] == ["long"]


def test_too_many_bad_samples_stop_the_run_while_rows_are_planned(tmp_path, monkeypatch):
    packed(tmp_path / "data")
    monkeypatch.setattr("longvila.shards.bad.GRACE", 1)
    loader = make_loader(tmp_path, max_bad_share=0.0, row_tokens=6)
    with pytest.raises(DataError, match=r"^\d+ of \d+ samples could not be used, more than the share of 0.0"):
        rows_of(loader)


def test_a_broken_frame_leaves_zeros_and_is_named_to_the_group(tmp_path):
    good = video("good", number=5)
    documents = [
        Document("broken", [1] * 6, [-100] * 6, (Clip("video", b"not a film", (0.0, 1.0)),)),
        Document("good", [1] * 6, [-100] * 6, (Clip("video", good.media, (0.0, 1.0)),)),
    ]
    row = build_row(documents, 0, 1, 48)
    ((document, reason),) = row.failed
    assert document == 0
    assert reason.startswith("broken: cannot be read as a video")
    assert not row.frames[:2].any()
    assert [read_number(frame) for frame in row.frames[2:]] == [5, 6]
    assert build_row(documents, 1, 2, 48).failed == ()  # its share is the good film


def test_packing_is_best_fit_and_starves_nobody():
    def documents(*lengths):
        return [Document(str(length), [1] * length, [1] * length) for length in lengths]

    rows = [[len(d.ids) for d in row] for row in pack(documents(6, 1, 5, 9, 4, 3), 10)]
    assert rows == [[6, 4], [1, 9], [5, 3]]
    many = documents(9, *[8] * (3 * LOOK_AHEAD), 1)
    assert [len(d.ids) for d in next(iter(pack(many, 10)))] == [9]  # the one that fits is too far ahead
    assert sum(len(row) for row in pack(many, 10)) == len(many)


def test_a_film_too_long_for_a_row_gets_fewer_frames_and_that_is_counted(tmp_path):
    packed(tmp_path / "data", [video("long", num_frames=30)])
    loader = make_loader(tmp_path, row_tokens=24)
    (row,) = rows_of(loader)
    assert row.num_frames == (6,)  # 5 words and 6 frames of 3 tokens are 23
    assert [read_number(frame) for frame in row.frames] == [2, 7, 12, 17, 22, 27]
    assert loader.bad.shortened == 1
    assert loader.bad.count == 0


def test_text_too_long_for_a_row_is_refused_with_the_numbers(tmp_path):
    packed(
        tmp_path / "data", [video("good"), SourceSample("wordy", conversation("w " * 30), video("x").media, "video")]
    )
    loader = make_loader(tmp_path, row_tokens=24)
    assert keys(rows_of(loader)) == ["good"]
    assert loader.bad.listed == {"wordy": "its text has 33 tokens and one frame 3, more than a row of 24"}


def test_a_sample_without_an_answer_is_refused(tmp_path):
    question = [{"role": "user", "content": [{"type": "video"}]}]
    packed(tmp_path / "data", [video("good"), SourceSample("mute", question, video("x").media, "video")])
    loader = make_loader(tmp_path)
    assert keys(rows_of(loader)) == ["good"]
    assert "none of its tokens is a target" in loader.bad.listed["mute"]


def test_a_long_text_is_cut_into_pieces_without_losing_a_target():
    from longvila.shards import Sample

    words = " ".join("x" * (1 + index) for index in range(25))
    sample = Sample("text", [], (), {"text": words})
    pieces = list(to_documents([sample], encode, FrameSampling(), IMAGE_SIZE, 8, BadSamples()))
    assert [len(piece.ids) for piece in pieces] == [8, 8, 8, 4]
    targets = [label for piece in pieces for label in piece.labels if label != -100]
    assert targets == [101 + index for index in range(1, 25)]
    assert all(piece.labels[:-1] == piece.ids[1:] for piece in pieces)


def test_sources_are_mixed_by_weight(tmp_path):
    for name in ("rare", "often"):
        texts = (SourceSample(f"{name}-{index}", [], None, "text", {"text": f"a b c{index}"}) for index in range(120))
        packed(tmp_path / name, texts, max_samples=60)
    loader = make_loader(tmp_path, SourceConfig("rare", 1.0), SourceConfig("often", 4.0), row_tokens=3)
    order = [key.split("-")[0] for key in keys(rows_of(loader))]
    assert len(order) == 240
    assert 78 <= order[:100].count("often") <= 82
    assert order[:8] != order[8:16]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_by_which_nothing_can_be_drawn_is_refused_by_the_name_of_its_source(tmp_path, weight):
    packed(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"source 'data' has the weight (0.0|-1.0|nan|inf)"):
        make_loader(tmp_path, SourceConfig("data", 1.0), SourceConfig("data", weight))


def test_sources_without_an_index_are_mixed_by_weight_too(tmp_path):
    for name in ("rare", "often"):
        texts = (SourceSample(f"{name}-{index}", [], None, "text", {"text": f"a b c{index}"}) for index in range(120))
        without_indexes(packed(tmp_path / name, texts, max_samples=60))
    loader = make_loader(tmp_path, SourceConfig("rare", 1.0), SourceConfig("often", 4.0), row_tokens=3)
    order = [key.split("-")[0] for key in keys(rows_of(loader))]
    assert len(order) == 240
    assert 70 <= order[:100].count("often") <= 90


def test_without_an_index_shards_are_read_in_sequence_and_that_is_said(tmp_path, caplog):
    without_indexes(packed(tmp_path / "data"))
    loader = make_loader(tmp_path)
    assert "6 of 6 shards of 'data' have no index" in caplog.text
    whole = list(loader.rows(Cursor(2)))
    assert sorted(keys([row for row, _ in whole])) == sorted(sample.key for sample in all_kinds())
    for number in range(len(whole)):
        rest = rows_of(make_loader(tmp_path), whole[number][1])
        assert len(rest) == len(whole) - number - 1
        assert all(same(a, b) for a, (b, _) in zip(rest, whole[number + 1 :], strict=True))
    shares = [keys(rows_of(make_loader(tmp_path, data_rank=rank, num_data_ranks=2))) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(sample.key for sample in all_kinds())


def test_without_an_index_what_needs_one_is_refused(tmp_path):
    without_indexes(packed(tmp_path / "data"))
    with pytest.raises(ConfigError, match=r"'data': repeat, limit and weigh=tokens need an index"):
        make_loader(tmp_path, SourceConfig("data", repeat=2.0))


def test_reading_rows_draws_no_random_number_of_the_training(tmp_path):
    """A run resumed inside an epoch starts its processes once more than one that was not."""
    packed(tmp_path / "data")
    before = torch.get_rng_state()
    rows_of(make_loader(tmp_path, workers=1))
    assert torch.equal(torch.get_rng_state(), before)
