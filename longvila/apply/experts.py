"""Mixtures of experts of transformers on a fold of their own: each rank keeps its share of the experts, tokens travel
(`parallel/experts.py`), and routers are watched (`parallel/balance.py`)."""

from __future__ import annotations

import fnmatch
import inspect
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from longvila.apply.attention import ATTENTION
from longvila.config import MixtureConfig, ParallelConfig
from longvila.errors import ConfigError
from longvila.parallel.balance import Routers, capacity_of
from longvila.parallel.experts import Capacity, dispatch
from longvila.parallel.fold import Fold
from longvila.parallel.packed import packed

BALANCED = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Mixtures whose routers' probabilities are the softmax of their logits, as the losses of `parallel/balance.py` take
them, and whose gradients with those losses were compared with one process's."""


try:  # transformers 5.17 has no registry of expert parallelism
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError:
    pass
else:

    class ExpertDispatch(EPImplementation):
        """The dispatcher of `parallel/experts.py` for models that transformers itself distributes, by the name
        `DistributedConfig(ep_implementation="longvila")`.

        Raises:
            ConfigError: where ranks of a tensor group hold the same tokens, which would each be sent more than once.
        """

        num_local_experts: int

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            if self.tp_mesh.size() > 1:
                raise ConfigError(
                    f"ep_implementation='{ATTENTION}' sends each rank's tokens, but tp_size={self.tp_mesh.size()} "
                    f"ranks hold the same ones; use 'all_to_all', or longvila's own parallel.tensor"
                )
            group = self.ep_mesh.get_group()
            return dispatch(
                self.experts_forward, hidden_states, top_k_index, top_k_weights, self.num_local_experts, group
            )

    EPImplementationInterface.register(ATTENTION, ExpertDispatch)

BIAS = "e_score_correction_bias"
"""How transformers names a bias of experts' scores that plays a part in choosing alone."""


class DispatchedExperts(nn.Module):
    """What goes in front of the class of a mixture's experts of transformers: (T, D), (T, k), (T, k) -> (T, D)."""

    num_experts: int
    """Of this rank."""
    ranks: dist.ProcessGroup | None
    """Those that share out the experts."""
    tensor_ranks: dist.ProcessGroup | None
    """Those that share out the matrices of each."""
    capacity: Capacity | None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        shared = dict(self._parameters)
        # Weights are DTensors over the ranks that share them; what runs here knows those of this rank alone.
        mine: dict[str, Any] = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in shared.items()}
        try:
            self._parameters.update(mine)
            return dispatch(
                super().forward, hidden_states, top_k_index, top_k_weights,
                self.num_experts, self.ranks, self.capacity, self.tensor_ranks,
            )  # fmt: skip
        finally:
            self._parameters.update(shared)


def check_mixture(language_model: PreTrainedModel, fold: Fold, mixture: MixtureConfig) -> int:
    """How many experts each mixture of a model has, 0 for a model that is none. Changes nothing.

    A mixture's experts are a module of transformers with `num_experts`, whose parameters all begin with that dimension,
    and whose forward takes tokens, their experts and their weights.

    Args:
        language_model: with all its layers.

    Raises:
        ConfigError: experts are to be shared out and there are none, or they differ in number; losses or biases are
            asked for that this model has not.
    """
    blocks, found = _mixtures_of(language_model)
    kind = type(language_model).__name__
    asked = {
        "parallel.experts": fold.experts is not None,
        "mixture.capacity": capacity_of(mixture) is not None,
        "mixture.bias": mixture.bias != 0,
    }
    _check_losses(language_model, _routers_of(language_model), mixture)
    if not found:
        if names := [name for name, given in asked.items() if given]:
            raise ConfigError(f"{' and '.join(names)} given, but {kind} has no experts to share out; leave it out")
        return 0
    numbers = sorted({module.num_experts for module in found})
    if len(numbers) > 1:
        raise ConfigError(f"layers of {kind} have {numbers} experts; only equal numbers are known")
    if mixture.bias and len(_biases_of(blocks)) != len(found):
        raise ConfigError(
            f"mixture.bias={mixture.bias:g}, but the routers of {kind} have no bias ({BIAS}): the model that is "
            f"exported would choose other experts than the one trained; use mixture.balance"
        )
    return numbers[0]


def set_up_experts(language_model: PreTrainedModel, num_experts: int, fold: Fold, mixture: MixtureConfig) -> Routers:
    """Leaves each rank its share of the experts of every mixture, and watches what is chosen; in place.

    Args:
        language_model: what this rank's stage has of it, which may be no mixture at all.
        num_experts: of each, as `check_mixture` says.

    Raises:
        ConfigError: experts or their matrices do not divide.
    """
    capacity, mesh = capacity_of(mixture), fold.experts
    blocks, found = _mixtures_of(language_model)
    for module in found:
        if mesh is not None:
            _share_out(module, mesh, _styles_of(language_model, module) if mesh["expert_tensor"].size() > 1 else {})
        if mesh is not None or capacity is not None:
            own = type(module)
            module.__class__ = type(f"Dispatched{own.__name__}", (DispatchedExperts, own), {})
            module.ranks = mesh.get_group("experts") if mesh is not None else None
            module.tensor_ranks = None
            if mesh is not None and mesh["expert_tensor"].size() > 1:
                module.tensor_ranks = mesh.get_group("expert_tensor")
            module.capacity = capacity
    group = fold.sequence if mixture.over == "sequence" else fold.stage
    with_losses = _routers_of(language_model) if mixture.balance or mixture.z else []
    biases = _biases_of(blocks) if mixture.bias else []
    return Routers(found, num_experts, with_losses, biases, mixture, group, fold)


def check_experts(language_model: PreTrainedModel, parallel: ParallelConfig) -> None:
    """Raises ConfigError where the experts of a model, or the matrices of each, cannot be shared out as asked."""
    _, found = _mixtures_of(language_model)
    if not found:
        raise ConfigError(
            f"parallel.experts={parallel.experts} and expert_tensor={parallel.expert_tensor}, but "
            f"{type(language_model).__name__} has no experts; leave them out"
        )
    for module in found:
        kind = type(module).__name__
        _check_division(module.num_experts, kind, parallel.experts)
        if parallel.expert_tensor > 1:
            styles = _styles_of(language_model, module)
            for name, parameter in module._parameters.items():
                _cut_of(name, parameter, kind, styles.get(name), parallel.expert_tensor)


def _check_division(experts: int, kind: str, ranks: int) -> None:
    if experts % ranks:
        raise ConfigError(
            f"{experts} experts of {kind} cannot be shared out evenly among parallel.experts={ranks} ranks; use a "
            f"divisor of {experts}"
        )


def _mixtures_of(language_model: nn.Module) -> tuple[list[nn.Module], list[Any]]:
    """The blocks that hold experts, and the experts of each."""
    blocks = [module for module in language_model.modules() if any(map(is_experts, module.children()))]
    return blocks, [child for block in blocks for child in block.children() if is_experts(child)]


def _biases_of(blocks: list[nn.Module]) -> list[Tensor]:
    return [buffer for block in blocks for name, buffer in block.named_buffers() if name.endswith(BIAS)]


def _styles_of(language_model: PreTrainedModel, experts: nn.Module) -> dict[str, str]:
    """How transformers' plan for the model cuts each parameter of its experts."""
    (name,) = (name for name, module in language_model.base_model.named_modules() if module is experts)
    plan = language_model.config.base_model_tp_plan or {}
    return {parameter: style for parameter in experts._parameters
            for pattern, style in plan.items() if fnmatch.fnmatchcase(f"{name}.{parameter}", pattern)}  # fmt: skip


def _share_out(module: Any, mesh: DeviceMesh, styles: dict[str, str]) -> None:
    """Leaves this rank its experts, or its parts of them: `styles` says of each parameter how matrices are cut."""
    *_, ranks, parts = mesh.shape
    _check_division(module.num_experts, type(module).__name__, ranks)
    module.num_experts //= ranks
    for name, parameter in list(module._parameters.items()):
        assert parameter is not None
        placements, over = [Shard(0)], mesh["experts"]
        if parts > 1:
            placements.append(_cut_of(name, parameter, type(module).__name__, styles.get(name), parts))
            over = mesh["experts", "expert_tensor"]
        shared = distribute_tensor(parameter.data, over, placements, src_data_rank=None)
        module.register_parameter(name, nn.Parameter(shared, parameter.requires_grad))


def _cut_of(name: str, parameter: nn.Parameter, kind: str, style: str | None, parts: int) -> Shard:
    """Of (experts, outputs, inputs): the dimension by which an expert's neurons are shared out.

    Raises:
        ConfigError: the plan says nothing of it, or neurons do not divide.
    """
    dims = {"packed_colwise": (1, 2), "colwise": (1, 1), "rowwise": (2, 1)}
    if style not in dims or parameter.ndim != 3:
        raise ConfigError(
            f"parallel.expert_tensor={parts}, but transformers' plan has no way to cut {name} of {kind} (it says "
            f"{style}); use 1"
        )
    dim, matrices = dims[style]
    if (neurons := parameter.shape[dim] // matrices) % parts:
        raise ConfigError(
            f"{neurons} neurons of {name} of {kind} cannot be shared out evenly among parallel.expert_tensor={parts} "
            f"ranks; use a divisor of {neurons}"
        )
    # Gates lie before what they gate: each rank has its part of either.
    return Shard(dim) if matrices == 1 else packed(dim, matrices)


def _routers_of(language_model: PreTrainedModel) -> list[nn.Module]:
    recorder = (getattr(language_model.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    kind = getattr(recorder, "target_class", None)
    return [module for module in language_model.modules() if kind is not None and isinstance(module, kind)]


def _check_losses(language_model: PreTrainedModel, routers: list[nn.Module], mixture: MixtureConfig) -> None:
    if (mixture.balance or mixture.z) and (not routers or language_model.config.model_type not in BALANCED):
        raise ConfigError(
            f"mixture.balance={mixture.balance:g} and mixture.z={mixture.z:g}, but {type(language_model).__name__} has "
            f"no routers whose losses are known here (those of {', '.join(BALANCED)} are); set both to 0"
        )


def is_experts(module: nn.Module) -> bool:
    """Whether a module is the experts of a mixture, as `check_mixture` describes them."""
    total, parameters = getattr(module, "num_experts", None), list(module.parameters())
    if not parameters or parameters[0].ndim != 3 or any(p.shape[0] != total for p in parameters):
        return False
    return len(inspect.signature(module.forward).parameters) == 3
