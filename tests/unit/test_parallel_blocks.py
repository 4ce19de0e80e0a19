"""Masks cut into rectangles and triangles: every visible pair once, no other."""

import random

import pytest

from longvila.parallel.blocks import Block, Mask, join_squares, visible_blocks


def pairs(block):
    """The query-key pairs that a kernel computes for a block."""
    (q0, q1), (k0, k1) = block.q, block.k
    if block.kind != "full":
        assert q1 - q0 == k1 - k0, "triangles are square"
    sees = {
        "full": lambda i, j: True,
        "causal": lambda i, j: j <= i,
        "edge": lambda i, j: j >= i,
    }[block.kind]
    return [(q0 + i, k0 + j) for i in range(q1 - q0) for j in range(k1 - k0) if sees(i, j)]


def visible(q, k, mask):
    return {
        (i, j)
        for i in range(*q)
        for j in range(*k)
        if not mask.causal or (j <= i and (mask.window is None or i - j < mask.window))
    }


@pytest.mark.parametrize(
    "mask", [Mask(), Mask(causal=False), *(Mask(window=w) for w in (1, 2, 3, 5, 8, 13, 40))], ids=str
)
def test_blocks_are_exactly_what_is_visible(mask):
    random.seed(0)
    for _ in range(300):
        cuts = sorted(random.sample(range(40), 4))
        early, late = (cuts[0], cuts[1]), (cuts[2], cuts[3])
        for q, k in ((early, early), (late, early), (early, late), (late, (cuts[1], cuts[2]))):
            blocks = visible_blocks(q, k, mask)
            found = [pair for block in blocks for pair in pairs(block)]
            assert len(found) == len(set(found)) == sum(block.work for block in blocks)
            assert set(found) == visible(q, k, mask)


def test_causal_squares_end_to_end_become_one_launch():
    documents = [Block((a, b), (a, b), "causal") for a, b in ((0, 3), (3, 4), (4, 9))]
    (joined,) = join_squares(documents)
    assert (joined.q, joined.k, joined.cuts) == ((0, 9), (0, 9), (0, 3, 4, 9))
    assert joined.work == sum(block.work for block in documents)


@pytest.mark.parametrize("other", [
    Block((4, 6), (4, 6), "causal"),  # a gap
    Block((3, 6), (4, 7), "causal"),  # queries follow, keys do not
    Block((3, 6), (3, 6), "full"),
    Block((3, 6), (3, 6), "edge"),
])  # fmt: skip
def test_other_blocks_are_launched_by_themselves(other):
    first = Block((0, 3), (0, 3), "causal")
    assert join_squares([first, other]) == [first, other]
