"""Cross-entropy over a large vocabulary without the logits of a whole row.

Only positions with a target are multiplied by the output matrix, a chunk at a time, and a chunk's gradients are taken
before the next one's logits exist: 256 thousand tokens x 152 thousand words would be 156 GB in fp32. From forward to
backward stay the gradients of the hidden states and of the output matrix, which the backward needs in any case; of the
logits nothing stays, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from longvila.errors import ConfigError

IGNORE = -100
LOGIT_BYTES = 64 * 2**20
"""Of one chunk's logits in fp32. Three such tensors exist at a time: logits, their softmax, their gradient. 64 MiB are
110 targets of 152 thousand words: enough for matrix products at full speed, and little beside the gradient of an output
matrix (152 thousand words x 1024 are 622 MB), which is added to once for each chunk."""
FEWEST_TARGETS = 32


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

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.linear.parameters()

    @property
    def chunk(self) -> int:
        """Targets whose logits exist at one time, so that they take `LOGIT_BYTES`."""
        return max(FEWEST_TARGETS, LOGIT_BYTES // (4 * self.linear.weight.shape[0]))

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


class Head(Protocol):
    """(n, D) -> (n, vocabulary): a LogitHead, or a module."""

    def __call__(self, hidden: Tensor, /) -> Tensor: ...

    def parameters(self) -> Iterable[nn.Parameter]: ...


def chunked_cross_entropy(hidden: Tensor, labels: Tensor, head: Head, chunk: int) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over the targets, in fp32 (fp64 for fp64 hidden states).

    Args:
        hidden: (N, D) last hidden states.
        labels: (N,) the target that follows each position; -100 where there is none.
        chunk: targets whose logits exist at one time.

    Returns:
        The sum and the number of targets. Without a target the sum is 0 and still reaches every parameter.
    """
    places = (labels != IGNORE).nonzero().flatten()
    trained = [p for p in head.parameters() if p.requires_grad]
    with_grads = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained))
    total = _ChunkedCrossEntropy.apply(hidden, labels, places, head, chunk, with_grads, *trained)
    return total, torch.tensor(len(places), device=labels.device)  # type: ignore[return-value]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Takes the gradients of each chunk in the forward: a loss has one number above it, which the backward multiplies.

    Trained parameters are arguments so that autograd asks for their gradients.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, labels: Tensor, places: Tensor, head: Head, chunk: int, with_grads: bool, *trained: Tensor
    ):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        if with_grads:
            grad_hidden = torch.zeros_like(hidden)
            # Added up over chunks in fp32 at least.
            grads = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        for start in range(0, len(places), chunk):
            some = places[start : start + chunk]
            part = hidden[some].detach().requires_grad_(with_grads)
            with torch.set_grad_enabled(with_grads):
                loss = F.cross_entropy(head(part).to(exact), labels[some], reduction="sum")
            total += loss.detach()
            if with_grads:
                grad_hidden[some], *found = torch.autograd.grad(loss, [part, *trained])
                for grad, one in zip(grads, found, strict=True):
                    grad += one
        if with_grads:
            ctx.save_for_backward(grad_hidden, *(grad.to(p.dtype) for grad, p in zip(grads, trained, strict=True)))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        # In place: nothing of the size of the output matrix is made. A second backward is refused by torch itself.
        grad_hidden, *grads = (saved.mul_(grad) for saved in ctx.saved_tensors)
        return grad_hidden, None, None, None, None, None, *grads
