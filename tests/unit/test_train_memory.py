"""What sharding costs, by hand."""

import pytest

from longvila.bench.engines import make_config
from longvila.config import ParallelConfig, ShardingConfig
from longvila.errors import ConfigError
from longvila.train.memory import memory_table, sharding_of, state_bytes


def test_everything_sharded_over_the_world():
    found = state_bytes(1600, 160, 16, ShardingConfig(node=8), "bf16")
    assert found == {"masters": 400, "moments": 80, "gradients": 40, "gathered": 0}


def test_each_scope_divides_its_own_kind():
    sharding = ShardingConfig("node", "none", "none", node=8)
    found = state_bytes(1600, 160, 16, sharding, "bf16")
    assert found == {"masters": 800, "moments": 160, "gradients": 640, "gathered": 3200}
    whole = state_bytes(1600, 160, 16, ShardingConfig("none", "none", "none", node=8), "fp32")
    assert whole == {"masters": 6400, "moments": 1280, "gradients": 640, "gathered": 0}


def test_the_table_has_every_choice_and_marks_the_runs():
    lines = memory_table(1600, 1600, 16, ShardingConfig(node=8), "fp32")
    assert len(lines) == 1 + 11
    assert [line for line in lines if "this run" in line] == [lines[1]]


@pytest.mark.parametrize(
    ("sharding", "words"),
    [
        (ShardingConfig("node", "world", "node", node=8), "parameters=world is finer than sharding.optimizer=node"),
        (ShardingConfig("world", "world", "node", node=8), "gradients=node must be sharding.optimizer's"),
        (ShardingConfig(node=3), "nodes of 3 ranks do not divide the world of 16"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(sharding, words):
    with pytest.raises(ConfigError, match=words):
        state_bytes(1, 1, 16, sharding, "fp32")


@pytest.mark.parametrize(("engine", "share"), [("zero1", (4, 1)), ("zero2", (4, 4)), ("zero3", (4, 4))])
def test_a_stage_of_zero_is_counted_as_the_sharding_it_is(engine, share):
    sharding = sharding_of(make_config(ParallelConfig(), engine=engine))
    found = state_bytes(4000, 4000, 4, sharding, "fp32")
    assert (16_000 // found["masters"], 16_000 // found["gradients"]) == share
    assert (found["gathered"] == 0) == (engine == "zero3")
