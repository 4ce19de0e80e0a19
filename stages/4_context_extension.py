"""Stage 4, context extension: the language model learns long contexts from text alone, its RoPE base raised on the way.

Trains the language model, from stage 3: low-rank adapters on q, k, v and o with embeddings and norms in full, merged at
the end (`lora=None` trains it in full). LongVILA: SlimPajama at a constant 2e-5, rows of 64K tokens at RoPE base 15.3M,
then of 256K at 207M, starting from the model's own 8K. The next steps of that ladder are 512K at 1.06B and 1M at 3.58B.

    scripts/4_context_extension.sh --run runs/demo --scale tiny
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longvila.config import DataConfig, LoraConfig, Phase, SourceConfig, StageConfig

from .scales import LONG_ROWS, stage

TINY = (
    Phase(
        name="2k",
        steps=30,
        learning_rate=2e-4,
        schedule="constant",
        rope_theta=40_000.0,
        data=DataConfig(sources=(SourceConfig("text"), SourceConfig("long_text")), row_tokens=2048),
    ),
    Phase(
        name="4k",
        steps=15,
        learning_rate=2e-4,
        schedule="constant",
        rope_theta=200_000.0,
        data=DataConfig(sources=(SourceConfig("long_text"),), row_tokens=4096),
    ),
)

# From SmolLM2's own 8K (RoPE base 100,000) to 16K.
SMALL = (
    Phase(
        name="16k",
        steps=3,
        learning_rate=1e-4,
        schedule="constant",
        rope_theta=500_000.0,
        data=DataConfig(sources=(SourceConfig("long_text"),), row_tokens=16_384),
    ),
)

# 4M tokens a step, about 1.2 billion tokens in all.
CLUSTER = (
    Phase(
        name="64k",
        steps=200,
        rows_per_step=64,
        learning_rate=2e-5,
        schedule="constant",
        rope_theta=15.3e6,
        data=DataConfig(sources=(SourceConfig("slimpajama"),), row_tokens=65_536, workers=4),
    ),
    Phase(
        name="256k",
        steps=100,
        rows_per_step=16,
        learning_rate=2e-5,
        schedule="constant",
        rope_theta=207e6,
        data=DataConfig(sources=(SourceConfig("slimpajama"),), row_tokens=262_144, workers=4),
    ),
)

PHASES = {"tiny": TINY, "small": SMALL, "1.5b": CLUSTER, "7b": CLUSTER}


def config(scale: str, models: Path) -> StageConfig:
    """Context extension at `scale`."""
    of_scale: dict[str, Any] = {"parallel": LONG_ROWS[scale]} if scale in LONG_ROWS else {}
    if scale == "small":  # 8K tokens a rank through 30 layers would not fit beside each other on a small machine
        of_scale["recompute"] = "save_attention"
    return stage(
        "4_context_extension",
        scale,
        models,
        PHASES,
        starts_from="3_short_sft",
        trains=("language_model",),
        lora=LoraConfig(rank=8, alpha=16),
        **of_scale,
    )
