"""Losses of routers: their gradients are those of one process that sees all the tokens."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers

from longvila.apply import apply_folds
from longvila.bench import engines
from longvila.config import MixtureConfig, ParallelConfig
from longvila.errors import ConfigError
from longvila.parallel.balance import Routers, router_loss
from longvila.parallel.batch import shard_batch
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import RankError, run_ranks
from longvila.train.gradients import FRAME, make_row, reference

from . import test_models
from .test_experts import DENSE, make_mixture, with_mixture
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


@pytest.mark.parametrize("counts", COUNTS)
def test_parts_of_ranks_sum_to_the_loss_of_all_tokens(counts):
    found = run_ranks(parts_of_the_loss, 3, counts)
    assert sum(part for part, *_ in found) == pytest.approx(found[0][1], rel=1e-12)
    assert all(difference.abs().sum() < 1e-12 for *_, difference in found)


def errors(name, parallel, mixture, recompute):
    expected_loss, expected = test_models.reference(attach_plain_losses(test_models.make(name)))
    model, fold = test_models.make(name), make_fold(parallel, "cpu")
    routers = apply_folds(model, fold, recompute=recompute, mixture=mixture)
    ids, labels, positions = test_models.make_row()
    batch = shard_batch(
        test_models.LENGTHS, fold, parallel.layout, parallel.routing,
        input_ids=ids, labels=labels, position_ids=positions,
    )  # fmt: skip
    out = model(**batch, use_cache=False)
    total = int((labels != -100).sum())
    loss = F.cross_entropy(out.logits[0], batch["labels"][0], ignore_index=-100, reduction="sum") / total
    loss.backward()
    whole = loss.detach().clone()
    dist.all_reduce(whole)
    found = {"loss": abs(whole.item() - expected_loss)}
    for key, parameter in model.named_parameters():
        difference = (parameter.grad.full_tensor() - expected[key]).abs().max()
        found[key] = (difference / expected[key].abs().max()).item()
    return found, routers.figures()


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "mixtral"])
@pytest.mark.parametrize(
    ("parallel", "over", "recompute"),
    [
        (ParallelConfig(inner=2), "world", "none"),
        (ParallelConfig(inner=2, experts=2), "sequence", "save_attention"),
        (ParallelConfig(head=2, inner=2, experts=4), "world", "none"),
    ],
    ids=str,
)
def test_gradients_of_a_model_are_those_of_one_process(name, parallel, over, recompute):
    mixture = MixtureConfig(MIXTURE.balance, MIXTURE.z, over)
    found, figures = run_ranks(errors, parallel.sequence, name, parallel, mixture, recompute)[0]
    assert max(found.values()) < 1e-11, max(found, key=found.get)
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
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**test_models.SHAPE, num_experts=4))


def test_a_model_whose_routers_losses_are_not_known_is_refused():
    run_ranks(refused, 1, make_mixture)
    for make, name in ((DENSE, "Qwen3ForCausalLM"), (make_other_mixture, "OlmoeForCausalLM")):
        with pytest.raises((ConfigError, RankError), match=rf"{name} has no routers whose losses are known"):
            run_ranks(refused, 1, make)


class OtherRouter(torch.nn.Linear):
    """Returns scores and logits alone, as some models' routers do."""

    def forward(self, hidden):
        logits = super().forward(hidden)
        return logits.sigmoid(), logits


def see_other_router():
    router = OtherRouter(4, 3)
    routers = Routers([router], MixtureConfig(), dist.group.WORLD)
    router(torch.randn(2, 4))
    return routers.figures()


def test_routers_that_return_something_else_run_and_are_not_counted():
    assert run_ranks(see_other_router, 1) == [{}]


def train_projector(parallel):
    state = engines.make_state(parallel, trains=("projector",))
    return engines.take_steps(state, 0, 1)[0]


def test_choices_are_counted_where_the_mixture_is_frozen():
    figures = run_ranks(with_mixture, 2, train_projector, ParallelConfig(inner=2, experts=2))[0]
    assert figures["expert_load"] > 1
