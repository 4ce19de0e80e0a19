"""What ranks agree on before each step: ends, drops, errors. Nobody waits for a rank that went another way."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.distributed as dist

from longvila.bench.engines import DOCUMENTS, make_rows
from longvila.config import ParallelConfig
from longvila.errors import DataError
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import RankError, run_ranks
from longvila.shards.windows import placeholder_ids
from longvila.train.feed import IGNORE, RowFeed

from .training_parts import RowList

SEQUENCE = ParallelConfig(inner=2)


def read_uneven_epochs():
    """Data rank 0 has three rows, data rank 1 has one; steps of one row."""
    fold = make_fold(ParallelConfig(), "cpu")
    rows = make_rows(fold, range(3) if fold.data_rank == 0 else range(3, 4))
    feed = RowFeed(RowList(rows), fold, rows_per_step=1)
    seen = []
    for _ in range(4):
        step = feed.next_step()
        seen.append((feed.cursor.epoch, feed.cursor.row, step.rows[0].keys[0], step.num_targets))
    return seen


def test_data_ranks_end_an_epoch_together_and_nothing_is_left_unread():
    first, second = run_ranks(read_uneven_epochs, 2)
    assert [(epoch, rows) for epoch, rows, _, _ in first] == [(0, 1), (0, 2), (0, 3), (1, 1)]
    assert [key for _, _, key, _ in first] == ["row0-0", "row1-0", "row2-0", "row0-0"]
    assert [key for _, _, key, _ in second] == ["row3-0", "", "", "row3-0"]
    counts = [sum(document.answer for document in documents) for documents in DOCUMENTS]
    expected = [counts[0] + counts[3], counts[1], counts[2], counts[0] + counts[3]]
    assert [targets for *_, targets in first] == [targets for *_, targets in second] == expected


def read_and_go_on(counts):
    """Data ranks of so many rows each; the cursors of four steps, and what is read again from rank 0's after two."""
    fold = make_fold(ParallelConfig(), "cpu")
    loader = RowList(make_rows(fold, range(sum(counts[: fold.data_rank]), sum(counts[: fold.data_rank + 1]))))
    feed = RowFeed(loader, fold, rows_per_step=1)
    seen = [(feed.next_step().rows[0].keys[0], feed.cursor) for _ in range(4)]
    kept = [seen[1][1]]
    dist.broadcast_object_list(kept, src=0)
    feed = RowFeed(loader, fold, rows_per_step=1, start=kept[0])
    return seen, [(feed.next_step().rows[0].keys[0], feed.cursor) for _ in range(2)]


@pytest.mark.parametrize("counts", [(1, 3), (3, 1), (0, 3), (1, 0)])
def test_any_ranks_cursor_is_that_of_all_however_uneven_their_data(counts):
    answers = run_ranks(read_and_go_on, 2, counts)
    for (seen, again), count, first in zip(answers, counts, (0, counts[0]), strict=True):
        rows = [f"row{first + row}-0" if row < count else "" for row in range(max(counts))]
        assert [key for key, _ in seen] == (rows * 4)[:4]  # epoch after epoch
        assert again == seen[2:]
    assert [cursor for _, cursor in answers[0][0]] == [cursor for _, cursor in answers[1][0]]


def read_with_a_failure(failing_rank):
    fold = make_fold(SEQUENCE, "cpu")
    (row,) = make_rows(fold, [0])
    if fold.sequence_rank == failing_rank:
        row = replace(row, failed=((0, "cannot be decoded"),))
    loader = RowList([row, row])
    feed = RowFeed(loader, fold, rows_per_step=1)
    step = feed.next_step()
    named = dict(loader.bad.listed)  # at once: there may be no other step
    feed.next_step()
    assert loader.bad.listed == named
    assert loader.bad.count == 1
    labels = step.rows[0].labels.split(list(row.lengths))
    kept = [int((one != IGNORE).sum()) for one in labels]
    before = [int((one != IGNORE).sum()) for one in row.labels.split(list(row.lengths))]
    return kept, before, step.num_targets, step.num_dropped, loader.bad.listed


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_document_that_one_rank_cannot_decode_is_dropped_by_its_whole_group(failing_rank):
    answers = run_ranks(read_with_a_failure, 2, failing_rank)
    for kept, before, num_targets, num_dropped, listed in answers:
        assert before[0] > 0
        assert kept == [0, *before[1:]]
        assert num_targets == sum(before[1:])
        assert num_dropped == 1
        assert list(listed) == ["row0-0"]
    assert answers[failing_rank][-1]["row0-0"] == "cannot be decoded"


def read_where_one_rank_cannot(failing_rank):
    """The failing rank has a placeholder for its first document, as `Windows.document` makes one."""
    fold = make_fold(SEQUENCE, "cpu")
    (row,) = make_rows(fold, [0])
    loader = RowList([])
    if fold.sequence_rank == failing_rank:
        length = row.lengths[0]
        frame_tokens = row.num_frames[0] * loader.encode.tokens_per_frame
        ids, labels = row.input_ids.clone(), row.labels.clone()
        ids[:length] = torch.tensor(placeholder_ids(length, frame_tokens, loader.encode.frame_token))
        labels[:length] = IGNORE
        row = replace(row, input_ids=ids, labels=labels, failed=((0, "cannot be read"),))
    step = RowFeed(RowList([row]), fold, rows_per_step=1).next_step()
    (found,) = step.rows
    places = int((found.input_ids == loader.encode.frame_token).sum())
    return found.input_ids, found.labels, step.num_targets, places, sum(row.num_frames) * loader.encode.tokens_per_frame


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_document_that_one_rank_cannot_read_is_the_same_placeholder_on_all(failing_rank):
    first, second = run_ranks(read_where_one_rank_cannot, 2, failing_rank)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2] == (first[1] != IGNORE).sum()
    assert first[3] == first[4]  # every frame of the row keeps its places


class BrokenOnOneRank(RowList):
    def rows(self, start):
        yield from islice(super().rows(start), 1)
        raise DataError("shard-3.tar is unreadable")


def read_past_an_error():
    fold = make_fold(ParallelConfig(), "cpu")
    rows = make_rows(fold, range(4))
    feed = RowFeed((BrokenOnOneRank if fold.data_rank == 1 else RowList)(rows), fold, rows_per_step=1)
    feed.next_step()
    feed.next_step()


def test_an_error_on_one_rank_stops_every_rank_at_once():
    with pytest.raises(RankError) as caught:
        run_ranks(read_past_an_error, 2, timeout=60.0)
    assert "DataError: shard-3.tar is unreadable" in str(caught.value)
    assert "DataError: rank 1 could not read its data" in str(caught.value)


def read_past_an_error_in_a_pipeline():
    fold = make_fold(ParallelConfig(pipeline=2), "cpu")
    rows = make_rows(fold, range(4))
    feed = RowFeed((BrokenOnOneRank if dist.get_rank() == 1 else RowList)(rows), fold, rows_per_step=1)
    feed.next_step()
    feed.next_step()


def test_an_error_in_a_pipeline_names_the_rank_of_the_world():
    with pytest.raises(RankError, match="DataError: rank 1 could not read its data"):
        run_ranks(read_past_an_error_in_a_pipeline, 4, timeout=60.0)


def read_different_rows():
    fold = make_fold(SEQUENCE, "cpu")
    feed = RowFeed(RowList(make_rows(fold, [fold.sequence_rank])), fold, rows_per_step=1)
    feed.next_step()


def test_ranks_of_a_sequence_group_that_read_different_rows_are_refused():
    with pytest.raises(RankError, match="read different rows"):
        run_ranks(read_different_rows, 2)


def read_other_words():
    fold = make_fold(SEQUENCE, "cpu")
    (row,) = make_rows(fold, [0])
    row = replace(row, input_ids=row.input_ids + (fold.sequence_rank == 1) * (row.input_ids == row.input_ids[0]))
    RowFeed(RowList([row]), fold, rows_per_step=1).next_step()


def test_ranks_of_a_sequence_group_that_read_other_words_in_the_same_places_are_refused():
    with pytest.raises(RankError, match="read different rows"):
        run_ranks(read_other_words, 2)


def read_by_plans(plans):
    fold = make_fold(ParallelConfig(), "cpu")
    rows = [replace(row, plan=plans[fold.data_rank]) for row in make_rows(fold, [fold.data_rank])]
    RowFeed(RowList(rows), fold, rows_per_step=1).next_step()


def test_data_ranks_that_follow_different_plans_are_refused():
    run_ranks(read_by_plans, 2, (7, 7))
    with pytest.raises(RankError, match="data ranks planned different rows"):
        run_ranks(read_by_plans, 2, (7, 8))


def read_nothing():
    fold = make_fold(ParallelConfig(), "cpu")
    RowFeed(RowList([]), fold, rows_per_step=1).next_step()


def test_an_epoch_without_a_usable_sample_is_an_error_and_not_an_endless_loop():
    with pytest.raises(RankError, match="no usable sample in epoch 0"):
        run_ranks(read_nothing, 2)
