"""Applies the folds to a model: the one place that knows both. The order matters and is the order of this file.

1. attention: the language model's layers call `folded_attention`, plugged in by name through transformers' registries;
2. tiles: the layers' token-wise modules take a tile of tokens at a time (`model/tile.py`);
3. experts: each rank keeps its share of every mixture's experts, and tokens travel (`parallel/experts.py`); losses of
   the routers look at the tokens of all ranks (`parallel/balance.py`);
4. recompute: activation checkpointing of the language model's layers, around the tiles;
5. parameters: FSDP2 shards experts over the ranks that hold the same, and blocks, embeddings and the rest over all
   ranks. Gradients are SUMMED over ranks: the loss is already divided by the global count of target tokens, so no other
   factor may appear.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from longvila.config import MixtureConfig, RecomputeName, ShardingConfig
from longvila.errors import ConfigError
from longvila.model.tile import tile_layers
from longvila.parallel.attention import FoldedPlan
from longvila.parallel.balance import Routers
from longvila.parallel.blocks import Mask
from longvila.parallel.experts import dispatch
from longvila.parallel.fold import Fold, check_sharding, parameter_mesh
from longvila.parallel.recompute import checkpoint_arguments
from longvila.parallel.replay import ModelAttention, Shape

ATTENTION = "longvila"
_NUMBER = "longvila_layer"

BALANCED = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Mixtures whose routers' probabilities are the softmax of their logits, as the losses of `parallel/balance.py` take
them, and whose gradients with those losses were compared with one process's."""

# What transformers passes to attention functions and what does not change the result here: positions are already in
# q and k, caches are off in training, router logits and the keywords of the loss are a matter of the model's output.
_HARMLESS = {
    *("position_ids", "position_embeddings", "use_cache", "cache_position", "is_causal"),
    *("output_router_logits", "shift_labels", "num_items_in_batch"),
}


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: FoldedPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface over a fold: q, k, v (1, heads, t, D) -> (1, t, heads, D).

    Raises:
        ConfigError: for a missing plan, or for anything that would change the result and is not implemented: a mask,
            dropout, softcap, sinks, unknown keywords.
    """
    name = type(module).__name__
    if plan is None:
        raise ConfigError(f"{name} under attention '{ATTENTION}' needs plan=... in the model's forward")
    if attention_mask is not None:
        raise ConfigError(f"{name} was given an attention mask; under '{ATTENTION}' the plan says who sees whom")
    if dropout:
        raise ConfigError(f"{name} uses attention dropout {dropout}; set attention_dropout=0 in its configuration")
    is_causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window is not None and not causal:
        raise ConfigError(f"{name} has a window of {sliding_window} tokens both ways; windows are causal here")
    if unknown := sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS):
        raise ConfigError(f"{name} passes {unknown} to attention, which '{ATTENTION}' does not implement")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # A window as long as the longest document hides nothing: one mask for both spares planning twice.
    window = sliding_window if sliding_window is not None and sliding_window < max(plan.plan.lengths) else None
    layer = getattr(module, _NUMBER, -1)
    out = plan.attend(query, key, value, scale, Mask(causal, window), layer)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, folded_attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def apply_folds(
    model: PreTrainedModel,
    fold: Fold,
    precision: str = "fp32",
    recompute: RecomputeName = "none",
    recompute_keeps: Collection[int] | None = None,
    sharding: ShardingConfig | None = ShardingConfig(),
    tile_tokens: int | None = None,
    mixture: MixtureConfig | None = None,
) -> Routers | None:
    """Makes `model` (a LongVilaModel, or a causal language model of transformers) run under `fold`, in place.

    Args:
        precision: `fp32` or `bf16` computation; parameters keep their own type as masters.
        recompute: activation checkpointing of every language-model layer (`parallel/recompute.py`).
        recompute_keeps: layers whose attention it keeps; None means all.
        sharding: FSDP2 over all ranks, or as it says. None leaves parameters whole and gradients to the caller.
        tile_tokens: tokens that the MLPs and norms of language-model layers take at a time; None means all.
        mixture: losses of the routers of a mixture of experts.

    Returns:
        The routers of a mixture, which count what they choose.

    Raises:
        ConfigError: for what cannot be done exactly with this model, by name.
    """
    language_model = getattr(model, "language_model", model)
    language_model.set_attn_implementation(ATTENTION)
    if recompute_keeps is not None:
        # Only then do layers need numbers; they would cost `torch.compile` a graph for each.
        for module in language_model.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, _NUMBER, module.layer_idx)
    if tile_tokens is not None:
        tile_layers(blocks(language_model), tile_tokens)
    if fold.experts is not None:
        if sharding != ShardingConfig():
            raise ConfigError("parallel.experts above 1 goes with sharding over all ranks alone; leave sharding.* out")
        _share_experts(language_model, fold.experts["experts"])
    routers = _hook_routers(language_model, fold, mixture or MixtureConfig())
    if recompute != "none":
        # transformers 5.24 renamed it; earlier ones have the old name alone.
        new_name = getattr(language_model, "activation_checkpointing_enable", None)
        enable = new_name or language_model.gradient_checkpointing_enable
        enable(checkpoint_arguments(recompute, recompute_keeps))
    if sharding is not None:
        _shard_parameters(model, fold, precision, sharding)
    return routers


def _shard_parameters(model: nn.Module, fold: Fold, precision: str, sharding: ShardingConfig) -> None:
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if precision == "bf16"
        else MixedPrecisionPolicy()
    )
    mesh = parameter_mesh(sharding, fold.mesh.device_type)
    reshard: bool | int = sharding.parameters != "none"
    if sharding.parameters == "node" and sharding.optimizer == "world":
        reshard = check_sharding(sharding, mesh.size())
        if reshard == mesh.size():  # one node is the world
            reshard = True

    def shard(module: nn.Module, ignored: set[nn.Parameter] | None = None) -> Any:
        return fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, ignored_params=ignored)

    if fold.experts is not None:
        copies = fold.experts["copies"]
        for module in model.modules():
            if isinstance(module, SharedExperts):
                fully_shard(module, mesh=copies, reshard_after_forward=reshard, mp_policy=policy,
                            shard_placement_fn=partial(_expert_dim, copies.size()))  # fmt: skip
    for block in blocks(model):
        shard(block)
    # The matrices of words are large and of no use to the backward of a look-up: gathered for the forward alone.
    language_model: Any = getattr(model, "language_model", model)
    embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    tied = head is not None and embedding.weight is head.weight
    if not tied:
        shard(embedding).set_unshard_in_backward(False)
    if language_model is model:
        shard(model)
    else:  # nor does the backward of the chunked loss look at them, so that the root unit holds the output matrix alone
        # Both may end in a view, of which torch warns: nothing writes into that.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDP(VisionTower|Projector)\) returned a view")
        shard(model.vision)  # type: ignore[arg-type]
        shard(model.projector)  # type: ignore[arg-type]
        shard(language_model.get_decoder(), {embedding.weight} if tied else None)
        shard(model).set_unshard_in_backward(False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


class SharedExperts(nn.Module):
    """What goes in front of the class of a mixture's experts of transformers: (T, D), (T, k), (T, k) -> (T, D)."""

    num_experts: int
    """Of this rank."""
    ranks: dist.ProcessGroup
    """Those that share out the experts."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        shared = dict(self._parameters)
        # Weights are DTensors over the ranks that share them; what runs here knows those of this rank alone.
        mine: dict[str, Any] = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in shared.items()}
        try:
            self._parameters.update(mine)
            return dispatch(super().forward, hidden_states, top_k_index, top_k_weights, self.num_experts, self.ranks)
        finally:
            self._parameters.update(shared)


def _expert_dim(copies: int, parameter: nn.Parameter) -> Shard:
    """The dimension by which ranks that hold the same experts shard them: not that of the experts, where it divides."""
    return Shard(1 if parameter.ndim > 1 and parameter.shape[1] % copies == 0 else 0)


def _share_experts(language_model: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each rank of `mesh` its share of the experts of every mixture.

    A mixture's experts are a module of transformers with `num_experts`, whose parameters all begin with that dimension,
    and whose forward takes tokens, their experts and their weights.

    Raises:
        ConfigError: there is none, or the experts cannot be shared out evenly.
    """
    found = [module for module in language_model.modules() if _is_experts(module)]
    if not found:
        raise ConfigError(
            f"parallel.experts={mesh.size()}, but {type(language_model).__name__} has no experts to share out; use 1"
        )
    for module in found:
        total: int = module.num_experts  # type: ignore[assignment]
        if total % mesh.size():
            raise ConfigError(
                f"{total} experts of {type(module).__name__} cannot be shared out evenly among parallel.experts="
                f"{mesh.size()} ranks; use a divisor of {total}"
            )
        module.num_experts = total // mesh.size()  # type: ignore[assignment]
        for name, parameter in list(module._parameters.items()):
            assert parameter is not None
            shared = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(shared, parameter.requires_grad))
        kind = type(module)
        module.__class__ = type(f"Shared{kind.__name__}", (SharedExperts, kind), {})
        module.ranks = mesh.get_group()  # type: ignore[assignment]


def _hook_routers(language_model: PreTrainedModel, fold: Fold, mixture: MixtureConfig) -> Routers | None:
    """Raises ConfigError where losses are asked for and not known for this model."""
    recorder = (getattr(language_model.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    kind = getattr(recorder, "target_class", None)
    found = [module for module in language_model.modules() if kind is not None and isinstance(module, kind)]
    if (mixture.balance or mixture.z) and (not found or language_model.config.model_type not in BALANCED):
        raise ConfigError(
            f"mixture.balance={mixture.balance:g} and mixture.z={mixture.z:g}, but {type(language_model).__name__} has "
            f"no routers whose losses are known here (those of {', '.join(BALANCED)} are); set both to 0"
        )
    if not found:
        return None
    group = fold.sequence if mixture.over == "sequence" else dist.group.WORLD
    assert group is not None
    return Routers(found, mixture, group)


def _is_experts(module: nn.Module) -> bool:
    total, parameters = getattr(module, "num_experts", None), list(module.parameters())
    if not parameters or parameters[0].ndim != 3 or any(p.shape[0] != total for p in parameters):
        return False
    return len(inspect.signature(module.forward).parameters) == 3


def attention_of(config: PreTrainedConfig) -> ModelAttention:
    """Heads and masks of a language model, from its configuration: what the layout `auto` goes by."""
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    masks = tuple(Mask(window=window if kind == "sliding_attention" else None) for kind in kinds)
    return ModelAttention(Shape(heads, kv_heads or heads, head_dim), masks)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of the tower and the language model: children of every outermost list of two or more."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        children = list(module.children())
        repeated = isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(c) for c in children}) == 1
        if repeated and len(children) > 1 and any(True for _ in children[0].parameters()):
            found.extend(children)
            return
        for child in children:
            visit(child)

    visit(model)
    return found
