"""What each way of sharding training state costs in memory. Computed from counts, not measured; activations aside."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Literal, get_args

from longvila.config import ScopeName, ShardingConfig, StageConfig
from longvila.errors import ConfigError
from longvila.parallel.fold import check_sharding

MASTER, MOMENTS, GRADIENT = 4, 8, 4
"""Bytes of a parameter: fp32 master weight, AdamW's two fp32 moments, fp32 gradient."""


def sharding_of(config: StageConfig) -> ShardingConfig:
    """The sharding of the engine that the configuration names: a stage of ZeRO is a choice among the same."""
    return {
        "fsdp2": config.sharding,
        "zero1": ShardingConfig("world", "none", "none"),
        "zero2": ShardingConfig("world", "none", "world"),
        "zero3": ShardingConfig("world", "world", "world"),
    }[config.engine]


def state_bytes(
    total: int, trained: int, world: int, sharding: ShardingConfig, precision: Literal["fp32", "bf16"]
) -> dict[str, int]:
    """Bytes of training state on one rank.

    Args:
        total, trained: parameters in all, and those that move.
        precision: type of the weights that blocks compute with.

    Returns:
        `masters`, `moments`, `gradients`, and `gathered`: weights that stay gathered from a block's forward to its
        backward, where they are sharded less than their masters.

    Raises:
        ConfigError: for a choice that cannot be carried out.
    """
    node = check_sharding(sharding, world)
    ranks = {"world": world, "node": node, "none": 1}
    shards = ranks[sharding.optimizer]
    compute = 2 if precision == "bf16" else 4
    return {
        "masters": MASTER * total // shards,
        "moments": MOMENTS * trained // shards,
        "gradients": GRADIENT * trained // ranks[sharding.gradients],
        "gathered": 0 if sharding.parameters == sharding.optimizer else compute * total // ranks[sharding.parameters],
    }


def memory_table(
    total: int, trained: int, world: int, chosen: ShardingConfig, precision: Literal["fp32", "bf16"]
) -> list[str]:
    """A line for every choice that can be carried out, dearest last, `chosen` marked."""
    scopes = get_args(ScopeName)
    costs = []
    for optimizer, parameters, gradients in product(scopes, scopes, scopes):
        sharding = replace(chosen, optimizer=optimizer, parameters=parameters, gradients=gradients)
        try:
            costs.append((sum(state_bytes(total, trained, world, sharding, precision).values()), sharding))
        except ConfigError:
            continue
    costs.sort(key=lambda cost: cost[0])
    lines = [f"training state a rank, computed for {world} ranks: optimizer / parameters / gradients"]
    for size, sharding in costs:
        names = f"{sharding.optimizer} / {sharding.parameters} / {sharding.gradients}"
        lines.append(f"  {names:<24} {size / 2**30:9.3f} GiB{'  this run' if sharding == chosen else ''}")
    return lines
