"""Experts shared out over ranks, on a fold of their own: loss and every gradient equal one process."""

import functools
import itertools
import logging
import math

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from longvila.apply import apply_folds
from longvila.apply import experts as mixtures
from longvila.apply.experts import is_experts
from longvila.bench import engines
from longvila.bench.mapping import kept_of
from longvila.config import MixtureConfig, ParallelConfig, ShardingConfig
from longvila.difference import relative_error
from longvila.errors import ConfigError
from longvila.parallel.batch import shard_batch
from longvila.parallel.choose import make_plan
from longvila.parallel.experts import Capacity, dispatch
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import RankError, run_cases, run_ranks
from longvila.parallel.traffic import counting
from longvila.shards.order import Cursor
from longvila.train import gradients
from longvila.train.checkpoint import Checkpoints, Position
from longvila.train.gradients import MIXED, TEXT, VIDEO, Case
from longvila.train.loop import resume

from . import test_models
from .test_models import errors_of_all, worst
from .test_training import check_steps
from .training_parts import whole_weights

DENSE = gradients.make_model


def make_mixture(seed=0):
    """The small vision-language model of `train.gradients` with 8 experts in each of 2 layers."""
    return DENSE(seed, experts=8)


def with_mixture(function, *arguments):
    """`function` on every rank, over the mixture in place of the dense model."""
    gradients.make_model = engines.make_model = make_mixture
    return function(*arguments)


MIXTURES = ("qwen3_moe", "qwen2_moe", "mixtral")
"""Of `test_models.MODELS`."""


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(inner=2, experts=2),
        ParallelConfig(inner=2, head=2, experts=2),
        ParallelConfig(inner=4, experts=4),
        ParallelConfig(inner=2, expert_tensor=2),
        ParallelConfig(inner=2, head=2, experts=2, expert_tensor=2),
        ParallelConfig(inner=4, expert_tensor=4),
    ],
    ids=str,
)
def test_language_models_of_transformers_have_the_gradients_of_one_process(parallel):
    names = [name for name in MIXTURES if parallel.expert_tensor == 1 or cuts_experts(name)]
    if len(names) < len(MIXTURES):
        logging.warning("this transformers has no plan to cut the experts of %s", set(MIXTURES) - set(names))
    assert names
    for name, by_rank in errors_of_all(names, parallel).items():
        for found, counted in by_rank:
            assert worst(found)[1] < 1e-11, (name, worst(found))
            assert (counted["bytes experts"] > 0) == (parallel.experts > 1)
            assert (counted["bytes expert_tensor"] > 0) == (parallel.expert_tensor > 1)


def cuts_experts(name):
    """Before 5.24, transformers has no plan to cut the experts of some models."""
    return any("experts" in key for key in test_models.MODELS[name]().base_model_tp_plan)


@pytest.mark.parametrize(
    ("world", "parallel", "rows"),
    [
        (2, ParallelConfig(experts=2), (MIXED, TEXT)),  # a row of video, and one without
        (4, ParallelConfig(inner=2, experts=2), (MIXED, VIDEO)),
        (4, ParallelConfig(head=2, experts=4), (TEXT, MIXED)),
        (4, ParallelConfig(inner=2, outer=2, experts=4, routing="relay", placement="context_first"), (MIXED,)),
    ],
    ids=str,
)
def test_a_vision_language_model_has_the_gradients_of_one_process(world, parallel, rows):
    errors = run_ranks(with_mixture, world, gradients.folded, Case(parallel, world, rows))[0]
    assert len(errors) == 60
    assert worst(errors)[1] < 1e-11, worst(errors)


# Of Qwen2-MoE the experts are not the last part of a layer: all of it is computed again.
@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral"])
def test_experts_are_right_when_they_are_computed_again(name):
    test_models.expected_of(name)
    policies = ("none", "all", "save_attention", "offload_attention")
    cases = [(name, ParallelConfig(inner=2, experts=2), policy) for policy in policies]
    plain, *others = run_cases(test_models.errors, 2, cases)
    for policy, by_rank in zip(policies[1:], others, strict=True):
        for (found, counted), (_, once) in zip(by_rank, plain, strict=True):
            assert worst(found)[1] < 1e-11, (policy, worst(found))
            # There, back, and there and back again.
            assert counted["bytes experts"] == 1.5 * once["bytes experts"] > 0, policy


@functools.cache
def three_plain_steps():
    return run_ranks(with_mixture, 1, engines.plain_steps, 3)[0]


def train_three_steps(parallel):
    state = engines.make_state(parallel)
    return engines.take_steps(state, 0, 3), whole_weights(state.model)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, ParallelConfig(inner=2, experts=2)),
        (4, ParallelConfig(head=2, experts=2)),
        (4, ParallelConfig(experts=4)),
        (4, ParallelConfig(inner=2, experts=2, expert_tensor=2)),
        (4, ParallelConfig(expert_tensor=2)),
    ],
)
def test_norms_clipping_and_steps_are_those_of_one_process(world, parallel):
    check_steps(run_ranks(with_mixture, world, train_three_steps, parallel), three_plain_steps())


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


def test_a_checkpoint_goes_on_under_any_other_fold_of_experts(tmp_path):
    saved = ParallelConfig(inner=2, experts=2, expert_tensor=2)
    expected, exported = run_ranks(with_mixture, 4, save_after_two, saved, tmp_path)[0]
    for world, parallel in (
        (2, ParallelConfig(inner=2, expert_tensor=2)),
        (2, ParallelConfig(experts=2)),
        (4, ParallelConfig(experts=4)),
    ):
        resumed = run_ranks(with_mixture, world, continue_after_two, parallel, tmp_path)[0]
        for name, weight in expected.items():
            assert (resumed[name] - weight).abs().max() < 1e-9, (parallel, name)
    for name, weight in expected.items():
        assert (exported[name] - weight).abs().max() < 1e-6, name


def exchange(chosen_by_rank):
    """Tokens of every rank through experts that multiply by a parameter and by their number + 1."""
    rank, world = dist.get_rank(), dist.get_world_size()
    chosen = torch.tensor(chosen_by_rank[rank], dtype=torch.long).view(-1, 2)
    torch.manual_seed(rank)
    hidden = torch.randn(len(chosen), 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(len(chosen), 2, dtype=torch.float64, requires_grad=True)
    factor = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def run(tokens, numbers, ones):
        assert numbers.shape == ones.shape == (len(tokens), 1)
        return tokens * factor[numbers] * (1.0 + 2 * rank + numbers)

    with counting() as counts:
        out = dispatch(run, hidden, chosen, weights, 2, dist.group.WORLD)
        out.sum().backward()
    expected = (hidden[:, None] * (1.0 + chosen)[..., None] * weights[..., None]).sum(1)
    grads = torch.autograd.grad(expected.sum(), (hidden, weights)) if len(chosen) else (hidden, weights)
    local = all(torch.allclose(a, b) for a, b in zip((out, hidden.grad, weights.grad), (expected, *grads), strict=True))
    away = sum(int(number) // 2 != rank for number in chosen.flatten())
    assert world == 3
    return local, counts["bytes experts"], away, factor.grad


CHOSEN = (
    ([0, 1, 2, 3, 4, 5, 5, 0], [3, 2, 1, 0], [4, 0, 2, 5]),
    ([0, 5, 2, 3], [], [4, 0]),  # a rank without tokens
    ([4, 5, 5, 4], [4, 5], [5, 4]),  # everything to one rank, nothing to others
    ([], [], []),
)


def test_tokens_reach_their_experts_and_come_back():
    for chosen, found in zip(CHOSEN, run_cases(exchange, 3, [(chosen,) for chosen in CHOSEN]), strict=True):
        assert all(local for local, *_ in found), chosen
        assert all(factor is not None for *_, factor in found), chosen
        # There and back, and their gradients: each (token, expert) pair on another rank crosses four times.
        moved = sum(away for _, _, away, _ in found) * 4 * 8
        assert sum(count for _, count, _, _ in found) == 4 * moved, chosen


# Capacity: what is dropped is what one process drops that looks at each rank's tokens by themselves.


def exchange_with_capacity(chosen_by_rank, capacity, shared):
    """As `exchange`, with weights that are often equal; and the bytes sent."""
    rank = dist.get_rank()
    chosen = torch.tensor(chosen_by_rank[rank], dtype=torch.long).view(-1, 2)
    torch.manual_seed(rank)
    hidden = torch.randn(len(chosen), 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randint(1, 3, chosen.shape).double().requires_grad_()
    num_local = 2 if shared else 6

    def run(tokens, numbers, ones):
        return tokens * (1.0 + (num_local * rank if shared else 0) + numbers)

    with counting() as counts:
        out = dispatch(run, hidden, chosen, weights, num_local, dist.group.WORLD if shared else None, capacity)
        out.sum().backward()
    kept = kept_of(capacity, chosen, weights, 6)
    expected = (hidden[:, None] * (1.0 + chosen)[..., None] * (weights * kept)[..., None]).sum(1)
    grads = torch.autograd.grad(expected.sum(), (hidden, weights)) if len(chosen) else (hidden, weights)
    right = all(torch.allclose(a, b) for a, b in zip((out, hidden.grad, weights.grad), (expected, *grads), strict=True))
    return right, int((~kept).sum()), counts["bytes experts"]


def test_an_expert_takes_what_its_capacity_holds():
    chosen = ([0, 1, 0, 3, 0, 5, 5, 0, 1, 0], [3, 2, 3, 0, 3, 1], [])
    capacities = itertools.starmap(
        Capacity, itertools.product((0.5, 1.0, 1.25, 9.0), ("probability", "position"), (False, True))
    )
    cases = [(chosen, *each) for each in itertools.product(capacities, (True, False))]
    for case, found in zip(cases, run_cases(exchange_with_capacity, 3, cases), strict=True):
        _, capacity, shared = case
        assert all(right for right, *_ in found), case
        assert (sum(dropped for _, dropped, _ in found) > 0) == (capacity.factor < 9), case
        if shared and capacity.pads:
            # To 4 experts of other ranks, back from 2 of its own, and their gradients: whatever is chosen.
            takes = [capacity.of(len(each), 6) for each in chosen]
            rows = [2 * (4 * most + 2 * (sum(takes) - most)) for most in takes]
            assert [size for *_, size in found] == [4 * 8 * number for number in rows], case


def errors_with_capacity(name, parallel, mixture):
    """Against one process that drops of each rank's tokens by themselves."""
    world = parallel.sequence
    fold = test_models.fold_of(parallel, "cpu")
    plan = make_plan(
        test_models.LENGTHS, fold.inner, fold.outer, fold.num_heads, parallel.layout, tensor=fold.num_tensor
    )
    chunks = [plan.positions(*fold.coordinates(rank)) for rank in range(world)]
    capacity = Capacity(mixture.capacity, mixture.keeps)
    dropped = []

    def drop(module, inputs):
        hidden, chosen, weights = inputs
        kept = torch.zeros_like(chosen, dtype=torch.bool)
        for chunk in chunks:
            kept[chunk] = kept_of(capacity, chosen[chunk], weights[chunk], module.num_experts)
        dropped.append((~kept).double().mean())
        return hidden, chosen, weights * kept

    plain = test_models.make(name)
    for module in plain.modules():
        if is_experts(module):
            module.register_forward_pre_hook(drop)
    expected = test_models.reference(plain)
    found, _, routers = test_models.compare(test_models.make(name), expected, parallel, mixture=mixture)
    return found, routers.end_step(moved=True)["choices_dropped"], sum(dropped).item() / len(dropped)


@pytest.mark.parametrize(
    ("parallel", "mixture"),
    [
        (ParallelConfig(inner=2), MixtureConfig(capacity=0.75)),
        (ParallelConfig(inner=2, experts=2), MixtureConfig(capacity=0.75, keeps="position")),
        (ParallelConfig(inner=2, tensor=2, experts=4), MixtureConfig(capacity=1.0, pads=True)),
    ],
    ids=str,
)
def test_a_model_that_drops_has_the_gradients_of_one_process(parallel, mixture):
    cases = [(name, parallel, mixture) for name in MIXTURES]
    for name, by_rank in zip(MIXTURES, run_cases(errors_with_capacity, parallel.sequence, cases), strict=True):
        for found, share, expected in by_rank:
            assert worst(found)[1] < 1e-11, (name, worst(found))
            assert share == pytest.approx(expected, rel=1e-12)
            assert share > 0.02


def by_transformers(tp):
    """A model that transformers shares out, on another row for each rank: error of each summed gradient."""
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    rank, plain, model = dist.get_rank(), test_models.make("qwen3_moe"), test_models.make("qwen3_moe")
    rows = [torch.randint(1, 50, (1, n), generator=torch.Generator().manual_seed(n)) for n in (11, 7)]
    for ids in rows:
        plain(ids, use_cache=False).logits.square().sum().backward()
    plan = {}
    for name, module in model.named_modules():
        if is_experts(module):
            plan |= {f"{name}.{parameter}": "grouped_gemm" for parameter in module._parameters}
            plan[name] = "ep_dispatch_experts"
    mesh = init_device_mesh("cpu", (2,))
    one = init_device_mesh("cpu", (2, 1) if tp == 1 else (1, 2), mesh_dim_names=("data", "tensor"))["tensor"]
    apply_expert_parallelism(model, mesh, one, plan, ep_implementation="longvila")
    model(rows[rank], use_cache=False).logits.square().sum().backward()
    found = {}
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        else:
            dist.all_reduce(gradient)
        found[name] = relative_error(gradient, expected.grad)
    return found


@pytest.mark.skipif(
    not hasattr(mixtures, "ExpertDispatch"), reason="this transformers has no registry of expert parallelism"
)
def test_models_that_transformers_shares_out_find_the_dispatcher_by_name():
    found = run_ranks(by_transformers, 2, 1)[0]
    assert worst(found)[1] < 1e-11, worst(found)
    with pytest.raises(RankError, match="tp_size=2 ranks hold the same ones"):
        run_ranks(by_transformers, 2, 2)


def refused(parallel, make, sharding, mixture=None):
    apply_folds(make(), make_fold(parallel, "cpu"), sharding=sharding, mixture=mixture)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_capacity_that_holds_nothing_is_refused(factor):
    with pytest.raises(RankError, match=r"mixture\.capacity=.* leaves experts no tokens"):
        run_ranks(refused, 1, ParallelConfig(), make_mixture, None, MixtureConfig(capacity=factor))


def with_biased_experts():
    """Experts with a parameter of which transformers' plan says nothing."""
    model = make_mixture()
    for module in model.modules():
        if is_experts(module):
            module.down_bias = torch.nn.Parameter(torch.zeros(8, 48, 1))
    return model


@pytest.mark.parametrize(("world", "parallel", "make", "sharding", "words"), [
    (2, ParallelConfig(expert_tensor=2), DENSE, ShardingConfig(), "Qwen3ForCausalLM has no experts"),
    (5, ParallelConfig(expert_tensor=5), make_mixture, ShardingConfig(), "24 neurons of .*expert_tensor=5"),
    (2, ParallelConfig(expert_tensor=2), with_biased_experts, ShardingConfig(), "no way to cut down_bias"),
    (4, ParallelConfig(experts=2, expert_tensor=3), make_mixture, ShardingConfig(), "=2 x expert_tensor=3 .* of 4"),
    (3, ParallelConfig(experts=3), make_mixture, ShardingConfig(), "8 experts .* evenly among parallel.experts=3"),
    (2, ParallelConfig(experts=2), DENSE, ShardingConfig(), "Qwen3ForCausalLM has no experts"),
    (4, ParallelConfig(experts=3), make_mixture, ShardingConfig(), "parallel.experts=3 .* world of 4"),
    (2, ParallelConfig(experts=2), make_mixture, ShardingConfig("none", "none"), "leave sharding"),
], ids=["nothing to cut", "neurons", "no plan", "sizes", "uneven", "no experts", "world", "sharding"])  # fmt: skip
def test_what_cannot_be_shared_out_is_refused_with_both_numbers(world, parallel, make, sharding, words):
    with pytest.raises((ConfigError, RankError), match=words):
        run_ranks(refused, world, parallel, make, sharding)


def brief_step(make, parallel, mixture):
    """Types of what routers score with, of experts' results and of the model's, in bf16; and the loss."""
    model = make().float()
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_pre_hook(lambda module, _: seen.update(router=module.weight.dtype))
        if is_experts(module):
            module.register_forward_hook(lambda _module, _inputs, out: seen.update(experts=out.dtype))
    fold = make_fold(parallel, "cpu")
    apply_folds(model, fold, "bf16", recompute="all", mixture=mixture, parallel=parallel)
    ids, labels, positions = test_models.make_row()
    batch = shard_batch(test_models.LENGTHS, fold, input_ids=ids, labels=labels, position_ids=positions)
    labels = batch.pop("labels")[0]
    logits = model(**batch, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0].float(), labels, ignore_index=-100, reduction="sum")
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(name.endswith(("expert_bias", "e_score_correction_bias")) for name in without), (
        without
    )  # they choose only
    return seen | {"logits": logits.dtype, "loss": loss.item()}


GLM = functools.partial(
    transformers.Glm4MoeConfig, **test_models.SHAPE, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    moe_intermediate_size=16, first_k_dense_replace=1, n_shared_experts=1,
)  # fmt: skip


def make_glm():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(GLM()).train()


ERNIE = functools.partial(
    transformers.Ernie4_5_MoeConfig, **test_models.SHAPE, moe_num_experts=4, moe_k=2, moe_intermediate_size=16,
    moe_layer_start_index=1, moe_num_shared_experts=1,
)  # fmt: skip
AFMOE = functools.partial(
    transformers.AfmoeConfig, **test_models.SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    num_dense_layers=1, num_shared_experts=1, layer_types=["full_attention"] * 3, sliding_window=64,
)  # fmt: skip


def make_from(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config()).train()


@pytest.mark.parametrize("config", [ERNIE, AFMOE], ids=["ernie4_5_moe", "afmoe"])
def test_routers_of_which_parts_are_kept_in_fp32_run_in_bf16(config):
    make = functools.partial(make_from, config)
    assert make()._keep_in_fp32_modules_strict
    (seen,) = run_ranks(brief_step, 1, make, ParallelConfig(), MixtureConfig())
    assert seen["experts"] == seen["logits"] == torch.bfloat16
    assert math.isfinite(seen["loss"])


@pytest.mark.parametrize(
    "make", [functools.partial(test_models.make, "mixtral"), make_glm], ids=["mixtral", "glm4_moe"]
)
@pytest.mark.parametrize(
    ("world", "parallel", "mixture"),
    [
        (1, ParallelConfig(), MixtureConfig(capacity=2.0)),
        (2, ParallelConfig(inner=2, experts=2), MixtureConfig()),
    ],
    ids=["capacity", "shared"],
)
def test_mixtures_compute_in_bf16_and_their_routers_in_what_they_ask_for(make, world, parallel, mixture):
    # transformers 5.17 keeps the bias of GLM 4's routers in fp32, 5.24 their weights too.
    keeps = make()._keep_in_fp32_modules_strict or ()
    router = torch.float32 if "gate.weight" in keeps else torch.bfloat16
    for seen in run_ranks(brief_step, world, make, parallel, mixture):
        assert seen["router"] == router
        assert seen["experts"] == seen["logits"] == torch.bfloat16
