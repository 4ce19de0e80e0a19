"""Pipelines change nothing: loss, norm and gradients of a step of rows of different lengths, against one process."""

from functools import partial

import pytest
import torch
import transformers

from longvila.bench import bubble, engines, folding
from longvila.bench.folding import Mapping, measure
from longvila.config import MixtureConfig, ParallelConfig, ShardingConfig
from longvila.errors import ConfigError
from longvila.model.rope import extend_context
from longvila.parallel.agree import sum_over_world
from longvila.parallel.fold import check_world
from longvila.parallel.launch import RankError, run_ranks
from longvila.parallel.pipeline import SPLITS_BACKWARD, check_rows
from longvila.shards.order import Cursor
from longvila.train.checkpoint import Checkpoints, Position
from longvila.train.gradients import make_model
from longvila.train.loop import resume
from longvila.train.step import sum_of_losses

ZERO_BUBBLE = ParallelConfig(pipeline=2, schedule="zero_bubble")
SCHEDULES = [ParallelConfig(pipeline=2), *[ZERO_BUBBLE] * SPLITS_BACKWARD]
MAPPINGS = [
    Mapping(2, ParallelConfig(pipeline=2), 0),
    Mapping(2, ParallelConfig(pipeline=2), 0, tied=False),
    Mapping(2, ParallelConfig(pipeline=2, chunks=2), 0, layers=5),
    Mapping(2, ParallelConfig(pipeline=2, schedule="zero_bubble"), 0),
    Mapping(2, ParallelConfig(pipeline=2, chunks=2, schedule="zero_bubble"), 0, layers=4, tied=False),
    Mapping(4, ParallelConfig(pipeline=4), 0, layers=4),
    Mapping(4, ParallelConfig(pipeline=2), 0),
    Mapping(4, ParallelConfig(pipeline=2, inner=2), 0),
    Mapping(4, ParallelConfig(pipeline=2, tensor=2, schedule="zero_bubble"), 0),
    Mapping(4, ParallelConfig(pipeline=2, experts=2)),
    Mapping(4, ParallelConfig(pipeline=2, inner=2, expert_tensor=2, schedule="zero_bubble")),
    Mapping(4, ParallelConfig(pipeline=2, experts=2), mixture=MixtureConfig(capacity=1.0)),
    Mapping(2, ParallelConfig(pipeline=2, chunks=2, stage_layers=(0, 2, 2, 1)), 0, layers=5),
    Mapping(2, ParallelConfig(pipeline=2, stage_layers=(2, 0)), 0, tied=False),
    Mapping(4, ParallelConfig(pipeline=2, experts=2, stage_layers=(1, 2)), layers=3, dense=(0,)),
]
MAPPINGS = [each for each in MAPPINGS if SPLITS_BACKWARD or each.parallel.schedule == "1f1b"]


@pytest.mark.parametrize("mapping", MAPPINGS, ids=[str(number) for number in range(len(MAPPINGS))])
def test_a_step_through_a_pipeline_is_that_of_one_process(mapping):
    row = measure(mapping)
    assert row["loss_error"] < 1e-12
    assert row["norm_error"] < 1e-9
    assert row["gradient_error"] < 1e-11, row["worst"]


SHAPE = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": partial(transformers.LlamaConfig, **SHAPE),
    "mistral": partial(transformers.MistralConfig, **SHAPE, sliding_window=6),
    "gemma3": partial(
        transformers.Gemma3TextConfig, **SHAPE, sliding_window=5, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mixtral": partial(
        transformers.MixtralConfig, **SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen2_moe": partial(
        transformers.Qwen2MoeConfig, **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    ),
}  # fmt: skip


def step_around(name, parallel):
    build = partial(make_model, text=MODELS[name]())
    return folding._observed_step(engines.make_state(parallel, build=build), 0)


@pytest.mark.parametrize("name", MODELS)
def test_other_language_models_have_the_step_of_one_rank(name):
    shared = {"experts": 2} if name in ("mixtral", "qwen2_moe") else {"inner": 2}
    expected, gradients = run_ranks(step_around, 1, name, ParallelConfig())[0]
    figures, found = run_ranks(step_around, 4, name, ParallelConfig(pipeline=2, **shared))[0]
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    assert figures["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-9)
    assert found.keys() == gradients.keys()
    bound = 1e-6 if name == "gemma3" else 1e-11  # Gemma's norms compute in fp32, whatever goes in
    for parameter, gradient in gradients.items():
        assert (found[parameter] - gradient).abs().max() < bound * gradient.abs().max(), parameter


def test_a_decoder_that_scales_what_it_is_given_is_refused_by_name():
    # Each stage would scale again; the loss would be off by 5e-5 and nobody would see it.
    build = partial(make_model, text=transformers.GraniteConfig(**SHAPE, embedding_multiplier=12.0))
    with pytest.raises(RankError, match="GraniteModel changes what it is given before its first layer"):
        run_ranks(engines.make_state, 2, ParallelConfig(pipeline=2), torch.float64, build)


def steps_of(parallel, count):
    figures, _, weights = engines.engine_steps(parallel, "fsdp2", torch.float64, count)
    return figures, weights


@pytest.mark.parametrize("parallel", SCHEDULES)
def test_steps_of_a_pipeline_move_weights_as_those_of_one_process(parallel):
    figures, _, expected = run_ranks(engines.plain_steps, 1, 3)[0]
    found, weights = run_ranks(steps_of, 4, parallel, 3)[0]
    for one, other in zip(found, figures, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-9)
    for name, weight in expected.items():
        assert (weights[name] - weight).abs().max() < 1e-9, name


def losses_of(parallel):
    state = engines.make_state(parallel)
    step = engines.make_step(state.fold, 0)
    losses = []
    for _ in range(2):  # and nothing of the first is left
        state.model.eval()
        losses.append(sum_over_world(sum_of_losses(state, step.rows))[0] / step.num_targets)
        state.model.train()
    gradients = sum(parameter.grad is not None for parameter in state.model.parameters())
    return losses, gradients, engines.take_steps(state, 0, 1)[0]["loss"]


@pytest.mark.parametrize("parallel", SCHEDULES)
def test_the_loss_alone_is_that_of_a_step_and_leaves_no_gradient(parallel):
    for losses, gradients, expected in run_ranks(losses_of, 2, parallel):
        assert losses == pytest.approx([expected] * 2, rel=1e-12)
        assert gradients == 0


def save(parallel, folder):
    state = engines.make_state(parallel)
    engines.take_steps(state, 0, 2)
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.save(state.engine.state(), Position(2, Cursor(0, 0, 8)), state.config)
    engines.take_steps(state, 2, 1)
    return state.engine.weights()


def go_on(parallel, folder):
    state = engines.make_state(parallel)
    resume(state.engine, Checkpoints(folder, 1))
    engines.take_steps(state, 2, 1)
    return state.engine.weights()


@pytest.mark.parametrize(
    ("saved", "then"), [(ParallelConfig(pipeline=2), ParallelConfig()), (ParallelConfig(), ParallelConfig(pipeline=2))]
)
def test_a_checkpoint_goes_on_with_and_without_a_pipeline(tmp_path, saved, then):
    expected = run_ranks(save, 2, saved, tmp_path)[0]
    resumed = run_ranks(go_on, 2, then, tmp_path)[0]
    assert resumed.keys() == expected.keys()
    for name, weight in expected.items():
        assert (resumed[name] - weight).abs().max() < 1e-9, name


@pytest.mark.parametrize(
    ("parallel", "fields", "words"),
    [
        (ParallelConfig(pipeline=2, chunks=2), {}, "4 stretches of layers, but the language model has 2 layers"),
        (ParallelConfig(pipeline=2, stage_layers=(2, 1)), {}, "are 3 layers, but the language model has 2"),
        (ZERO_BUBBLE, {"recompute": "all"}, "recompute=all"),
        (ParallelConfig(pipeline=2), {"engine": "zero1"}, "does not go with the engine zero1"),
        (ParallelConfig(pipeline=2), {"sharding": ShardingConfig(gradients="none")}, "leave sharding"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_before_it_runs(parallel, fields, words):
    with pytest.raises(RankError, match=words):
        run_ranks(refused, 2, parallel, fields)


def refused(parallel, fields):
    engines.make_state(parallel, **fields)


@pytest.mark.parametrize("layers", [(2,), (1, 2, 0), (1, 0, 1, 0), (-1, 1, 1, 1)])
def test_layers_of_stages_that_no_pipeline_has_are_refused_without_ranks(layers):
    with pytest.raises(ConfigError, match=r"must be 4 numbers, for parallel\.pipeline=2"):
        check_world(ParallelConfig(pipeline=2, chunks=2, stage_layers=layers), 2)
    with pytest.raises(ConfigError, match=r"parallel\.pipeline is 1"):
        check_world(ParallelConfig(stage_layers=layers), 2)


def balanced(parallel, mixture):
    build = Mapping(4, parallel, layers=3, dense=(0,)).build
    state = engines.make_state(parallel, build=build, mixture=mixture)
    return folding._observed_step(state, 0)


def test_a_stage_without_experts_has_the_figures_and_losses_of_the_others():
    mixture = MixtureConfig(balance=0.1, z=0.01, over="sequence")
    expected, gradients = run_ranks(balanced, 1, ParallelConfig(), mixture)[0]
    results = run_ranks(balanced, 4, ParallelConfig(pipeline=2, experts=2, stage_layers=(1, 2)), mixture)
    for figures, _ in results:
        assert figures["expert_load"] == expected["expert_load"]
        assert figures["experts_idle"] == expected["experts_idle"]
    for name, gradient in gradients.items():
        assert (results[0][1][name] - gradient).abs().max() < 1e-11 * gradient.abs().max(), name


def test_rows_that_no_schedule_orders_are_refused():
    check_rows(1, 2)
    check_rows(6, 2)
    with pytest.raises(ConfigError, match=r"choose rows_per_step so that each data rank has a multiple of 2"):
        check_rows(5, 2)


@pytest.mark.parametrize("parallel", [ParallelConfig(pipeline=2), ParallelConfig(pipeline=2, chunks=2)])
def test_what_ranks_did_leaves_them_waiting_as_long_as_published(parallel):
    row = bubble.measure(parallel)
    assert row["actions"] == 2 * 2 * parallel.chunks * row["rows"]
    assert row["bubble"] == pytest.approx(row["formula"], abs=1e-12)


@pytest.mark.skipif(not SPLITS_BACKWARD, reason="torch cannot split the backward of autograd functions")
def test_weights_gradients_apart_make_ranks_wait_less():
    row = bubble.measure(ZERO_BUBBLE)
    assert row["actions"] == 3 * 2 * row["rows"]
    assert row["bubble"] < 1 / (row["rows"] + 1)


def test_replayed_work_waits_for_what_it_needs():
    first = [("forward", 0, 0), ("both", 0, 0)]
    second = [("forward", 1, 0), ("inputs", 1, 0), ("weights", 1, 0)]
    assert bubble.replay([first, second], 2) == (5, 6)


def rebased(parallel):
    state = engines.make_state(parallel, build=MAPPINGS[0].build)
    extend_context(state.model.language_model, 50.0, 4096)
    return engines.take_steps(state, 0, 1)[0]["loss"]


def test_a_raised_rope_base_holds_under_every_fold():
    (expected,) = run_ranks(rebased, 1, ParallelConfig())
    (other,) = run_ranks(engines.plain_steps, 1, 1, MAPPINGS[0].build)[0][0]
    assert abs(expected - other["loss"]) > 1e-6
    for parallel in (ParallelConfig(tensor=2), ParallelConfig(pipeline=2)):
        assert run_ranks(rebased, 2, parallel) == pytest.approx([expected] * 2, rel=1e-12)


def recomputed(mapping, recompute):
    state = engines.make_state(mapping.parallel, build=mapping.build, recompute=recompute)
    return folding._observed_step(state, 0)


@pytest.mark.parametrize("recompute", ["all", "save_attention"])
@pytest.mark.parametrize(
    "mapping",
    [Mapping(4, ParallelConfig(pipeline=2, experts=2)), Mapping(4, ParallelConfig(pipeline=2, tensor=2), 0)],
    ids=["experts", "tensor"],
)
def test_layers_that_are_computed_again_are_so_for_their_own_row(mapping, recompute):
    (expected,), gradients, _ = folding._expected(mapping)
    once = run_ranks(recomputed, 4, mapping, "none")[0][0]
    figures, found = run_ranks(recomputed, 4, mapping, recompute)[0]
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    for name in ("expert_load", "expert_load_text", "expert_load_frames"):
        assert figures.get(name) == once.get(name)
    assert ("expert_load" in figures) == bool(mapping.experts)
    for name, gradient in gradients.items():
        assert (found[name] - gradient).abs().max() < 1e-11 * gradient.abs().max(), name
