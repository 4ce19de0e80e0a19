"""The peers of the training bench: Hugging Face Trainer alone, and with DeepSpeed's ALST.

Both get what they ship for long sequences. Trainer: gradient checkpointing, sdpa (torch's flash kernel). ALST (Arctic
Long Sequence Training, Bekman et al. 2025), through accelerate's `ParallelismConfig(sp_backend="deepspeed")`: Ulysses
attention, ZeRO-3, gradient checkpointing, `TiledMLP` and `TiledFusedLogitsLoss`, put in as their docstrings say. It is
made for GPUs; on a CPU it goes over gloo, with torch's AdamW instead of DeepSpeed's fused one, and without compiled
kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen3 import modeling_qwen3

from longvila.bench.cell import Cell
from longvila.bench.rank import Watch, language_model, tokens_of
from longvila.train.deepspeed import import_deepspeed

RATE = 1e-4
LOSS_TILE = 1024 * 4096
"""Logits of one tile of ALST's loss. 16 MiB in fp32, or 27 targets of a 152K vocabulary."""


def train_plain(cell: Cell, watch: Watch) -> None:
    """The reference of gradients: the model's own loss and backward, nothing else."""
    model, ids = language_model(cell.model), tokens_of(cell)
    model.set_attn_implementation("sdpa")
    watch.begin()
    loss = model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
    loss.backward()
    watch.end(loss.item())
    watch.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(cell: Cell, watch: Watch) -> None:
    """Trainer on one process."""
    model = language_model(cell.model)
    model.set_attn_implementation("sdpa")
    _Measured(cell, watch, model, {}).train()


def train_alst(cell: Cell, watch: Watch) -> None:
    """Trainer over ALST on `cell.ranks` ranks."""
    accelerate, handlers = importlib.import_module("accelerate"), importlib.import_module("accelerate.utils")
    parallel = accelerate.ParallelismConfig(
        sp_backend="deepspeed",
        sp_size=cell.ranks,
        sp_handler=handlers.DeepSpeedSequenceParallelConfig(
            sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
        ),
    )
    deepspeed = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "seq_parallel_communication_data_type": "fp32",
    }
    modeling_qwen3.Qwen3MLP.forward = _tiled_mlp  # type: ignore[assignment]
    model = language_model(cell.model)
    model.__class__ = _TiledLoss
    model.set_attn_implementation("sdpa")
    _Measured(cell, watch, model, {"deepspeed": deepspeed, "parallelism_config": parallel}).train()


def prepare_deepspeed() -> None:
    """To be called before transformers looks for DeepSpeed."""
    # accelerate starts torch's process group alone where there is no GPU, and DeepSpeed's own is asked for.
    import_deepspeed()
    importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")


class _Measured(Trainer):
    """Trainer on one row, watched."""

    def __init__(self, cell: Cell, watch: Watch, model: Qwen3ForCausalLM, options: dict[str, Any]) -> None:
        self._cell, self._watch, self._loss = cell, watch, math.nan
        ids = tokens_of(cell)
        row = {"input_ids": ids, "labels": ids}
        if options:  # DeepSpeed's data loader asks for positions
            row["position_ids"] = torch.arange(len(ids))
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=1, max_steps=cell.steps,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
            learning_rate=RATE, lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0, use_cpu=True,
            adam_beta2=0.95, max_grad_norm=0.0 if cell.gradients else 1.0, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, **options,
        )  # fmt: skip
        super().__init__(
            model=model, args=arguments, train_dataset=[row] * (cell.steps * cell.ranks), data_collator=_stack
        )
        self.add_callback(_Steps(self))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._cell.gradients and self.is_deepspeed_enabled and self._watch.gradients is None:
            self._gather_before_deepspeed_steps()
        loss = super().training_step(*args, **kwargs)
        self._loss = float(loss)
        if self._cell.gradients and not self.is_deepspeed_enabled and self._watch.gradients is None:
            assert self.model is not None
            named = self.model.named_parameters()
            self._watch.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        return loss

    def _gather_before_deepspeed_steps(self) -> None:
        """DeepSpeed's engine steps inside of `backward`, and drops the gradients."""
        gather = importlib.import_module("deepspeed.utils").safe_get_full_grad
        engine: Any = self.model_wrapped
        step = engine.step

        def gather_and_step(*args: Any, **kwargs: Any) -> Any:
            self._watch.gradients = {name: gather(p).clone() for name, p in engine.module.named_parameters()}
            engine.step = step
            return step(*args, **kwargs)

        engine.step = gather_and_step


class _Steps(TrainerCallback):
    """Where a step begins and ends, for Trainer."""

    def __init__(self, trainer: _Measured) -> None:
        self._trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._watch.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._watch.end(self._trainer._loss)


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _ulysses() -> Any:
    return importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")


def _tiled_mlp(self: Any, x: Tensor) -> Tensor:
    """`Qwen3MLP.forward` as the docstring of `TiledMLP` has it: as many tiles as tokens / width."""

    def run(module: Any, tile: Tensor) -> Tensor:
        return module.down_proj(module.act_fn(module.gate_proj(tile)) * module.up_proj(tile))

    tiles = math.ceil(x.shape[1] / x.shape[2])
    weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
    return _ulysses().TiledMLP.apply(run, self, x, tiles, weights)


class _TiledLoss(Qwen3ForCausalLM):
    """Loss by `TiledFusedLogitsLoss`, as its docstring has it."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, shift_labels: Tensor, **kwargs: Any):  # type: ignore
        for name in ("labels", "num_items_in_batch"):
            kwargs.pop(name, None)
        hidden = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **kwargs).last_hidden_state

        # Inside, not behind: what multiplies the loss later on reaches the hidden states alone, not the output matrix.
        count = (shift_labels != -100).sum()

        def loss_of(module: Any, tile: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(module.lm_head(tile).float(), labels, ignore_index=-100, reduction="sum") / count

        tiles = max(1, math.ceil(input_ids.shape[1] * self.config.vocab_size / LOSS_TILE))
        loss = _ulysses().TiledFusedLogitsLoss.apply(
            loss_of, self, hidden, shift_labels, None, tiles, [self.lm_head.weight], "sum"
        )
        return CausalLMOutputWithPast(loss=loss)
