"""Matrices shared out over tensor groups: loss and every gradient equal one process, with every other fold beside."""

import functools

import peft
import pytest
import torch
import transformers

from longvila.apply import apply_folds
from longvila.apply.parameters import check_rules
from longvila.bench import engines
from longvila.config import ParallelConfig, ShardingConfig
from longvila.errors import ConfigError
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import RankError, run_cases, run_ranks
from longvila.train import gradients
from longvila.train.gradients import MIXED, TEXT, VIDEO, Case
from longvila.train.step import forward_row

from . import test_models
from .test_models import errors_of_all, worst
from .test_training import check_steps
from .training_parts import whole_weights

MODELS = {experts: functools.partial(gradients.make_model, heads=(4, 2), experts=experts) for experts in (0, 8)}


def make_biased():
    """A Llama with a bias in every matrix, none of them zero."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**test_models.SHAPE, attention_bias=True, mlp_bias=True)
    model = transformers.AutoModelForCausalLM.from_config(config).double().train()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def biased_errors(parallel):
    return test_models.compare(make_biased(), test_models.reference(make_biased()), parallel)[0]


# With more ranks than key heads some ranks hold the same one. Models that take a norm of it in fp32 then round the
# parts of its gradient instead of their sum.
@pytest.mark.parametrize(
    ("parallel", "rounded"),
    [
        (ParallelConfig(tensor=2), ()),
        (ParallelConfig(tensor=2, inner=2), ()),
        (ParallelConfig(tensor=2, head=2, placement="context_first"), ()),
        (ParallelConfig(tensor=4), ("qwen3", "qwen3_moe", "gemma3")),
    ],
    ids=str,
)
def test_language_models_of_transformers_have_the_gradients_of_one_process(parallel, rounded):
    for name, by_rank in errors_of_all(test_models.MODELS, parallel).items():
        for found, counted in by_rank:
            if name == "gemma3":  # it takes its norms, and so the sums over tokens of their gradients, in fp32
                assert max(found.pop(key) for key in list(found) if "norm" in key) < 1e-6
            assert worst(found)[1] < (1e-6 if name in rounded else 1e-11), (name, worst(found))
            assert counted["bytes tensor"] > 0


@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2), ParallelConfig(tensor=4, inner=2)], ids=str)
def test_biases_are_added_once_and_have_whole_gradients(parallel):
    # On every rank: of a bias that all ranks of a group hold, one alone might have the right gradient.
    for found in run_ranks(biased_errors, parallel.sequence, parallel):
        assert sum(name.endswith("bias") for name in found) == 21
        assert worst(found)[1] < 1e-11, worst(found)


def with_model(experts, function, *arguments):
    gradients.make_model = engines.make_model = MODELS[experts]
    return function(*arguments)


@pytest.mark.parametrize(
    ("experts", "world", "parallel", "rows"),
    [
        (0, 2, ParallelConfig(tensor=2), (MIXED,)),
        (0, 4, ParallelConfig(tensor=2), (TEXT, VIDEO)),  # a group without any frame
        (8, 4, ParallelConfig(tensor=2, experts=4), (MIXED, VIDEO)),
    ],
    ids=str,
)
def test_a_vision_language_model_has_the_gradients_of_one_process(experts, world, parallel, rows):
    errors = run_ranks(with_model, world, experts, gradients.folded, Case(parallel, world, rows))[0]
    assert worst(errors)[1] < 1e-11, worst(errors)


def test_layers_are_right_when_they_are_computed_again():
    policies = ("all", "save_attention", "offload_attention")
    parallel = ParallelConfig(tensor=2, inner=2)
    test_models.expected_of("llama")
    for policy, by_rank in zip(
        policies, run_cases(test_models.errors, 4, [("llama", parallel, policy) for policy in policies]), strict=True
    ):
        assert all(worst(found)[1] < 1e-11 for found, _ in by_rank), policy


def tiled():
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**test_models.SHAPE))
    apply_folds(model, make_fold(ParallelConfig(tensor=2), "cpu"), tile_tokens=7)


def test_tiles_are_refused_by_name():
    with pytest.raises(RankError, match=r"tile_tokens=7 does not go with parallel\.tensor=2"):
        run_ranks(tiled, 2)


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


@functools.cache
def plain_steps_of(experts):
    return run_ranks(with_model, 1, experts, engines.plain_steps, 3)[0]


def train_three_steps(parallel):
    state = engines.make_state(parallel)
    return engines.take_steps(state, 0, 3), whole_weights(state.model)


@pytest.mark.parametrize(
    ("experts", "world", "parallel"),
    [
        (0, 2, ParallelConfig(tensor=2)),
        (0, 4, ParallelConfig(tensor=2)),
        (8, 4, ParallelConfig(tensor=2, inner=2, experts=2)),
    ],
)
def test_norms_clipping_and_steps_are_those_of_one_process(experts, world, parallel):
    check_steps(run_ranks(with_model, world, experts, train_three_steps, parallel), plain_steps_of(experts))


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
        (
            2,
            transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, attn_pdrop=0.0),
            ShardingConfig(),
            "no plan to cut GPT2",
        ),
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


def adapters_on_every_matrix():
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"), model)
    apply_folds(model, make_fold(ParallelConfig(tensor=2), "cpu"))


def test_adapters_are_refused_by_name():
    with pytest.raises(RankError, match=r"self_attn\.q_proj is a peft\.tuners\.lora\.layer\.Linear"):
        run_ranks(adapters_on_every_matrix, 2)


def train_projector(parallel):
    """The first gradients of a run in which the language model and the tower are frozen."""
    state = engines.make_state(parallel, trains=("projector",))
    step = engines.make_step(state.fold, 0)
    for row in step.rows:
        state.engine.backward(forward_row(state, row) / step.num_targets, last=row is step.rows[-1])
    return {name: gradient.clone() for name, gradient in state.engine.gradients()}


def test_gradients_pass_through_cut_matrices_that_are_frozen():
    _, expected, _ = run_ranks(with_model, 1, 0, engines.plain_steps, 1)[0]
    found = run_ranks(with_model, 4, 0, train_projector, ParallelConfig(tensor=2))[0]
    assert found
    assert all(name.startswith("projector.") for name in found)
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() < 1e-11 * expected[name].abs().max()


def a_parameter_left_out():
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE))
    apply_folds(model, make_fold(ParallelConfig(inner=2), "cpu"))
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    check_rules(model, 2)


def test_a_parameter_whose_gradient_nobody_sums_is_named():
    with pytest.raises(RankError, match=r"layers\.0\.mlp\.extra\.weight over all 2 ranks \(it knows of 1\)"):
        run_ranks(a_parameter_left_out, 2)
