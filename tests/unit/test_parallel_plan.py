"""Plans: who owns what, what is computed where, what is sent. No processes."""

import random

import pytest

from longvila.errors import ConfigError, DataError
from longvila.parallel.blocks import Mask
from longvila.parallel.choose import LAYOUTS, make_plan
from longvila.parallel.plan import count_tokens

ROWS = [(37,), (5, 1, 23, 2, 9), (1, 1, 1), (64, 3), tuple(random.Random(0).randrange(1, 30) for _ in range(20))]
FOLDS = [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (1, 3), (2, 3), (3, 2)]


def plans(routings=("direct", "relay")):
    for layout, rule in LAYOUTS.items():
        for routing in routings:
            if rule.helpers and routing == "relay":
                continue
            for inner, outer in FOLDS:
                for lengths in ROWS:
                    yield make_plan(lengths, inner, outer, 1, layout, routing)


def test_every_token_has_one_owner_and_no_span_crosses_a_document():
    for plan in plans(("direct",)):
        spans = sorted(span for part in plan.spans for span in part)
        assert [p for start, stop in spans for p in range(start, stop)] == list(range(sum(plan.lengths)))
        borders = {sum(plan.lengths[:n]) for n in range(len(plan.lengths) + 1)}
        assert not any(start < border < stop for start, stop in spans for border in borders)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=4)])
def test_the_work_of_all_ranks_is_that_of_the_row(mask):
    expected = {
        lengths: sum(
            min(i + 1, mask.window or i + 1) if mask.causal else length for length in lengths for i in range(length)
        )
        for lengths in ROWS
    }
    for plan in plans():
        work = sum(step.work for part in range(plan.parts) for step in plan.program(part, mask).steps)
        assert work == expected[plan.lengths]


def test_each_step_is_a_permutation_and_each_pair_meets_once():
    plan = make_plan((64,), 3, 2)
    for step in range(plan.parts):
        met = [[o for o in range(plan.parts) if plan.meeting_step(rank, o) == step] for rank in range(plan.parts)]
        assert sorted(owner for (owner,) in met) == list(range(plan.parts))


def test_both_ends_know_of_every_transfer_in_one_order():
    for plan in plans():
        programs = [plan.program(part) for part in range(plan.parts)]
        for kind in ("fetches", "returns"):
            for one in programs:
                for other in programs[: one.rank]:
                    ends = [
                        [t for t in getattr(program, kind) if {t.source, t.target} == {one.rank, other.rank}]
                        for program in (one, other)
                    ]
                    assert ends[0] == ends[1]


def test_direct_sends_nothing_that_is_not_needed_and_nothing_twice():
    for plan in plans(("direct",)):
        for part in range(plan.parts):
            program = plan.program(part)
            for transfer in program.fetches:
                assert transfer.num_tokens > 0
                assert transfer.source == transfer.owner
            needed = {(step.owner, step.cargo) for step in program.steps if step.owner != part}
            received = [(t.owner, t.cargo) for t in program.fetches if t.target == part]
            assert sorted(received) == sorted(needed)


def test_documents_that_lie_whole_on_one_rank_are_not_sent():
    plan = make_plan((10, 10, 10, 10), 4, layout="contiguous")
    assert not any(plan.program(part).fetches for part in range(4))
    assert [plan.num_tokens(part) for part in range(4)] == [10] * 4


def test_a_window_sends_only_what_it_reaches():
    plan = make_plan((400,), 4, layout="contiguous")
    (transfer,) = [t for t in plan.program(1, Mask(window=7)).fetches if t.target == 1]
    assert transfer.spans == ((94, 100),)


def test_zigzag_balances_one_document_and_document_zigzag_every_one():
    def imbalance(lengths, layout, parts):
        plan = make_plan(lengths, parts, layout=layout)
        work = [sum(step.work for step in plan.program(part).steps) for part in range(parts)]
        return max(work) / (sum(work) / parts)

    assert imbalance((8192,), "contiguous", 8) == pytest.approx(1.875, abs=1e-3)  # (2P - 1) / P
    assert imbalance((8192,), "zigzag", 8) == pytest.approx(1.0, abs=1e-3)
    packed = (3000, 200, 1500, 900, 2592)
    assert imbalance(packed, "zigzag", 8) > 1.3
    assert imbalance(packed, "document_zigzag", 8) < 1.02


def test_lightseq_makes_late_ranks_send_queries_to_early_ones():
    plan = make_plan((64,), 4, layout="lightseq")
    steps = {part: [(s.index, s.owner, s.cargo) for s in plan.program(part).steps] for part in range(4)}
    # Step 2 at even sizes: only the late half has work, which is what LightSeq's 1.25 x at 4 ranks comes from.
    assert steps == {
        0: [(0, 0, "keys"), (1, 3, "queries")],
        1: [(0, 1, "keys"), (1, 0, "keys")],
        2: [(0, 2, "keys"), (1, 1, "keys"), (2, 0, "keys")],
        3: [(0, 3, "keys"), (1, 2, "keys"), (2, 1, "keys")],
    }


@pytest.mark.parametrize(("inner", "outer"), [(4, 1), (2, 2), (2, 3), (3, 2), (1, 4)])
def test_a_relay_makes_the_hops_of_the_double_ring(inner, outer):
    """Forward (w - 1) cp / w inner and cp / w - 1 outer hops a rank; gradients cp inner and cp / w outer ones."""
    plan = make_plan((480,), inner, outer, layout="zigzag", routing="relay")
    parts = inner * outer
    for part in range(parts):
        program = plan.program(part)
        sent = {
            (kind, link): sum(t.source == part and t.link == link for t in getattr(program, kind))
            for kind in ("fetches", "returns")
            for link in ("inner", "outer")
        }
        assert sent == {
            ("fetches", "inner"): (inner - 1) * outer,
            ("fetches", "outer"): outer - 1,
            ("returns", "inner"): parts if inner > 1 else 0,
            ("returns", "outer"): outer if outer > 1 else 0,
        }
        assert all(t.num_tokens == 480 // parts == count_tokens(t.spans) for t in program.fetches)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (((),), DataError, "at least one document"),
        (((3, 0, 2),), DataError, "document 1 of the row has 0 tokens"),
        (((3,), 0), ConfigError, "inner 0"),
        (((3,), 1, 1, 1, "spiral"), ConfigError, "unknown layout 'spiral'; there is contiguous"),
        (((3,), 1, 1, 1, "zigzag", "post"), ConfigError, "unknown routing 'post'"),
        (((3,), 2, 1, 1, "lightseq", "relay"), ConfigError, "cannot be carried by a relay; use routing=direct"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        make_plan(*arguments)
