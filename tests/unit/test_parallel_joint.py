"""The joint layout: any lengths, and balance and bytes counted token by token, independently of the module."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import pytest

from longvila.bench.balance import MIXES, TOKENS, pack
from longvila.parallel.joint import joint, keys_sent


def _owners(lengths: Sequence[int], spans: Sequence[Sequence[tuple[int, int]]]) -> np.ndarray:
    """The rank of every row position; fails unless each has exactly one."""
    owners = np.full(sum(lengths), -1)
    for rank, owned in enumerate(spans):
        for start, stop in owned:
            assert (owners[start:stop] == -1).all()
            owners[start:stop] = rank
    assert (owners >= 0).all()
    return owners


def _count(lengths: Sequence[int], parts: int) -> tuple[np.ndarray, int]:
    """Query-key pairs of each rank, and key positions that ranks need from others."""
    owners = _owners(lengths, joint(lengths, parts))
    work, received = np.zeros(parts), 0
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        document = owners[end - length : end]
        work += np.bincount(document, weights=np.arange(1, length + 1), minlength=parts)
        for rank in range(parts):
            own = np.flatnonzero(document == rank)
            if len(own):
                received += int(own[-1]) + 1 - len(own)
    assert received == keys_sent(lengths, joint(lengths, parts))
    return work, received


def _any_lengths(generator: random.Random) -> list[int]:
    longest = generator.choice((1, 2, 5, 50, 1000, 20_000))
    lengths = [generator.randint(1, longest) for _ in range(generator.choice((1, 2, 3, 10, 60)))]
    if generator.random() < 0.3:
        lengths.insert(generator.randrange(len(lengths) + 1), generator.randint(1, 30_000))
    return lengths


@pytest.mark.parametrize("seed", range(150))
def test_any_lengths_give_every_token_one_rank(seed: int) -> None:
    generator = random.Random(seed)
    lengths, parts = _any_lengths(generator), generator.choice((1, 2, 3, 4, 5, 7, 8, 13, 16))
    spans = joint(lengths, parts)
    borders = list(accumulate(lengths))
    assert len(spans) == parts
    _owners(lengths, spans)
    for rank, owned in enumerate(spans):
        assert all(start < stop for start, stop in owned)
        assert not any(start < border < stop for start, stop in owned for border in borders)
        for (_, stop), (start, _) in pairwise(owned):
            assert stop < start or (stop == start and stop in borders)
        total = borders[-1]
        assert sum(stop - start for start, stop in owned) == total * (rank + 1) // parts - total * rank // parts
    assert joint(tuple(lengths), parts) == spans


@pytest.mark.parametrize("seed", range(40))
def test_work_is_balanced_wherever_one_token_does_not_decide(seed: int) -> None:
    generator = random.Random(1000 + seed)
    parts = generator.choice((2, 3, 4, 8, 16))
    shape = generator.choice(((1, 200, 400), (500, 4000, 40), (5000, 9000, 12), (1, 30_000, 20)))
    lengths = [generator.randint(*shape[:2]) for _ in range(shape[2])]
    work, _ = _count(lengths, parts)
    assert max(lengths) < 0.005 * work.mean()
    assert work.max() <= 1.02 * work.mean()
    assert work.min() >= 0.98 * work.mean()


@pytest.mark.parametrize("parts", [4, 8])
def test_real_packs_are_balanced_with_few_bytes(parts: int) -> None:
    ring = (parts - 1) * TOKENS
    means = []
    for mix in MIXES:
        received = []
        for seed in range(8):
            work, keys = _count(pack(mix, seed), parts)
            assert work.max() <= 1.02 * work.mean(), (mix, seed)
            received.append(keys / ring)
        means.append(sum(received) / len(received))
    assert max(means) <= 0.25


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8, 16])
def test_a_single_document_is_spread_evenly(parts: int) -> None:
    work, _ = _count([40_000], parts)
    assert work.max() <= 1.01 * work.mean()


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([1000] * 8, 8),
        ([1000] * 16, 4),
        ([1] * 3000, 8),
        ([1, 1, 1], 8),
        ([1000, 3000, 1000] * 4, 4),
    ],
)
def test_documents_that_fit_are_not_spread_for_nothing(lengths: list[int], parts: int) -> None:
    _, received = _count(lengths, parts)
    assert received == 0


def test_a_long_document_takes_only_the_ranks_it_needs() -> None:
    # 1.5 ranks' share of the work, 0.8 of the tokens.
    lengths = [8000, *[5000] * 4, *[100] * 120]
    spans = joint(lengths, 4)
    assert sum(any(start < 8000 for start, _ in owned) for owned in spans) in (2, 3)
