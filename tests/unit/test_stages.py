"""Every stage builds at every scale, and says what LongVILA says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from longvila import config as configuration
from longvila import content
from longvila.config import PARTS, StageConfig
from longvila.errors import ConfigError

SCALES = content.load("stages", "scales").SCALES
STAGES = ["1_alignment", "2_pretraining", "3_short_sft", "4_context_extension", "5_long_sft"]
TRAINS = [("projector",), ("projector", "language_model"), PARTS, ("language_model",), PARTS]
SPLITS = {"images", "short", "medium", "long", "text", "long_text"}
TOKENS_PER_FRAME = 196
"""SigLIP-SO400M at 384 pixels has 27 x 27 patches, which 2x2 blocks make 14 x 14 tokens."""


def build(name: str, scale: str) -> StageConfig:
    return content.entry("stages", name)(scale, Path("models"))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", content.names("stages"))
def test_every_stage_builds_at_every_scale(name: str, scale: str):
    config = build(name, scale)
    assert (config.name, config.scale) == (name, scale)
    assert config.steps > 0
    assert configuration.from_json(StageConfig, configuration.to_json(config)) == config


@pytest.mark.parametrize("scale", SCALES)
def test_the_five_stages_form_a_chain_and_train_what_the_paper_trains(scale: str):
    configs = [build(name, scale) for name in STAGES]
    assert [config.starts_from for config in configs] == [None, *STAGES[:-1]]
    assert [config.trains for config in configs] == TRAINS
    assert len({config.model for config in configs}) == 1


@pytest.mark.parametrize("scale", ["1.5b", "7b"])
def test_learning_rates_and_lengths_are_those_of_the_paper(scale: str):
    phases = [build(name, scale).phases for name in STAGES]
    rates = [{phase.learning_rate for phase in stage} for stage in phases]
    assert rates == [{1e-3}, {5e-5}, {2e-5}, {2e-5}, {2e-5}]
    assert [stage[0].data.row_tokens for stage in phases[:3]] == [4096] * 3
    assert [(phase.data.row_tokens, phase.rope_theta) for phase in phases[3]] == [(65_536, 15.3e6), (262_144, 207e6)]
    assert [phase.schedule for phase in phases[3]] == ["constant", "constant"]
    assert phases[4][0].data.frames.frames == 256


@pytest.mark.parametrize("scale", ["1.5b", "7b"])
@pytest.mark.parametrize("name", STAGES)
def test_a_video_and_its_answer_fit_in_a_row_at_the_cluster_scales(name: str, scale: str):
    for phase in build(name, scale).phases:
        assert phase.data.frames.frames * TOKENS_PER_FRAME + 512 <= phase.data.row_tokens


def test_context_extension_uses_the_adapters_of_the_paper():
    for scale in SCALES:
        lora = build("4_context_extension", scale).lora
        assert lora is not None
        assert (lora.rank, lora.alpha, lora.targets) == (8, 16, ("q_proj", "k_proj", "v_proj", "o_proj"))
        assert [build(name, scale).lora for name in STAGES if name != "4_context_extension"] == [None] * 4


@pytest.mark.parametrize("scale", ["tiny", "small"])
@pytest.mark.parametrize("name", content.names("stages"))
def test_demo_scales_read_the_demo_with_two_ranks_to_a_row(name: str, scale: str):
    config = build(name, scale)
    assert config.parallel.sequence == 2
    sources = {source.shards for phase in config.phases for source in phase.data.sources}
    assert sources <= SPLITS or (name, sources) == ("lora_sft", {"my_videos"})


def test_the_demo_grows_its_videos_and_contexts_from_stage_to_stage():
    lengths = [phase.data.row_tokens for name in STAGES for phase in build(name, "tiny").phases]
    assert lengths[:3] == sorted(lengths[:3])
    frames = [
        [phase.data.frames.frames for phase in build(name, "tiny").phases] for name in STAGES if name[0] in "1235"
    ]
    assert all(stage == sorted(stage) for stage in frames)
    longest = [max(stage) for stage in frames]
    assert longest == sorted(set(longest))


def test_rows_too_long_for_a_gpu_are_read_by_one_node():
    for scale in ("1.5b", "7b"):
        assert [build(name, scale).parallel.sequence for name in STAGES] == [1, 1, 1, 8, 8]


def test_joint_sft_is_long_sft_with_the_short_sources_added():
    for scale in SCALES:
        joint, long, short = (build(name, scale) for name in ("joint_sft", "5_long_sft", "3_short_sft"))
        for mixed, alone in zip(joint.phases, long.phases, strict=True):
            names, before = ([source.shards for source in phase.data.sources] for phase in (mixed, alone))
            assert names[: len(before)] == before
            added = {source.shards for each in short.phases for source in each.data.sources}
            assert set(names) == {*before, *added}
            assert len(names) == len(set(names))
        assert replace(joint, name=long.name, phases=long.phases) == long


def test_an_unknown_scale_is_answered_with_the_scales_there_are():
    with pytest.raises(ConfigError, match=r"no scale '70b'; there are: tiny, small, 1\.5b, 7b"):
        build("1_alignment", "70b")


@pytest.mark.parametrize("name", content.names("stages"))
def test_the_recipe_says_how_every_source_of_a_stage_is_packed(name: str):
    recipe = (Path(__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8")
    named = {source.shards for phase in build(name, "7b").phases for source in phase.data.sources}
    assert [each for each in sorted(named) if f"`{each}` |" not in recipe and f"data/{each}" not in recipe] == []
