"""Some of the faults of `longvila bench faults`; each is a run that is broken and one that goes on from it."""

import pytest

from longvila.bench.faults import Bench, plan


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("number", [10, 11])
def test_a_fault_is_said_loses_no_checkpoint_and_the_run_resumes_bit_for_bit(bench, number):
    """A full disk under an asynchronous save; a rank that is killed, and then its newest checkpoint is corrupted."""
    row = bench.row(number, plan()[number])
    assert row["survived"], row
    assert row["identical"]


def test_the_plan_is_drawn_from_its_seed():
    assert plan() == plan()
    assert plan(1) != plan()
    assert len(plan()) == 20
