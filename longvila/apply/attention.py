"""The attention fold in any language model of transformers, through its registries of attention and mask functions."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from longvila.errors import ConfigError
from longvila.parallel.attention import FoldedPlan
from longvila.parallel.blocks import Mask
from longvila.parallel.cache import ShardedCache
from longvila.parallel.replay import ModelAttention, Shape

ATTENTION = "longvila"
NUMBER = "longvila_layer"
"""Attribute of attention modules by which activation checkpointing and caches tell layers apart."""

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
    plan: FoldedPlan | ShardedCache | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface over a fold: q, k, v (1, heads, t, D) -> (1, t, heads, D).

    `plan`, from the keywords of the model's forward, is what a rank shares with others: a row whole, or a sequence that
    grows.

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
    window = sliding_window if sliding_window is not None and sliding_window < plan.longest else None
    layer = getattr(module, NUMBER, -1)
    out = plan.attend(query, key, value, scale, Mask(causal, window), layer)
    return out.transpose(1, 2).contiguous(), None


def number_layers(language_model: nn.Module) -> None:
    """Tells attention modules which layer they belong to, for those who tell layers apart."""
    for module in language_model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, NUMBER, module.layer_idx)


def refuse_mask(*_args: object, attention_mask: Tensor | None = None, **_kwargs: object) -> None:
    """transformers' mask interface: no mask is made, since the plan says who sees whom.

    Raises:
        ConfigError: for a mask of the caller's that hides tokens.
    """
    if attention_mask is not None and not attention_mask.all():
        raise ConfigError(
            f"attention_mask hides {int((attention_mask == 0).sum())} of {attention_mask.numel()} tokens; under "
            f"'{ATTENTION}' the plan says who sees whom: leave padding out of the row, and attention_mask out"
        )


AttentionInterface.register(ATTENTION, folded_attention)
AttentionMaskInterface.register(ATTENTION, refuse_mask)


def attention_of(config: PreTrainedConfig) -> ModelAttention:
    """Heads and masks of a language model, from its configuration: what the layout `auto` goes by."""
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    masks = tuple(Mask(window=window if kind == "sliding_attention" else None) for kind in kinds)
    return ModelAttention(Shape(heads, kv_heads or heads, head_dim), masks)
