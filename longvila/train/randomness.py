"""The random generators of this process: torch's, its GPU's, Python's and NumPy's."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }


def restore_random_state(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])


def seed_anew(seed: int, step: int, rank: int) -> None:
    """Another stream of random numbers for each rank, and for each step that a run is continued at."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:4], "big")
    torch.manual_seed(number)  # of the GPU too
    random.seed(number)
    np.random.seed(number)
