"""Cross-entropy over a large vocabulary without the logits of a whole row.

Only positions with a target are multiplied by the output matrix, in chunks whose logits are recomputed in the backward
pass: 256 thousand tokens x 152 thousand words would be 156 GB in fp32; a chunk of 1024 takes 0.6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from longvila.errors import ConfigError

IGNORE = -100


class LogitHead:
    """Hidden states (..., D) to logits (..., vocabulary) exactly as a Hugging Face model does it.

    Three things that models do to their logits are known here: a soft cap (Gemma 2 and later), a factor (Cohere) and a
    divisor (Granite). `check_logit_head` proves the result against the model itself.
    """

    def __init__(self, language_model: PreTrainedModel):
        config = language_model.config
        self.linear: Any = language_model.get_output_embeddings()
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden)
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


@torch.no_grad()
def check_logit_head(language_model: PreTrainedModel) -> None:
    """Compares `LogitHead` with the model's own logits on three tokens.

    Raises:
        ConfigError: they differ, so the chunked loss would train something other than this model.
    """
    device = language_model.device
    if device.type == "meta":
        return
    was_training = language_model.training
    language_model.eval()
    input_ids = torch.tensor([[1, 2, 0]], device=device)
    expected = language_model(input_ids=input_ids, use_cache=False).logits
    hidden = language_model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    logits = LogitHead(language_model)(hidden)
    language_model.train(was_training)
    if logits.shape != expected.shape or not torch.allclose(logits, expected.to(logits), rtol=1e-3, atol=1e-4):
        raise ConfigError(
            f"{type(language_model).__name__} computes its logits in a way this loss does not know (they differ from "
            f"the output matrix times the hidden states by {(logits - expected).abs().max().item():.3g}); "
            f"use another language model"
        )


def chunked_cross_entropy(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], chunk: int
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over the targets, in fp32 (fp64 for fp64 hidden states).

    Args:
        hidden: (N, D) last hidden states.
        labels: (N,) the target that follows each position; -100 where there is none.
        head: (n, D) -> (n, vocabulary).
        chunk: targets whose logits exist at one time.

    Returns:
        The sum and the number of targets. Without a target the sum is 0 and still reaches every parameter.
    """
    targets = labels != IGNORE
    hidden, labels = hidden[targets], labels[targets]
    total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    for start in range(0, max(1, len(labels)), chunk):
        part = slice(start, start + chunk)
        total = total + checkpoint(_cross_entropy, hidden[part], labels[part], head, use_reentrant=False)
    return total, targets.sum()


def _cross_entropy(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")
