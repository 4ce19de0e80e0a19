"""Losses that keep the experts of a mixture in use, layer by layer, over all the tokens that share a batch.

The loss that transformers has for it pools all layers and looks at one rank's tokens, so that it changes with the
number of ranks. Here each layer has its own, and counts are those of all ranks that are asked for: gradients are those
of one process that sees all their tokens (`tests/distributed/test_balance.py`).

The losses reach the gradients through the routers' outputs, and nothing else: the loss that is reported stays the
cross-entropy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longvila.config import MixtureConfig


class RouterLosses:
    """The losses of every router it is hooked to."""

    def __init__(self, config: MixtureConfig, group: dist.ProcessGroup) -> None:
        """
        Args:
            group: ranks whose tokens are balanced together.
        """
        self._config, self._group = config, group
        self.rows = 1
        """Rows of this step on each sequence group: the step has the mean of their losses."""
        self._groups = dist.get_world_size() // dist.get_world_size(group)
        self._loads: dict[nn.Module, Tensor] = {}

    def __call__(self, router: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> Any:
        """A forward hook of a router of transformers: logits (T, E), scores (T, k) and chosen experts (T, k)."""
        logits, scores, chosen = outputs
        if not (router.training and torch.is_grad_enabled() and scores.requires_grad):
            return None
        loss, self._loads[router] = router_loss(logits, chosen, self._config, self._group)
        return logits, _WithLoss.apply(scores, loss, 1 / (self.rows * self._groups)), chosen

    def largest_load(self) -> float:
        """Of all experts of all layers in the last row, the largest share of tokens, by an even share: 1 is balance."""
        loads = [load.max() for load in self._loads.values()]
        return float(torch.stack(loads).max()) if loads else 0.0


def router_loss(
    logits: Tensor, chosen: Tensor, config: MixtureConfig, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """This rank's part of a router's losses, which sum to the whole over `group`. Collective.

    The load-balancing loss is E * sum over experts of (share of choices) * (mean probability), 1 in balance (Switch
    Transformer, Fedus et al. 2021, equations 4 to 6, for k choices a token); the z-loss is the mean squared log-sum-exp
    of the logits (ST-MoE, Zoph et al. 2022, equation 5).

    Args:
        logits: (T, E) of this rank's tokens; T may be 0.
        chosen: (T, k).

    Returns:
        The loss, in fp32 at least, and each expert's share of choices by an even share, (E,).
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    num_experts, logits = logits.shape[1], logits.to(exact)
    # Counts are whole numbers, exact in fp32 up to 16 million.
    counts = torch.bincount(chosen.flatten(), minlength=num_experts).to(exact)
    dist.all_reduce(counts, group=group)
    choices = counts.sum().clamp(min=1.0)
    loads = counts * num_experts / choices
    num_tokens = choices / chosen.shape[1]
    balance = (loads * logits.softmax(-1).sum(0)).sum() / num_tokens
    z = logits.logsumexp(-1).square().sum() / num_tokens
    return config.balance * balance + config.z * z, loads


class _WithLoss(torch.autograd.Function):
    """`scores` as they are; the backward adds the gradient of `weight` * `loss`."""

    @staticmethod
    def forward(ctx, scores: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.slope = torch.full_like(loss, weight)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, ctx.slope, None
