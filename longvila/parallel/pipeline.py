"""Rows through the stages of a pipeline, by torch's schedules. Knows no model: a stage is a module that takes the row's
number and what the stage before returned.

Rows differ in length, and torch's stages receive tensors of one shape: what travels is filled up to the longest row of
the step, and the stage that receives it takes off what was added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

from longvila.config import ParallelConfig
from longvila.errors import ConfigError
from longvila.parallel.fold import Fold

SPLITS_BACKWARD = torch.__version__ >= "2.14"  # compared as versions, not letter by letter
"""Between 2.11, which cannot, and 2.14 none was tried."""


class Chunk(Protocol):
    """A stretch of a model: a module whose forward takes what the chunk before it returned, (1, longest, D), but for
    the first, and `row`, a tensor with a row's number. It returns such a tensor, the last the row's loss (1,)."""

    rows: Sequence[Any]
    """Of the step at hand, by number."""
    longest: int
    """Tokens of a tensor that travels."""


class Pipeline:
    """This rank's chunks of a model, and what runs rows through all of them."""

    def __init__(
        self, chunks: Sequence[Any], parallel: ParallelConfig, fold: Fold, width: int, dtype: torch.dtype
    ) -> None:
        """
        Args:
            chunks: this rank's, each a `Chunk`; chunk number i is the pipeline's number i * stages + own stage.
            width: of what travels, which is of type `dtype`.
        """
        self.chunks, self._fold, self._width, self._dtype = chunks, fold, width, dtype
        self._zero_bubble = parallel.schedule == "zero_bubble"
        if self._zero_bubble and not SPLITS_BACKWARD:
            raise ConfigError(
                f"parallel.schedule=zero_bubble needs torch 2.14 or newer; this one, {torch.__version__}, cannot split "
                f"the backward of autograd functions; use 1f1b"
            )

    def run(self, rows: Sequence[Any], tokens: Sequence[int], divisor: float, backward: bool = True) -> float:
        """The sum of the rows' losses on this rank, which only ranks of the last stage have. Collective over the world.

        Args:
            rows: what chunks need of each row.
            tokens: of each row on this rank.
            divisor: by which every loss is divided before its gradients are taken.
            backward: whether they are, and added to those that parameters have.
        """
        longest = max(tokens)
        for chunk in self.chunks:
            chunk.rows, chunk.longest = rows, longest
        schedule = self.schedule(len(rows), longest, divisor, backward)
        numbers, losses = torch.arange(len(rows)), []
        if backward:
            schedule.step(row=numbers, target=numbers, losses=losses, return_outputs=False)
        else:
            schedule.eval(row=numbers, target=numbers, losses=losses)
        for chunk in self.chunks:
            chunk.rows = ()
        return sum(loss.item() for loss in losses) * divisor

    def schedule(self, rows: int, longest: int, divisor: float, backward: bool = True) -> Any:
        """torch's schedule of a step of `rows` rows."""
        check_rows(rows, self._fold.num_stages)
        stages: list[Any] = [self._stage(number, chunk, longest, backward) for number, chunk in enumerate(self.chunks)]
        kind = ScheduleInterleavedZeroBubble if self._zero_bubble else ScheduleInterleaved1F1B
        # What is divided is divided by the count of targets, not by that of rows.
        return kind(stages, rows, loss_fn=lambda loss, _: loss.sum() / divisor, scale_grads=False)

    def _stage(self, number: int, chunk: nn.Module, longest: int, backward: bool) -> PipelineStage:
        fold = self._fold
        index, count = number * fold.num_stages + fold.stage_number, len(self.chunks) * fold.num_stages
        device = torch.device(fold.mesh.device_type)

        def travels() -> Tensor:
            shape = (1, longest, self._width)
            return torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=backward)

        loss = torch.empty(1, dtype=torch.promote_types(self._dtype, torch.float32), device="meta")
        return PipelineStage(
            chunk, index, count, device,
            input_args=() if index == 0 else (travels(),),
            output_args=(loss.requires_grad_(backward),) if index == count - 1 else (travels(),),
            group=fold.pipeline,
        )  # fmt: skip


def check_rows(rows: int, stages: int, field: str = "rows_per_step") -> None:
    """Raises ConfigError for a number of rows that torch's schedules have no order for."""
    rounds = max(1, rows // stages)
    if rows % rounds:
        raise ConfigError(
            f"{rows} rows of each data rank cannot follow one another through parallel.pipeline={stages} stages in "
            f"{rounds} equal rounds; choose {field} so that each data rank has a multiple of {stages}"
        )


def over_stages(value: Tensor | None, fold: Fold) -> list[Tensor]:
    """A number of each stage, on all of them; zero where one has none. Collective over a pipeline."""
    value = torch.zeros((), dtype=torch.float64) if value is None else value
    everyone = [torch.zeros((), dtype=torch.float64, device=fold.mesh.device_type) for _ in range(fold.num_stages)]
    dist.all_gather(everyone, value.to(everyone[0]), group=fold.pipeline)
    return everyone


def add_other_end(tensor: Tensor, fold: Fold) -> None:
    """The sum, in place, of what the first and the last rank of a pipeline hold. Both call it."""
    other = dist.get_global_rank(fold.pipeline, fold.num_stages - 1 if fold.stage_number == 0 else 0)
    mine, theirs = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
    exchange = [
        dist.P2POp(dist.isend, mine, other, fold.pipeline), dist.P2POp(dist.irecv, theirs, other, fold.pipeline)
    ]  # fmt: skip
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    tensor += theirs


def from_stages(own: Iterator[tuple[str, Tensor]], fold: Fold) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of all stages, the first's first, each name once, on all ranks. Collective over a pipeline.

    Args:
        own: those of this rank's stage.
    """
    seen: set[str] = set()
    for number in range(fold.num_stages):
        source = dist.get_global_rank(fold.pipeline, number)
        while fold.num_stages > 1:
            name, tensor = next(own, ("", None)) if number == fold.stage_number else ("", None)
            told: list[Any] = [(name, None if tensor is None else (tensor.shape, tensor.dtype))]
            dist.broadcast_object_list(told, source, group=fold.pipeline)
            ((name, about),) = told
            if about is None:
                break
            if tensor is None:
                tensor = torch.empty(about[0], dtype=about[1], device=fold.mesh.device_type)
            tensor = tensor.contiguous()
            dist.broadcast(tensor, source, group=fold.pipeline)
            if name not in seen:
                seen.add(name)
                yield name, tensor
    if fold.num_stages == 1:
        yield from own
