"""What routers of a mixture choose, and losses that keep its experts in use, by layer, over the tokens of all ranks.

The loss that transformers has for it pools all layers and looks at one rank's tokens, so that it changes with the
number of ranks. Here each layer has its own, and counts are those of all ranks that are asked for: gradients are those
of one process that sees all their tokens (`tests/distributed/test_balance.py`).

The losses reach the gradients through the routers' outputs, and nothing else: the loss that is reported stays the
cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longvila.config import MixtureConfig
from longvila.errors import ConfigError
from longvila.parallel.experts import Capacity
from longvila.parallel.fold import Fold


class Routers:
    """The routers of a mixture: counts what they choose, adds their losses and moves their biases where asked for."""

    def __init__(
        self,
        experts: Sequence[nn.Module],
        num_experts: int,
        routers: Sequence[nn.Module],
        biases: Sequence[Tensor],
        config: MixtureConfig,
        group: dist.ProcessGroup,
        fold: Fold,
    ) -> None:
        """
        Args:
            experts: of each layer, what is called with (tokens (T, D), chosen experts (T, k), weights (T, k)).
            num_experts: of each layer, over all ranks.
            routers: of each layer, where losses are asked for: what returns logits (T, E), scores (T, k) and chosen
                experts (T, k), its probabilities being the softmax of its logits.
            biases: (E,) of each layer, where they are to be moved.
            group: ranks whose tokens are balanced together.
        """
        self._config, self._group, self._num_experts, self._biases = config, group, num_experts, biases
        self._groups = dist.get_world_size(fold.stage) // dist.get_world_size(group)
        self._stage, self._pipeline = fold.stage, fold.pipeline
        self._capacity = capacity_of(config)
        self.rows = 1
        """Rows of this step on each sequence group: the step has the mean of their losses."""
        self.is_frame: Tensor | None = None
        """(T,) which of this rank's tokens of the row at hand are of frames; None: none is."""
        self._counts: list[Tensor | None] = [None] * len(experts)
        for number, module in enumerate(experts):
            module.register_forward_pre_hook(partial(self._count, number))
        for router in routers:
            router.register_forward_hook(self._add_loss)

    def _count(self, number: int, _experts: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # What a backward computes again is not counted again: a pipeline may be at another row by then.
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        _, chosen, _ = inputs
        total = self._num_experts
        kinds = chosen if self.is_frame is None else chosen + total * self.is_frame[:, None]
        counts = torch.bincount(kinds.flatten(), minlength=2 * total + 1)
        if self._capacity is not None:
            of_expert = counts[:total] + counts[total:-1]
            counts[-1] = (of_expert - self._capacity.of(chosen.numel(), total)).clamp(min=0).sum()
        before = self._counts[number]
        self._counts[number] = counts if before is None else before + counts

    def _add_loss(self, _router: nn.Module, _inputs: Any, outputs: Any) -> Any:
        logits, scores, chosen = outputs
        if not torch.is_grad_enabled() or not scores.requires_grad:
            return None
        loss = router_loss(logits, chosen, self._config, self._group)
        return logits, _WithLoss.apply(scores, loss, 1 / (self.rows * self._groups)), chosen

    def end_step(self, moved: bool) -> dict[str, float]:
        """Figures of what was chosen since the last call, on all ranks; moves biases where the weights were `moved`.
        Collective.

        `expert_load`: of the fullest expert of any layer, its share of choices by an even share, 1 in balance;
        `expert_load_text` and `expert_load_frames`: among tokens of one kind, 0 where there are none. `experts_idle`:
        experts, over all layers, that no token chose. `choices_dropped`: share of choices above an expert's capacity.
        """
        seen = [counts for counts in self._counts if counts is not None]
        self._counts = [None] * len(self._counts)
        sizes = [self._num_experts, self._num_experts, 1]
        counts = torch.stack(seen) if seen else torch.zeros(0, sum(sizes), dtype=torch.long)
        if seen:
            dist.all_reduce(counts, group=self._stage)
        text, frames, dropped = counts.split(sizes, dim=1)
        if seen and moved:
            for bias, chosen in zip(self._biases, text + frames, strict=bool(self._biases)):
                move_bias(bias, chosen, self._config.bias)
        # From here on of the layers of all stages, of which some may have no mixture.
        everyone: list[Any] = [None] * dist.get_world_size(self._pipeline)
        dist.all_gather_object(everyone, counts.cpu(), group=self._pipeline)
        if not len(counts := torch.cat(everyone)):
            return {}
        text, frames, dropped = counts.split(sizes, dim=1)

        def load(part: Tensor) -> float:
            return float((part.amax(1) * part.shape[1] / part.sum(1).clamp(min=1)).max())

        return {
            "expert_load": load(text + frames),
            "expert_load_text": load(text),
            "expert_load_frames": load(frames),
            "experts_idle": float((text + frames == 0).sum()),
            "choices_dropped": int(dropped.sum()) / max(1, int((text + frames).sum())),
        }


def capacity_of(config: MixtureConfig) -> Capacity | None:
    """Raises ConfigError where it would leave no expert a token."""
    if config.capacity is None:
        return None
    if not 0 < config.capacity < math.inf:
        raise ConfigError(
            f"mixture.capacity={config.capacity:g} leaves experts no tokens; give a factor above 0 (1 is an even "
            "share), or leave it out to drop nothing"
        )
    return Capacity(config.capacity, config.keeps, config.pads)


@torch.no_grad()
def move_bias(bias: Tensor, chosen: Tensor, step: float) -> None:
    """Experts chosen less than the mean gain `step`, those chosen more lose it (Wang et al. 2024, algorithm 1).

    Args:
        bias: (E,), moved in place.
        chosen: (E,) how often each expert was chosen, on all ranks, in one step.
    """
    chosen = chosen.to(torch.float64)
    bias += step * (chosen.mean() - chosen).sign().to(bias.dtype)


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


class _WithLoss(torch.autograd.Function):
    """`scores` as they are; the backward adds the gradient of `weight` * `loss`."""

    @staticmethod
    def forward(ctx, scores: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.slope = torch.full_like(loss, weight)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, ctx.slope, None
