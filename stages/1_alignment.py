"""Stage 1, alignment: the projector learns to put what the tower sees where the language model expects words.

Trains the projector alone, from the base models (`longvila base`), on captioned images. LongVILA: LLaVA-CC3M-595K, rate
1e-3 with a cosine, 2,048 samples a step, rows of 4K tokens.

    scripts/1_alignment.sh --run runs/demo --scale tiny
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longvila.config import DataConfig, FrameSampling, Phase, SourceConfig, StageConfig

from .scales import stage

TINY = Phase(
    name="images",
    steps=150,
    learning_rate=2e-3,
    data=DataConfig(sources=(SourceConfig("images"),), frames=FrameSampling("uniform", frames=1), row_tokens=1024),
)

# A row holds about 17 samples (196 tokens a picture and a caption): 128 rows are 2,048 samples; one epoch.
CLUSTER = Phase(
    name="captions",
    steps=290,
    rows_per_step=128,
    learning_rate=1e-3,
    data=DataConfig(
        sources=(SourceConfig("llava_cc3m_595k"),),
        frames=FrameSampling("uniform", frames=8),
        row_tokens=4096,
        workers=4,
    ),
)

PHASES = {"tiny": (TINY,), "small": (replace(TINY, steps=50),), "1.5b": (CLUSTER,), "7b": (CLUSTER,)}


def config(scale: str, models: Path) -> StageConfig:
    """Alignment at `scale`."""
    return stage("1_alignment", scale, models, PHASES, starts_from=None, trains=("projector",))
