"""What all tests share: workers and forked ranks must not fight over the cores, and no test leaves a cache behind."""

import os
import tempfile

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
_cache = tempfile.TemporaryDirectory(prefix="longvila-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name


@pytest.fixture(autouse=True)
def ordinary_priority():
    """A real-time process that waits busily, as gloo does, stops the machine; its children inherit that."""
    yield
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
