"""What moves the weights: FSDP2, or DeepSpeed's ZeRO, behind one small interface. The loop knows no more of either.

The loss that goes in is divided by the global count of targets already, so that gradients are plain SUMS over all
ranks; an engine that averages undoes it in its adapter, in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from longvila.apply import apply_folds
from longvila.config import StageConfig
from longvila.model.vlm import LongVilaModel
from longvila.parallel.balance import Routers
from longvila.parallel.fold import Fold
from longvila.parallel.packed import as_pieces, as_placed, whole
from longvila.parallel.pipeline import Pipeline, add_other_end, from_stages, over_stages
from longvila.train.optimizer import make_optimizer, set_learning_rate


class Engine(Protocol):
    """Steps one model. Methods are collective over the world where they do not say otherwise."""

    model: LongVilaModel
    routers: Routers | None
    """Of a mixture of experts."""
    pipeline: Pipeline | None
    """What runs all rows of a step, forward and backward, in the place of `forward` and `backward`."""

    def forward(self, **inputs: Any) -> Any:
        """The model's forward."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of one row's loss, summed over ranks. `last`: no row of this step follows."""
        ...

    def end_rows(self) -> None:
        """After a pipeline has run the rows of a step, before `gradient_norm`: completes what gradients lack."""
        ...

    def gradient_norm(self) -> float:
        """Norm of all gradients before clipping, the same on every rank; infinite or not a number where one is."""
        ...

    def step(self, rate: float) -> None:
        """Clips, moves the weights at learning rate `rate`, and drops the gradients. After `gradient_norm`."""
        ...

    def discard(self) -> None:
        """Drops the gradients; weights and moments stay. After `gradient_norm`."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Whole gradients of the trained parameters, one at a time, by name. Before `step`."""
        ...

    def shares(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of every parameter, by name. Not collective."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Whole weights in fp32 on the CPU of rank 0, by name; elsewhere empty."""
        ...

    def state(self) -> dict[str, Any]:
        """`{"model": ..., "optimizer": ...}` by parameter name, for torch's distributed checkpoint: weights, and
        AdamW's step and moments; settings come from the configuration. The same form for every engine, so that one
        continues what another saved."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned, filled from a checkpoint since."""
        ...


def make_engine(model: LongVilaModel, fold: Fold, config: StageConfig) -> Engine:
    """Puts `model` under its folds, in place, and under the engine that the configuration names. Collective.

    Raises:
        ConfigError: for choices that do not go together.
    """
    if config.engine == "fsdp2":
        return FSDP2Engine(model, fold, config)
    from longvila.train.deepspeed import DeepSpeedEngine  # an extra of its own

    return DeepSpeedEngine(model, fold, config)


class FSDP2Engine:
    """torch's fully sharded data parallelism. Weights, gradients and moments are DTensors."""

    def __init__(self, model: LongVilaModel, fold: Fold, config: StageConfig) -> None:
        if staged := fold.num_stages > 1:
            make_optimizer(model, config.optimizer)  # says what is wrong with its groups while the model is whole
        self.routers, self.pipeline = apply_folds(
            model, fold, config.precision, config.recompute, config.recompute_keeps, config.sharding,
            config.tile_tokens, config.mixture, config.parallel,
        )  # fmt: skip
        self.model, self._fold = model, fold
        self.optimizer = make_optimizer(model, config.optimizer, part=staged)
        self._clip = config.optimizer.clip or float("inf")
        self._reduce_once = config.sharding.gradients == "none"

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        if self._reduce_once:
            root: nn.Module = self.model
            assert isinstance(root, FSDPModule)
            root.set_requires_gradient_sync(last)
        loss.backward()

    def gradient_norm(self) -> float:
        counted = dict(self.model.named_parameters())
        if self.pipeline is not None and self._fold.stage_number > 0:
            for name in self._on_both_ends():  # the first stage counts those
                counted.pop(name)
        gradients = [p.grad for p in counted.values() if p.grad is not None]
        norms = [whole(torch.nn.utils.get_total_norm(some)) for some in _by_mesh(gradients)]
        if self.pipeline is not None:
            norms = over_stages(torch.linalg.vector_norm(torch.stack(norms)) if norms else None, self._fold)
        self._norm = torch.linalg.vector_norm(torch.stack(norms))
        return float(self._norm)

    def _on_both_ends(self) -> list[str]:
        """Parameters that the first and the last stage of a pipeline both hold: words that are the output matrix."""
        head = self.model.language_model.get_output_embeddings().weight
        words = self.model.language_model.get_input_embeddings().weight
        return [name for name, each in self.model.named_parameters() if each is head and each is words]

    def end_rows(self) -> None:
        """Sums the gradients of what lies on both ends of a pipeline. After the last row of a step."""
        parameters = dict(self.model.named_parameters())
        for name in self._on_both_ends():
            gradient = parameters[name].grad
            if gradient is not None:
                add_other_end(gradient.to_local() if isinstance(gradient, DTensor) else gradient, self._fold)

    def step(self, rate: float) -> None:
        for some in _by_mesh(p for p in self.model.parameters() if p.grad is not None):
            torch.nn.utils.clip_grads_with_norm_(some, self._clip, self._norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        found = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
        return from_stages(((name, whole(gradient)) for name, gradient in found), self._fold)

    def shares(self) -> Iterator[tuple[str, Tensor]]:
        for module in self.model.modules():  # what a forward gathered, a backward spreads again; validation has none
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, parameter in self.model.named_parameters():
            yield name, parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def weights(self) -> dict[str, Tensor]:
        weights = {}
        state: Any = get_model_state_dict(self.model)
        for name, gathered in from_stages(((name, whole(each)) for name, each in state.items()), self._fold):
            if dist.get_rank() == 0:
                weights[name] = gathered.cpu()
        return weights

    def state(self) -> dict[str, Any]:
        fresh = not self.optimizer.state
        model, optimizer = get_state_dict(self.model, self.optimizer)
        if fresh:  # asked for its state, it took an empty step, which must not count in its bias correction
            for moments in self.optimizer.state.values():
                moments["step"].zero_()
        self._groups = optimizer["param_groups"]
        return _map_tensors({"model": model, "optimizer": optimizer["state"]}, lambda _, tensor: as_pieces(tensor))

    def load_state(self, state: dict[str, Any]) -> None:
        parameters = dict(self.model.named_parameters())
        state = _map_tensors(state, lambda name, tensor: as_placed(tensor, parameters.get(name, tensor)))
        optimizer = {"state": state["optimizer"], "param_groups": self._groups}
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=optimizer)


def _map_tensors(state: dict[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """`change(name of the parameter, tensor)` of weights and moments."""
    moments = {
        name: {key: change(name, value) if isinstance(value, Tensor) else value for key, value in each.items()}
        for name, each in state["optimizer"].items()
    }
    return {"model": {name: change(name, value) for name, value in state["model"].items()}, "optimizer": moments}


def _by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that lie on the same ranks together: torch takes no operation over others."""
    found: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(found.values())


def whole_shape(parameter: Tensor) -> torch.Size:
    """Also of a sharded parameter: DeepSpeed's ZeRO 3 leaves an empty tensor, and its shape beside it."""
    return getattr(parameter, "ds_shape", parameter.shape)
