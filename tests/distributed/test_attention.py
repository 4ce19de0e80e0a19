"""Attention over a fold against a dense mask on one process, fp64, and its refusals."""

import pytest
import torch
import torch.nn.functional as F

from longvila.config import ParallelConfig
from longvila.errors import ConfigError
from longvila.parallel.attention import FoldedPlan
from longvila.parallel.blocks import Mask
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import RankError, run_ranks
from longvila.parallel.layout import LAYOUTS
from longvila.parallel.plan import make_plan

from .attention_parts import dense_mask

HEADS = [(4, 2), (6, 2), (5, 1), (7, 7)]
ROWS = [(37,), (5, 1, 23, 2, 9), (1, 1, 1)]
MASKS = [Mask(), Mask(window=1), Mask(window=3), Mask(window=8), Mask(causal=False)]
SCALE = 0.3


def dense(q, k, v, lengths, mask=MASKS[0]):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(lengths, mask), scale=SCALE)


def attention_error(fold, plan, heads, mask, dtype):
    """The largest of max |difference| / max |reference| over out, dq, dk and dv of this rank."""
    torch.manual_seed(0)
    shapes = [(1, count, sum(plan.lengths), 16) for count in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, grad = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = dense(*whole, plan.lengths, mask)
    expected_grads = torch.autograd.grad(expected, whole, grad)
    mine = torch.tensor(plan.positions(fold.part, fold.head), dtype=torch.long)
    local = [x[:, :, mine].to(dtype).requires_grad_() for x in (q, k, v)]
    out = FoldedPlan(plan, fold).attend(*local, SCALE, mask)
    grads = torch.autograd.grad(out, local, grad[:, :, mine].to(dtype))
    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
    if not len(mine):
        return 0.0
    # With a window of one, gradients of queries and keys are zero: errors below 1 are taken as they are.
    return max(((a.double() - b[:, :, mine]).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)


def meshes(world):
    sizes = range(1, world + 1)
    return [(h, i, o) for h in sizes for i in sizes for o in sizes if h * i * o == world]


def plans(fold, rows):
    for layout, rule in LAYOUTS.items():
        for routing in ("direct",) if rule.helpers else ("direct", "relay"):
            for lengths in rows:
                yield make_plan(lengths, fold.inner, fold.outer, fold.num_heads, layout, routing)


def worst_error(world, dtype, masks):
    worst = 0.0
    for index, (head, inner, outer) in enumerate(meshes(world)):
        placement = ("head_first", "context_first")[index % 2]
        fold = make_fold(ParallelConfig(head, inner, outer, placement=placement), "cpu")
        for plan in plans(fold, ROWS):
            for heads in (h for h in HEADS if h[0] >= head):
                for mask in masks:
                    worst = max(worst, attention_error(fold, plan, heads, mask, dtype))
    return worst


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_out_and_gradients_equal_one_process_on_every_mesh(world):
    assert max(run_ranks(worst_error, world, world, torch.float64, MASKS)) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_within_its_rounding(dtype, bound):
    assert max(run_ranks(worst_error, 2, 2, dtype, MASKS[:1])) < bound


def six_ranks(placement):
    """A double ring of 3 windows of 2, and 2 windows of 3: the smallest whose windows and rings differ."""
    worst = 0.0
    for inner, outer in ((2, 3), (3, 2)):
        fold = make_fold(ParallelConfig(1, inner, outer, placement=placement), "cpu")
        for plan in plans(fold, ROWS[:2]):
            for mask in (MASKS[0], MASKS[2]):
                worst = max(worst, attention_error(fold, plan, (4, 2), mask, torch.float64))
    return worst


@pytest.mark.parametrize("placement", ["head_first", "context_first"])
def test_double_rings_of_six_ranks(placement):
    assert max(run_ranks(six_ranks, 6, placement)) < 1e-12


def attend(heads, tokens, dtypes, head_axis):
    fold = make_fold(ParallelConfig(head=head_axis), "cpu")
    plan = make_plan((8,), fold.inner, fold.outer, fold.num_heads)
    q, k, v = (torch.randn(1, h, tokens, 8, dtype=d) for h, d in zip(heads, dtypes, strict=True))
    FoldedPlan(plan, fold).attend(q, k, v, SCALE)


FP32 = (torch.float32,) * 3


@pytest.mark.parametrize(
    ("heads", "tokens", "dtypes", "words"),
    [
        ((4, 2, 2), 5, FP32, "1 x 4 tokens"),
        ((4, 3, 3), 4, FP32, "4 query heads cannot share 3"),
        ((1, 1, 1), 4, FP32, "head axis of 2"),
        ((4, 2, 2), 4, (torch.float32, torch.float64, torch.float64), "one type"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(heads, tokens, dtypes, words):
    with pytest.raises(RankError, match=words):
        run_ranks(attend, 2, heads, tokens, dtypes, 2)


def fold_of_three():
    make_fold(ParallelConfig(inner=3), "cpu")


def test_a_fold_that_does_not_divide_the_world_is_refused_on_every_rank():
    with pytest.raises(RankError, match=r"3 ranks .* world of 2") as caught:
        run_ranks(fold_of_three, 2)
    assert str(caught.value).count(ConfigError.__name__ + ":") == 2
