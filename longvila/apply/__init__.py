"""Applies the folds to a model: the one place that knows both. The order matters and is the order of this file.

0. pipeline: each rank keeps the layers of its stage, as what all the rest is done to (`parallel/pipeline.py`);
1. attention: the language model's layers call `folded_attention`, plugged in by name through transformers' registries;
2. tiles: the layers' token-wise modules take a tile of tokens at a time (`model/tile.py`);
3. tensor: each rank keeps its part of the matrices of attention and MLPs (`parallel/tensor.py`);
4. experts: each rank keeps its share of every mixture's experts, and tokens travel (`parallel/experts.py`); losses of
   the routers look at the tokens of all ranks (`parallel/balance.py`);
5. recompute: activation checkpointing of the language model's layers, around the tiles;
6. parameters: FSDP2 shards experts and parts of matrices over the ranks that hold the same, and the rest over all
   ranks. Gradients are SUMMED over ranks: the loss is already divided by the global count of target tokens, so no other
   factor may appear.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from longvila.apply.attention import ATTENTION, attention_of, number_layers
from longvila.apply.experts import check_experts, check_mixture, set_up_experts
from longvila.apply.parameters import blocks, shard_parameters
from longvila.apply.pipeline import keep_own_layers, make_chunks, stretches
from longvila.apply.probe import check_language_model
from longvila.apply.tensor import cut_matrices
from longvila.config import MixtureConfig, ParallelConfig, RecomputeName, ShardingConfig
from longvila.errors import ConfigError
from longvila.model.tile import tile_layers
from longvila.model.vlm import LongVilaModel
from longvila.parallel.balance import Routers
from longvila.parallel.fold import Fold
from longvila.parallel.pipeline import Pipeline
from longvila.parallel.recompute import checkpoint_arguments

__all__ = ["Applied", "apply_cache", "apply_folds", "attention_of", "blocks", "check_fits"]


class Applied(NamedTuple):
    """What has a say while a model runs under its folds."""

    routers: Routers | None
    """Of a mixture: they count what they choose."""
    pipeline: Pipeline | None
    """What runs the model, whose own forward lacks the layers of other stages."""


def check_fits(config: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Whether a language model has layers and experts enough, known from its configuration alone.

    Raises:
        ConfigError: it has not.
    """
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(config.get_text_config())
    if parallel.pipeline > 1:
        stretches(len(language_model.get_decoder().layers), parallel)
    if parallel.experts * parallel.expert_tensor > 1:
        check_experts(language_model, parallel)


def apply_cache(language_model: PreTrainedModel, num_ranks: int) -> None:
    """Makes `language_model`, whole on each rank, run over a `ShardedCache` that so many ranks share, in place.

    Raises:
        ConfigError: for what cannot be done exactly with this model, by name.
    """
    check_language_model(language_model, num_ranks)
    language_model.set_attn_implementation(ATTENTION)
    number_layers(language_model)


def apply_folds(
    model: PreTrainedModel,
    fold: Fold,
    precision: str = "fp32",
    recompute: RecomputeName = "none",
    recompute_keeps: Collection[int] | None = None,
    sharding: ShardingConfig | None = ShardingConfig(),
    tile_tokens: int | None = None,
    mixture: MixtureConfig | None = None,
    parallel: ParallelConfig | None = None,
) -> Applied:
    """Makes `model` (a LongVilaModel, or a causal language model of transformers) run under `fold`, in place.

    Args:
        precision: `fp32` or `bf16` computation; parameters keep their own type as masters.
        recompute: activation checkpointing of every language-model layer (`parallel/recompute.py`).
        recompute_keeps: layers whose attention it keeps; None means all.
        sharding: FSDP2 over all ranks, or as it says. None leaves parameters whole and gradients to the caller.
        tile_tokens: tokens that the MLPs and norms of language-model layers take at a time; None means all.
        mixture: of a mixture of experts, losses and biases of its routers, and capacity of its experts.
        parallel: of a pipeline, how rows go through it; the rest of it is in `fold`.

    Raises:
        ConfigError: for what cannot be done exactly with this model, by name.
    """
    parallel = parallel or ParallelConfig()
    stages, zero_bubble = fold.num_stages, parallel.schedule == "zero_bubble"
    if zero_bubble and recompute != "none":
        raise ConfigError(
            f"parallel.schedule=zero_bubble goes through a layer's backward twice and would compute it again twice "
            f"(recompute={recompute}); use recompute=none, or the schedule 1f1b"
        )
    mixture = mixture or MixtureConfig()
    language_model = getattr(model, "language_model", model)
    num_experts = check_mixture(language_model, fold, mixture)  # a stage may have none of them
    check_language_model(language_model, fold.num_sequence)
    layers = keep_own_layers(cast(LongVilaModel, model), fold, parallel) if stages > 1 else []
    language_model.set_attn_implementation(ATTENTION)
    if recompute_keeps is not None:
        count = language_model.config.get_text_config().num_hidden_layers
        if recompute == "none" or not set(recompute_keeps) <= set(range(count)):
            raise ConfigError(
                f"recompute_keeps={sorted(recompute_keeps)} with recompute={recompute}; it numbers those of the "
                f"model's {count} layers, from 0, whose attention a policy that keeps attention keeps"
            )
        number_layers(language_model)  # only then: numbers would cost `torch.compile` a graph for each
    if tile_tokens is not None:
        if fold.tensor is not None:
            raise ConfigError(
                f"tile_tokens={tile_tokens} does not go with parallel.tensor={fold.num_tensor}, which leaves each rank "
                f"a part of every MLP; leave tile_tokens out"
            )
        tile_layers(blocks(language_model), tile_tokens)
    spread = fold.tensor is not None or fold.experts is not None or stages > 1
    if spread and sharding not in (None, ShardingConfig()):
        raise ConfigError(
            "parallel.tensor, parallel.experts and parallel.pipeline above 1 go with sharding over all ranks alone; "
            "leave sharding.* out"
        )
    cut = cut_matrices(language_model, fold.tensor["tensor"]) if fold.tensor is not None else []
    routers = set_up_experts(language_model, num_experts, fold, mixture) if num_experts else None
    if recompute != "none":
        # transformers 5.24 renamed it; earlier ones have the old name alone.
        new_name = getattr(language_model, "activation_checkpointing_enable", None)
        enable = new_name or language_model.gradient_checkpointing_enable
        enable(checkpoint_arguments(recompute, recompute_keeps))
    chunks = make_chunks(cast(LongVilaModel, model), fold, layers, twice=zero_bubble) if layers else []
    if sharding is not None:
        shard_parameters(model, fold, precision, sharding, cut, chunks)
    if not chunks:
        return Applied(routers, None)
    dtype = torch.bfloat16 if precision == "bf16" else model.dtype
    return Applied(routers, Pipeline(chunks, parallel, fold, language_model.config.hidden_size, dtype))
