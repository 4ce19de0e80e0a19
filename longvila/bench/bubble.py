"""How long the ranks of a pipeline wait for each other: the order in which each did its work is recorded, and replayed
with a stretch of layers' forward, its gradients of inputs and those of its weights taking one unit of time each."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.distributed.pipelining import PipelineStage

from longvila.bench import engines
from longvila.config import ParallelConfig
from longvila.parallel.launch import run_ranks
from longvila.train.gradients import make_model

Action = tuple[str, int, int]
"""(kind, number of the stretch, row): `forward`, `inputs` and `weights`, or `both` of these at once."""
COST = {"forward": 1, "inputs": 1, "weights": 1, "both": 2}
CASES = (
    ParallelConfig(pipeline=2),
    ParallelConfig(pipeline=4),
    ParallelConfig(pipeline=2, chunks=2),
    ParallelConfig(pipeline=4, chunks=2),
    ParallelConfig(pipeline=2, schedule="zero_bubble"),
    ParallelConfig(pipeline=4, schedule="zero_bubble"),
    ParallelConfig(pipeline=2, chunks=2, schedule="zero_bubble"),
)


def measure(parallel: ParallelConfig) -> dict[str, Any]:
    """One step of `bench.engines`, of whose rows each stage does its own layers.

    Returns:
        `bubble`, the share of the ranks' time that they wait, and `formula`: for 1F1B with v stretches a rank, m rows
        and p stages (p - 1) / (v m + p - 1) (Narayanan et al. 2021, section 2.2); None for other schedules.
    """
    stages, chunks, rows = parallel.pipeline, parallel.chunks, engines.ROWS_PER_STEP
    orders = run_ranks(_record, stages, parallel)
    makespan, busy = replay(orders, stages * chunks)
    return {
        "stages": stages, "chunks": chunks, "schedule": parallel.schedule, "rows": rows,
        "actions": sum(map(len, orders)), "bubble": 1 - busy / (stages * makespan),
        "formula": (stages - 1) / (chunks * rows + stages - 1) if parallel.schedule == "1f1b" else None,
    }  # fmt: skip


def replay(orders: list[list[Action]], stretches: int) -> tuple[int, int]:
    """The time that recorded work takes when nothing but its order and what it needs holds it up, and all its cost.

    Args:
        orders: of each rank.
    """
    done: dict[Action, int] = {}
    time, place = [0] * len(orders), [0] * len(orders)
    while any(at < len(order) for at, order in zip(place, orders, strict=True)):
        before = sum(place)
        for rank, order in enumerate(orders):
            while place[rank] < len(order) and all(need in done for need in _needs(order[place[rank]], stretches)):
                kind, stretch, row = order[place[rank]]
                start = max([time[rank], *(done[need] for need in _needs((kind, stretch, row), stretches))])
                time[rank] = start + COST[kind]
                done["inputs" if kind == "both" else kind, stretch, row] = time[rank]
                place[rank] += 1
        assert sum(place) > before, "each rank's order was carried out, so that nothing waits for ever"
    return max(time), sum(COST[kind] for order in orders for kind, _, _ in order)


def _needs(action: Action, stretches: int) -> list[Action]:
    kind, stretch, row = action
    if kind == "forward":
        return [("forward", stretch - 1, row)] if stretch else []
    if kind == "weights":
        return [("inputs", stretch, row)]
    after = [("inputs", stretch + 1, row)] if stretch + 1 < stretches else []
    return [("forward", stretch, row), *after]


def _record(parallel: ParallelConfig) -> list[Action]:
    """What this rank did in a step, in order."""
    build = partial(make_model, layers=parallel.pipeline * parallel.chunks)
    state, order = engines.make_state(parallel, build=build), []
    forward, backward = PipelineStage.forward_one_chunk, PipelineStage.backward_one_chunk
    weights = PipelineStage.backward_weight_one_chunk

    def forward_one_chunk(stage: Any, row: int, *args: Any, **kwargs: Any) -> Any:
        order.append(("forward", stage.stage_index, row))
        return forward(stage, row, *args, **kwargs)

    def backward_one_chunk(stage: Any, row: int, *args: Any, **kwargs: Any) -> Any:
        order.append(("both" if kwargs.get("full_backward", True) else "inputs", stage.stage_index, row))
        return backward(stage, row, *args, **kwargs)

    def backward_weight_one_chunk(stage: Any, row: int, *args: Any, **kwargs: Any) -> Any:
        order.append(("weights", stage.stage_index, row))
        return weights(stage, row, *args, **kwargs)

    stage: Any = PipelineStage
    stage.forward_one_chunk, stage.backward_one_chunk = forward_one_chunk, backward_one_chunk
    stage.backward_weight_one_chunk = backward_weight_one_chunk
    engines.take_steps(state, 0, 1)
    return order
