"""A language model is tried before any step: those that folds cannot carry exactly are refused by name."""

import pytest
import torch
import transformers

from longvila.apply.attention import refuse_mask
from longvila.apply.probe import check_language_model
from longvila.errors import ConfigError

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {key: value for key, value in SHAPE.items() if key != "head_dim"}
SLIDING = ["sliding_attention", "full_attention"]
BART = transformers.BartConfig(
    vocab_size=50, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, attention_dropout=0.0,
    is_decoder=True, pad_token_id=0,
)  # fmt: skip


def make(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen3Config(**SHAPE),
        transformers.MistralConfig(**SHAPE, sliding_window=4),
        transformers.Gemma3TextConfig(**SHAPE, sliding_window=4, layer_types=SLIDING),
        transformers.MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None),
        transformers.Qwen2MoeConfig(**SHAPE, num_experts=4),  # makes a mask with a window that no layer uses
        transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=50, attn_pdrop=0.0),  # draws dropout
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_folds_carry_passes_and_is_left_as_it_was(config):
    model = make(config)
    draws = torch.get_rng_state()
    check_language_model(model, 2)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=50), "BloomForCausalLM mixes tokens"),
        (transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=50), "MptForCausalLM mixes tokens"),
        (transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), r"layers of \['conv'\]"),
        (transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2), r"Mamba.* layers of|mixes"),
        (transformers.Llama4TextConfig(**SHAPE, attention_chunk_size=6), r"layers of \['chunked_attention'\]"),
        (transformers.PhimoeConfig(**SMALL, sliding_window=6, num_local_experts=4), "a window in its mask"),
        (transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=50), "dropout 0.1; set attention_dropout"),
        (BART, "BartForCausalLM counts the positions of tokens itself"),
    ],
    ids=lambda value: getattr(value, "model_type", "words"),
)
def test_a_model_that_they_do_not_reach_is_refused_by_name(config, words):
    with pytest.raises(ConfigError, match=words):
        check_language_model(make(config), 1)


def test_a_model_that_mixes_tokens_beside_its_attention_is_refused():
    model = make(transformers.LlamaConfig(**SHAPE))
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(lambda _module, _inputs, out: out + 1e-6 * out.roll(1, dims=1))
    with pytest.raises(ConfigError, match="LlamaForCausalLM mixes tokens outside"):
        check_language_model(model, 1)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_a_ranks_own_positions_are_refused_where_ranks_share_a_row(kind):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **(factors if kind == "longrope" else {})}
    model = make(transformers.LlamaConfig(**SHAPE, max_position_embeddings=32, rope_parameters=rope))
    check_language_model(model, 1)
    with pytest.raises(ConfigError, match=f"RoPE type '{kind}'.* shared by 1 rank, not 2"):
        check_language_model(model, 2)


def test_a_mask_of_the_callers_is_refused_unless_it_hides_nothing():
    mask = torch.ones(1, 8, dtype=torch.long)
    assert refuse_mask(attention_mask=None) is None
    assert refuse_mask(attention_mask=mask) is None
    mask[0, :3] = 0
    with pytest.raises(ConfigError, match="hides 3 of 8 tokens"):
        refuse_mask(attention_mask=mask)
    model = make(transformers.LlamaConfig(**SHAPE))
    model.set_attn_implementation("longvila")
    with pytest.raises(ConfigError, match="hides 3 of 8 tokens"):
        model(torch.ones(1, 8, dtype=torch.long), attention_mask=mask, use_cache=False)
