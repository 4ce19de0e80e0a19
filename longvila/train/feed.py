"""Feeds a training loop with the rows of each step, agreed on by all ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from longvila.errors import ConfigError, DataError
from longvila.parallel.agree import Agreement, RowView, agree, row_digest
from longvila.parallel.fold import Fold
from longvila.shards.bad import BadSamples
from longvila.shards.document import IGNORE
from longvila.shards.loader import RowLoader
from longvila.shards.order import Cursor
from longvila.shards.rows import Row
from longvila.shards.windows import placeholder_ids


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step on this rank's sequence group, and the step's global count of targets."""

    rows: tuple[Row, ...]
    num_targets: int
    num_dropped: int
    """Documents of this group's rows that were dropped because a rank could not decode them."""
    num_bad: int = 0
    """Samples of this data rank that could not be used, since the phase began."""
    num_shortened: int = 0
    """Its samples that got fewer frames than asked, since then."""


def rows_of_rank(rows: int | None, num_data: int, field: str) -> int:
    """Of so many rows over all data ranks, those that each reads.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    if rows is None:
        return 1
    if rows < 1 or rows % num_data:
        raise ConfigError(
            f"{field}={rows} rows cannot be shared out evenly over {num_data} data ranks; make it a multiple of "
            f"{num_data}, or choose ranks and parallel.* so that it is one"
        )
    return rows // num_data


class RowFeed:
    """Endless steps over the epochs of a loader.

    An epoch ends on all ranks together: a rank whose data ends early takes part with empty rows until all have ended,
    so nothing is left unread and nobody waits. A document that one rank cannot decode is dropped by its whole group.
    """

    def __init__(self, loader: RowLoader, fold: Fold, rows_per_step: int, start: Cursor | None = None) -> None:
        """
        Args:
            rows_per_step: of each data rank.
            start: where the data stands.
        """
        self.cursor = start or Cursor()
        """Where the data stands after the last step."""
        self._loader, self._fold, self._rows_per_step = loader, fold, rows_per_step
        self._dropped: dict[str, str] = {}
        self._iterator = iter(loader.rows(self.cursor))

    @property
    def bad(self) -> BadSamples:
        """The samples of this data rank that could not be used."""
        return self._loader.bad

    def next_step(self) -> Step:
        """The rows of the next step.

        Raises:
            DataError: on every rank, when any rank cannot go on, or when a whole epoch held no usable row.
        """
        started = (self.cursor.window, self.cursor.row) != (0, 0)
        rows, agreement = self._read()
        if agreement.ended:
            if started:
                self.cursor = replace(self.cursor, epoch=self.cursor.epoch + 1, window=0, row=0)
                self._iterator = iter(self._loader.rows(self.cursor))
                rows, agreement = self._read()
            if agreement.ended:
                raise DataError(
                    f"no usable sample in epoch {self.cursor.epoch}; check the shards and the list of bad samples"
                )
        for row, gone in zip(rows, agreement.dropped, strict=True):
            for document in gone:
                assert row is not None, "only a row of this group can have failed"
                reason = dict(row.failed).get(document, "another rank of its sequence group could not decode it")
                self._dropped[row.keys[document]] = reason
                self.bad.listed.setdefault(row.keys[document], reason)  # named now, though counted at the next step
        kept = tuple(
            self._without(row, gone) if row else self._empty_row()
            for row, gone in zip(rows, agreement.dropped, strict=True)
        )
        num_dropped = sum(len(gone) for gone in agreement.dropped)
        return Step(kept, agreement.num_targets, num_dropped, self.bad.count, self.bad.shortened)

    def _read(self) -> tuple[list[Row | None], Agreement]:
        rows: list[Row | None] = [None] * self._rows_per_step
        error: Exception | None = None
        try:
            # Counted here and not where they are dropped: past the bound this raises, and every rank must hear of it.
            while self._dropped:
                self._loader.bad.record(*self._dropped.popitem())
            for index in range(self._rows_per_step):
                rows[index], self.cursor = next(self._iterator, (None, self._past_the_end()))
        except OSError as caught:
            error = DataError(f"the data cannot be read: {caught}")
            error.__cause__ = caught
        except Exception as caught:  # told to every rank by `agree`, which raises it again here
            error = caught
        return rows, agree([_view(row) for row in rows], error, self._fold)

    def _past_the_end(self) -> Cursor:
        """Where all ranks stand after one more row, of which this one has none.

        Without indexes its data may end before others' does. Its rows are counted on, so that every rank has the same
        cursor: a checkpoint keeps that of one.
        """
        return self.cursor if self.cursor.sources else replace(self.cursor, row=self.cursor.row + 1)

    def _without(self, row: Row, gone: tuple[int, ...]) -> Row:
        """The row with placeholders for the documents `gone`. Documents do not see each other, so that drops them.

        Their tokens are replaced too: a rank that could not read a document does not know them, and all ranks of a
        sequence group must agree on where frames go.
        """
        if not gone:
            return row
        ids, labels, start = row.input_ids.clone(), row.labels.clone(), 0
        encode = self._loader.encode
        for document, length in enumerate(row.lengths):
            if document in gone:
                frame_tokens = row.num_frames[document] * encode.tokens_per_frame
                ids[start : start + length] = torch.tensor(placeholder_ids(length, frame_tokens, encode.frame_token))
                labels[start : start + length] = IGNORE
            start += length
        return replace(row, input_ids=ids, labels=labels)

    def _empty_row(self) -> Row:
        num_tokens = 2 * self._fold.num_sequence
        return Row(
            input_ids=torch.zeros(num_tokens, dtype=torch.long),
            labels=torch.full((num_tokens,), IGNORE),
            position_ids=torch.arange(num_tokens),
            lengths=(num_tokens,),
            keys=("",),
            num_frames=(0,),
            frames=torch.zeros((0, 3, self._loader.image_size, self._loader.image_size), dtype=torch.uint8),
            failed=(),
        )


def _view(row: Row | None) -> RowView:
    if row is None:
        return RowView(0)
    return RowView(
        digest=row_digest(row.keys, row.lengths, row.num_frames),
        content=int(row.input_ids.sum()),
        plan=row.plan,
        failed=tuple(document for document, _ in row.failed),
        targets=tuple(int((labels != IGNORE).sum()) for labels in row.labels.split(list(row.lengths))),
    )
