"""`summary.json`: what a finished stage was, in figures."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist
from torch import nn

from longvila.config import PARTS, StageConfig
from longvila.train.engine import whole_shape
from longvila.train.metrics import read_jsonl


def write_summary(folder: Path, config: StageConfig, model: nn.Module, moved: dict[str, bool], seconds: float) -> None:
    """Writes `folder/summary.json`.

    Args:
        model: the trained model, whose `requires_grad` flags say what was trained.
        moved: for each part, whether any of its parameters differs from where the stage started.
        seconds: wall-clock time of the last session of the stage (a resumed stage counts only its last).
    """
    lines = read_jsonl(folder / "metrics.jsonl")
    counts = {
        part: {
            "trained": sum(whole_shape(p).numel() for p in getattr(model, part).parameters() if p.requires_grad),
            "total": sum(whole_shape(p).numel() for p in getattr(model, part).parameters()),
        }
        for part in PARTS
    }
    summary = {
        "stage": config.name,
        "scale": config.scale,
        "steps": config.steps,
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "trains": list(config.trains),
        "parts_moved": moved,
        "parameters": counts,
        "trained_parameters": sum(count["trained"] for count in counts.values()),
        "total_parameters": sum(count["total"] for count in counts.values()),
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
