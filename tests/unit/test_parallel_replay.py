"""Predicted seconds and bytes against sums done by hand, and `auto`, which goes by them."""

import pytest

from longvila.parallel.blocks import Mask
from longvila.parallel.choose import CANDIDATES, choose, make_plan
from longvila.parallel.replay import Machine, Shape, predict

ONE_HEAD = Shape(heads=1, kv_heads=1, head_dim=1, element=2)
# Of two ranks with 4 of 8 tokens each, the first computes the 10 query-key pairs of its square, the second those of its
# own and 16 with the first's keys. A pair is 4 operations forward and 10 backward; keys and values of 4 tokens are 16
# bytes, and their gradients, in fp32, 32.
PAIRS, SQUARE, OTHERS = (10, 26), 10, 16


@pytest.mark.parametrize("link", ["inner", "outer"])
@pytest.mark.parametrize(
    ("speed", "forward", "backward"),
    [
        (16.0, 26, 2.5 * 26 + 2),  # keys come within a second, while the own square is computed
        (0.5, 32 + 16, 32 + 2.5 * 16 + 64),  # keys come after 32
    ],
    ids=["hidden", "waited for"],
)
def test_time_is_that_of_the_last_rank_and_of_what_it_waits_for(link, speed, forward, backward):
    sizes = {"inner": 2} if link == "inner" else {"inner": 1, "outer": 2}
    machine = Machine(flops=4.0, **{"inner": 1e9, "outer": 1e9, link: speed})
    found = predict(make_plan((8,), **sizes, layout="contiguous"), Mask(), ONE_HEAD, machine)
    assert found.seconds == pytest.approx(forward + backward)
    assert found.ideal == pytest.approx((4 + 10) * 36 / 2 / 4)
    assert found.work == PAIRS
    assert found.imbalance == pytest.approx(26 / 18)
    assert found.bytes == {link: 16 + 16 + 32}


def test_messages_take_turns_on_a_link():
    # Of three ranks the last needs the keys of both others, 4 seconds each, and computes nothing meanwhile.
    machine = Machine(flops=1e12, inner=4.0)
    found = predict(make_plan((12,), 3, layout="contiguous"), Mask(causal=False), ONE_HEAD, machine)
    # Forward two in turn; backward two, and two gradients of twice the bytes.
    assert found.seconds == pytest.approx(2 * 4 + 2 * 4 + 2 * 8, rel=1e-6)


ROWS = ((64,), (8,) * 8, (40, 2, 9, 5, 1, 7), (3, 3, 58), (33, 31))
MACHINES = (Machine(flops=1e3, inner=1e9), Machine(flops=1e3, inner=1e4), Machine(flops=1e9, inner=1e3))


def test_auto_picks_what_is_predicted_to_be_fastest_and_of_equals_what_sends_least():
    masks, shape, picked = (Mask(), Mask(window=6), Mask()), Shape(4, 2, 8), set()
    for lengths in ROWS:
        for machine in MACHINES:
            costs = {}
            for layout, routing in CANDIDATES:
                plan = make_plan(lengths, 4, layout=layout, routing=routing)
                predictions = [predict(plan, mask, shape, machine) for mask in masks]
                sent = sum(sum(each.bytes.values()) for each in predictions)
                costs[layout, routing] = (sum(each.seconds for each in predictions), sent)
            choice = choose(lengths, 4, 1, 1, shape, masks, machine)
            assert costs[choice.layout, choice.routing] == min(costs.values())
            assert f"{choice.layout} {choice.routing}" in choice.reason.split(";")[0]
            picked.add((choice.layout, choice.routing))
    assert len(picked) > 1
