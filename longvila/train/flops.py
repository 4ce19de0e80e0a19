"""Model FLOPs of a step: the arithmetic that its loss and gradients need, whatever ranks or recomputation they cost.

Counted, at 2 for a multiplication and its addition:

- every weight matrix, for each vector it is multiplied by: the tower's per patch, the projector's per frame token, the
  language model's per token, and the output matrix per TARGET: no other logit is asked for. (The usual formula, six
  times parameters times tokens, takes every token for a target; of a long video that is most of a vocabulary's work
  that nobody does.) Of the experts of a mixture, those that a token is sent to;
- attention: 4 x heads x head dim for each (query, key) pair that the layer's mask allows inside a document;
- backward: as much again for the gradient of a matrix that is trained, and as much for the gradient of its input where
  anything before it is. Where all is trained that is three times forward, as in PaLM (Chowdhery et al. 2022, appendix
  B); a frozen tower costs its forward alone.

Not counted: recomputation, look-ups, norms, activations, softmax, the optimizer. MFU is these FLOPs by the time of the
whole step, waiting for data included, over what the devices could do at their peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from longvila.apply import attention_of
from longvila.model.loss import IGNORE
from longvila.model.vlm import LongVilaModel
from longvila.parallel.blocks import Mask
from longvila.shards.rows import Row
from longvila.train.engine import whole_shape

# Dense bf16 with fp32 accumulation, from NVIDIA's data sheets (some print twice as much, "with sparsity"). Found by a
# part of the device's name; the first that fits.
PEAKS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that one device can do at most; None where that is not known (a CPU, another GPU, fp32)."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


@dataclass(frozen=True)
class ModelFlops:
    """What forward and backward cost for each thing in a row."""

    frame: int
    token: int
    target: int
    pair: int
    """Of one (query, key) pair of one layer of the language model."""
    masks: tuple[Mask, ...]
    """One for each of its layers."""

    def of_row(self, row: Row) -> int:
        """FLOPs of a whole row, whoever shares it."""
        targets = int((row.labels != IGNORE).sum())
        linear = self.frame * sum(row.num_frames) + self.token * sum(row.lengths) + self.target * targets
        return linear + self.pair * sum(visible_pairs(row.lengths, mask) for mask in self.masks)


def visible_pairs(lengths: Sequence[int], mask: Mask) -> int:
    """(query, key) pairs that `mask` allows inside documents of these lengths."""
    if not mask.causal:
        return sum(n * n for n in lengths)
    # The first queries of a document see one key more than the one before, the others a whole window.
    seen = [(n, n if mask.window is None else min(n, mask.window)) for n in lengths]
    return sum(w * (w + 1) // 2 + (n - w) * w for n, w in seen)


def count_flops(model: LongVilaModel) -> ModelFlops:
    """From the shapes of a model whose trained parameters are chosen; they may be sharded."""
    language_model, decoder = model.language_model, model.language_model.get_decoder()
    tower_trains, projector_trains = trains(model.vision), trains(model.projector)
    reaches_decoder = tower_trains or projector_trains
    decoder_trains = reaches_decoder or trains(decoder)
    attention = attention_of(language_model.config)
    head = language_model.get_output_embeddings().weight
    projector = sum(cost for cost, _ in _matrices(model.projector, tower_trains))
    return ModelFlops(
        frame=_tower(model) + projector * model.projector.tokens_per_frame,
        token=sum(cost for cost, _ in _matrices(decoder, reaches_decoder, language_model.config)),
        target=2 * _size(head) * (1 + head.requires_grad + decoder_trains),
        pair=4 * attention.shape.heads * attention.shape.head_dim * (3 if decoder_trains else 1),
        masks=attention.masks,
    )


def trains(module: nn.Module) -> bool:
    """Whether any of its parameters is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _tower(model: LongVilaModel) -> int:
    """Of one frame. Some towers have a class token beside the patches."""
    vision, patches = model.vision, model.vision.grid**2
    tokens = patches + vision.num_prefix_tokens
    first = vision.patch_projection.weight
    total = 2 * _size(first) * (1 + first.requires_grad) * patches  # pixels have no gradient
    total += tokens * sum(cost for cost, matrix in _matrices(vision, flows=trains(vision)) if matrix is not first)
    attention = 4 * vision.width * tokens**2 * len(vision.blocks)
    return total + attention * (3 if trains(vision) else 1)


def _matrices(module: nn.Module, flows: bool, config: PreTrainedConfig | None = None) -> Iterator[tuple[int, Tensor]]:
    """(FLOPs a vector, weight) of every matrix in `module`, forward and backward, in the order they are used.

    Args:
        flows: anything before `module` is trained, so that gradients flow to its input.
        config: of a language model, which says how many experts a token is sent to.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            shape = whole_shape(parameter)
            # Other parameters of two dims and more (positions, class tokens) are added, and embeddings looked up.
            if name.endswith(("weight", "_proj")) and len(shape) > 1 and not isinstance(part, nn.Embedding):
                size = math.prod(shape)
                if len(shape) == 3 and config is not None:
                    size = size * config.num_experts_per_tok // shape[0]
                yield 2 * size * (1 + parameter.requires_grad + flows), parameter
            flows = flows or parameter.requires_grad


def _size(parameter: Tensor) -> int:
    return math.prod(whole_shape(parameter))
