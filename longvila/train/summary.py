"""`summary.json`: what a finished stage was, in figures."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch import nn

from longvila.config import PARTS, StageConfig
from longvila.train.metrics import read_jsonl


class Count(NamedTuple):
    """Parameters of a part of a model."""

    total: int
    trained: int

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.total:,}"


def count_parameters(model: nn.Module) -> dict[str, Count]:
    """Of each part, by name. The model must be whole."""
    parts = {part: list(getattr(model, part).parameters()) for part in PARTS}
    return {
        part: Count(sum(p.numel() for p in ps), sum(p.numel() for p in ps if p.requires_grad))
        for part, ps in parts.items()
    }


def write_summary(
    folder: Path, config: StageConfig, parameters: dict[str, Count], moved: dict[str, bool], seconds: float
) -> None:
    """Writes `folder/summary.json`.

    Args:
        parameters: of each part of the model.
        moved: for each part, whether any of its parameters differs from where the stage started.
        seconds: wall-clock time of the last session of the stage (a resumed stage counts only its last).
    """
    lines = read_jsonl(folder / "metrics.jsonl")
    summary = {
        "stage": config.name,
        "scale": config.scale,
        "steps": config.steps,
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "trains": list(config.trains),
        "parts_moved": moved,
        "parameters": {part: count._asdict() for part, count in parameters.items()},
        "trained_parameters": sum(count.trained for count in parameters.values()),
        "total_parameters": sum(count.total for count in parameters.values()),
        "ranks": dist.get_world_size(),
        "sequence_ranks": config.parallel.sequence,
        "tokens": sum(line["tokens"] for line in lines),
        "frames": sum(line["frames"] for line in lines),
        "dropped": sum(line["dropped"] for line in lines),
        "seconds": seconds,
        "seed": config.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "open_clip_torch", "webdataset", "av")},
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
