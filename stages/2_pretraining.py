"""Stage 2, pretraining: the language model learns to read frames, from many loosely described images and short videos.

Trains the projector and the language model, from stage 1. LongVILA: interleaved and caption data (COYO-25M relabelled,
MMC4, ShareGPT4V), rate 5e-5 with a cosine, 1,024 samples a step, rows of 4K tokens.

    scripts/2_pretraining.sh --run runs/demo --scale tiny
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longvila.config import DataConfig, FrameSampling, Phase, SourceConfig, StageConfig

from .scales import stage

# A small model learns to read one picture before several.
TINY = (
    Phase(
        name="1_frame",
        steps=600,
        learning_rate=2e-3,
        data=DataConfig((SourceConfig("images"),), FrameSampling("uniform", frames=1), row_tokens=1024),
    ),
    Phase(
        name="4_frames",
        steps=100,
        learning_rate=1e-3,
        data=DataConfig(
            (SourceConfig("images"), SourceConfig("short", 2)), FrameSampling("uniform", frames=4), row_tokens=1024
        ),
    ),
)

# SmolLM2 knows words already; the tiny model's rates would undo that.
SMALL = (replace(TINY[0], steps=50, learning_rate=3e-4), replace(TINY[1], steps=30, learning_rate=3e-4))

# 64 rows of about 17 samples are 1,024 samples; one epoch of some 25 million.
CLUSTER = Phase(
    name="captions",
    steps=24_000,
    rows_per_step=64,
    learning_rate=5e-5,
    data=DataConfig(
        sources=(SourceConfig("coyo_25m", 25), SourceConfig("mmc4_core", 7), SourceConfig("sharegpt4v", 1)),
        frames=FrameSampling("uniform", frames=8),
        row_tokens=4096,
        workers=4,
    ),
)

PHASES = {"tiny": TINY, "small": SMALL, "1.5b": (CLUSTER,), "7b": (CLUSTER,)}


def config(scale: str, models: Path) -> StageConfig:
    """Pretraining at `scale`."""
    trains = ("projector", "language_model")
    return stage("2_pretraining", scale, models, PHASES, starts_from="1_alignment", trains=trains)
