"""`longvila.train.interrupt`: what SIGTERM does while a run is under way, and after it."""

from __future__ import annotations

import os
import signal

import pytest

from longvila.train.interrupt import StopSignal


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGTERM)
    yield before
    signal.signal(signal.SIGTERM, before)


def enter_and_fail():
    with StopSignal():
        raise ValueError("a fault")


def test_sigterm_is_noted_instead_of_obeyed(handler):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_rank_that_fails_is_not_cut_off_before_it_has_said_why(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="a fault"):
        enter_and_fail()
    os.kill(os.getpid(), signal.SIGTERM)  # would end this process


def test_a_process_of_its_own_is_left_as_it_was_found(monkeypatch, handler):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="a fault"):
        enter_and_fail()
    assert signal.getsignal(signal.SIGTERM) == handler
