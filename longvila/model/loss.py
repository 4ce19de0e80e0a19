"""Cross-entropy over a large vocabulary without the logits of a whole row.

Only positions with a target are multiplied by the output matrix, a chunk at a time, and a chunk's gradients are taken
before the next one's logits exist: 256 thousand tokens x 152 thousand words would be 156 GB in fp32. From forward to
backward stay the gradients of the hidden states and of the output matrix, which the backward needs in any case; of the
logits nothing stays, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from longvila.errors import ConfigError

IGNORE = -100
LOGIT_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Of one chunk's logits in fp32, by device, which become their gradient in place. 64 MiB are
110 targets of 152 thousand words: enough for a CPU's matrix products, and little beside the gradient of an output
matrix (152 thousand words x 3584 are 2.2 GB), which each chunk reads and writes once. A GPU multiplies so much faster
than it reads that this would take it longer than the products themselves: it takes 882 targets at a time."""
FEWEST_TARGETS = 32


class LogitHead:
    """Hidden states (..., D) to logits (..., vocabulary) exactly as a Hugging Face model does it.

    Three things that models do to their logits are known here: a soft cap (Gemma 2 and later), a factor (Cohere) and a
    divisor (Granite). `check_logit_head` proves the result against the model itself.
    """

    def __init__(self, language_model: PreTrainedModel):
        config = language_model.config
        linear = language_model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise ConfigError(
                f"the output matrix of {type(language_model).__name__} is a {type(linear).__name__}; the chunked loss "
                f"takes a plain linear layer (leave it out of lora.targets)"
            )
        self.linear = linear
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self.softcap = getattr(config, "final_logit_softcapping", None)

    @property
    def chunk(self) -> int:
        """Targets whose logits exist at one time, so that they take `LOGIT_BYTES`."""
        weight = self.linear.weight
        return max(FEWEST_TARGETS, LOGIT_BYTES.get(weight.device.type, LOGIT_BYTES["cpu"]) // (4 * weight.shape[0]))

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.finish(self.linear(hidden))

    def finish(self, logits: Tensor) -> Tensor:
        """What follows the product with the output matrix."""
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
    hidden: Tensor,
    labels: Tensor,
    linear: nn.Linear,
    chunk: int,
    finish: Callable[[Tensor], Tensor] = lambda logits: logits,
    twice: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over the targets, in fp32 (fp64 for fp64 hidden states).

    Args:
        hidden: (N, D) last hidden states.
        labels: (N,) the target that follows each position; -100 where there is none.
        linear: the output matrix. It is not called, since ranks have different numbers of chunks and an engine may
            communicate when a module is called: its weights must be whole.
        chunk: targets whose logits exist at one time.
        finish: what follows the product with the output matrix, element by element.
        twice: whether gradients may be asked for twice, of `hidden` and then of the weights, as a pipeline without
            bubbles does; takes memory for those of the weights once more.

    Returns:
        The sum and the number of targets. Without a target the sum is 0 and still reaches every parameter.
    """
    places = (labels != IGNORE).nonzero().flatten()
    total = _ChunkedCrossEntropy.apply(
        hidden, linear.weight, linear.bias, labels, places, chunk, finish, torch.is_grad_enabled(), twice
    )
    return total, torch.tensor(len(places), device=labels.device)  # type: ignore[return-value]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Takes the gradients of each chunk in the forward: a loss has one number above it, which the backward multiplies.

    Nothing as large as the output matrix is made but its gradient, which each chunk adds to in place.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        places: Tensor,
        chunk: int,
        finish: Callable[[Tensor], Tensor],
        with_grads: bool,
        twice: bool,
    ):
        ctx.twice = twice
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        needed = [with_grads and needs for needs in ctx.needs_input_grad[:3]]
        # Added up over chunks in fp32 at least.
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden) if needed[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None
        for start in range(0, len(places), chunk):
            some = places[start : start + chunk]
            part = hidden[some]
            with torch.set_grad_enabled(any(needed)):
                product = F.linear(part.detach(), weight.detach(), bias.detach() if bias is not None else None)
                product.requires_grad_(any(needed))
                logits = finish(product).to(exact)
            # By hand and in place: autograd would hold three more tensors of this size, and logsumexp one.
            rest, target = logits.detach(), labels[some, None]
            largest, own = rest.amax(-1, keepdim=True), rest.gather(-1, target)
            sums = rest.sub_(largest).exp_().sum(-1, keepdim=True)
            total += (largest + sums.log() - own).sum()
            if not any(needed):
                continue
            slope = rest.div_(sums)  # the softmax, less one at the target
            slope.scatter_add_(-1, target, slope.new_full((), -1.0).expand(target.shape))
            (grad,) = torch.autograd.grad(logits, product, slope)
            del product, logits, rest, slope
            if grad_hidden is not None:
                grad_hidden[some] = grad @ weight
            if grad_weight is not None and wide == grad.dtype:
                grad_weight.addmm_(grad.T, part)
            elif grad_weight is not None and grad.is_cuda:  # the product is added unrounded, and never written out
                torch.addmm(grad_weight, grad.T, part, out_dtype=wide, out=grad_weight)
            elif grad_weight is not None:
                grad_weight += grad.T @ part
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        grads = (grad_hidden, grad_weight, grad_bias)
        types = (hidden.dtype, weight.dtype, weight.dtype)
        ctx.save_for_backward(*(None if g is None else g.to(t) for g, t in zip(grads, types, strict=True)))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.twice:
            grads = [None if saved is None else saved * grad for saved in ctx.saved_tensors]
        else:  # in place: a second backward is refused by torch itself
            grads = [None if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors]
        return *grads, None, None, None, None, None, None
