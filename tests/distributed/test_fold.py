"""Which ranks form the groups of a fold."""

import pytest
import torch.distributed as dist

from longvila.config import ParallelConfig
from longvila.errors import ConfigError
from longvila.parallel.fold import EXPERT_AXES, experts_between_nodes, fold_groups, make_fold
from longvila.parallel.launch import run_ranks

MANY = [
    (1, ParallelConfig()),
    (8, ParallelConfig(head=2, inner=2)),
    (16, ParallelConfig(head=2, inner=2, outer=2, experts=8)),
    (16, ParallelConfig(head=2, inner=2, outer=2, experts=2, placement="context_first")),
    (12, ParallelConfig(inner=3, experts=4)),
    (16, ParallelConfig(inner=2, head=2, tensor=2, experts=4)),
    (16, ParallelConfig(inner=2, experts=4, expert_tensor=2)),
    (16, ParallelConfig(pipeline=2, inner=2, tensor=2, experts=4, expert_tensor=2)),
    (16, ParallelConfig(pipeline=4, inner=2, head=2, placement="context_first")),
]


def test_what_expert_groups_between_nodes_cost_is_said():
    assert experts_between_nodes(ParallelConfig(experts=8), 16, 8) is None
    assert experts_between_nodes(ParallelConfig(), 16, 8) is None
    said = experts_between_nodes(ParallelConfig(experts=16), 32, 8)
    assert said is not None
    assert said.startswith("2 of 2 groups")
    assert "50% of what goes to experts leaves its node" in said


@pytest.mark.parametrize(("world", "parallel"), MANY, ids=str)
def test_every_rank_is_in_one_group_of_each_kind_and_groups_have_their_size(world, parallel):
    groups = fold_groups(parallel, world)
    stage = world // parallel.pipeline
    sizes = {
        "sequence": parallel.sequence, "data": stage // parallel.sequence, "heads": parallel.head,
        "context": parallel.inner * parallel.outer, "ring": parallel.inner, "tensor": parallel.tensor,
    }  # fmt: skip
    if parallel.experts > 1:
        sizes |= {"experts": parallel.experts, "expert_tensor": parallel.expert_tensor}
        sizes["copies"] = stage // parallel.experts // parallel.expert_tensor
    if parallel.pipeline > 1:
        sizes |= {"pipeline": parallel.pipeline, "stage": stage, "readers": parallel.pipeline * parallel.sequence}
        for name in sizes.keys() - {"pipeline", "readers"}:  # pipelines coincide: no other group leaves its stage
            assert all(len({rank // stage for rank in group}) == 1 for group in groups[name])
    assert groups.keys() == sizes.keys()
    for name, size in sizes.items():
        assert sorted(rank for group in groups[name] for rank in group) == list(range(world))
        assert {len(group) for group in groups[name]} == {size}
    across = {(a, b): set(map(tuple, groups[a])) for a, b in (("heads", "context"), ("sequence", "data"))}
    for (first, second), _ in across.items():
        assert all(len(set(a) & set(b)) <= 1 for a in groups[first] for b in groups[second])


def made_groups(parallel):
    """The members of each of this rank's groups, from torch."""
    fold = make_fold(parallel, "cpu")
    groups = {
        "sequence": fold.sequence, "data": fold.mesh.get_group("data"), "heads": fold.heads, "context": fold.context,
        "ring": fold.links.inner, "tensor": fold.mesh.get_group("tensor"),
    }  # fmt: skip
    if fold.num_stages > 1:
        groups |= {"pipeline": fold.pipeline, "stage": fold.stage, "readers": fold.readers}
    if fold.experts is not None:
        groups |= {name: fold.experts.get_group(name) for name in EXPERT_AXES}
    return {name: dist.get_process_group_ranks(group) for name, group in groups.items()}


@pytest.mark.parametrize("parallel", [
    ParallelConfig(head=2, inner=2, outer=2, experts=4),
    ParallelConfig(inner=2, experts=2, expert_tensor=2),
    ParallelConfig(head=2, inner=2, outer=2, experts=2, placement="context_first"),
    ParallelConfig(head=2, inner=2),
    ParallelConfig(head=2, inner=2, tensor=2, placement="context_first"),
    ParallelConfig(pipeline=2, inner=2, experts=2),
    ParallelConfig(pipeline=2, head=2, inner=2, placement="context_first"),
], ids=str)  # fmt: skip
def test_the_groups_that_are_made_are_these(parallel):
    groups = fold_groups(parallel, 8)
    for rank, made in enumerate(run_ranks(made_groups, 8, parallel)):
        assert made == {name: next(group for group in groups[name] if rank in group) for name in groups}


def test_head_first_and_context_first_are_orders_of_the_same_axes():
    groups = fold_groups(ParallelConfig(head=2, inner=2, outer=2), 8)
    assert groups["heads"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups["ring"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups["context"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    groups = fold_groups(ParallelConfig(head=2, inner=2, outer=2, placement="context_first"), 8)
    assert groups["heads"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups["ring"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups["context"] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_tensor_group_is_of_neighbours_in_either_placement():
    for placement, heads in (("head_first", [0, 2]), ("context_first", [0, 4])):
        groups = fold_groups(ParallelConfig(head=2, inner=2, tensor=2, placement=placement), 8)
        assert groups["tensor"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert heads in groups["heads"]


def pieces(parallel):
    fold = make_fold(parallel, "cpu")
    return fold.sequence_rank, fold.part, fold.head, fold.tensor.get_local_rank("tensor"), fold.piece


@pytest.mark.parametrize("placement", ["head_first", "context_first"])
def test_a_rank_owns_the_piece_of_its_place(placement):
    found = run_ranks(pieces, 8, ParallelConfig(head=2, inner=2, tensor=2, placement=placement))
    assert {(part, piece) for _, part, _, _, piece in found} == {(c, p) for c in range(2) for p in range(4)}
    assert all(piece == 2 * head + tensor for _, _, head, tensor, piece in found)


def test_experts_have_a_fold_of_their_own():
    groups = fold_groups(ParallelConfig(inner=4, experts=2), 8)
    assert groups["sequence"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups["experts"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups["copies"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    # The paper's order, for 8 of its 16 ranks in a pipeline stage: TP2 CP2 DP2 beside ETP2 EP4.
    groups = fold_groups(ParallelConfig(tensor=2, inner=2, experts=4, expert_tensor=2), 8)
    assert groups["tensor"] == groups["expert_tensor"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups["context"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups["experts"] == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(("world", "parallel", "words"), [
    (6, ParallelConfig(inner=4), "sequence group of 4 ranks .* world of 6"),
    (8, ParallelConfig(experts=3), r"parallel\.experts=3 .* world of 8"),
    (8, ParallelConfig(head=0), "at least 1"),
    (8, ParallelConfig(tensor=0), "at least 1"),
    (6, ParallelConfig(tensor=4), "sequence group of 4 ranks .* world of 6"),
    (8, ParallelConfig(experts=0), r"parallel\.experts=0"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_numbers(world, parallel, words):
    with pytest.raises(ConfigError, match=words):
        fold_groups(parallel, world)
