"""`longvila bench attention`: what the attention engine promises, measured. Sections, tables and bars.

Each section is a list of rows in the JSON file; the bars are computed from those rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from longvila.bench import balance, exact, kept, peers, steps, volume
from longvila.bench.bars import at_most, sections
from longvila.config import LayoutName
from longvila.parallel.blocks import Mask
from longvila.parallel.choose import LAYOUTS

Rows = list[dict[str, Any]]
MODEL = (
    "times are a model: 150 TFLOP/s, 200 GB/s inside a node of 8, 25 GB/s between; work, tokens and keys are counted"
)

EXACT = 1e-12
IMBALANCE = 1.05
BYTES, BYTES_OF_A_MIX = 0.30, 0.35
LIGHTSEQ, LIGHTSEQ_MARGIN = 4.7, 0.1
TIME_ERROR = 0.10
PEER_TIME = 1.0


def run(quick: bool, show: Callable[[str, Rows, str], None]) -> dict[str, Any]:
    """Runs all sections and returns what is written as JSON.

    Args:
        quick: fewer masks, sizes, repeats and layouts; under a minute on two cores.
        show: called with (title, rows, note) as each section is done.
    """
    figures: dict[str, Any] = {"quick": quick}

    section = sections(figures, show)

    # First: ranks are forked from this process, and after the other sections two of them took a fifth longer for the
    # same steps of a balanced ring, in every whole run (why was not found out).
    times = [steps.measure(parts, rounds=1 if quick else 5) for parts in (2, 4)]
    section("time", [{**asdict(one), "error": one.error} for one in times], "CPU time along the critical path, forward")

    masks = [Mask(), Mask(window=8)] if quick else [Mask(), Mask(window=1), Mask(window=8), Mask(causal=False)]
    heads = exact.HEADS[1:3] if quick else exact.HEADS
    rows = exact.ROWS[:2] if quick else exact.ROWS
    errors = [asdict(one) for one in exact.measure((1, 2, 3, 4), masks, rows, heads)]
    section("exact", errors, "largest error of out, dq, dk, dv in fp64 against a dense mask on one process")

    parts = (4, 8) if quick else (4, 8, 16, 64)
    layouts: list[LayoutName] = ["joint"] if quick else list(LAYOUTS)
    balances = section("balance", [asdict(one) for one in balance.measure(parts, 20, layouts)], MODEL)

    volumes = section("bytes", [asdict(one) for one in volume.measure()], "of all ranks, one layer, both passes")
    ratio = volume.lightseq_volume_ratio()
    figures["lightseq_volume_ratio"] = ratio

    policies = section("recompute", [asdict(one) for one in kept.measure()], "a layer's forward and backward")
    compared = section("peers", peers.compare(quick), "one thread a rank, CPU time summed over ranks")
    figures["bars"] = _bars(errors, balances, volumes, ratio, times, policies, peers.time_ratio(compared))
    return figures


def _bars(
    errors: Rows,
    balances: Rows,
    volumes: Rows,
    ratio: float,
    times: Sequence[steps.StepTime],
    policies: Rows,
    peer_time: float | None,
) -> list[dict[str, Any]]:
    bars = [at_most("exact_max_error", max(row["error"] for row in errors), EXACT)]
    for parts in (4, 8):
        rows = [row for row in balances if row["layout"] == "joint" and row["parts"] == parts]
        worst = max(max(row["work"], row["makespan"]) for row in rows)
        shares = [row["key_share"] for row in rows]
        bars.append(at_most(f"joint_imbalance_p{parts}", worst, IMBALANCE))
        bar = at_most(f"joint_bytes_p{parts}", sum(shares) / len(shares), BYTES)
        bars.append({**bar, "holds": bar["holds"] and max(shares) <= BYTES_OF_A_MIX})
    bars.append(at_most("bytes_mismatch", sum(abs(row["counted"] - row["formula"]) for row in volumes), 0))
    near = abs(ratio - LIGHTSEQ) <= LIGHTSEQ_MARGIN
    bound = f"{LIGHTSEQ} +- {LIGHTSEQ_MARGIN}"
    bars.append({"name": "lightseq_volume_ratio", "value": ratio, "bound": bound, "holds": near})
    bars += [at_most(f"time_ratio_error_p{one.parts}", one.error, TIME_ERROR) for one in times]
    kept_forwards = [row["forwards"] for row in policies if row["policy"] in ("save_attention", "offload_attention")]
    bars.append(at_most("attention_forwards_per_layer", max(kept_forwards), 1))
    bars.append(at_most("peer_time_ratio", peer_time, PEER_TIME))
    return bars
