"""One rank of a training bench: a process that trains for a few steps and writes down what that took.

Started by `cell.py` as `python -m longvila.bench.rank CELL.json`, alone or beside others under torchrun's variables.
Each way to train is a function that builds its model, runs its steps and calls `Watch` around each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from longvila.bench.cell import Cell, TextModel, peak_rss


@dataclass
class Watch:
    """Counts CPU time of steps in this process, from `begin` to `end`, optimizer and all."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    gradients: dict[str, Tensor] | None = None
    """Of the first step, whole, before anything clips them; where they are asked for."""
    norm: float = 0.0
    without_gradient: list[str] = dataclasses.field(default_factory=list)
    """Trained parameters whose gradient is not finite, or zero."""
    _begun: float = 0.0

    def begin(self) -> None:
        self._begun = time.process_time()

    def end(self, loss: float) -> None:
        self.seconds.append(time.process_time() - self._begun)
        self.losses.append(loss)


def language_model(model: TextModel) -> Qwen3ForCausalLM:
    """The same weights in every process."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=model.vocabulary, hidden_size=model.hidden, intermediate_size=model.mlp,
        num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.heads,
        head_dim=64, max_position_embeddings=2**20, tie_word_embeddings=model.tied,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).train()


def tokens_of(cell: Cell) -> Tensor:
    """(N,) the row that every step trains on."""
    return torch.randint(0, cell.model.vocabulary, (cell.tokens,), generator=torch.Generator().manual_seed(1))


def main() -> None:
    """Reads a cell, trains, writes `rank-N.json` and, on rank 0 where asked for, `gradients.pt` beside it."""
    path = Path(sys.argv[1])
    cell, rank = Cell.from_json(path.read_text()), int(os.environ.get("RANK", 0))
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    run = contender(cell.contender)
    baseline = peak_rss(os.getpid())
    (path.parent / f"rank-{rank}.baseline").write_text(str(baseline))
    watch = Watch()
    run(cell, watch)
    if rank == 0 and watch.gradients is not None:
        torch.save(watch.gradients, path.parent / "gradients.pt")
    figures: dict[str, Any] = {
        "seconds": watch.seconds, "losses": watch.losses, "norm": watch.norm,
        "without_gradient": watch.without_gradient, "peak": peak_rss(os.getpid()) - baseline,
    }  # fmt: skip
    (path.parent / f"rank-{rank}.json").write_text(json.dumps(figures))
    sys.stdout.flush()
    os._exit(0)  # peers leave threads and process groups behind


def contender(name: str) -> Callable[[Cell, Watch], None]:
    """The function of a way to train; everything that it needs is imported here, before memory is measured."""
    if name in ("longvila", "longvila video"):
        from longvila.bench import ours

        return ours.train_text if name == "longvila" else ours.train_video
    from longvila.bench import trainer

    if name == "Trainer + ALST":
        trainer.prepare_deepspeed()
    return {"plain": trainer.train_plain, "Trainer": trainer.train, "Trainer + ALST": trainer.train_alst}[name]


if __name__ == "__main__":
    main()
