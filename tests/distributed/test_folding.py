"""Mappings of every axis over 8 and 16 ranks: loss, norm and every gradient equal one process; and faults show."""

import pytest

from longvila.bench import folding, sent
from longvila.bench.gradient_faults import FAULTS, OF_PIPELINES
from longvila.bench.mapping import Mapping, is_able
from longvila.config import ParallelConfig

AXES = ("tensor", "head", "inner", "outer", "experts", "expert_tensor")

PIPELINES = [each for each in folding.PIPELINES if is_able(each.parallel)]


def test_the_mappings_use_every_axis_with_and_without_dropping():
    for world in (8, 16):
        mappings = [each for each in folding.MAPPINGS if each.world == world]
        assert all(any(getattr(each.parallel, axis) > 1 for each in mappings) for axis in AXES)
        assert any(each.world > each.parallel.sequence for each in mappings)
    assert {each.mixture.keeps for each in folding.MAPPINGS if each.mixture.capacity} == {"probability", "position"}
    assert len(folding.MAPPINGS) >= folding.MAPPINGS_WANTED


@pytest.mark.parametrize(
    "mapping", [*folding.MAPPINGS, *PIPELINES], ids=lambda mapping: f"{mapping.world} ranks, {mapping.name}"
)
def test_a_mapping_has_the_loss_norm_and_gradients_of_one_process(mapping):
    row = folding.measure(mapping)
    assert row["loss_error"] < 1e-12
    assert row["norm_error"] < folding.NORM
    assert row["gradient_error"] < folding.GRADIENT, row["worst"]
    assert (row["dropped"] > 0.02) == (mapping.mixture.capacity is not None)


@pytest.mark.parametrize("faults", [FAULTS, OF_PIPELINES], ids=["mappings", "pipelines"])
def test_faults_are_seen_in_a_gradient_or_the_norm_and_not_in_the_loss(faults):
    rows = folding.measure_faults(faults)
    assert len(rows) == len(faults)
    for row in rows:
        assert row["caught"], row


UNTIED = Mapping(2, ParallelConfig(inner=2), tied=False)


@pytest.mark.parametrize("mapping", [*folding.MAPPINGS[2:17:7], UNTIED, *PIPELINES], ids=str)
def test_bytes_that_are_counted_are_those_of_the_formula(mapping):
    rows = sent.measure(mapping)
    kinds = {row["kind"] for row in rows}
    assert kinds == {"weights", "gradients"} if mapping == UNTIED else kinds > {"weights", "gradients"}
    assert any(row["kind"] == "pipeline" for row in rows) == (mapping.parallel.pipeline > 1)
    assert all(row["counted"] == row["formula"] > 0 for row in rows)


def test_a_run_goes_on_under_other_mappings_with_the_same_gradients():
    for row in folding.measure_resharding():
        assert row["loss_error"] < 1e-12
        assert row["gradient_error"] < folding.RESHARDED, row["worst"]


def test_bytes_between_nodes_follow_from_which_ranks_share_experts():
    rows = {(row["model"], row["tensor"]): row for row in folding.cross_node_bytes()}
    assert rows["Mixtral 8x22B G8T8", 4]["kib_folded"] == 0
    # 8 experts 4 ranks apart lie on 4 nodes of 8: 3 of 4 choices leave theirs.
    assert rows["Mixtral 8x22B G8T8", 4]["kib_unfolded"] == 4 * 8 * 6144 * 2 * 0.75 / 1024
