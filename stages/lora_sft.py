"""Low-rank adapters on videos of your own, from any trained model: the cheapest way to teach it a new kind of film.

Trains adapters on every projection of the language model, and the projector in full; the tower stays. They are merged
at the end, so that what comes out is a model like any other. Pack a folder (`data/README.md`), then:

    longvila pack folder -o folder=my_videos --out runs/mine/data/my_videos
    scripts/run_stage.sh lora_sft --run runs/mine --scale 7b --set starts_from=runs/demo/5_long_sft/model
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longvila.config import DataConfig, FrameSampling, LoraConfig, Phase, SourceConfig, StageConfig

from .scales import stage

CLUSTER = Phase(
    name="my_videos",
    steps=300,
    learning_rate=1e-4,
    warmup=0.1,
    data=DataConfig(
        sources=(SourceConfig("my_videos"),),
        frames=FrameSampling("fps", frames=64, fps=1.0),
        row_tokens=16_384,
        workers=4,
    ),
)
SMALL = replace(CLUSTER, steps=30, data=replace(CLUSTER.data, row_tokens=4096, workers=0))
TINY = replace(SMALL, data=replace(SMALL.data, frames=FrameSampling("fps", frames=32, fps=1.0), row_tokens=2048))

PHASES = {"tiny": (TINY,), "small": (SMALL,), "1.5b": (CLUSTER,), "7b": (CLUSTER,)}

EVERY_PROJECTION = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(scale: str, models: Path) -> StageConfig:
    """Low-rank adaptation at `scale`."""
    return stage(
        "lora_sft",
        scale,
        models,
        PHASES,
        starts_from="5_long_sft",
        trains=("projector", "language_model"),
        lora=LoraConfig(rank=16, alpha=32, targets=EVERY_PROJECTION, full=()),
    )
