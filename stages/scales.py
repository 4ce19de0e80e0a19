"""What the scale alone decides, the same in every stage: precision, recomputation, saving, and how ranks are folded.

The stage files give the rest. `tiny` and `small` run on two CPU ranks, which read each row together in every stage, so
that the demo goes through sequence parallelism from its first step. `1.5b` and `7b` are LongVILA's sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longvila.config import ParallelConfig, Phase, StageConfig
from longvila.errors import ConfigError

from .base import models as base_models

SCALES = ("tiny", "small", "1.5b", "7b")

LONG_ROWS = {
    "1.5b": ParallelConfig(head=2, inner=4),  # Qwen2-1.5B: 12 query heads, 2 key/value heads
    "7b": ParallelConfig(head=4, inner=2),  # Qwen2-7B: 28 query heads, 4 key/value heads
}
"""The fold of rows too long for one GPU: one node of 8 reads one row, heads split as far as the key/value heads go."""


def stage(name: str, scale: str, models: Path, phases: dict[str, tuple[Phase, ...]], **fields: Any) -> StageConfig:
    """The configuration of stage `name` at `scale`: its phases there, and what every stage has at that scale.

    Args:
        models: the folder of the base models (`longvila base`).
        phases: the stage's phases at each scale.
        fields: further fields of `StageConfig`; they win over those of the scale.

    Raises:
        ConfigError: for a scale that does not exist.
    """
    if scale not in SCALES:
        raise ConfigError(f"there is no scale '{scale}'; there are: {', '.join(SCALES)}")
    if scale in ("tiny", "small"):
        of_scale: dict[str, Any] = {"parallel": ParallelConfig(inner=2), "checkpoint_every": 100}
    else:
        of_scale = {"precision": "bf16", "recompute": "save_attention", "checkpoint_every": 200}
    model = base_models(scale, models)
    return StageConfig(**{"name": name, "scale": scale, "model": model, "phases": phases[scale], **of_scale, **fields})
