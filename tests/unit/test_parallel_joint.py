"""The joint layout: equal tokens for any row, and balance and bytes on packs of the bench, counted token by token."""

import random

import pytest

from longvila.bench.balance import MIXES, pack
from longvila.parallel.joint import fill, imbalance, joint, keys_sent, spread

RNG = random.Random(0)
ROWS = [
    *((1,), (2, 1), (1,) * 50, (5, 1, 23, 2, 9), (64,) * 8, (1000, 1, 1)),
    *(tuple(RNG.randrange(1, 200) for _ in range(RNG.randrange(1, 40))) for _ in range(20)),
]


def owners(spans, total):
    found = [None] * total
    for rank, owned in enumerate(spans):
        assert list(owned) == sorted(owned)
        for start, stop in owned:
            assert start < stop
            for position in range(start, stop):
                assert found[position] is None
                found[position] = rank
    assert None not in found
    return found


@pytest.mark.parametrize("make", [joint, fill, lambda lengths, parts: spread(lengths, parts, 0.2)])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 8])
def test_any_row_is_shared_out_with_equal_tokens_inside_documents(make, parts):
    for lengths in ROWS:
        spans = make(lengths, parts)
        assert len(spans) == parts
        owner = owners(spans, sum(lengths))
        counts = [owner.count(rank) for rank in range(parts)]
        assert max(counts) - min(counts) <= 1
        borders = {sum(lengths[:n]) for n in range(len(lengths))}
        assert not any(start < border < stop for owned in spans for start, stop in owned for border in borders)


def counted(lengths, spans):
    """Work of the busiest rank and keys sent, token by token."""
    owner = owners(spans, sum(lengths))
    work, sent, start = [0] * len(spans), 0, 0
    for length in lengths:
        document = owner[start : start + length]
        for query, rank in enumerate(document):
            work[rank] += query + 1
        for rank in set(document):
            last = max(i for i, other in enumerate(document) if other == rank)
            sent += sum(other != rank for other in document[:last])
        start += length
    return max(work), sent


def test_its_own_figures_are_those_counted_token_by_token():
    for lengths in ROWS:
        spans = joint(lengths, 4)
        assert (imbalance(spans, lengths), keys_sent(spans, lengths)) == counted(lengths, spans)


@pytest.mark.parametrize("parts", [4, 8])
def test_packs_are_balanced_for_less_than_a_third_of_a_rings_bytes(parts):
    shares = []
    for mix in MIXES:
        for seed in range(20):
            lengths = pack(mix, seed)
            spans = joint(lengths, parts)
            work = sum(length * (length + 1) // 2 for length in lengths)
            assert imbalance(spans, lengths) * parts <= 1.05 * work
            shares.append(keys_sent(spans, lengths) / ((parts - 1) * sum(lengths)))
    assert sum(shares) / len(shares) <= 0.30


def test_one_long_document_is_balanced_over_all_ranks():
    work, _ = counted((65_536,), joint((65_536,), 8))
    assert work * 8 <= 1.05 * 65_536 * 65_537 // 2


def test_documents_that_fit_stay_whole_and_send_nothing():
    assert keys_sent(joint((64,) * 8, 8), (64,) * 8) == 0
    assert keys_sent(joint((64,) * 16, 8), (64,) * 16) == 0
