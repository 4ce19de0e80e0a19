"""Running ranks for checks: what ends a rank is told, and what the parent left alone stays alone."""

import gc
import signal

import pytest

from longvila.parallel.launch import RankError, run_ranks


def end_by_signal():
    # To this thread: one sent to the process may be taken by a thread of gloo, and this one be done first.
    signal.raise_signal(signal.SIGSEGV)


def test_a_rank_that_a_signal_ends_tells_which_and_where():
    with pytest.raises(RankError, match=r"ended without an answer \(SIGSEGV\)(.|\n)*in end_by_signal"):
        run_ranks(end_by_signal, 1)


class Destroyed:
    """Garbage that only the collector finds, and that counts how often it was destroyed in this process."""

    count = 0

    def __init__(self):
        self.itself = self

    def __del__(self):
        Destroyed.count += 1


def collect():
    gc.collect()
    return Destroyed.count


def test_a_rank_does_not_destroy_what_its_parent_left():
    gc.disable()
    try:
        Destroyed()
        assert run_ranks(collect, 1) == [0]
        assert collect() == 1
    finally:
        gc.enable()
