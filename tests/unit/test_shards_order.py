"""`longvila.shards.order`: what comes where, as a pure function."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from longvila.shards.order import EpochOrder


def order(sizes=((5, 4, 6), (9, 2)), amounts=None, weights=(1.0, 1.0), window=4, seed=0, epoch=0):
    amounts = amounts or [sum(each) for each in sizes]
    return EpochOrder(sizes, amounts, weights, window, seed, epoch)


def places(epoch_order):
    return [place for number in range(epoch_order.num_windows) for place in epoch_order.window(number)]


def test_an_epoch_has_every_sample_once_in_windows_of_the_given_size():
    whole = order()
    found = [(place.source, place.shard, place.entry) for place in places(whole)]
    assert sorted(found) == [
        (source, shard, entry)
        for source, sizes in enumerate(((5, 4, 6), (9, 2)))
        for shard, size in enumerate(sizes)
        for entry in range(size)
    ]
    assert [len(whole.window(number)) for number in range(whole.num_windows)] == [4] * 6 + [2]


def test_any_window_can_be_had_without_those_before_it():
    whole = [order().window(number) for number in range(order().num_windows)]
    for number in reversed(range(len(whole))):
        assert order().window(number) == whole[number]


def test_seed_and_epoch_set_the_order():
    first = places(order())
    assert places(order()) == first
    assert places(order(epoch=1)) != first
    assert places(order(seed=1)) != first


def test_shards_are_read_in_groups_that_fill_a_window():
    """What is shuffled together lies together: a local copy of few shards is enough at any time."""
    sizes = [[10] * 12]
    read = [place.shard for place in places(order(sizes, weights=[1.0], window=25))]
    groups = [set(read[start : start + 30]) for start in range(0, 120, 30)]
    assert [len(group) for group in groups] == [3] * 4
    assert len(set.union(*groups)) == 12


def test_samples_leave_the_order_in_which_they_are_stored():
    read = [place.entry for place in places(order([[1000]], weights=[1.0], window=1000))]
    assert abs(np.corrcoef(read, range(1000))[0, 1]) < 0.1
    assert sum(b == a + 1 for a, b in pairwise(read)) < 10


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 4.0), (0.3, 0.1)])
def test_each_source_holds_its_share_of_every_stretch_until_it_runs_dry(weights):
    read = [place.source for place in places(order([[400], [400]], weights=weights, window=16))]
    share = weights[1] / sum(weights)
    lasting = int(400 / max(share, 1 - share))
    for end in range(1, lasting):
        assert abs(sum(read[:end]) - share * end) <= 1
    assert len(read) == 800


def test_samples_repeat_in_another_order_and_half_of_them_is_another_half_each_epoch():
    twice = places(order([[8, 8]], amounts=[32], weights=[1.0], window=4))
    assert sorted(twice[:16]) == sorted(twice[16:])
    assert twice[:16] != twice[16:]
    halves = [set(places(order([[1] * 40], amounts=[20], weights=[1.0], epoch=epoch))) for epoch in range(2)]
    assert [len(half) for half in halves] == [20, 20]
    assert halves[0] != halves[1]


def test_empty_shards_and_an_empty_source_are_passed_over():
    found = places(order([[0, 3, 0], []], amounts=[3, 0]))
    assert sorted(place.entry for place in found) == [0, 1, 2]
    assert {(place.source, place.shard) for place in found} == {(0, 1)}
    assert places(order([[]], amounts=[0], weights=[1.0])) == []


def test_the_order_of_ten_million_samples_takes_little_memory_and_no_reading():
    whole = order([[10_000] * 700, [10_000] * 300], weights=[7.0, 3.0], window=1024)
    assert whole.num_windows == 9766
    assert len(set(whole.window(5000))) == 1024
