"""Matrices shared out over tensor groups: loss and every gradient equal one process, with every other fold beside."""

import functools

import pytest
import torch
import transformers

from longvila.apply import apply_folds, tensor
from longvila.apply.parameters import check_rules
from longvila.bench import engines
from longvila.config import ParallelConfig, ShardingConfig
from longvila.errors import ConfigError
from longvila.model.vlm import LongVilaConfig, LongVilaModel
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import RankError, run_ranks
from longvila.shards.order import Cursor
from longvila.train import gradients
from longvila.train.checkpoint import Checkpoints, Position
from longvila.train.gradients import MIXED, TEXT, VIDEO, Case
from longvila.train.loop import resume

from . import test_models
from .test_experts import make_mixture
from .test_training import check_steps
from .training_parts import whole_weights

BIASED = functools.partial(transformers.LlamaConfig, **test_models.SHAPE, attention_bias=True, mlp_bias=True)
MODELS = {"dense": gradients.make_model, "mixture": make_mixture}


def biased_errors(parallel):
    """Of a Llama with a bias in every matrix, none of them zero."""

    def make(_name):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(BIASED()).double().train()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
        return model

    test_models.make = make
    return test_models.errors("llama", parallel)


# With more ranks than key heads some ranks hold the same one. Models that take a norm of it in fp32 then round the
# parts of its gradient instead of their sum.
@pytest.mark.parametrize(
    ("parallel", "rounded"),
    [
        (ParallelConfig(tensor=2), ()),
        (ParallelConfig(tensor=2, inner=2), ()),
        (ParallelConfig(tensor=2, head=2, placement="context_first"), ()),
        (ParallelConfig(tensor=4), ("qwen3", "qwen3_moe")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["qwen3", "llama", "mistral", "qwen2_moe", "qwen3_moe", "mixtral"])
def test_language_models_of_transformers_have_the_gradients_of_one_process(name, parallel, rounded):
    found, counted = run_ranks(test_models.errors, parallel.sequence, name, parallel)[0]
    bound = 1e-6 if name in rounded else 1e-11
    assert max(found.values()) < bound, max(found, key=found.get)
    assert counted["bytes tensor"] > 0


@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2), ParallelConfig(tensor=4, inner=2)], ids=str)
def test_biases_are_added_once_and_have_whole_gradients(parallel):
    found, _ = run_ranks(biased_errors, parallel.sequence, parallel)[0]
    assert sum(name.endswith("bias") for name in found) == 21
    assert max(found.values()) < 1e-11, max(found, key=found.get)


def with_heads(make):
    """The small vision-language models with 4 query and 2 key heads, in place of 6 and 3."""

    def changed(seed=0):
        model = make(seed)
        config = model.config.text_config
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 12
        torch.manual_seed(seed)
        whole = LongVilaConfig(
            tower=model.config.tower, projector="downsample_mlp", text_config=config, frame_token_id=gradients.FRAME
        )
        model = LongVilaModel(whole).double().train()
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                torch.nn.init.normal_(parameter, std=0.5)
        model.language_model.set_experts_implementation("eager")
        return model

    return changed


def with_model(make, function, *arguments):
    gradients.make_model = engines.make_model = with_heads(MODELS[make])
    return function(*arguments)


@pytest.mark.parametrize(
    ("make", "world", "parallel", "rows"),
    [
        ("dense", 2, ParallelConfig(tensor=2), (MIXED,)),
        ("dense", 4, ParallelConfig(tensor=2), (TEXT, VIDEO)),  # a group without any frame
        ("dense", 8, ParallelConfig(tensor=2, inner=2, head=2, layout="joint"), (MIXED,)),
        ("dense", 8, ParallelConfig(2, 1, 2, "zigzag", "relay", "context_first", tensor=2), (MIXED,)),
        ("mixture", 4, ParallelConfig(tensor=2, experts=4), (MIXED, VIDEO)),
        ("mixture", 8, ParallelConfig(tensor=2, inner=2, experts=4), (MIXED, TEXT)),
        ("mixture", 8, ParallelConfig(tensor=2, head=2, experts=2), (VIDEO, MIXED)),
    ],
    ids=str,
)
def test_a_vision_language_model_has_the_gradients_of_one_process(make, world, parallel, rows):
    errors = run_ranks(with_model, world, make, gradients.folded, Case(parallel, world, rows))[0]
    assert max(errors.values()) < 1e-11, max(errors, key=errors.get)


@pytest.mark.parametrize("policy", ["all", "save_attention", "offload_attention"])
def test_layers_are_right_when_they_are_computed_again(policy):
    parallel = ParallelConfig(tensor=2, inner=2)
    found, _ = run_ranks(test_models.errors, 4, "llama", parallel, policy)[0]
    assert max(found.values()) < 1e-11, max(found, key=found.get)


def tiled_errors(parallel):
    apply = test_models.apply_folds
    test_models.apply_folds = functools.partial(apply, tile_tokens=7)
    return test_models.errors("llama", parallel, "save_attention")


def test_mlps_take_the_tokens_of_the_group_a_tile_at_a_time():
    found, _ = run_ranks(tiled_errors, 4, ParallelConfig(tensor=2, inner=2))[0]
    assert max(found.values()) < 1e-11, max(found, key=found.get)


def count_a_layer(parallel):
    """Of one layer's forward and backward: what is counted, against the formula."""
    _, counted = test_models.errors("llama", parallel)
    return counted["collective tensor"], counted["bytes tensor"]


def test_collectives_and_bytes_are_those_of_the_formula():
    collectives, size = run_ranks(count_a_layer, 2, ParallelConfig(tensor=2))[0]
    layers, width, most = 3, 32, 23  # of 45 tokens, the longer half
    # Attention and MLP each gather and spread, there and back; and once a forward, position ids.
    assert collectives == layers * 2 * 2 * 2 + 1
    assert size == layers * 8 * most * width * 8 + most * 8


def train_three_steps(parallel):
    state = engines.make_state(parallel)
    return engines.take_steps(state, 0, 3), whole_weights(state.model)


@pytest.mark.parametrize(
    ("make", "world", "parallel"),
    [
        ("dense", 2, ParallelConfig(tensor=2)),
        ("dense", 4, ParallelConfig(tensor=2)),
        ("mixture", 4, ParallelConfig(tensor=2, inner=2, experts=2)),
    ],
)
def test_norms_clipping_and_steps_are_those_of_one_process(make, world, parallel):
    expected = run_ranks(with_model, 1, make, engines.plain_steps, 3)[0]
    check_steps(run_ranks(with_model, world, make, train_three_steps, parallel), expected)


def save_after_two(parallel, folder):
    state = engines.make_state(parallel)
    engines.take_steps(state, 0, 2)
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.save(state.engine.state(), Position(2, Cursor(0, 0, 8)), state.config)
        engines.take_steps(state, 2, 1)
    return whole_weights(state.model), state.engine.weights()


def continue_after_two(parallel, folder):
    state = engines.make_state(parallel)
    assert resume(state.engine, Checkpoints(folder, 1)) == Position(2, Cursor(0, 0, 8))
    engines.take_steps(state, 2, 1)
    return whole_weights(state.model)


def test_a_checkpoint_goes_on_under_any_other_mapping(tmp_path):
    saved = ParallelConfig(tensor=2, experts=4)
    expected, exported = run_ranks(with_model, 4, "mixture", save_after_two, saved, tmp_path)[0]
    for world, parallel in (
        (4, ParallelConfig(inner=2, experts=2)),
        (2, ParallelConfig(tensor=2)),
        (2, ParallelConfig(head=2)),
    ):
        resumed = run_ranks(with_model, world, "mixture", continue_after_two, parallel, tmp_path)[0]
        for name, weight in expected.items():
            assert (resumed[name] - weight).abs().max() < 1e-9, (parallel, name)
    for name, weight in expected.items():
        assert (exported[name] - weight).abs().max() < 1e-6, name


# Each fault leaves the loss as it is, and must show in a gradient.


def _cut_matrices_are_summed_over_the_tensor_group_too():
    _scale_cut(2.0)


def _cut_matrices_are_averaged_over_their_copies():
    _scale_cut(0.5)


def _a_hundredth_is_lost():
    _scale_cut(0.99)


def _scale_cut(factor):
    real = tensor.ColumnLinear.forward

    def changed(self, input):
        out = real(self, input)
        return out.detach() + factor * (out - out.detach()) if out.requires_grad else out

    tensor.ColumnLinear.forward = changed


def _gradients_of_gathered_tokens_are_not_summed():
    real = tensor.gather_tokens

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, tokens, group):
            ctx.mine = sum(tokens[: torch.distributed.get_rank(group)]), tokens[torch.distributed.get_rank(group)]
            return real(x, tokens, group)

        @staticmethod
        def backward(ctx, grad):
            start, number = ctx.mine
            return grad[start : start + number], None, None

    tensor.gather_tokens = Wrong.apply


def _gradients_of_sums_are_averaged():
    real = tensor.spread_sums

    def changed(x, *rest):
        out = real(x, *rest)
        return out.detach() + 0.5 * (out - out.detach())

    tensor.spread_sums = changed


def _norms_of_heads_are_not_summed_over_the_tensor_group():
    real = test_models.apply_folds

    def changed(model, fold, **kwargs):
        out = real(model, fold, **kwargs)
        rank = fold.tensor.get_local_rank("tensor")
        for name, module in model.named_modules():
            if name.endswith(("q_norm", "k_norm")):
                module.register_forward_hook(lambda _m, _i, out: out if rank == 0 else out.detach() + 0 * out)
        return out

    gradients.apply_folds = changed


FAULTS = [
    _cut_matrices_are_summed_over_the_tensor_group_too, _cut_matrices_are_averaged_over_their_copies,
    _a_hundredth_is_lost, _gradients_of_gathered_tokens_are_not_summed, _gradients_of_sums_are_averaged,
    _norms_of_heads_are_not_summed_over_the_tensor_group,
]  # fmt: skip


def with_fault(fault, case):
    fault()
    return with_model("dense", gradients.folded, case)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_in_a_gradient_and_not_in_the_loss(fault):
    errors = run_ranks(with_fault, 4, fault, Case(ParallelConfig(tensor=2), 4, (MIXED, VIDEO)))[0]
    assert errors.pop("loss") < 1e-12
    assert max(errors.values()) > 1e-3


def refused(parallel, config, sharding):
    model = transformers.AutoModelForCausalLM.from_config(config)
    apply_folds(model, make_fold(parallel, "cpu"), sharding=sharding)


SHAPE = test_models.SHAPE


@pytest.mark.parametrize(
    ("ranks", "config", "sharding", "words"),
    [
        (3, transformers.LlamaConfig(**SHAPE), ShardingConfig(), "3 ranks; use a divisor of|3 ranks must divide"),
        (3, transformers.LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}), ShardingConfig(), "32 outputs of .*=3"),
        (8, transformers.LlamaConfig(**SHAPE), ShardingConfig(), "4 query heads .*=8"),
        (2, transformers.Olmo2Config(**SHAPE), ShardingConfig(), "colwise_gather_output"),
        (2, transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4), ShardingConfig(), "no plan to cut GPT2"),
        (2, transformers.LlamaConfig(**SHAPE), ShardingConfig("none", "none"), "leave sharding"),
    ],
    ids=["key heads", "outputs", "query heads", "other styles", "no plan", "sharding"],
)
def test_what_cannot_be_cut_is_refused_with_both_numbers(ranks, config, sharding, words):
    with pytest.raises((ConfigError, RankError), match=words):
        run_ranks(refused, ranks, ParallelConfig(tensor=ranks), config, sharding)


def a_norm_over_all_heads():
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE))
    model.model.layers[1].self_attn.q_norm = torch.nn.RMSNorm(32)
    apply_folds(model, make_fold(ParallelConfig(tensor=2), "cpu"))


def test_a_parameter_between_cut_matrices_without_a_rule_is_named():
    with pytest.raises(RankError, match=r"self_attn\.q_norm\.weight \(32,\) lies between matrices that are cut"):
        run_ranks(a_norm_over_all_heads, 2)


def a_parameter_left_out():
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE))
    apply_folds(model, make_fold(ParallelConfig(inner=2), "cpu"))
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    check_rules(model)


def test_a_parameter_whose_gradient_nobody_sums_is_named():
    with pytest.raises(RankError, match=r"layers\.0\.mlp\.extra\.weight over all 2 ranks \(it knows of 1\)"):
        run_ranks(a_parameter_left_out, 2)
