"""The optimizer with which small models are trained from nothing: Muon for hidden matrices, AdamW for everything else.

Muon (Jordan et al. 2024) orthogonalises each matrix's update. Small transformers learn to retrieve with it in half the
steps AdamW needs, and steps are what base models made on a laptop have few of. The stages use AdamW (`optimizer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

WARMUP = 0.1
"""Share of the steps over which the rates rise from 0; a cosine back to 0 follows."""
CLIP = 1.0


class FromScratch:
    """Steps all parameters of `model`, for `steps` steps.

    Args:
        matrix_rate: learning rate of hidden matrices; updates are scaled to the size of AdamW's (Liu et al. 2025).
        other_rate: AdamW's, for embeddings, norms, biases and whatever is no hidden matrix.
        weight_decay: of hidden matrices.
    """

    def __init__(self, model: nn.Module, steps: int, matrix_rate: float, other_rate: float, weight_decay: float = 0.0):
        self.model = model
        hidden = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
        others = [p for name, p in model.named_parameters() if name not in hidden]
        self.optimizers = (
            torch.optim.Muon(
                hidden.values(), lr=matrix_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(one, warmup_cosine(steps)) for one in self.optimizers]

    def step(self, loss: torch.Tensor) -> None:
        """Backward pass, clipping, one step of both optimizers."""
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at each step."""
    return lambda step: min(1.0, (step + 1) / (WARMUP * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
