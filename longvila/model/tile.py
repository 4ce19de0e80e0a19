"""Token-wise modules of a language model's layers, a tile of tokens at a time: what lies inside exists for one tile.

A decoder layer is attention, which sees other tokens, and an MLP and norms, which do not. Of the latter only the input
is kept; the backward takes one tile after the other: computes it again, takes its gradients, drops it. A row of 256
thousand tokens through an MLP of width 18,944 holds 19 GB of each intermediate in fp32, a tile of 4096 holds 0.3.

Models stay as transformers ships them: each module gets a subclass of its own class, as FSDP2 does it, so that names of
parameters stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from longvila.errors import ConfigError

NORMS = ("RMSNorm", "LayerNorm")


def tile_layers(layers: Iterable[nn.Module], tile_tokens: int) -> None:
    """Makes the token-wise children of decoder layers work on `tile_tokens` tokens at a time, in place.

    The rule: a child with a `layer_idx` is attention, and left alone. A child whose class is named an RMSNorm or a
    LayerNorm, or whose parameters all belong to linear layers outside of lists, is token-wise. Anything else, a mixture
    of experts above all, is refused.

    Raises:
        ConfigError: for a child that is neither, or that draws dropout; or a tile below 1.
    """
    if tile_tokens < 1:
        raise ConfigError(f"tile_tokens={tile_tokens}; a tile has at least 1 token, and None tiles nothing")
    found = [(name, child) for layer in layers for name, child in layer.named_children()]
    chosen = [(name, child) for name, child in found if not hasattr(child, "layer_idx") and _has_parameters(child)]
    for name, child in chosen:
        _check_token_wise(name, child)
    for _, child in chosen:
        kind = type(child)
        child.__class__ = type(f"Tiled{kind.__name__}", (Tiled, kind), {})
        child.tile_tokens = tile_tokens  # type: ignore[assignment]


class Tiled(nn.Module):
    """What goes in front of a module's own class."""

    tile_tokens: int

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., N, D) -> (..., N, D')."""
        if hidden.shape[-2] <= self.tile_tokens:
            return super().forward(hidden)
        if torch.is_autocast_enabled(hidden.device.type):
            raise ConfigError(f"{type(self).__name__} runs under autocast; use apply_folds(precision='bf16') instead")
        # In a list: as an argument of its own, autograd would run its backward.
        kept = [_Keep.apply(hidden, torch.empty(0, requires_grad=True))]
        return _Tiles.apply(hidden, kept, super().forward, self, *_trained(self))  # type: ignore[return-value]


class _Keep(torch.autograd.Function):
    """Saves its input *before* the tiles are computed, for their backward.

    Activation checkpointing computes a layer again up to the last tensor that was saved. A function's own are saved as
    it returns; the layer's last MLP would be computed once more for nothing.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, _makes_autograd_record: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.new_empty(0)

    @staticmethod
    def backward(ctx, *_grads):
        raise AssertionError("nothing is computed from what _Keep returns")


class _Tiles(torch.autograd.Function):
    """`run` on tiles of `hidden`. Trained parameters are arguments so that autograd asks for their gradients."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, kept: list[Any], run: Callable[[Tensor], Tensor], module: Tiled, *_trained
    ) -> Tensor:
        ctx.kept, ctx.run, ctx.module = kept, run, module
        out = None
        for start, tile in _tiles(hidden, module.tile_tokens):
            with _Operators() if out is None else nullcontext() as operators:
                part = run(tile)
            ctx.unneeded = operators.last_product() if operators else ctx.unneeded
            if out is None:
                out = part.new_empty((*hidden.shape[:-1], part.shape[-1]))
            out.narrow(-2, start, part.shape[-2]).copy_(part)
        assert out is not None
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (hidden,), module = ctx.kept[0].grad_fn.saved_tensors, ctx.module
        # The parameters of now: between forward and backward, FSDP2 puts others in their place.
        parameters = _trained(module)
        needs_hidden = ctx.needs_input_grad[0]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        totals: list[Tensor] = []
        for start, tile in _tiles(hidden, module.tile_tokens):
            tile = tile.detach().requires_grad_(needs_hidden)
            with torch.enable_grad(), _Operators(ctx.unneeded):
                part = ctx.run(tile)
            wanted = [tile, *parameters] if needs_hidden else parameters
            found = list(torch.autograd.grad(part, wanted, grads[0].narrow(-2, start, tile.shape[-2])))
            del part
            if grad_hidden is not None:
                grad_hidden.narrow(-2, start, tile.shape[-2]).copy_(found.pop(0))
            if not totals:
                # In fp32 at least: a sum over tiles in bf16 would cost more accuracy than the tiles themselves.
                totals = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in found]
            else:
                for total, one in zip(totals, found, strict=True):
                    total += one
        sums = (total.to(p.dtype) for total, p in zip(totals, parameters, strict=True))
        return grad_hidden, None, None, None, *sums


class _Operators(TorchDispatchMode):
    """Counts the matrix products that a tile takes, and leaves out the one numbered `skip`: its result stays undefined.

    Gradients of a matrix product need what went into it, not what came out. An MLP's last product is therefore not
    computed again: a ninth of its work in a step.

    By products and not by operators: what lies between them differs between torch's releases, and within one between
    forward and backward, as does whether a product is one of matrices or of batches of them.
    """

    def __init__(self, skip: int | None = None) -> None:
        super().__init__()
        self._skip, self._products, self._ends_in_one = skip, 0, False

    def last_product(self) -> int | None:
        """The number of the matrix product that only views of its result follow, if the tile ends in one."""
        return self._products - 1 if self._ends_in_one else None

    def __exit__(self, kind, error, trace) -> None:
        super().__exit__(kind, error, trace)
        if kind is None and self._skip is not None and self._products != self._skip + 1:
            raise AssertionError(
                f"a tile took {self._skip + 1} matrix products forward and {self._products} when computed again"
            )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in _PRODUCTS:
            self._ends_in_one &= func.is_view or func is aten._unsafe_view.default
            return func(*args, **(kwargs or {}))
        self._products, self._ends_in_one = self._products + 1, True
        if self._products - 1 == self._skip:
            left, right = args[-2:]
            return left.new_empty((*left.shape[:-1], right.shape[-1]))
        return func(*args, **(kwargs or {}))


aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


def _tiles(hidden: Tensor, size: int) -> Iterable[tuple[int, Tensor]]:
    for start in range(0, hidden.shape[-2], size):
        yield start, hidden.narrow(-2, start, min(size, hidden.shape[-2] - start))


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _check_token_wise(name: str, child: nn.Module) -> None:
    kind = type(child).__name__
    if isinstance(child, Tiled):
        raise ConfigError(f"{name} ({kind}) is tiled already")
    for inner in child.modules():
        if isinstance(inner, nn.Dropout) and inner.p > 0:
            raise ConfigError(f"{name} ({kind}) draws dropout {inner.p}, which tiles would draw anew; set it to 0")
        own = any(True for _ in inner.parameters(recurse=False))
        linear = isinstance(inner, nn.Linear)
        norm = inner is child and any(word in kind for word in NORMS)
        if isinstance(inner, nn.ModuleList) or (own and not linear and not norm):
            raise ConfigError(
                f"{name} ({kind}) is not plainly token-wise: it holds a {type(inner).__name__}, and only norms and "
                f"modules of linear layers are tiled; leave tile_tokens out for this model"
            )
