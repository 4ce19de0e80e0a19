"""Loss and every gradient of a whole vision-language model under every fold, against one process."""

import pytest
import torch
import torch.distributed as dist

from longvila.parallel import batch, exchange
from longvila.parallel.launch import run_ranks
from longvila.train import gradients
from longvila.train.gradients import BOUND, Case, cases, folded

TWO_RANKS = Case(gradients.ParallelConfig(inner=2), 2, (gradients.MIXED,))
DATA_AND_SEQUENCE = Case(gradients.ParallelConfig(inner=2), 4, (gradients.MIXED, gradients.TEXT))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_mesh_and_layout_gives_the_gradients_of_one_process(world):
    # Starting ranks takes longer than a case, and threads of their groups stay until they end: a few cases at a time.
    chosen = cases(world)
    for start in range(0, len(chosen), 6):
        some = chosen[start : start + 6]
        for case, errors in zip(some, run_ranks(_each_folded, world, some)[0], strict=True):
            check(case, errors)


def check(case, errors):
    assert len(errors) == 60
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= BOUND, f"{case.name}: {worst} is off by {errors[worst]:.1e}"


def _each_folded(chosen):
    return [folded(case) for case in chosen]


def _lose_gradients(case):
    def forward_only(x, in_splits, out_splits, group, what):
        out = x.new_empty((sum(out_splits), *x.shape[1:]))
        dist.all_to_all_single(out, x.detach().contiguous(), out_splits, in_splits, group=group)
        return out + 0 * x.sum()

    batch.all_to_all = forward_only
    return folded(case)


def _wrong_backward_splits(case):
    class Flipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, in_splits, out_splits, *rest):
            ctx.arguments = (out_splits, in_splits, *rest)
            return exchange.all_to_all(x, in_splits, out_splits, *rest)

        @staticmethod
        def backward(ctx, grad):
            return exchange.all_to_all(grad.flip(0), *ctx.arguments), None, None, None, None

    batch.all_to_all = Flipped.apply
    return folded(case)


def _shift_labels_late(case):
    def shard_then_shift(ids, labels, positions, lengths, is_frame, tokens, fold, *rest):
        unshifted = torch.cat([one.roll(1) for one in labels.split(list(lengths))])
        local = _shard_row(ids, unshifted, positions, lengths, is_frame, tokens, fold, *rest)
        local.labels.copy_(local.labels.roll(-1, dims=1))
        return local

    _shard_row = gradients.shard_row
    gradients.shard_row = shard_then_shift
    return folded(case)


def _average_over_ranks(case):
    real = gradients.apply_folds

    def averaged(model, fold):
        real(model, fold)
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(float(dist.get_world_size()))

    gradients.apply_folds = averaged
    return folded(case)


def _normalise_locally(case):
    gradients.sum_over_world = lambda *values: list(values)
    return folded(case)


@pytest.mark.parametrize(
    "fault", [_lose_gradients, _wrong_backward_splits, _shift_labels_late, _average_over_ranks, _normalise_locally]
)
def test_a_broken_fold_is_seen_in_the_gradients(fault):
    errors = run_ranks(fault, 4, DATA_AND_SEQUENCE)[0]
    assert max(errors.values()) > 1e-3


@pytest.mark.parametrize("fault", [_lose_gradients, _wrong_backward_splits, _average_over_ranks])
def test_these_faults_leave_the_loss_exact(fault):
    assert run_ranks(fault, 2, TWO_RANKS)[0]["loss"] <= BOUND
