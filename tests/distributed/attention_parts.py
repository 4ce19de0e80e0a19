"""Attention by a dense mask on one process: what everything folded is compared with."""

import torch

from longvila.parallel.blocks import Mask


def dense_mask(lengths: tuple[int, ...], mask: Mask) -> torch.Tensor:
    """bool (N, N): whether the query of a row sees the key of a column."""
    document = torch.repeat_interleave(torch.tensor(lengths))
    visible = document[:, None] == document[None]
    if mask.causal:
        visible = visible.tril()
    if mask.window is not None:
        visible = visible.triu(1 - mask.window)
    return visible
