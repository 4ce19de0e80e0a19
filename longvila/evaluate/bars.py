"""The bars the demo is held to (a run with `timing.json`), computed from the tables of its report.

A bar is {name, value, bound, holds, conditions}. Value and bound are those of its first condition; it holds when all of
its conditions do. A figure that is absent makes its bar fail: nothing is assumed.
"""

from __future__ import annotations

from typing import Any

NEEDLE_FRAMES = 128
NEEDLE_ACCURACY = 0.9
ANSWERS_PER_CELL = 20
NUM_QUESTIONS = 300
LOWER_BOUND = 0.35
SWAPPED_ACCURACY = 0.30
RECALL_FACTOR = 1.5
DISTINCT_SHARE = 0.9
GRADIENT_ERROR = 1e-11
DEMO_MINUTES = {"tiny": 20.0, "small": 90.0}

Condition = dict[str, Any]


def compute_bars(report: dict[str, Any]) -> list[dict[str, Any]]:
    """All bars, in a fixed order."""
    scores = report["evaluations"]
    return [
        _bar("stage1_only_projector_moved", _stage_one(report["stages"])),
        _bar("needle_128_generated", _needle(scores.get("needle", {}).get("final"))),
        _bar("videomme_over_chance", _videomme(scores.get("videomme", {}))),
        _bar("caption_over_stage1", _captioning(scores.get("captioning", {}))),
        _bar(
            "gradient_max_error",
            [_at_most("largest error", (report["gradients"] or {}).get("max_error"), GRADIENT_ERROR)],
        ),
        _bar("demo_minutes", [_at_most("minutes", report["minutes"], DEMO_MINUTES.get(report["scale"], 0.0))]),
    ]


def _bar(name: str, conditions: list[Condition]) -> dict[str, Any]:
    return {
        "name": name,
        "value": conditions[0]["value"],
        "bound": conditions[0]["bound"],
        "holds": all(condition["holds"] for condition in conditions),
        "conditions": conditions,
    }


def _at_least(name: str, value: float | None, bound: float | None) -> Condition:
    holds = value is not None and bound is not None and value >= bound
    return {"name": name, "value": value, "bound": bound, "kind": "at least", "holds": holds}


def _at_most(name: str, value: float | None, bound: float) -> Condition:
    return {
        "name": name,
        "value": value,
        "bound": bound,
        "kind": "at most",
        "holds": value is not None and value <= bound,
    }


def _stage_one(stages: list[dict[str, Any]]) -> list[Condition]:
    """Only the projector moved, and the loss fell (means of the first and the last tenth of the steps)."""
    stage = next((stage for stage in stages if stage["stage"] == "1_alignment"), None)
    moved = None if stage is None else "+".join(part for part, moved in stage["parts_moved"].items() if moved)
    first, last = (None, None) if stage is None else (stage["mean_loss_first_tenth"], stage["mean_loss_last_tenth"])
    falls = first is not None and last is not None and last < first
    return [
        {"name": "parts moved", "value": moved, "bound": "projector", "kind": "equals", "holds": moved == "projector"},
        {"name": "last loss below first", "value": last, "bound": first, "kind": "below", "holds": falls},
    ]


def _needle(scores: dict[str, Any] | None) -> list[Condition]:
    """The worst length up to NEEDLE_FRAMES, averaged over depth; NEEDLE_FRAMES itself must have been asked."""
    cells = [cell for cell in (scores or {}).get("cells", []) if cell["frames"] <= NEEDLE_FRAMES]
    by_length: dict[int, list[float]] = {}
    for cell in cells:
        by_length.setdefault(cell["frames"], []).append(cell["correct"] / cell["answers"])
    worst = min((sum(row) / len(row) for row in by_length.values()), default=None)
    return [
        _at_least(f"worst length up to {NEEDLE_FRAMES} frames", worst, NEEDLE_ACCURACY),
        _at_least("longest of those lengths", max(by_length, default=None), NEEDLE_FRAMES),
        _at_least("answers in each cell", min((cell["answers"] for cell in cells), default=None), ANSWERS_PER_CELL),
    ]


def _videomme(variants: dict[str, Any]) -> list[Condition]:
    """By lmms-eval's protocol, which counts an answer without a letter as wrong."""
    final, swapped = (variants.get(name, {}).get("lmms_eval", {}).get("overall", {}) for name in ("final", "swapped"))
    lower = final.get("lower_95")
    return [
        {
            **{"name": "lower 95 % bound of accuracy", "value": lower, "bound": LOWER_BOUND, "kind": "above"},
            "holds": lower is not None and lower > LOWER_BOUND,
        },
        _at_least("questions", final.get("counted"), NUM_QUESTIONS),
        _at_most("accuracy with another film's frames", swapped.get("accuracy"), SWAPPED_ACCURACY),
    ]


def _captioning(variants: dict[str, Any]) -> list[Condition]:
    final, stage1, swapped = (variants.get(name, {}) for name in ("final", "stage1", "swapped"))
    recall = final.get("event_recall")

    def over(other: dict[str, Any], name: str) -> Condition:
        control = other.get("event_recall")  # None also where no reference names events
        bound = None if control is None else RECALL_FACTOR * control
        condition = _at_least(f"event recall, {RECALL_FACTOR:g} x {name}", recall, bound)
        return {**condition, "holds": condition["holds"] and bool(recall)}  # nothing recalled beats nobody

    distinct = final["num_distinct"] / final["num_distinct_references"] if final else None
    return [
        over(stage1, "stage 1's"),
        over(swapped, "another film's frames"),
        _at_least("different captions for each different reference", distinct, DISTINCT_SHARE),
    ]
