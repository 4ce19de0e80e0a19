"""Stage 5, long SFT: the whole model learns to follow instructions about long videos, under sequence parallelism.

Trains everything, from stage 4. LongVILA: 15,292 long videos (Shot2Story), a caption and questions each, 256 frames,
rate 2e-5, at most 131K tokens, 6 epochs. At the tiny scale the frames grow and the rate falls from phase to phase:
started at its longest videos, a model that small learns nothing.

    scripts/5_long_sft.sh --run runs/demo --scale tiny
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longvila.config import PARTS, DataConfig, FrameSampling, Phase, SourceConfig, StageConfig

from .scales import LONG_ROWS, stage


def tiny(frames: int, row_tokens: int, steps: int, learning_rate: float, *sources: str) -> Phase:
    """One rung of the ladder: videos of at most `frames` frames, one a second."""
    data = DataConfig(
        sources=tuple(map(SourceConfig, sources)),
        frames=FrameSampling("fps", frames=frames, fps=1.0),
        row_tokens=row_tokens,
    )
    return Phase(name=f"{frames}_frames", steps=steps, learning_rate=learning_rate, data=data)


TINY = (
    tiny(32, 2048, 400, 1e-3, "short", "medium"),
    tiny(128, 4096, 180, 5e-4, "medium", "long"),
)

SMALL = (replace(TINY[0], steps=25, learning_rate=1e-4), replace(TINY[1], steps=12, learning_rate=1e-4))

# 256 frames are 50,176 tokens: a row of 131K holds two videos and their answers. 16 rows are 32 videos
# a step, so that 6 epochs of 15,292 videos are 2,867 steps.
CLUSTER = Phase(
    name="256_frames",
    steps=2_867,
    rows_per_step=16,
    learning_rate=2e-5,
    data=DataConfig(
        sources=(SourceConfig("shot2story_long"),),
        frames=FrameSampling("uniform", frames=256),
        row_tokens=131_072,
        workers=4,
    ),
)

PHASES = {"tiny": TINY, "small": SMALL, "1.5b": (CLUSTER,), "7b": (CLUSTER,)}


def config(scale: str, models: Path) -> StageConfig:
    """Long supervised fine-tuning at `scale`."""
    parallel = {"parallel": LONG_ROWS[scale]} if scale in LONG_ROWS else {}
    return stage("5_long_sft", scale, models, PHASES, starts_from="4_context_extension", trains=PARTS, **parallel)
