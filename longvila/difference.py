"""How far a result is from its reference: the one measure of every check and bench."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def relative_error(found: Tensor | float, expected: Tensor | float, scale: Tensor | float | None = None) -> float:
    """max |found - expected| / max |expected|, of tensors of one shape or of numbers; 0 where they are equal.

    Infinite where that is not a number: Python's `max` and `<=` pass over those, so that gradients which are none would
    be called exact.

    Args:
        scale: what to divide by instead.
    """
    found, expected = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in (found, expected))
    difference = (found - expected).abs().max()
    if difference == 0:
        return 0.0
    error = float(difference / (expected.abs().max() if scale is None else scale))
    return math.inf if math.isnan(error) else error
