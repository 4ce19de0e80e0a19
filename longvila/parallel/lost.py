"""What a rank says when another is gone: one error with the way out, instead of a stack trace of the transport."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from longvila.errors import LongvilaError

_GLOO = ("gloo/transport", "gloo/rendezvous", "Wait timeout")
"""gloo raises plain RuntimeErrors; they begin with the file of its transport that failed, but for making a group."""
_NCCL = ("timeout", "timed out", "aborted", "remote process")
"""Of NCCL's errors, those that another rank causes. A GPU that waits in a kernel raises nothing: torch's watchdog ends
such a process itself once the timeout is over."""


@contextmanager
def lost_ranks(timeout: float) -> Iterator[None]:
    """Around a whole run: turns the transport's errors about another rank into one LongvilaError.

    Args:
        timeout: seconds that ranks wait for each other (`start_world`).

    Raises:
        LongvilaError: where a collective fails since another rank has died or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_about_another_rank(error):
            raise
        # gloo: "[FILE:LINE] what happened. Advice."
        reason = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]
        raise LongvilaError(
            f"another rank died, or did not answer within {timeout:g} s ({reason}); what it said last says why. The "
            f"same command goes on from the last checkpoint"
        ) from error


def _is_about_another_rank(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    words = _NCCL if isinstance(error, dist.DistBackendError) else _GLOO
    return any(word in str(error) for word in words)
