"""What activation checkpointing policies compute and send again: counted on a model of transformers, two ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from longvila.apply import apply_folds
from longvila.config import ParallelConfig, RecomputeName
from longvila.parallel.batch import shard_batch
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import run_ranks
from longvila.parallel.traffic import counting

LAYERS = 4
LENGTHS = (5, 40, 19)
POLICIES: tuple[RecomputeName, ...] = ("none", "all", "save_attention", "offload_attention")


@dataclass(frozen=True)
class Kept:
    """A layer's forward and backward under one policy, on rank 0."""

    policy: str
    fold: str
    forwards: float
    """Attention forwards a layer, 1 being what the plan's tasks take once."""
    backwards: float
    exchanges: float
    """All-to-alls over heads a layer."""
    bytes: int
    """Sent in all."""


def measure() -> list[Kept]:
    """Every policy under a head axis and under a ring."""
    table = []
    for parallel in (ParallelConfig(head=2), ParallelConfig(inner=2)):
        plain = run_ranks(_count, 2, parallel, "none")[0]
        for policy in POLICIES:
            found = run_ranks(_count, 2, parallel, policy)[0]
            table.append(
                Kept(
                    policy,
                    f"{parallel.outer}x{parallel.inner}x{parallel.head}",
                    found["kernel forward"] / plain["kernel forward"],
                    found["kernel backward"] / plain["kernel backward"],
                    found["collective heads"] / LAYERS,
                    sum(number for name, number in found.items() if name.startswith("bytes")),
                )
            )
    return table


def _count(parallel: ParallelConfig, policy: RecomputeName) -> Counter[str]:
    fold = make_fold(parallel, "cpu")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).train()
    apply_folds(model, fold, recompute=policy, sharding=None)
    ids = torch.randint(0, 64, (sum(LENGTHS),))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    batch = shard_batch(LENGTHS, fold, input_ids=ids, position_ids=positions)
    with counting() as counter:
        model(**batch, use_cache=False).logits.sum().backward()
    return counter
