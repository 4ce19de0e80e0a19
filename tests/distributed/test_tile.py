"""Tiled layers: loss and every gradient equal those of untiled ones, under each policy and sharded over ranks."""

import pytest
import torch
import torch.nn.functional as F

from longvila.apply import apply_folds
from longvila.config import ParallelConfig
from longvila.difference import relative_error
from longvila.model import tile
from longvila.parallel.agree import sum_over_world
from longvila.parallel.batch import shard_batch
from longvila.parallel.launch import run_cases, run_ranks

from .test_models import LENGTHS, fold_of, make, make_row


def step(name, parallel, recompute, tile_tokens):
    """Loss and gradients of one step, on every rank."""
    fold = fold_of(parallel, "cpu")
    model = make(name)
    apply_folds(model, fold, recompute=recompute, tile_tokens=tile_tokens)
    ids, labels, positions = make_row()
    batch = shard_batch(LENGTHS, fold, input_ids=ids, labels=labels, position_ids=positions)
    targets = batch.pop("labels")[0]
    logits = model(**batch, use_cache=False).logits[0]
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / int((labels != -100).sum())
    loss.backward()
    gradients = {key: p.grad.full_tensor() for key, p in model.named_parameters()}
    return {"loss": torch.tensor(sum_over_world(loss.item())[0]), **gradients}


def difference(name, parallel, recompute, tile_tokens, fault=None):
    """Of the worst of loss and gradients: max |difference| / max |untiled|."""
    untiled = step(name, parallel, recompute, None)
    if fault is not None:
        fault()
    tiled = step(name, parallel, recompute, tile_tokens)
    assert len(untiled) > 20
    assert list(tiled) == list(untiled)  # tiling renames no parameter
    return max(relative_error(tiled[key], one) for key, one in untiled.items())


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(inner=2), ParallelConfig(head=2)], ids=str)
def test_tiles_change_nothing_under_any_policy(parallel):
    policies = ("none", "all", "save_attention", "offload_attention")
    cases = [("qwen3", parallel, policy, 4) for policy in policies]
    for policy, found in zip(policies, run_cases(difference, parallel.sequence, cases), strict=True):
        assert max(found) < 1e-12, policy


def test_tiles_need_not_divide_the_tokens():
    assert sum(LENGTHS) == 45
    cases = [("llama", ParallelConfig(), "all", tile_tokens) for tile_tokens in (1, 7, 44, 45, 1000)]
    for case, found in zip(cases, run_cases(difference, 1, cases), strict=True):
        assert max(found) < 1e-12, case


def swap_tiles_in_the_backward():
    real = tile._Tiles.backward

    def swapped(ctx, grad):
        hidden, *rest = real(ctx, grad)
        return hidden.roll(4, dims=-2), *rest

    tile._Tiles.backward = staticmethod(swapped)


def drop_the_second_tile():
    real = tile._Tiles.backward

    def without(ctx, grad):
        grad = grad.clone()
        grad.narrow(-2, 4, 4).zero_()
        return real(ctx, grad)

    tile._Tiles.backward = staticmethod(without)


@pytest.mark.parametrize("fault", [drop_the_second_tile, swap_tiles_in_the_backward])
def test_a_broken_tile_is_seen(fault):
    assert min(run_ranks(difference, 2, "qwen3", ParallelConfig(inner=2), "none", 4, fault)) > 1e-3
