"""Faults in how gradients travel and are summed, for checks that must catch them: each leaves the loss as it is.

A fault is put in by entering what it returns on every rank, before the model is folded, and taken out by leaving it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from longvila import apply
from longvila.apply import experts as mixtures
from longvila.apply import parameters, tensor
from longvila.parallel import experts, pipeline
from longvila.train import engine

Fault = Callable[[], AbstractContextManager[Any]]


def _scaled(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is `factor` times as large."""
    return x.detach() + factor * (x - x.detach()) if x.requires_grad else x


def _scale_cut_matrices(factor: float) -> AbstractContextManager[Any]:
    real: Any = tensor.ColumnLinear.forward
    return patch.object(tensor.ColumnLinear, "forward", lambda self, input: real(_Scaled(self, factor), input))


class _Scaled:
    """A linear layer as its forward sees it, with scaled gradients of its own parameters alone."""

    def __init__(self, linear: Any, factor: float) -> None:
        self.weight = _scaled(tensor._local(linear.weight), factor)
        self.bias = None if linear.bias is None else _scaled(tensor._local(linear.bias), factor)


def _scale_experts(factor: Callable[[Any], float]) -> AbstractContextManager[Any]:
    """`factor`: of the mesh of experts."""
    real = parameters.shard_parameters

    def changed(model: Any, fold: Any, *rest: Any) -> None:
        real(model, fold, *rest)
        for module in model.modules():
            if isinstance(module, mixtures.DispatchedExperts):
                module.set_gradient_divide_factor(1 / factor(fold.experts))  # type: ignore[operator]

    return patch.object(apply, "shard_parameters", changed)


def no_sum_over_the_tensor_group() -> AbstractContextManager[Any]:
    """Gradients of gathered tokens stay with the rank that has them."""
    real = tensor.gather_tokens

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, tokens: Any, group: Any) -> Tensor:
            rank = dist.get_rank(group)
            ctx.mine = sum(tokens[:rank]), tokens[rank]
            return real(x, tokens, group)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
            return grads[0].narrow(0, *ctx.mine), None, None

    return patch.object(tensor, "gather_tokens", Wrong.apply)


def experts_over_the_dense_group() -> AbstractContextManager[Any]:
    """Experts are summed over ranks that hold others too."""
    return _scale_experts(lambda mesh: mesh["experts"].size() * mesh["expert_tensor"].size())


def a_factor_of_experts_copies() -> AbstractContextManager[Any]:
    return _scale_experts(lambda mesh: 1 / mesh["copies"].size())


def a_factor_of_experts_ranks() -> AbstractContextManager[Any]:
    return _scale_experts(lambda mesh: 1 / mesh["experts"].size())


def a_hundredth_is_lost() -> AbstractContextManager[Any]:
    return _scale_cut_matrices(0.99)


def a_norm_over_the_tensor_group() -> AbstractContextManager[Any]:
    """The norm by which gradients are clipped is divided by the ranks of a tensor group."""
    real = engine.FSDP2Engine.gradient_norm

    def changed(self: Any) -> float:
        real(self)
        self._norm = self._norm / 2
        return float(self._norm)

    return patch.object(engine.FSDP2Engine, "gradient_norm", changed)


def cut_matrices_over_the_tensor_group() -> AbstractContextManager[Any]:
    """Parts of matrices are summed over ranks that hold other parts too."""
    return _scale_cut_matrices(2.0)


def sums_spread_are_averaged() -> AbstractContextManager[Any]:
    real = tensor.spread_sums
    return patch.object(tensor, "spread_sums", lambda *arguments: _scaled(real(*arguments), 0.5))


def routers_without_a_gradient() -> AbstractContextManager[Any]:
    real = experts.dispatch
    detached = lambda run, hidden, chosen, weights, *rest: real(run, hidden, chosen, weights.detach(), *rest)  # noqa: E731
    return patch.object(mixtures, "dispatch", detached)


def tokens_of_experts_without_a_gradient() -> AbstractContextManager[Any]:
    real = experts.dispatch
    return patch.object(mixtures, "dispatch", lambda run, hidden, *rest: real(run, hidden.detach(), *rest))


def gradients_to_other_tokens() -> AbstractContextManager[Any]:
    """Gradients of tokens that were sent to experts come back in another order."""
    real = experts.all_to_all

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, sent: Any, received: Any, *rest: Any) -> Tensor:
            ctx.arguments = (received, sent, *rest)
            return real(x, sent, received, *rest)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
            return real(grads[0].flip(0), *ctx.arguments), None, None, None, None

    return patch.object(experts, "all_to_all", Wrong.apply)


def parts_of_experts_averaged() -> AbstractContextManager[Any]:
    real = experts.spread_sums
    return patch.object(experts, "spread_sums", lambda *arguments: _scaled(real(*arguments), 0.5))


def ends_without_their_sum() -> AbstractContextManager[Any]:
    """Words that are the output matrix too have gradients of both ends of a pipeline, and each keeps its own."""
    return patch.object(engine.FSDP2Engine, "end_rows", lambda self: None)


def rows_averaged() -> AbstractContextManager[Any]:
    """torch's schedules divide gradients by the number of rows unless they are told not to."""
    real: Any = pipeline.ScheduleInterleaved1F1B
    changed = lambda *arguments, **named: real(*arguments, **{**named, "scale_grads": True})  # noqa: E731
    return patch.object(pipeline, "ScheduleInterleaved1F1B", changed)


def a_norm_of_one_stage() -> AbstractContextManager[Any]:
    return patch.object(engine, "over_stages", lambda value, fold: [value])


FAULTS: tuple[Fault, ...] = (
    no_sum_over_the_tensor_group, experts_over_the_dense_group, a_factor_of_experts_copies, a_factor_of_experts_ranks,
    a_hundredth_is_lost, a_norm_over_the_tensor_group, cut_matrices_over_the_tensor_group, sums_spread_are_averaged,
    routers_without_a_gradient, tokens_of_experts_without_a_gradient, gradients_to_other_tokens,
    parts_of_experts_averaged,
)  # fmt: skip
"""The first six are those that were found to leave the loss exact in a prototype of MoE Parallel Folding."""
OF_PIPELINES: tuple[Fault, ...] = (ends_without_their_sum, rows_averaged, a_norm_of_one_stage)
"""What a pipeline adds to them."""
