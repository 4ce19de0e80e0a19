"""A run folder as training and evaluation leave it, with figures of our choice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from longvila import content
from longvila.evaluate.runner import run_benchmark

from .eval_parts import ScriptedAnswerer, evaluation_folder

STAGES = {
    "1_alignment": ("projector",),
    "2_pretraining": ("projector", "language_model"),
    "5_long_sft": ("vision", "projector", "language_model"),
}
VARIANTS = {"final": ({}, 1), "stage1": ({}, 4), "swapped": ({"swap": True}, 3)}
"""Options, and of how many answers one is right."""


def make_run(run: Path, steps: int = 40) -> Path:
    """Three stages, three benchmarks in three variants, gradients and timing."""
    for number, (stage, trains) in enumerate(STAGES.items()):
        folder = run / stage
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        losses = [2 + 4 * math.exp(-step / 9) + 0.2 * math.sin(step) for step in range(steps)]
        lines = [
            {"step": step + 1, "phase": f"{8 * 2**number}_frames", "loss": loss, "seconds": 0.5, "tokens": 1024}
            for step, loss in enumerate(losses)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write(folder / "summary.json", summary(stage, trains, losses))
    data = evaluation_folder(run / "data" / "evaluation")
    for variant, (options, one_in) in VARIANTS.items():
        for benchmark in ("needle", "videomme", "captioning"):
            if benchmark != "needle":
                evaluate(run, data, benchmark, variant, one_in, options)
            elif variant != "swapped":
                evaluate(run, data, benchmark, variant, one_in, {"frames": (4, 8, 12)})
    write(run / "gradients.json", {"max_error": 3e-15, "command": "longvila gradients"})
    write(run / "timing.json", {"seconds": 900.0, "steps": {"train": 600, "base": 300}})
    return run


def evaluate(run: Path, data: Path, name: str, variant: str, one_in: int, options: dict[str, Any]) -> None:
    """Answers every `one_in`-th question rightly, the others with a wrong word."""
    benchmark = content.load("eval", name)
    right = {}
    for number, request in enumerate(benchmark.requests(data, **options)):
        metadata = request.metadata
        answer = metadata.get("answer") or metadata.get("caption") or metadata["question"]["answer"]
        right.setdefault(request.question, []).append(answer if number % one_in == 0 else "Dots")
    answerer = ScriptedAnswerer(lambda question: right[question].pop(0))
    answerer.fingerprint = variant
    run_benchmark(benchmark, answerer, data, run / "eval" / variant / name, options=options)


def summary(stage: str, trains: tuple[str, ...], losses: list[float]) -> dict[str, Any]:
    return {
        "stage": stage,
        "scale": "tiny",
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "trained_parameters": 136_576 * len(trains),
        "total_parameters": 2_519_232,
        "trains": list(trains),
        "parts_moved": {part: part in trains for part in ("vision", "projector", "language_model")},
        "seconds": 12.0,
        "seed": 0,
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
    }


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def edit(path: Path, **changes: Any) -> None:
    """Replaces top-level fields of a JSON file."""
    write(path, {**json.loads(path.read_text()), **changes})
