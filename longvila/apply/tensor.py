"""Tensor parallelism in a language model of transformers: each rank keeps its columns or rows of the matrices of
attention and MLPs.

Which matrices are cut, and how, the model's own plan says (`base_model_tp_plan` in its configuration): `colwise` ones
by what comes out, `rowwise` ones by what goes in. A module that holds both gets the tokens of its whole tensor group,
and of what it returns each rank keeps the sum for its own tokens. Words are looked up, and the loss taken, on a rank's
own tokens with whole matrices: there is nothing to gain by cutting them.

Gradients: a cut matrix has seen all tokens of its group, so its gradient is summed over the ranks that hold the same
part. Everything else has seen each token on one rank (norms, routers, embeddings) or a part of the heads (norms of
queries and keys, keys that ranks share): summed over all ranks, as without tensor parallelism.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from longvila.errors import ConfigError
from longvila.parallel.attention import FoldedPlan
from longvila.parallel.tensor import SummedGradient, gather_tokens, spread_sums


class CutModule(nn.Module):
    """What goes in front of the class of an attention or MLP module whose matrices are cut."""

    tensor_ranks: dist.ProcessGroup
    tensor_tokens: tuple[int, ...]
    """Of the row at hand, the tokens of each rank. Set each time that the layer runs."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(..., t, D) -> (..., t, D), or a tuple that begins with it."""
        whole = _on_tokens(gather_tokens, hidden_states, self)
        if "position_ids" in kwargs and "position_ids" in inspect.signature(super().forward).parameters:
            kwargs["position_ids"] = _of_all_tokens(kwargs["position_ids"], self)  # as Ministral 3 scales queries by
        out = super().forward(whole, *args, **kwargs)
        if isinstance(out, tuple):
            return _on_tokens(spread_sums, out[0], self), *out[1:]
        return _on_tokens(spread_sums, out, self)


class ColumnLinear(nn.Linear):
    """Some outputs of a linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _local(self.weight), None if self.bias is None else _local(self.bias))


class SharedColumnLinear(nn.Linear):
    """Some outputs of a linear layer of which several ranks need the same; its parameters stay whole."""

    outputs: slice

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight[self.outputs], None if self.bias is None else self.bias[self.outputs])


class RowLinear(nn.Linear):
    """A linear layer's outputs from some of its inputs: this rank's part of their sum. The first rank adds the bias."""

    ranks: dist.ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        out = F.linear(input, _local(self.weight))
        if self.bias is None:
            return out
        # Every rank takes part in summing its gradient.
        bias: Tensor = SummedGradient.apply(_local(self.bias), self.ranks)  # type: ignore[assignment]
        return out + bias if dist.get_rank(self.ranks) == 0 else out + 0 * bias


def cut_matrices(language_model: PreTrainedModel, mesh: DeviceMesh) -> list[list[nn.Module]]:
    """Leaves each rank of `mesh` its part of the matrices, in place.

    Args:
        mesh: one axis, the ranks of a tensor group.

    Returns:
        For each layer, its cut linear layers: their parameters are DTensors over `mesh`.

    Raises:
        ConfigError: the model has no plan, or one that asks for more than is done here; or sizes do not divide.
    """
    decoder: Any = language_model.base_model
    plan = language_model.config.base_model_tp_plan or {}
    styles = {name: style for name, _ in decoder.named_modules() if name.startswith("layers.")
              for pattern, style in plan.items() if "wise" in style and fnmatch.fnmatchcase(name, pattern)}  # fmt: skip
    kind = type(language_model).__name__
    if not styles:
        raise ConfigError(f"parallel.tensor={mesh.size()}, but transformers has no plan to cut {kind}; use 1")
    for name, style in styles.items():
        if style not in ("colwise", "rowwise"):
            raise ConfigError(
                f"parallel.tensor={mesh.size()}: transformers' plan for {kind} cuts {name} '{style}', and only colwise "
                f"and rowwise are done here; use 1"
            )
    layers = []
    for number, layer in enumerate(decoder.layers):
        prefix = f"layers.{number}."
        own = {name.removeprefix(prefix): style for name, style in styles.items() if name.startswith(prefix)}
        layers.append(_cut_layer(layer, own, language_model.config, mesh))
    rotaries = [module for name, module in decoder.named_children() if "rotary" in name]
    for module in rotaries:
        module.tensor_ranks = mesh.get_group()
        module.register_forward_pre_hook(_gather_positions, with_kwargs=True)
    decoder.register_forward_pre_hook(partial(_tell_tokens, rotaries), with_kwargs=True)
    return layers


def _cut_layer(layer: nn.Module, styles: dict[str, str], config: Any, mesh: DeviceMesh) -> list[nn.Module]:
    cut, parents = [], []
    by_parent: dict[str, list[str]] = {}
    for name in styles:
        by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    for parent_name, names in by_parent.items():
        parent = layer.get_submodule(parent_name)
        for name in names:
            if type(linear := layer.get_submodule(name)) is not nn.Linear:
                raise ConfigError(
                    f"parallel.tensor={mesh.size()}: {name} is a {type(linear).__module__}.{type(linear).__name__}, "
                    f"and only plain linear layers can be cut; use 1, or merge adapters first"
                )
        _check_rest(parent, parent_name, [layer.get_submodule(name) for name in names], config)
        heads = hasattr(parent, "layer_idx")
        for name in names:
            linear: Any = layer.get_submodule(name)
            if styles[name] == "rowwise":
                _cut_rows(name, linear, mesh)
            elif heads and linear.out_features == config.num_key_value_heads * parent.head_dim:
                _cut_heads(name, linear, config, int(parent.head_dim), mesh)  # type: ignore[arg-type]
            else:
                _cut_columns(name, linear, mesh)
            if not isinstance(linear, SharedColumnLinear):
                cut.append(linear)
        if heads and config.num_attention_heads % mesh.size():
            raise ConfigError(
                f"{config.num_attention_heads} query heads cannot be shared out evenly among parallel.tensor="
                f"{mesh.size()} ranks; use a divisor of {config.num_attention_heads}"
            )
        own = type(parent)
        parent.__class__ = type(f"Cut{own.__name__}", (CutModule, own), {})
        parent.tensor_ranks = mesh.get_group()  # type: ignore[assignment]
        parents.append(parent)
    # Attention comes first. Not the layer: transformers 5.24 computes a layer again without the hooks of the layer.
    for module in layer.children():
        if hasattr(module, "layer_idx"):
            module.register_forward_pre_hook(partial(_tell_tokens, parents), with_kwargs=True)
    return cut


def _check_rest(parent: nn.Module, name: str, cut: list[nn.Module], config: Any) -> None:
    """Between matrices that are cut, a parameter must not look at more than one head at a time."""
    for child_name, parameter in parent.named_parameters():
        owner = parent.get_submodule(child_name.rpartition(".")[0])
        if owner not in cut and not (hasattr(parent, "head_dim") and parameter.shape == (parent.head_dim,)):
            raise ConfigError(
                f"parallel.tensor: {name}.{child_name} {tuple(parameter.shape)} lies between matrices that are cut, "
                f"and there is no rule for its gradient; use 1 for {config.model_type}"
            )


def _cut_columns(name: str, linear: Any, mesh: DeviceMesh) -> None:
    _check_divides(name, "outputs", linear.out_features, mesh)
    linear.__class__ = ColumnLinear
    _share(linear, "weight", Shard(0), mesh)
    _share(linear, "bias", Shard(0), mesh)


def _cut_rows(name: str, linear: Any, mesh: DeviceMesh) -> None:
    _check_divides(name, "inputs", linear.in_features, mesh)
    linear.__class__ = RowLinear
    linear.ranks = mesh.get_group()
    _share(linear, "weight", Shard(1), mesh)
    _share(linear, "bias", Replicate(), mesh)


def _cut_heads(name: str, linear: Any, config: Any, head_dim: int, mesh: DeviceMesh) -> None:
    """Of keys or values, which query heads share: a rank holds those that its query heads read."""
    heads = config.num_key_value_heads
    if heads % mesh.size() == 0:
        _cut_columns(name, linear, mesh)
        return
    if mesh.size() % heads:
        raise ConfigError(
            f"{heads} key heads of {name} and parallel.tensor={mesh.size()} ranks must divide each other; use a "
            f"divisor or a multiple of {heads}"
        )
    linear.__class__ = SharedColumnLinear
    head = mesh.get_local_rank() * heads // mesh.size()
    linear.outputs = slice(head * head_dim, (head + 1) * head_dim)


def _check_divides(name: str, what: str, size: int, mesh: DeviceMesh) -> None:
    if size % mesh.size():
        raise ConfigError(
            f"{size} {what} of {name} cannot be shared out evenly among parallel.tensor={mesh.size()} ranks; use a "
            f"divisor of {size}"
        )


def _share(linear: nn.Linear, name: str, placement: Shard | Replicate, mesh: DeviceMesh) -> None:
    parameter = getattr(linear, name)
    if parameter is not None:
        shared = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
        setattr(linear, name, nn.Parameter(shared, parameter.requires_grad))


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _on_tokens(collective: Callable[..., Tensor], x: Tensor, module: Any) -> Tensor:
    """`collective` over the last but one dimension of `x`; what comes before has size 1."""
    out = collective(x.reshape(-1, x.shape[-1]), module.tensor_tokens, module.tensor_ranks)
    return out.view(*x.shape[:-2], *out.shape)


def _tell_tokens(modules: list[Any], _caller: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    """In front of attention: also when activation checkpointing runs it again, maybe after another row."""
    plan: FoldedPlan | None = kwargs.get("plan")
    if plan is None:
        raise ConfigError("under tensor parallelism the model's forward needs plan=...")
    for module in modules:
        module.tensor_tokens = plan.tensor_tokens


def _gather_positions(rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The attention modules turn queries and keys of all tokens of the group."""
    bound = inspect.signature(rotary.forward).bind(*args, **kwargs)
    bound.arguments["position_ids"] = _of_all_tokens(bound.arguments["position_ids"], rotary)
    return bound.args, bound.kwargs


def _of_all_tokens(positions: Tensor, module: Any) -> Tensor:
    """(1, t) -> (1, tokens of the group)."""
    return _on_tokens(gather_tokens, positions.unsqueeze(-1), module).squeeze(-1)
