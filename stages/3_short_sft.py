"""Stage 3, short SFT: the whole model learns to follow instructions about images and short videos.

Trains everything, from stage 2. LongVILA: image and short-video instructions (YouCook2, ShareGPTVideo and others), rate
2e-5 with a cosine, 2,048 samples a step, rows of 4K tokens, 8 frames a video.

    scripts/3_short_sft.sh --run runs/demo --scale tiny
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longvila.config import PARTS, DataConfig, FrameSampling, Phase, SourceConfig, StageConfig

from .scales import stage

TINY = (
    Phase(
        name="1_frame",
        steps=700,
        learning_rate=1.5e-3,
        data=DataConfig((SourceConfig("images"),), FrameSampling("uniform", frames=1), row_tokens=1024),
    ),
    Phase(
        name="8_frames",
        steps=300,
        learning_rate=1e-3,
        data=DataConfig(
            (SourceConfig("images"), SourceConfig("short", 2)), FrameSampling("uniform", frames=8), row_tokens=1024
        ),
    ),
    Phase(
        name="16_frames",
        steps=200,
        learning_rate=1e-3,
        data=DataConfig((SourceConfig("short"),), FrameSampling("fps", frames=16), row_tokens=1024),
    ),
)

SMALL = tuple(replace(phase, steps=steps, learning_rate=2e-4) for phase, steps in zip(TINY, (40, 40, 20), strict=True))

# 8 frames are 1,568 tokens, so a row holds 2 videos or some 17 pictures: 256 rows are about 2,048 samples.
CLUSTER = Phase(
    name="short",
    steps=1_000,
    rows_per_step=256,
    learning_rate=2e-5,
    data=DataConfig(
        sources=(
            SourceConfig("llava_instruct", 3),
            SourceConfig("sharegpt_video", 2),
            SourceConfig("youcook2"),
        ),
        frames=FrameSampling("uniform", frames=8),
        row_tokens=4096,
        workers=4,
    ),
)

PHASES = {"tiny": TINY, "small": SMALL, "1.5b": (CLUSTER,), "7b": (CLUSTER,)}


def config(scale: str, models: Path) -> StageConfig:
    """Short supervised fine-tuning at `scale`."""
    return stage("3_short_sft", scale, models, PHASES, starts_from="2_pretraining", trains=PARTS)
