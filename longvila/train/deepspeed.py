"""DeepSpeed's ZeRO (Rajbhandari et al. 2020) as an engine: stages 1, 2 and 3, with the user's own JSON file.

DeepSpeed's data parallelism is the whole world here: the ranks of a sequence group hold the same weights and different
tokens, and so do data ranks. It averages gradients over the world where this project sums them; `backward` undoes that.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from longvila.apply import apply_folds
from longvila.config import MixtureConfig, ShardingConfig, StageConfig
from longvila.errors import ConfigError
from longvila.model.vlm import LongVilaModel
from longvila.parallel.fold import Fold, check_world
from longvila.parallel.packed import whole
from longvila.parallel.pipeline import Pipeline
from longvila.train.feed import rows_of_rank
from longvila.train.optimizer import make_optimizer, set_learning_rate

log = logging.getLogger(__name__)

AUTO = "auto"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_config(config: StageConfig, world: int) -> dict[str, Any]:
    """What DeepSpeed is given: the user's JSON file, completed by what the configuration decides.

    A value `"auto"` in the file, as Hugging Face writes it, takes the configuration's or else DeepSpeed's own.

    Raises:
        ConfigError: where the file cannot be read, or contradicts the configuration: all contradictions are named.
    """
    if config.sharding != ShardingConfig():
        raise ConfigError(f"sharding.* is for the engine fsdp2; {config.engine} shards as its stage does")
    for name in ("experts", "expert_tensor", "tensor"):
        if (ranks := getattr(config.parallel, name)) > 1:
            raise ConfigError(f"parallel.{name}={ranks} is for the engine fsdp2, not {config.engine}")
    if config.mixture != MixtureConfig():
        raise ConfigError(f"mixture.* is for the engine fsdp2, not {config.engine}")
    bf16 = config.precision == "bf16"
    if bf16 and config.engine == "zero1":
        raise ConfigError("engine=zero1 sums gradients in bf16 where precision=bf16; use zero2, which sums in fp32")
    file = _read(Path(config.deepspeed_json)) if config.deepspeed_json else {}
    num_data = check_world(config.parallel, world)
    accumulation = {rows_of_rank(phase.rows_per_step, num_data, "rows_per_step") for phase in config.phases}
    # Rows are counted by the loop, which tells DeepSpeed when the last has come: to DeepSpeed every step is one row.
    batch = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": world}
    decided: dict[str, Any] = {
        **batch,
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": {"stage": int(config.engine[-1])},
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": False},
        "prescale_gradients": False,
        "zero_force_ds_cpu_optimizer": False,  # AdamW is torch's under every engine, offloaded or not
    }
    expected = {
        **decided,
        "gradient_accumulation_steps": accumulation.pop() if len(accumulation) == 1 else "that of each phase",
        "train_batch_size": AUTO,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": AUTO, "betas": list(config.optimizer.betas), "eps": config.optimizer.eps,
                "weight_decay": config.optimizer.weight_decay,
            },
        },
        "scheduler": AUTO,
    }  # fmt: skip
    if wrong := list(_contradictions(file, expected, "")):
        raise ConfigError(
            f'{config.deepspeed_json} contradicts the configuration: {"; ".join(wrong)}; set these to "auto", leave '
            f"them out, or change the configuration"
        )
    zero = file.get("zero_optimization", {})
    if on_disk := [name for name in ("offload_optimizer", "offload_param") if _device(zero, name) == "nvme"]:
        raise ConfigError(f"{config.deepspeed_json}: {on_disk[0]} on nvme cannot be saved; offload it to the cpu")
    if bf16:
        decided |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    rest = _without_auto({name: value for name, value in file.items() if name not in ("optimizer", "scheduler")})
    return _merged(rest, decided)


def _device(zero: dict[str, Any], what: str) -> Any:
    return (zero.get(what) or {}).get("device")


class DeepSpeedEngine:
    """See `train.engine.Engine`."""

    def __init__(self, model: LongVilaModel, fold: Fold, config: StageConfig) -> None:
        if fold.num_stages > 1:
            raise ConfigError(
                f"parallel.pipeline={fold.num_stages} does not go with the engine {config.engine}; use fsdp2"
            )
        settings = deepspeed_config(config, dist.get_world_size())
        self.pipeline: Pipeline | None = None
        self._deepspeed = import_deepspeed()
        self._mesh = init_device_mesh(fold.mesh.device_type, (dist.get_world_size(),), mesh_dim_names=("zero",))
        self.routers = apply_folds(
            model, fold, config.precision, config.recompute, config.recompute_keeps, None, config.tile_tokens
        ).routers
        self.model = model
        self._stage = settings["zero_optimization"]["stage"]
        head = model.language_model.get_output_embeddings()
        optimizer = make_optimizer(model, config.optimizer)
        self._fragments = importlib.import_module("deepspeed.utils")
        # DeepSpeed casts every parameter. What does not move stays as it is in what is saved.
        self._frozen = {
            name: self._spread(tensor.detach().clone())
            for name, tensor in self._named()
            if config.precision == "bf16" and not tensor.requires_grad
        }
        self._engine = self._deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        if self._stage == 3:  # the loss uses the output matrix without calling its module: whole for the whole forward
            for parameter in head.parameters():
                self._deepspeed.zero.register_external_parameter(model, parameter)
        self._zero: Any = self._engine.optimizer
        self._create_moments()

    def _create_moments(self) -> None:
        """Makes AdamW's state ahead of its first step, when torch would: a checkpoint is loaded into it. (Stages 1 and
        2 of DeepSpeed 0.19, left to themselves, find that of the first group alone.)"""
        zero, state = self._zero, self._zero.optimizer.state
        flat = zero.single_partition_of_fp32_groups if self._stage < 3 else zero.fp32_partitioned_groups_flat
        for weights in flat:
            state[weights] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(weights) for key in _MOMENTS}}
        if self._stage < 3:
            for parameters, weights in zip(zero.bit16_groups, flat, strict=True):
                self._fragments.lazy_init_hp_params_optimizer_state(parameters, weights, state)

    def forward(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed divides by the number of ranks; gradients are sums here.
        self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def end_rows(self) -> None:
        """Nothing: there is no pipeline."""

    def gradient_norm(self) -> float:
        if self._stage < 3:
            return float(self._zero.scaled_global_norm())
        combine = importlib.import_module("deepspeed.runtime.utils").combine_grad_norm_groups
        return float(combine(self._zero._get_norm_groups()))

    def step(self, rate: float) -> None:
        set_learning_rate(self._zero, rate)
        self._engine.step()

    def discard(self) -> None:
        # A norm that is not finite is the one thing upon which DeepSpeed drops a step by itself.
        parameter = next(p for p in self.model.parameters() if p.requires_grad)
        gradient = self._fragments.safe_get_full_grad(parameter)
        spoilt = torch.full_like(gradient, float("nan"))
        if self._stage == 3:
            self._fragments.safe_set_local_grad(parameter, self._share(parameter, spoilt))
        else:
            self._fragments.safe_set_full_grad(parameter, spoilt)
        self._engine.step()
        assert self._zero.overflow, "a step of which a gradient is not a number was taken"

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, self._fragments.safe_get_full_grad(parameter)

    def shares(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.ds_tensor if self._stage == 3 else parameter  # pyright: ignore

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for name, tensor in self._named():
            weight = self._master(name, tensor)  # collective
            if dist.get_rank() == 0:
                found[name] = weight.cpu()
        return found

    def state(self) -> dict[str, Any]:
        read = self._fragments.safe_get_full_optimizer_state
        steps = next(iter(self._zero.optimizer.state.values()))["step"]
        weights = {name: self._spread(self._master(name, tensor)) for name, tensor in self._named()}
        moments = {
            name: {
                "step": steps.clone(),
                **{key: self._spread(read(parameter, key)) for key in _MOMENTS},
            }
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        return {"model": weights, "optimizer": moments}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, tensor in self._named():
            self._set_master(name, tensor, whole(state["model"][name]))
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        for name, parameter in trained.items():
            for key in _MOMENTS:
                self._set_moment(parameter, key, whole(state["optimizer"][name][key]))
        for moments in self._zero.optimizer.state.values():
            moments["step"].fill_(state["optimizer"][next(iter(trained))]["step"])

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and persistent buffers under every name they have, tied ones twice, as torch saves them."""
        yield from self.model.state_dict(keep_vars=True).items()

    def _spread(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that all ranks hold, in the form in which FSDP2 would save it."""
        return distribute_tensor(tensor, self._mesh, [Shard(0)], src_data_rank=None) if tensor.ndim else tensor

    def _master(self, name: str, tensor: Tensor) -> Tensor:
        """The whole weight, as exactly as it is known. Collective."""
        if tensor.requires_grad:
            return self._fragments.safe_get_full_fp32_param(tensor)
        if name in self._frozen:
            return whole(self._frozen[name])
        with self._gathered(tensor):
            return tensor.detach().clone()

    def _set_master(self, name: str, tensor: Tensor, weight: Tensor) -> None:
        with self._gathered(tensor, modifier_rank=0), torch.no_grad():
            tensor.copy_(weight)
        if tensor.requires_grad:
            if self._stage == 3:
                self._fragments.safe_set_local_fp32_param(tensor, self._share(tensor, weight))
            else:
                self._fragments.safe_set_full_fp32_param(tensor, weight)
        elif name in self._frozen:
            self._frozen[name] = self._spread(weight)

    def _set_moment(self, parameter: Tensor, key: str, moment: Tensor) -> None:
        if self._stage == 3:
            self._fragments.safe_set_local_optimizer_state(parameter, self._share(parameter, moment), key)
        else:
            self._fragments.safe_set_full_optimizer_state(parameter, moment, key)

    def _share(self, parameter: Any, value: Tensor) -> Tensor:
        """Stage 3's part of a whole tensor on this rank, flat and filled up with zeros. (DeepSpeed 0.19, given the
        whole tensor, fails where it does not divide evenly.)"""
        size, rank = parameter.ds_tensor.numel(), dist.get_rank()
        share = value.flatten()[rank * size : (rank + 1) * size]
        return torch.nn.functional.pad(share, (0, size - len(share)))

    def _gathered(self, tensor: Tensor, modifier_rank: int | None = None) -> AbstractContextManager[None]:
        """Stage 3 holds a share of each parameter; within, the tensor is whole."""
        partitioned = hasattr(tensor, "ds_id")
        return self._deepspeed.zero.GatheredParameters([tensor] if partitioned else [], modifier_rank)


def import_deepspeed() -> Any:
    """DeepSpeed, ready for this machine and in the process group that is there.

    Raises:
        ConfigError: where it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("this engine needs DeepSpeed; pip install 'longvila[deepspeed]', or set engine=fsdp2")
    os.environ.setdefault("LOCAL_RANK", "0")  # a run of one process without torchrun has none
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read as it is imported
    # DeepSpeed 0.19 calls collectives by names that torch 2.14 replaces, which is nothing a user could change.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed = importlib.import_module("deepspeed")
    if not torch.cuda.is_available():
        # Otherwise a kernel for all-reduce is compiled, for a minute; gloo does it here, as everywhere on a CPU.
        importlib.import_module("deepspeed.ops").__dict__["__compatible_ops__"] = {}
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo"
    )  # takes the process group that is there
    return deepspeed


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed_json={path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"deepspeed_json={path}: holds {type(found).__name__}, not an object")
    return found


def _contradictions(file: Any, expected: Any, where: str) -> Iterator[str]:
    if file == AUTO:
        return
    if isinstance(file, dict) and (isinstance(expected, dict) or expected == AUTO):
        for name, value in file.items():
            if expected == AUTO or name in expected:
                yield from _contradictions(value, AUTO if expected == AUTO else expected[name], f"{where}.{name}")
    elif file != expected:
        yield f"{where[1:]} is {file}, here it is {'decided by the run' if expected == AUTO else expected}"


def _without_auto(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if value != AUTO
    }


def _merged(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {name: _merged(tree[name], over[name]) for name in tree.keys() & over.keys() if isinstance(over[name], dict)}
    return {**tree, **over, **both}
