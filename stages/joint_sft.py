"""Stage 5 as one joint stage: long videos and the short sources of stage 3 together, after context extension.

A variant in two lines: stage 5's configuration with stage 3's sources added to each phase. LongVILA found the sequence
1-2-3-4-5 better (VideoMME without subtitles 57.5 against 55.9).

    scripts/run_stage.sh joint_sft --run runs/demo --scale tiny
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longvila import content
from longvila.config import Phase, SourceConfig, StageConfig


def config(scale: str, models: Path) -> StageConfig:
    """Joint short and long supervised fine-tuning at `scale`."""
    short, long = (content.load("stages", name).config(scale, models) for name in ("3_short_sft", "5_long_sft"))
    sources = {source.shards: source for phase in short.phases for source in phase.data.sources}
    return replace(long, name="joint_sft", phases=tuple(add(phase, *sources.values()) for phase in long.phases))


def add(phase: Phase, *sources: SourceConfig) -> Phase:
    """The phase with those of `sources` that it does not read yet."""
    known = {source.shards for source in phase.data.sources}
    more = tuple(source for source in sources if source.shards not in known)
    return replace(phase, data=replace(phase.data, sources=phase.data.sources + more))
