"""Raises the base of a language model's rotary position embedding, to extend its context (stage 4)."""

from __future__ import annotations

from transformers import PreTrainedModel

from longvila.errors import ConfigError


def extend_context(language_model: PreTrainedModel, theta: float, tokens: int) -> None:
    """Sets the RoPE base (Su et al. 2021; raised for long contexts as in Xiong et al. 2023), in place.

    Args:
        theta: the new base.
        tokens: how long documents are under it; the model's context is at least that from now on.

    Raises:
        ConfigError: for a model without one rotary embedding, or with one of another type than the default, whose
            frequencies do not follow from the base alone.
    """
    config, decoder = language_model.config, language_model.get_decoder()
    parameters = getattr(config, "rope_parameters", None)
    rotary = getattr(decoder, "rotary_emb", None)
    if not isinstance(parameters, dict) or "rope_theta" not in parameters or rotary is None:
        raise ConfigError(f"{type(language_model).__name__} has no single RoPE base to set to {theta:g}")
    if parameters.get("rope_type", "default") != "default":
        raise ConfigError(
            f"{type(language_model).__name__} uses RoPE type '{parameters['rope_type']}'; only 'default' can be rebased"
        )
    parameters["rope_theta"] = float(theta)
    config.max_position_embeddings = max(config.max_position_embeddings, tokens)
    # In place: folds may have put hooks on it, and others may hold it.
    fresh = type(rotary)(config=config)
    for name, buffer in fresh.named_buffers():
        setattr(rotary, name, buffer.to(rotary.inv_freq.device))
    for name in ("attention_scaling", "max_seq_len_cached", "original_max_seq_len"):
        if hasattr(fresh, name):
            setattr(rotary, name, getattr(fresh, name))
