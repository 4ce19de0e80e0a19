"""Masks cut into rectangles and triangles: every visible pair once, no other."""

import random

import pytest

from longvila.parallel.blocks import Block, Mask, halve_squares, join_squares, visible_blocks


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


@pytest.mark.parametrize("kind", ["causal", "edge"])
@pytest.mark.parametrize("size", [1, 4, 5, 8, 9, 12, 31, 32, 33])
def test_a_square_cut_by_halves_is_the_same_pairs(size, kind):
    square = Block((7, 7 + size), (2, 2 + size), kind)
    blocks = halve_squares(square, 4)
    found = [pair for block in blocks for pair in pairs(block)]
    assert len(found) == len(set(found)) == square.work
    assert set(found) == set(pairs(square))
    assert all(block.q[1] - block.q[0] <= 4 for block in blocks if block.kind == kind)
    assert all((edge - 7) % 4 == 0 for block in blocks for edge in block.q if edge != 7 + size)


def test_squares_end_to_end_are_cut_each_by_itself():
    joined = Block((3, 12), (5, 14), "causal", (0, 2, 9))
    apart = [Block((3, 5), (5, 7), "causal"), *halve_squares(Block((5, 12), (7, 14), "causal"), 4)]
    assert halve_squares(joined, 4) == apart
    assert sum(block.work for block in apart) == joined.work


def test_what_is_all_seen_stays_one_block():
    rectangle = Block((0, 9), (20, 40), "full")
    assert halve_squares(rectangle, 4) == [rectangle]
