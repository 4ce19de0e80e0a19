"""Which modules are tiled, which are refused, and what tiles cost."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from longvila.errors import ConfigError
from longvila.model.tile import Tiled, tile_layers

from .model_parts import qwen3

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def tiled_names(model):
    return {name for name, module in model.model.layers[0].named_modules() if isinstance(module, Tiled)}


def test_the_mlp_and_the_norms_of_a_layer_are_tiled_and_attention_is_not():
    model = qwen3()
    before = [name for name, _ in model.named_parameters()]
    tile_layers(model.model.layers, 4)
    assert tiled_names(model) == {"mlp", "input_layernorm", "post_attention_layernorm"}
    assert [name for name, _ in model.named_parameters()] == before
    assert isinstance(model.model.layers[0].mlp, type(qwen3().model.layers[0].mlp))
    assert not isinstance(qwen3().model.layers[0].mlp, Tiled)  # the library's class is as it was


def test_all_four_norms_of_a_layer_are_tiled():
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SMALL))
    tile_layers(model.model.layers, 4)
    assert len(tiled_names(model)) == 5


@pytest.mark.parametrize("hidden_trains", [True, False])
def test_a_module_of_any_leading_shape_gives_what_it_gave(hidden_trains):
    results = []
    for tile_tokens in (None, 3):
        torch.manual_seed(0)
        layer = qwen3().double().model.layers[0]
        layer.mlp.up_proj.requires_grad_(False)
        if tile_tokens:
            tile_layers([layer], tile_tokens)
        hidden = torch.randn(2, 10, 32, dtype=torch.float64, requires_grad=hidden_trains)
        out = layer.mlp(hidden)
        out.square().sum().backward()
        with torch.no_grad():
            assert torch.equal(layer.mlp(hidden), out)
        results.append((out, hidden.grad, *(p.grad for p in layer.mlp.parameters())))
    for plain, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, plain, rtol=0, atol=1e-12)
    assert any(grad is None for grad in results[1])


def test_under_checkpointing_the_last_mlp_is_computed_twice_as_without_tiles():
    layer = qwen3().model.layers[0]
    tokens = []
    layer.mlp.down_proj.register_forward_hook(lambda module, args, out: tokens.append(args[0].shape[-2]))
    tile_layers([layer], 4)
    hidden = torch.randn(1, 10, 32, requires_grad=True)

    def block(x):
        return x + layer.mlp(layer.post_attention_layernorm(x))

    checkpoint(block, hidden, use_reentrant=False).sum().backward()
    assert tokens == [4, 4, 2, 4, 4, 2]


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.total += left.numel() * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [False, True])
def test_tiles_take_as_many_operations_as_checkpointing_does(bias):
    layer = LlamaDecoderLayer(LlamaConfig(**SMALL, mlp_bias=bias), 0)
    hidden = torch.randn(1, 10, 32, requires_grad=True)

    def step():
        checkpoint(lambda x: x + layer.mlp(x), hidden, use_reentrant=False).sum().backward()

    with Products() as plain:
        step()
    tile_layers([layer], 4)
    with Products() as tiled:
        step()
    assert tiled.total == plain.total > 0


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1))


def with_dropout():
    model = qwen3()
    model.model.layers[0].mlp.act_fn = torch.nn.Dropout(0.5)
    return model


def with_a_list_of_experts():
    model = qwen3()
    model.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (mixtral, r"mlp \(MixtralSparseMoeBlock\) is not plainly token-wise: it holds a Mixtral"),
        (with_dropout, r"mlp \(Qwen3MLP\) draws dropout 0.5"),
        (with_a_list_of_experts, r"mlp \(Qwen3MLP\) is not plainly token-wise: it holds a ModuleList"),
    ],
)
def test_what_is_not_plainly_token_wise_is_refused_by_name_and_left_as_it_was(make, words):
    model = make()
    with pytest.raises(ConfigError, match=words):
        tile_layers(model.model.layers, 4)
    assert not any(isinstance(module, Tiled) for module in model.modules())


def test_a_tile_below_one_a_second_tiling_and_autocast_are_refused():
    model = qwen3()
    with pytest.raises(ConfigError, match="tile_tokens=0; a tile has at least 1 token"):
        tile_layers(model.model.layers, 0)
    tile_layers(model.model.layers, 4)
    with pytest.raises(ConfigError, match="is tiled already"):
        tile_layers(model.model.layers, 4)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="runs under autocast"):
        model.model.layers[0].mlp(torch.randn(1, 10, 32))
