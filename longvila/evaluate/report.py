"""A run's figures in one place: `report.json` for machines, `report.html` for readers.

Everything comes from files below the run's folder; what is not there is reported as absent (null), never guessed.
`longvila/evaluate/bars.py` says which figures the demo is held to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longvila.errors import ConfigError
from longvila.evaluate.bars import compute_bars
from longvila.evaluate.files import read_json, read_json_lines
from longvila.evaluate.page import render_page

CURVE_POINTS = 240
"""Points of a stage's loss curve; each is the mean of the steps it stands for."""
KNOWN_VARIANTS = ("final", "stage1", "swapped")
"""Shown first, in this order; any other folder of scores follows."""


def write_report(run: Path) -> dict[str, Any]:
    """Writes `report.json` and `report.html` into `run`, and returns what the JSON file holds.

    Reads `STAGE/{config.json,metrics.jsonl,summary.json}`, `eval/VARIANT/BENCHMARK/scores.json` (or
    `eval/BENCHMARK/VARIANT/`), `gradients.json` and, where `scripts/demo.sh` wrote it, `timing.json`: such a run is
    held to the demo's bars.

    Raises:
        ConfigError: no such folder, no stage finished in it, or a file that is not JSON.
    """
    report = gather(run)
    (run / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (run / "report.html").write_text(render_page(report, run), encoding="utf-8")
    return report


def gather(run: Path) -> dict[str, Any]:
    """The figures of a run; see `write_report`."""
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; give a run's, e.g. runs/demo")
    stages = [_stage(path.parent) for path in sorted(run.glob("*/summary.json"))]
    if not stages:
        raise ConfigError(
            f"{run}: no stage has finished here (there is no STAGE/summary.json); "
            f"run one first: longvila train 1_alignment --run {run}"
        )
    finished = {stage["stage"] for stage in stages}
    unfinished = sorted({path.parent.name for path in run.glob("*/config.json")} - finished)
    timing, gradients = _read_json(run / "timing.json"), _read_json(run / "gradients.json")
    report = {
        "run": run.resolve().name,
        "scale": stages[-1]["scale"],
        "stages": stages,
        "unfinished_stages": unfinished,
        "evaluations": _evaluations(run),
        "gradients": gradients,
        "minutes": None if timing is None else timing["seconds"] / 60,
        "seconds_by_step": (timing or {}).get("steps", {}),
        "seeds": {stage["stage"]: stage["seed"] for stage in stages},
        "versions": stages[-1]["versions"],
    }
    # The demo is held to its bars; it notes its time. Other runs have other data, scales and evaluations.
    report["bars"] = compute_bars(report) if timing else []
    return report


def _stage(folder: Path) -> dict[str, Any]:
    """One finished stage: its summary, minutes, and loss curve."""
    summary = _read_json(folder / "summary.json")
    metrics = [line for line in _read_lines(folder / "metrics.jsonl") if not line.get("skipped")]
    # A stage that was resumed knows the time of its last session only; its steps know theirs.
    seconds = max(summary["seconds"], sum(line.get("seconds", 0.0) for line in metrics))
    tenth = max(1, len(metrics) // 10)
    losses = [line["loss"] for line in metrics]
    return {
        **summary,
        "minutes": seconds / 60,
        "mean_loss_first_tenth": sum(losses[:tenth]) / tenth if losses else summary["first_loss"],
        "mean_loss_last_tenth": sum(losses[-tenth:]) / tenth if losses else summary["last_loss"],
        "phases": list(dict.fromkeys(line["phase"] for line in metrics)),
        "curve": _curve(metrics),
    }


def _curve(metrics: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss), thinned by averaging neighbours."""
    width = -(-len(metrics) // CURVE_POINTS) or 1
    groups = [metrics[start : start + width] for start in range(0, len(metrics), width)]
    return [(group[-1]["step"], sum(line["loss"] for line in group) / len(group)) for group in groups]


def _evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """Scores by benchmark and variant. Picture names are made relative to the run's folder."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((run / "eval").glob("*/*/scores.json")):
        scores = _read_json(path)
        names = path.parent.relative_to(run / "eval").parts
        variant = next((name for name in names if name != scores["benchmark"]), names[0])
        folder = path.parent.relative_to(run)
        for example in scores.get("examples", []):
            example["frames"] = [str(folder / name) for name in example["frames"]]
        found.setdefault(scores["benchmark"], {})[variant] = scores
    return {benchmark: dict(sorted(scores.items(), key=_variant_order)) for benchmark, scores in found.items()}


def _variant_order(item: tuple[str, Any]) -> tuple[int, str]:
    name = item[0]
    return KNOWN_VARIANTS.index(name) if name in KNOWN_VARIANTS else len(KNOWN_VARIANTS), name


def _read_json(path: Path) -> Any:
    """The content of a JSON file; None when there is no such file."""
    return read_json(path) if path.is_file() else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [line for _, line in read_json_lines(path)] if path.is_file() else []
