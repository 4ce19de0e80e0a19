"""Mixtures of experts of transformers on a fold of their own: each rank keeps its share of the experts, tokens travel
(`parallel/experts.py`), and routers are watched (`parallel/balance.py`)."""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from longvila.config import MixtureConfig
from longvila.errors import ConfigError
from longvila.parallel.balance import Routers
from longvila.parallel.experts import dispatch
from longvila.parallel.fold import Fold

BALANCED = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Mixtures whose routers' probabilities are the softmax of their logits, as the losses of `parallel/balance.py` take
them, and whose gradients with those losses were compared with one process's."""


class SharedExperts(nn.Module):
    """What goes in front of the class of a mixture's experts of transformers: (T, D), (T, k), (T, k) -> (T, D)."""

    num_experts: int
    """Of this rank."""
    ranks: dist.ProcessGroup
    """Those that share out the experts."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        shared = dict(self._parameters)
        # Weights are DTensors over the ranks that share them; what runs here knows those of this rank alone.
        mine: dict[str, Any] = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in shared.items()}
        try:
            self._parameters.update(mine)
            return dispatch(super().forward, hidden_states, top_k_index, top_k_weights, self.num_experts, self.ranks)
        finally:
            self._parameters.update(shared)


def share_experts(language_model: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each rank of `mesh` its share of the experts of every mixture.

    A mixture's experts are a module of transformers with `num_experts`, whose parameters all begin with that dimension,
    and whose forward takes tokens, their experts and their weights.

    Raises:
        ConfigError: there is none, or the experts cannot be shared out evenly.
    """
    found = [module for module in language_model.modules() if _is_experts(module)]
    if not found:
        raise ConfigError(
            f"parallel.experts={mesh.size()}, but {type(language_model).__name__} has no experts to share out; use 1"
        )
    for module in found:
        total: int = module.num_experts  # type: ignore[assignment]
        if total % mesh.size():
            raise ConfigError(
                f"{total} experts of {type(module).__name__} cannot be shared out evenly among parallel.experts="
                f"{mesh.size()} ranks; use a divisor of {total}"
            )
        module.num_experts = total // mesh.size()  # type: ignore[assignment]
        for name, parameter in list(module._parameters.items()):
            assert parameter is not None
            shared = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(shared, parameter.requires_grad))
        kind = type(module)
        module.__class__ = type(f"Shared{kind.__name__}", (SharedExperts, kind), {})
        module.ranks = mesh.get_group()  # type: ignore[assignment]


def hook_routers(language_model: PreTrainedModel, fold: Fold, mixture: MixtureConfig) -> Routers | None:
    """Raises ConfigError where losses are asked for and not known for this model."""
    recorder = (getattr(language_model.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    kind = getattr(recorder, "target_class", None)
    found = [module for module in language_model.modules() if kind is not None and isinstance(module, kind)]
    if (mixture.balance or mixture.z) and (not found or language_model.config.model_type not in BALANCED):
        raise ConfigError(
            f"mixture.balance={mixture.balance:g} and mixture.z={mixture.z:g}, but {type(language_model).__name__} has "
            f"no routers whose losses are known here (those of {', '.join(BALANCED)} are); set both to 0"
        )
    if not found:
        return None
    group = fold.sequence if mixture.over == "sequence" else dist.group.WORLD
    assert group is not None
    return Routers(found, mixture, group)


def _is_experts(module: nn.Module) -> bool:
    total, parameters = getattr(module, "num_experts", None), list(module.parameters())
    if not parameters or parameters[0].ndim != 3 or any(p.shape[0] != total for p in parameters):
        return False
    return len(inspect.signature(module.forward).parameters) == 3
