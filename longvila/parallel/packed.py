"""DTensors of packed matrices: several that lie behind one another in one dimension, each of which ranks share out.

An expert's gate and what it gates are one parameter of transformers. A rank's part of both is no contiguous piece of
it, which DTensor marks by a placement of its own and torch's checkpoints cannot name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard


def packed(dim: int, matrices: int) -> Any:
    """The placement of `matrices` that lie behind one another in dimension `dim`."""
    return _StridedShard(dim, split_factor=matrices)


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered, collectively; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    found: list[tuple[int, Any]] = [
        (axis, each) for axis, each in enumerate(tensor.placements) if is_packed(each, tensor.placements)
    ]
    if not found:
        return tensor.full_tensor()
    # As if they were contiguous pieces (torch 2.11 gathers no others), and then put in order.
    ((axis, placement),) = found
    matrices: int = placement.split_factor
    pieces = DTensor.from_local(
        tensor.to_local(), tensor.device_mesh, _contiguous(tensor.placements), run_check=False, shape=tensor.shape,
        stride=tensor.stride(),
    )  # fmt: skip
    dim, ranks = placement.dim, tensor.device_mesh.size(axis)
    by_rank = pieces.full_tensor().unflatten(dim, (ranks, matrices, -1))
    return by_rank.transpose(dim, dim + 1).flatten(dim, dim + 2)


def as_pieces(tensor: Tensor) -> Tensor:
    """A packed DTensor as contiguous pieces on the same ranks, collectively; any other tensor as it is."""
    if not isinstance(tensor, DTensor) or not any(is_packed(each, tensor.placements) for each in tensor.placements):
        return tensor
    return distribute_tensor(whole(tensor), tensor.device_mesh, _contiguous(tensor.placements), src_data_rank=None)


def as_placed(tensor: Tensor, like: Tensor) -> Tensor:
    """What `as_pieces` made of a DTensor that lies as `like`; any other tensor as it is. Collective."""
    if not isinstance(tensor, DTensor) or not isinstance(like, DTensor) or tensor.ndim != like.ndim:
        return tensor
    if not any(is_packed(each, like.placements) for each in like.placements):
        return tensor
    return distribute_tensor(whole(tensor), like.device_mesh, like.placements, src_data_rank=None)


def is_packed(placement: Any, placements: tuple[Any, ...]) -> bool:
    """Whether it spreads parts that lie side by side in one dimension. (FSDP2 uses the same kind of placement where it
    spreads further what another axis has spread: that leaves contiguous pieces.)"""
    of_dim = sum(getattr(each, "dim", None) == getattr(placement, "dim", None) for each in placements)
    return isinstance(placement, _StridedShard) and of_dim == 1


def _contiguous(placements: tuple[Any, ...]) -> list[Any]:
    return [Shard(each.dim) if is_packed(each, placements) else each for each in placements]
