"""Attention over a fold against a dense mask on one process, fp64, and its refusals."""

import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from longvila.bench import volume
from longvila.bench.exact import (
    HEADS,
    ROWS,
    SCALE,
    attention_error,
    dense_mask,
    measure,
    meshes,
    plans,
    rank_errors,
    variants,
)
from longvila.config import ParallelConfig
from longvila.errors import ConfigError
from longvila.parallel import attention, kernel, messages
from longvila.parallel.attention import FoldedPlan, _add, _Totals
from longvila.parallel.blocks import Mask
from longvila.parallel.choose import LAYOUTS, make_plan
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import RankError, run_ranks
from longvila.parallel.plan import Plan
from longvila.parallel.replay import Shape, predict

MASKS = [Mask(), Mask(window=1), Mask(window=3), Mask(window=8), Mask(causal=False)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_out_and_gradients_equal_one_process_on_every_mesh(world):
    table = measure([world], MASKS if world < 4 else MASKS[:4:3])
    assert len(table) == len(meshes(world)) * len(variants())
    worst = max(table, key=lambda one: one.error)
    assert worst.error < 1e-12, worst


def test_fp32_stays_within_its_rounding():
    for errors in run_ranks(rank_errors, 2, 2, torch.float32, MASKS[:1], ROWS, HEADS):
        assert max(one.error for one in errors) < 1e-5


def small_squares():
    """Squares of more than 4 tokens are cut by halves, as those of more than `CPU_LEAF` are."""
    kernel.CPU_LEAF = 4
    return max(one.error for one in rank_errors(2, torch.float64, MASKS, ROWS, HEADS[:2]))


def test_squares_cut_by_halves_equal_one_process():
    assert max(run_ranks(small_squares, 2)) < 1e-12


def bf16_errors():
    """Errors against fp64 of one kernel call over the whole row, of its square cut by halves, and of a ring of four."""
    found, cut = [], kernel.CPU_LEAF
    for leaf, parallel in ((2048, ParallelConfig()), (cut, ParallelConfig()), (cut, ParallelConfig(inner=4))):
        kernel.CPU_LEAF = leaf
        fold = make_fold(parallel, "cpu")
        plan = make_plan((2048,), fold.inner)
        found.append(attention_error(fold, plan, (4, 2), Mask(), torch.bfloat16))
    return found


def test_bf16_is_as_exact_as_one_kernel_call():
    alone, cut, folded = (max(errors) for errors in zip(*run_ranks(bf16_errors, 4), strict=True))
    assert max(cut, folded) <= 1.25 * alone


def six_ranks(placement):
    """A double ring of 3 windows of 2, and 2 windows of 3: the smallest whose windows and rings differ."""
    worst = 0.0
    for inner, outer in ((2, 3), (3, 2)):
        fold = make_fold(ParallelConfig(1, inner, outer, placement=placement), "cpu")
        for _, plan in plans(fold, ROWS[:2]):
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


def first_uses(parallel):
    """Groups over which transfers go that `make_fold` has not used with all of their ranks."""
    used, real = [], dist.all_reduce

    def noted(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        used.append(group)
        return real(tensor, op, group, async_op)

    dist.all_reduce = noted
    fold = make_fold(parallel, "cpu")
    carriers = {
        fold.sequence,
        *(group for links in (fold.links, fold.return_links) for group in (links.inner, links.outer)),
    }
    return len(carriers), len(carriers - set(used))


@pytest.mark.parametrize(("parallel", "groups"), [(ParallelConfig(inner=4), 3), (ParallelConfig(1, 2, 2), 5)], ids=str)
def test_groups_are_first_used_by_all_of_their_ranks_and_not_by_transfers(parallel, groups):
    assert run_ranks(first_uses, 4, parallel) == [(groups, 0)] * 4


def most_held(parallel):
    """Of a ring's forward and backward: the most tokens of keys that are held after a step, and unfinished sends."""
    tokens, sends, real = [], [], messages.Fetches.release

    def release(self, index):
        real(self, index)
        tokens.append(sum(held[0].shape[2] for (cargo, _), held in self._held.items() if cargo == "keys"))
        sends.append(len(self._mail._sends))

    messages.Fetches.release = release
    fold = make_fold(parallel, "cpu")
    plan = make_plan((64,), fold.inner, fold.outer, layout="zigzag", routing=parallel.routing)
    error = attention_error(fold, plan, (4, 2), Mask(), torch.float64)
    return error < 1e-12, max(tokens), max(sends)


@pytest.mark.parametrize(
    ("parallel", "transfers"),
    [(ParallelConfig(inner=4, routing="relay"), 2), (ParallelConfig(1, 2, 2, routing="relay"), 3)],
    ids=str,
)
def test_a_ring_holds_a_few_blocks_and_not_the_whole_row(parallel, transfers):
    for right, tokens, sends in run_ranks(most_held, 4, parallel):
        assert right
        assert tokens <= 3 * 16  # this rank's own, one at hand and one ahead
        assert sends <= 2 * transfers  # of keys and values: its own, over one ring or two, and one block passed on


# Each fault is put in on every rank, and must show in out or in a gradient.


def _lose_a_block():
    real = messages.Fetches._cargo
    messages.Fetches._cargo = lambda self, transfer: tuple(0 * x for x in real(self, transfer))


def _lose_a_gradient():
    messages.Returns.finish = lambda self: self._mail.finish()


def _swap_two_chunks():
    real = Plan._pair
    Plan._pair = lambda self, queries, keys, mask: real(self, queries, (keys + 1) % self.parts, mask)


def _lse_in_bf16():
    real = attention._merge
    attention._merge = lambda totals, parts: (real(totals, parts), totals[1].copy_(totals[1].bfloat16()))


def _wrong_scale_in_the_backward():
    real = attention.block_backward
    attention.block_backward = lambda *arguments: real(*arguments[:-2], 1.1 * arguments[-2], arguments[-1])


def _forget_the_windows_edge():
    real = attention.block_forward
    attention.block_forward = lambda q, k, v, kind, *rest: real(q, k, v, "full" if kind == "edge" else kind, *rest)


def _forget_where_documents_end():
    attention.kernel_blocks = lambda launch, device: [replace(launch, cuts=())]


def _wrong_key_head():
    real = FoldedPlan._scatter_heads
    FoldedPlan._scatter_heads = lambda self, q, k, v, *rest: real(self, q, k.flip(1), v.flip(1), *rest)


FAULTS = {
    _lose_a_block: ParallelConfig(inner=2),
    _lose_a_gradient: ParallelConfig(inner=2),
    _swap_two_chunks: ParallelConfig(inner=2),
    _lse_in_bf16: ParallelConfig(inner=2),
    _wrong_scale_in_the_backward: ParallelConfig(inner=2),
    _forget_the_windows_edge: ParallelConfig(inner=2),
    _forget_where_documents_end: ParallelConfig(inner=2),
    _wrong_key_head: ParallelConfig(head=2),
}


def error_with(fault, parallel):
    fold = make_fold(parallel, "cpu")
    plan = make_plan(ROWS[1], fold.inner, fold.outer, fold.num_heads)
    assert attention_error(fold, plan, (4, 2), Mask(window=8), torch.float64) < 1e-12
    fault()
    return attention_error(fold, Plan(*plan.identity), (4, 2), Mask(window=8), torch.float64)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault):
    assert max(run_ranks(error_with, 2, fault, FAULTS[fault])) > 1e-4


def changed(fold, plan, tokens, mask, moved):
    """For each row position, whether its output changes when the token `moved` does."""
    mine = torch.tensor(plan.positions(fold.part, fold.head), dtype=torch.long)
    other = tokens.clone()
    other[:, :, moved] += 1
    outs = [FoldedPlan(plan, fold).attend(*(x[:, :, mine] for _ in range(3)), SCALE, mask) for x in (tokens, other)]
    result = torch.zeros(sum(plan.lengths), dtype=torch.int64)
    result[mine] = (outs[0] != outs[1]).any(-1).any(1)[0].long()
    dist.all_reduce(result)
    return result > 0


def probe(layout):
    """Changing one token changes exactly the outputs that may see it."""
    fold = make_fold(ParallelConfig(inner=3, layout=layout), "cpu")
    torch.manual_seed(0)
    tokens = torch.randn(1, 2, sum(ROWS[1]), 8, dtype=torch.float64)
    for mask in MASKS:
        plan = make_plan(ROWS[1], fold.inner, fold.outer, 1, layout)
        for moved in (0, 5, 6, 17, 28, 39):
            assert torch.equal(changed(fold, plan, tokens, mask, moved), dense_mask(ROWS[1], mask)[:, moved])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_moves_exactly_the_outputs_that_may_see_it(layout):
    run_ranks(probe, 3, layout)


def many_heads():
    fold = make_fold(ParallelConfig(head=8), "cpu")
    plan = make_plan(ROWS[1], fold.inner, fold.outer, fold.num_heads)
    return max(
        attention_error(fold, plan, heads, Mask(), torch.float64) for heads in ((28, 4), (33, 33), (8, 4), (12, 2))
    )


def test_heads_that_eight_ranks_do_not_divide():
    assert max(run_ranks(many_heads, 8)) < 1e-12


def test_bytes_that_are_counted_are_those_of_the_formulas_and_of_the_prediction():
    found = volume.measure()
    assert len(found) > len(volume.CASES)
    assert all(each.counted == each.formula > 0 for each in found), found
    of_links = {(each.name, each.row, each.link): each.counted for each in found if each.link != "heads"}
    predicted = {}
    for name, parallel, lengths in volume.CASES:
        plan = make_plan(lengths, parallel.inner, parallel.outer, parallel.head, parallel.layout, parallel.routing)
        shape = Shape(volume.HEADS, volume.KV_HEADS, volume.HEAD_DIM).of_head_rank(parallel.head)
        title = f"{name} {parallel.outer}x{parallel.inner}x{parallel.head} {parallel.layout}"
        row = "one document" if len(lengths) == 1 else "packed"
        for link, size in predict(plan, Mask(), shape).bytes.items():
            predicted[title, row, link] = parallel.head * size
    assert predicted == of_links


def test_totals_need_no_blank_memory_and_blank_what_had_no_part():
    random.seed(0)
    for _ in range(200):
        expected = torch.zeros(1, 1, 40, 2)
        totals = _Totals((torch.full_like(expected, torch.nan),), (0.0,), _add)
        for _ in range(random.randint(1, 12)):
            start, stop = sorted(random.sample(range(41), 2))
            part = torch.randint(1, 9, (1, 1, stop - start, 2)).float()
            totals.add((start, stop), (part,))
            expected[:, :, start:stop] += part
        totals.close()
        assert torch.equal(totals.tensors[0], expected)
