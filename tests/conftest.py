"""What all tests share: two workers and forked ranks must not fight over the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
