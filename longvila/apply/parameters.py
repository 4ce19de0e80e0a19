"""The parameter fold: which ranks shard which parameters, by FSDP2, and over which their gradients are summed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from longvila.apply.experts import DispatchedExperts
from longvila.apply.pipeline import Elsewhere
from longvila.config import ShardingConfig
from longvila.errors import ConfigError
from longvila.parallel.fold import Fold, check_sharding, parameter_mesh

# What lies over two axes is gathered in two steps, of which torch warns: weights for an export, and one number a step.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def shard_parameters(
    model: nn.Module,
    fold: Fold,
    precision: str,
    sharding: ShardingConfig,
    cut: Sequence[Sequence[nn.Module]] = (),
    chunks: Sequence[nn.Module] = (),
) -> None:
    """Shards all parameters, in place.

    Args:
        cut: of each layer, the linear layers of which each rank of a tensor group has a part.
        chunks: of a pipeline, those of this rank: all of a chunk but its layers is one unit, gathered while it runs.

    Raises:
        ConfigError: for a parameter whose gradient would not be summed over all ranks.
    """
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if precision == "bf16"
        else MixedPrecisionPolicy()
    )
    mesh = parameter_mesh(sharding, fold.mesh.device_type, fold.num_stages)
    # Every row of a pipeline would gather a chunk's weights anew.
    reshard: bool | int = sharding.parameters != "none" and not chunks
    if sharding.parameters == "node" and sharding.optimizer == "world":
        reshard = check_sharding(sharding, mesh.size())
        if reshard == mesh.size():  # one node is the world
            reshard = True

    def shard(module: nn.Module, ignored: set[nn.Parameter] | None = None) -> Any:
        return fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, ignored_params=ignored)

    def shard_copies(modules: Any, copies: DeviceMesh, cast: bool = True) -> None:
        own = policy if cast else replace(policy, cast_forward_inputs=False)
        fully_shard(modules, mesh=copies, reshard_after_forward=reshard, mp_policy=own,
                    shard_placement_fn=partial(_other_dim, copies.size()))  # fmt: skip

    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for module in _exact_modules(model) if precision == "bf16" else ():
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=exact)
    if fold.experts is not None:
        for module in model.modules():
            if isinstance(module, DispatchedExperts):
                # Tokens are of the type of their layer already, and weights of results stay as the router gives them.
                shard_copies(module, fold.experts["copies"], cast=False)
    if fold.tensor is not None:
        for linears in cut:
            if linears:
                shard_copies(list(linears), fold.tensor["copies"])
    for block in blocks(model):
        shard(block)
    if chunks:
        for chunk in chunks:
            shard(chunk)
        _sum_gradients([module for chunk in chunks for module in chunk.modules()])
    else:
        _shard_rest(model, shard)
        _sum_gradients(model.modules())
    check_rules(model, dist.get_world_size(fold.stage))


def _exact_modules(model: nn.Module) -> list[nn.Module]:
    """Routers that score in fp32 whatever the rest computes in: the largest modules of which transformers' list of
    weights kept in fp32 names every parameter. (Others hold weights of both kinds, and a unit has one type.)"""
    keeps = getattr(getattr(model, "language_model", model), "_keep_in_fp32_modules_strict", None) or ()
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = [f".{name}.{parameter}." for parameter, _ in module.named_parameters()]
        every = bool(inside) and all(any(f".{one}." in each for one in keeps) for each in inside)
        if every and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


def _shard_rest(model: nn.Module, shard: Callable[..., Any]) -> None:
    # The matrices of words are large and of no use to the backward of a look-up: gathered for the forward alone.
    language_model: Any = getattr(model, "language_model", model)
    embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    tied = head is not None and embedding.weight is head.weight
    if not tied:
        shard(embedding).set_unshard_in_backward(False)
    if language_model is model:
        shard(model)
    else:  # nor does the backward of the chunked loss look at them, so that the root unit holds the output matrix alone
        # Both may end in a view, of which torch warns: nothing writes into that.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDP(VisionTower|Projector)\) returned a view")
        shard(model.vision)  # type: ignore[arg-type]
        shard(model.projector)  # type: ignore[arg-type]
        shard(language_model.get_decoder(), {embedding.weight} if tied else None)
        shard(model).set_unshard_in_backward(False)


def _sum_gradients(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def check_rules(model: nn.Module, world: int) -> None:
    """Every parameter must lie spread or alike over ALL `world` ranks that hold these layers, so that its gradient is
    summed over all that hold it.

    Raises:
        ConfigError: naming one that is not.
    """
    for name, parameter in model.named_parameters():
        ranks = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
        if not isinstance(parameter, DTensor) or ranks != world:
            raise ConfigError(
                f"no rule sums the gradient of {name} over all {world} ranks (it knows of {ranks}); the folds of "
                f"{type(model).__name__} leave it out"
            )


def _other_dim(copies: int, parameter: nn.Parameter) -> Shard:
    """The dimension by which ranks that hold the same part of a parameter shard it: not that of the parts, where it
    divides."""
    assert isinstance(parameter, DTensor)
    cut = {getattr(placement, "dim", None) for placement in parameter.placements}
    free = [dim for dim in range(parameter.ndim) if dim not in cut]
    # Only the first dimension may be spread unevenly.
    return Shard(next((dim for dim in free if dim == 0 or parameter.shape[dim] % copies == 0), 0))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of the tower and the language model: children of every outermost list of two or more."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        children = list(module.children())
        here = [child for child in children if not isinstance(child, Elsewhere)]
        repeated = isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(c) for c in here}) == 1
        if repeated and len(children) > 1 and any(True for _ in here[0].parameters()):
            found.extend(here)
            return
        for child in children:
            visit(child)

    visit(model)
    return found
