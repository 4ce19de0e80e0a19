"""Configurations: one field changed by name, saved and read back, refused where they are wrong."""

from __future__ import annotations

from typing import Any

import pytest

from longvila.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    Phase,
    SourceConfig,
    StageConfig,
    differences,
    from_json,
    override,
    to_json,
)
from longvila.errors import ConfigError

CONFIG = StageConfig(
    name="stage",
    scale="tiny",
    starts_from=None,
    model=ModelConfig(tower="tower.json", tower_weights=None, language_model="lm"),
    trains=("projector",),
    phases=(Phase("one", 10, DataConfig((SourceConfig("short"),)), 1e-3),),
)


def test_a_configuration_survives_json():
    full = override(override(CONFIG, "lora={}"), "phases.0.rope_theta=40000")
    assert full.lora == LoraConfig()
    assert from_json(StageConfig, to_json(full)) == full


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("phases.0.steps=20", 20),
        ("phases.0.learning_rate=1", 1.0),
        ("phases.0.data.frames.mode=uniform", "uniform"),
        ("optimizer.betas=[0.9, 0.99]", (0.9, 0.99)),
        ("phases.0.rope_theta=null", None),
        ("recompute=save_attention", "save_attention"),
        ("starts_from=1_alignment", "1_alignment"),
    ],
)
def test_override_changes_the_field_it_names(assignment: str, value: Any):
    changed: Any = override(CONFIG, assignment)
    for key in assignment.partition("=")[0].split("."):
        changed = changed[int(key)] if key.isdigit() else getattr(changed, key)
    assert changed == value
    assert type(changed) is type(value)


def test_differences_have_the_names_that_override_takes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    one = override(CONFIG, "model.tower=models/tower.json")
    other = override(override(one, f"model.tower={tmp_path}/models/tower.json"), "phases.0.data.row_tokens=7")
    assert list(differences(one, other)) == ["phases.0.data.row_tokens"]
    assert list(differences(one, override(one, 'lora={"rank": 3}'))) == ["lora"]
    assert list(differences(one, one)) == []


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", r"has no '='"),
        ("optimizer.momentum=1", r"no such field; there is: weight_decay, groups, betas, eps, clip"),
        ("phases.3.steps=1", r"no such field; there is: indices 0 to 0"),
        (
            "lora.rank=8",
            r"no such field; there is: nothing below None; set the whole field, as in lora='{\"rank\": 8}'",
        ),
        ("scale.x=1", r"no such field; there is: nothing below 'tiny'"),
        ("scale.tin=1", r"no such field; there is: nothing below 'tiny'"),
        ("phases.0.steps=many", r"steps must be int, not 'many'"),
        ("phases.0.steps=true", r"steps must be int, not True"),
        ("precision=fp8", r"precision is 'fp8'; it must be one of \['fp32', 'bf16'\]"),
        ("optimizer.betas=[0.9]", r"betas takes 2 values, not 1"),
        ('parallel={"rings": 2}', r"parallel has no field \['rings'\]"),
    ],
)
def test_a_wrong_override_is_refused_with_what_there_is(assignment: str, message: str):
    with pytest.raises(ConfigError, match=message):
        override(CONFIG, assignment)


def test_a_saved_configuration_with_a_foreign_field_is_refused():
    with pytest.raises(ConfigError, match=r"has no field \['colour'\]"):
        from_json(ParallelConfig, '{"head": 2, "colour": "red"}')


def test_a_sequence_group_has_head_times_inner_times_outer_ranks():
    assert ParallelConfig(head=2, inner=3, outer=4).sequence == 24
