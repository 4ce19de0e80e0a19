"""Whether a language model does under the attention fold what it does by itself, tried on four tokens of it.

Folds reach attention through transformers' registries and nothing else. A model may mix tokens elsewhere (attention of
its own, convolutions, state spaces), or say in its mask alone what it does not tell attention (a window, chunks): it
would run, and be wrong where documents or ranks meet. Found out before any step, on the model itself.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from longvila.apply.attention import folded_attention, refuse_mask
from longvila.errors import ConfigError

PROBE = "longvila_probe"
TOKENS = 4
FAR = 2**30
"""Tokens apart, as no context is long."""
SAME = 0.01
"""Of the largest number, by which queries and keys of equal tokens may differ: more than bf16 rounds, less than places
tell apart."""
LAYER_TYPES = ("full_attention", "sliding_attention")


def check_language_model(language_model: PreTrainedModel, num_sequence: int) -> None:
    """Tries `language_model` with an attention that lets no token see another, which it keeps until it is given one.

    What one token's logits owe to another's embedding is then exactly nothing, in any type and on any device, unless
    tokens meet outside of attention.

    Args:
        num_sequence: ranks that share a row.

    Raises:
        ConfigError: for a model that mixes tokens elsewhere, has layers or rotary embeddings that a fold cannot carry,
            or whose attention asks for what is not implemented (as `folded_attention` says).
    """
    name, config = type(language_model).__name__, language_model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or []
    if others := sorted(set(layer_types) - set(LAYER_TYPES)):
        raise ConfigError(f"{name} has layers of {others}; under folds they are of {list(LAYER_TYPES)}")
    if num_sequence > 1 and (moving := _moving_rope(config)):
        raise ConfigError(
            f"{name} uses RoPE type '{moving}', which chooses frequencies by the longest position that a rank has; a "
            f"row can be shared by 1 rank, not {num_sequence}"
        )
    seen = _try(language_model)
    if seen.moved:
        raise ConfigError(
            f"{name} counts the positions of tokens itself and does not read position_ids, so that they would be wrong "
            f"in every document but the first and on every rank but one; such a model cannot run under folds"
        )
    if not seen.calls or seen.leaks:
        raise ConfigError(
            f"{name} mixes tokens outside of transformers' attention interface, where folds and documents do not "
            f"reach; such a model cannot run under them"
        )
    windows = layer_types.count("sliding_attention") if layer_types else 1  # 1: of layers of one kind
    if seen.windowed_masks and seen.windows < windows:  # a mask may be made for layers that there are none of
        raise ConfigError(
            f"{name} has a window in its mask that it does not tell its attention; take the window out of its "
            f"configuration (use_sliding_window=False or sliding_window=None)"
        )


def _moving_rope(config: Any) -> str | None:
    """The RoPE type whose frequencies depend on the positions at hand, if there is one: of all layers, or of a kind."""
    parameters = getattr(config, "rope_parameters", None) or {}
    of_kinds = [each for each in parameters.values() if isinstance(each, dict)]
    types = [str(each.get("rope_type", "default")) for each in (parameters, *of_kinds)]
    return next((kind for kind in types if kind == "longrope" or "dynamic" in kind), None)


def _try(language_model: PreTrainedModel) -> SimpleNamespace:
    """Runs the model on tokens that differ, then on equal ones at one position; what its attention was asked."""
    seen = SimpleNamespace(calls=0, windows=0, windowed_masks=0, leaks=False, moved=False)

    class EachForItself:
        """A plan by which every token sees itself alone."""

        longest = FAR

        def attend(self, q: Tensor, k: Tensor, v: Tensor, _scale: float, mask: Any, _layer: int) -> Tensor:
            if equal:
                seen.moved |= any(bool((x - x[:, :, :1]).abs().max() > SAME * x.abs().max()) for x in (q, k, v))
            seen.calls += 1
            seen.windows += mask.window is not None
            return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    def mask(*args: Any, mask_function: Any = None, **kwargs: Any) -> None:
        refuse_mask(*args, **kwargs)
        if mask_function is not None and not equal:
            zero = torch.tensor(0)
            seen.windowed_masks += not mask_function(zero, zero, torch.tensor(FAR), zero)

    AttentionInterface.register(PROBE, folded_attention)
    AttentionMaskInterface.register(PROBE, mask)
    language_model.set_attn_implementation(PROBE)
    weight: Any = language_model.get_input_embeddings().weight
    devices = [weight.device] if weight.is_cuda else []

    def run(embeds: Tensor, positions: list[int]) -> Tensor:
        return language_model(
            inputs_embeds=embeds, position_ids=torch.tensor([positions], device=weight.device), use_cache=False,
            plan=EachForItself(),
        ).logits  # fmt: skip

    modes = [(module, module.training) for module in language_model.modules()]
    with torch.random.fork_rng(devices), torch.enable_grad():  # a model that draws leaves a run's draws as they were
        embeds = torch.linspace(-1, 1, TOKENS * weight.shape[1], dtype=weight.dtype, device=weight.device)
        embeds = embeds.view(1, TOKENS, -1).requires_grad_()
        equal = False
        (grad,) = torch.autograd.grad(run(embeds, list(range(TOKENS)))[0, -1].float().square().sum(), embeds)
        asked = seen.calls, seen.windows, seen.windowed_masks
        equal = True
        language_model.eval()  # dropout would part equal tokens
        run(embeds[:, :1].detach().expand(-1, TOKENS, -1), [0] * TOKENS)
    for module, mode in modes:
        module.training = mode
    seen.calls, seen.windows, seen.windowed_masks = asked
    seen.leaks = bool(grad[:, :-1].any())
    return seen
