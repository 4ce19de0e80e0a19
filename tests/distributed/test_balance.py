"""Losses of routers: their gradients are those of one process that sees all the tokens."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers

from longvila.apply import apply_folds
from longvila.bench import engines
from longvila.config import MixtureConfig, ParallelConfig
from longvila.difference import relative_error
from longvila.errors import ConfigError
from longvila.parallel.balance import router_loss
from longvila.parallel.batch import shard_batch
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import RankError, run_cases, run_ranks
from longvila.parallel.packed import whole
from longvila.shards.order import Cursor
from longvila.train import gradients
from longvila.train.checkpoint import Checkpoints, Position
from longvila.train.gradients import FRAME, make_row, reference
from longvila.train.loop import resume

from . import test_models
from .test_experts import DENSE, MIXTURES, make_mixture, with_mixture
from .test_training import check_steps
from .training_parts import whole_weights

MIXTURE = MixtureConfig(balance=0.3, z=0.01)
ROUTER = "gate"


def plain_loss(logits, chosen, mixture=MIXTURE):
    """The losses as their papers have them, over all the tokens there are."""
    num_experts, top_k = logits.shape[1], chosen.shape[1]
    share = F.one_hot(chosen, num_experts).sum(1).double().mean(0) / top_k
    balance = num_experts * (share * logits.softmax(-1).mean(0)).sum()
    return mixture.balance * balance + mixture.z * (logits.logsumexp(-1) ** 2).mean()


class Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, loss):
        return scores.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones((), dtype=torch.float64)


def attach_plain_losses(model, factor=1.0):
    """Each router's loss on the tokens of a row, without any of the machinery."""
    routers = [module for name, module in model.named_modules() if name.endswith(("mlp.gate", "block_sparse_moe.gate"))]
    for router in routers:
        router.register_forward_hook(
            lambda _, __, out: (out[0], Attach.apply(out[1], factor * plain_loss(out[0], out[2])), out[2])
        )
    return model


COUNTS = [(5, 0, 9), (1, 1, 1), (0, 0, 4)]


def parts_of_the_loss(counts):
    torch.manual_seed(0)
    logits, chosen = torch.randn(sum(counts), 6, dtype=torch.float64), torch.randint(0, 6, (sum(counts), 2))
    mine = logits.split(counts)[dist.get_rank()].clone().requires_grad_()
    loss = router_loss(mine, chosen.split(counts)[dist.get_rank()], MIXTURE, dist.group.WORLD)
    loss.backward()
    logits.requires_grad_()
    expected = plain_loss(logits, chosen)
    expected.backward()
    return loss.item(), expected.item(), mine.grad - logits.grad.split(counts)[dist.get_rank()]


def test_parts_of_ranks_sum_to_the_loss_of_all_tokens():
    for counts, found in zip(COUNTS, run_cases(parts_of_the_loss, 3, [(each,) for each in COUNTS]), strict=True):
        assert sum(part for part, *_ in found) == pytest.approx(found[0][1], rel=1e-12), counts
        assert all(difference.abs().sum() < 1e-12 for *_, difference in found), counts


@functools.cache
def expected_of(name):
    """As that of `test_models`."""
    return run_ranks(test_models.reference, 1, attach_plain_losses(test_models.make(name)))[0]


def errors(name, parallel, mixture, recompute):
    expected_loss, expected = expected_of(name)
    model, fold = test_models.make(name), test_models.fold_of(parallel, "cpu")
    routers = apply_folds(model, fold, recompute=recompute, mixture=mixture).routers
    ids, labels, positions = test_models.make_row()
    batch = shard_batch(
        test_models.LENGTHS, fold, parallel.layout, parallel.routing,
        input_ids=ids, labels=labels, position_ids=positions,
    )  # fmt: skip
    out = model(**batch, use_cache=False)
    total = int((labels != -100).sum())
    loss = F.cross_entropy(out.logits[0], batch["labels"][0], ignore_index=-100, reduction="sum") / total
    loss.backward()
    of_all = loss.detach().clone()
    dist.all_reduce(of_all)
    found = {"loss": relative_error(of_all.item(), expected_loss)}
    for key, parameter in model.named_parameters():
        found[key] = relative_error(whole(parameter.grad), expected[key])
    return found, routers.end_step(moved=False)


@pytest.mark.parametrize(
    ("parallel", "over", "recompute"),
    [
        (ParallelConfig(inner=2), "world", "none"),
        (ParallelConfig(inner=2, experts=2), "sequence", "save_attention"),
        (ParallelConfig(head=2, inner=2, experts=4), "world", "none"),
    ],
    ids=str,
)
def test_gradients_of_a_model_are_those_of_one_process(parallel, over, recompute):
    mixture = MixtureConfig(MIXTURE.balance, MIXTURE.z, over)
    for name in MIXTURES:
        expected_of(name)
    cases = [(name, parallel, mixture, recompute) for name in MIXTURES]
    for name, by_rank in zip(MIXTURES, run_cases(errors, parallel.sequence, cases), strict=True):
        for found, figures in by_rank:
            assert test_models.worst(found)[1] < 1e-11, (name, test_models.worst(found))
            assert figures["expert_load"] == figures["expert_load_text"] > 1
            assert figures["expert_load_frames"] == 0


def plain_steps():
    plain = engines.make_model
    engines.make_model = lambda: attach_plain_losses(plain(), 1 / engines.ROWS_PER_STEP)
    return engines.plain_steps(3)


def train_three_steps(parallel):
    state = engines.make_state(parallel, mixture=MixtureConfig(MIXTURE.balance, MIXTURE.z, "sequence"))
    return engines.take_steps(state, 0, 3), whole_weights(state.model)


@pytest.mark.parametrize(("world", "parallel"), [(2, ParallelConfig(inner=2)), (4, ParallelConfig(head=2, experts=2))])
def test_steps_have_the_mean_of_their_rows(world, parallel):
    expected = run_ranks(with_mixture, 1, plain_steps)[0]
    check_steps(run_ranks(with_mixture, world, train_three_steps, parallel), expected)


def count_choices(parallel, recompute):
    """The figures of a step, and counts of the same choices on one process."""
    state = engines.make_state(parallel, recompute=recompute)
    (figures,) = engines.take_steps(state, 0, 1)
    assert state.engine.routers._counts == [None, None], "counts begin anew with each step"
    model, chosen = make_mixture(), []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
    rows = [make_row(engines.DOCUMENTS[i], 4, 32, seed=i) for i in range(engines.ROWS_PER_STEP)]
    reference(model, rows)
    text, frames = torch.zeros(2, 8), torch.zeros(2, 8)
    for index, row in enumerate(rows):
        for layer in range(2):
            is_frame = row.input_ids == FRAME
            text[layer] += torch.bincount(chosen[2 * index + layer][~is_frame].flatten(), minlength=8)
            frames[layer] += torch.bincount(chosen[2 * index + layer][is_frame].flatten(), minlength=8)
    return figures, text, frames


@pytest.mark.parametrize(
    ("world", "parallel", "recompute"),
    [(2, ParallelConfig(inner=2), "none"), (4, ParallelConfig(head=2, experts=2), "all")],
)
def test_what_is_chosen_is_counted_by_kind_of_token(world, parallel, recompute):
    figures, text, frames = run_ranks(with_mixture, world, count_choices, parallel, recompute)[0]

    def load(counts):
        return (counts.max(1).values / counts.mean(1)).max().item()

    assert figures["expert_load_text"] == pytest.approx(load(text))
    assert figures["expert_load_frames"] == pytest.approx(load(frames))
    assert figures["expert_load"] == pytest.approx(load(text + frames))
    assert figures["experts_idle"] == (text + frames == 0).sum()


def refused(make):
    apply_folds(make(), make_fold(ParallelConfig(), "cpu"), mixture=MIXTURE)


def make_other_mixture():
    return transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(**test_models.SHAPE, num_experts=4, num_experts_per_tok=2)
    )


def test_a_model_whose_routers_losses_are_not_known_is_refused():
    run_ranks(refused, 1, make_mixture)
    for make, name in ((DENSE, "Qwen3ForCausalLM"), (make_other_mixture, "OlmoeForCausalLM")):
        with pytest.raises((ConfigError, RankError), match=rf"{name} has no routers whose losses are known"):
            run_ranks(refused, 1, make)


def see_other_router():
    """A model whose losses are not known: what its experts are given is counted all the same."""
    model = make_other_mixture()
    routers = apply_folds(model, make_fold(ParallelConfig(), "cpu")).routers
    ids, _, positions = test_models.make_row()
    batch = shard_batch(test_models.LENGTHS, make_fold(ParallelConfig(), "cpu"), input_ids=ids, position_ids=positions)
    model(**batch, use_cache=False)
    return routers.end_step(moved=True)


def test_routers_of_any_form_are_counted():
    figures = run_ranks(see_other_router, 1)[0]
    assert figures["expert_load"] >= 1
    assert figures["choices_dropped"] == 0


def train_projector(parallel):
    state = engines.make_state(parallel, trains=("projector",))
    return engines.take_steps(state, 0, 1)[0]


def test_choices_are_counted_where_the_mixture_is_frozen():
    figures = run_ranks(with_mixture, 2, train_projector, ParallelConfig(inner=2, experts=2))[0]
    assert figures["expert_load"] > 1


# Biases of scores that choose alone, moved once a step.

CHOOSING = {
    **{key: value for key, value in test_models.SHAPE.items() if key != "pad_token_id"}, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "partial_rotary_factor": 0.5, "tie_word_embeddings": True,
}  # fmt: skip
STEP = 0.25


def make_choosing(seed=0):
    """The small vision-language model around a GLM 4 mixture, whose routers have such a bias."""
    text = transformers.Glm4MoeConfig(**{**CHOOSING, "vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2})
    return DENSE(seed, text=text)


def with_choosing(function, *arguments):
    gradients.make_model = engines.make_model = make_choosing
    return function(*arguments)


def biases_of(weights):
    return {name: bias.clone() for name, bias in weights.items() if name.endswith("e_score_correction_bias")}


def move_biases(parallel, folder):
    """Biases before and after each of two steps, what was chosen in the first, and what is saved and exported."""
    state = engines.make_state(parallel, mixture=MixtureConfig(bias=STEP))
    seen, chosen = [biases_of(dict(state.model.named_buffers()))], {}
    for name, module in state.model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: chosen.setdefault(name, []).append(inputs[1].flatten())
            )
    for number in range(2):
        engines.take_steps(state, number, 1)
        seen.append(biases_of(dict(state.model.named_buffers())))
        if number == 0:
            counts = {name: torch.bincount(torch.cat(each), minlength=4) for name, each in chosen.items()}
    for count in counts.values():
        dist.all_reduce(count)
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.save(state.engine.state(), Position(2, Cursor(0, 0, 8)), state.config)
    return seen, list(counts.values()), biases_of(state.engine.weights())


def steps_that_move_and_that_do_not():
    model = make_choosing().language_model
    fold = make_fold(ParallelConfig(), "cpu")
    routers = apply_folds(model, fold, mixture=MixtureConfig(bias=STEP)).routers
    ids, _, positions = test_models.make_row()
    batch = shard_batch(test_models.LENGTHS, fold, input_ids=ids, position_ids=positions)
    seen = []
    for moved in (False, True):
        model(**batch, use_cache=False)
        routers.end_step(moved)
        seen.append(max(bias.abs().max().item() for bias in biases_of(dict(model.named_buffers())).values()))
    return seen


def test_a_step_that_is_skipped_moves_no_bias():
    assert run_ranks(steps_that_move_and_that_do_not, 1) == [[0.0, STEP]]


def resumed_biases(parallel, folder):
    state = engines.make_state(parallel, mixture=MixtureConfig(bias=STEP))
    resume(state.engine, Checkpoints(folder, 1))
    return biases_of(dict(state.model.named_buffers()))


def test_biases_move_towards_balance_by_what_all_ranks_chose_and_are_saved_and_exported(tmp_path):
    found = run_ranks(with_choosing, 2, move_biases, ParallelConfig(inner=2, experts=2), tmp_path)
    (before, after, last), counts, exported = found[0]
    assert len(before) == len(counts) == 2
    for (name, bias), chosen in zip(after.items(), counts, strict=True):
        expected = before[name] + STEP * torch.sign(chosen.double().mean() - chosen)
        assert torch.equal(bias, expected.to(bias.dtype))
        assert bias.abs().max() == STEP
        assert all(torch.equal(bias, other[0][1][name]) for other in found)
    resumed = run_ranks(with_choosing, 4, resumed_biases, ParallelConfig(head=2, experts=4), tmp_path)[3]
    assert all(torch.equal(resumed[name], bias) and torch.equal(exported[name], bias) for name, bias in last.items())


def biased(make):
    apply_folds(make(), make_fold(ParallelConfig(), "cpu"), mixture=MixtureConfig(bias=STEP))


@pytest.mark.parametrize(("make", "words"), [
    (make_mixture, "routers of Qwen3MoeForCausalLM have no bias .* use mixture.balance"),
    (DENSE, "mixture.bias given, but Qwen3ForCausalLM has no experts"),
], ids=["no bias", "no experts"])  # fmt: skip
def test_biases_of_a_model_without_any_are_refused(make, words):
    with pytest.raises((ConfigError, RankError), match=words):
        run_ranks(biased, 1, make)
