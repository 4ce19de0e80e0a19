"""What routers of a mixture choose, and losses that keep its experts in use, by layer, over the tokens of all ranks.

The loss that transformers has for it pools all layers and looks at one rank's tokens, so that it changes with the
number of ranks. Here each layer has its own, and counts are those of all ranks that are asked for: gradients are those
of one process that sees all their tokens (`tests/distributed/test_balance.py`).

The losses reach the gradients through the routers' outputs, and nothing else: the loss that is reported stays the
cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longvila.config import MixtureConfig


class Routers:
    """The routers of a mixture: counts what they choose, and adds their losses where any are asked for."""

    def __init__(self, routers: Sequence[nn.Module], config: MixtureConfig, group: dist.ProcessGroup) -> None:
        """
        Args:
            routers: of transformers. Those that return logits (T, E), scores (T, k) and chosen experts (T, k) are
                counted; losses are for routers whose probabilities are the softmax of their logits.
            group: ranks whose tokens are balanced together.
        """
        self._config, self._group = config, group
        self._groups = dist.get_world_size() // dist.get_world_size(group)
        self.rows = 1
        """Rows of this step on each sequence group: the step has the mean of their losses."""
        self.is_frame: Tensor | None = None
        """(T,) which of this rank's tokens of the row are of frames; None: none is."""
        self._counts: list[Tensor | None] = [None] * len(routers)
        for number, router in enumerate(routers):
            router.register_forward_hook(partial(self._see, number))

    def _see(self, number: int, _router: nn.Module, _inputs: Any, outputs: Any) -> Any:
        if not torch.is_grad_enabled() or not _is_known(outputs):
            return None
        logits, scores, chosen = outputs
        # What is computed again is counted again, alike for every token: shares stay what they are.
        kinds = chosen if self.is_frame is None else chosen + logits.shape[1] * self.is_frame[:, None]
        counts = torch.bincount(kinds.flatten(), minlength=2 * logits.shape[1])
        before = self._counts[number]
        self._counts[number] = counts if before is None else before + counts
        if not (self._config.balance or self._config.z) or not scores.requires_grad:
            return None
        loss = router_loss(logits, chosen, self._config, self._group)
        return logits, _WithLoss.apply(scores, loss, 1 / (self.rows * self._groups)), chosen

    def figures(self) -> dict[str, float]:
        """Of what was chosen since the last call, on all ranks. Collective.

        `expert_load`: of the fullest expert of any layer, its share of choices by an even share, 1 in balance;
        `expert_load_text` and `expert_load_frames`: among tokens of one kind, 0 where there are none. `experts_idle`:
        experts, over all layers, that no token was sent to. Nothing, where routers return something else.
        """
        seen = [counts for counts in self._counts if counts is not None]
        self._counts = [None] * len(self._counts)
        if not seen:
            return {}
        counts = torch.stack(seen)
        dist.all_reduce(counts)
        text, frames = counts.chunk(2, dim=1)

        def load(part: Tensor) -> float:
            return float((part.amax(1) * part.shape[1] / part.sum(1).clamp(min=1)).max())

        return {
            "expert_load": load(text + frames),
            "expert_load_text": load(text),
            "expert_load_frames": load(frames),
            "experts_idle": float((text + frames == 0).sum()),
        }


def router_loss(logits: Tensor, chosen: Tensor, config: MixtureConfig, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of a router's losses, which sum to the whole over `group`. Collective.

    The load-balancing loss is E * sum over experts of (share of choices) * (mean probability), 1 in balance (Switch
    Transformer, Fedus et al. 2021, equations 4 to 6, for k choices a token); the z-loss is the mean squared log-sum-exp
    of the logits (ST-MoE, Zoph et al. 2022, equation 5).

    Args:
        logits: (T, E) of this rank's tokens; T may be 0.
        chosen: (T, k).

    Returns:
        The loss, in fp32 at least.
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
    return config.balance * balance + config.z * z


def _is_known(outputs: Any) -> bool:
    """Whether they are logits (T, E), scores (T, k) and chosen experts (T, k)."""
    return (
        isinstance(outputs, tuple) and len(outputs) == 3 and all(isinstance(each, Tensor) for each in outputs)
        and outputs[0].ndim == outputs[2].ndim == 2 and not outputs[2].is_floating_point()
    )  # fmt: skip


class _WithLoss(torch.autograd.Function):
    """`scores` as they are; the backward adds the gradient of `weight` * `loss`."""

    @staticmethod
    def forward(ctx, scores: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.slope = torch.full_like(loss, weight)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, ctx.slope, None
