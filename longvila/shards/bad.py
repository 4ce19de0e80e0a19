"""Counts and lists the samples that could not be used, and stops the run when they are too many."""

from __future__ import annotations

from dataclasses import dataclass

from longvila.errors import DataError

GRACE = 100
"""Samples read before the share of bad ones is judged."""


@dataclass(frozen=True)
class BadNews:
    """What a loader process counted since it last reported."""

    read: int
    count: int
    shortened: int
    listed: dict[str, str]


class BadSamples:
    """Every sample read is counted, every unusable one is kept by key with the reason."""

    def __init__(self, max_bad_share: float = 1.0) -> None:
        self.max_bad_share = max_bad_share
        self.read = 0
        self.count = 0
        self.listed: dict[str, str] = {}
        """The reason for each bad key; one that comes again in a later epoch is counted again and listed once."""
        self.shortened: int = 0
        """Samples that got fewer frames than asked, because a row has no room for more."""

    def record(self, key: str, reason: str) -> None:
        """Notes one unusable sample.

        Raises:
            DataError: when more than `max_bad_share` of the samples read were bad, once `GRACE` have been read.
        """
        self.count += 1
        self.listed[key] = reason
        if self.read > GRACE and self.count > self.max_bad_share * self.read:
            raise DataError(
                f"{self.count} of {self.read} samples could not be used, more than the share of {self.max_bad_share} "
                f"allowed (max_bad_share); the last one: {key}: {reason}"
            )

    def take(self) -> BadNews:
        """Everything counted since the last `take`, to be absorbed by another counter; this one starts again at 0."""
        news = BadNews(self.read, self.count, self.shortened, self.listed)
        self.read, self.count, self.shortened, self.listed = 0, 0, 0, {}
        return news

    def absorb(self, news: BadNews) -> None:
        """Adds what another counter has taken. Raises as `record` does."""
        self.read += news.read
        self.shortened += news.shortened
        self.count += news.count - len(news.listed)
        for key, reason in news.listed.items():
            self.record(key, reason)
