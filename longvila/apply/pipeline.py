"""Pipelines: each rank keeps stretches of the language model's layers, and what lies before or behind them.

The decoder of transformers runs as it is, with layers that hand on what they get in the place of those that lie
elsewhere: names, numbers and kinds of layers stay those of the whole model. The tower, the projector and the words lie
before the first layer, the last norm and the output matrix behind the last. An output matrix that is also the words'
lies on both ends, whose gradients are summed (`train/engine.py`).
"""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvila.config import ParallelConfig
from longvila.errors import ConfigError
from longvila.model.vlm import LongVilaModel
from longvila.parallel.batch import even_share
from longvila.parallel.fold import Fold


class Elsewhere(nn.Module):
    """In the place of a layer, or of a norm, that another rank holds."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states


class ModelChunk(nn.Module):
    """A stretch of a vision-language model (`parallel/pipeline.py`)."""

    rows: Any = ()
    """Of each row, the arguments of the model's forward, and `begin`, to be called before it."""
    longest: int = 0

    def __init__(self, model: LongVilaModel, layers: range, first: bool, last: bool, twice: bool) -> None:
        """
        Args:
            twice: whether a backward may ask the loss for its gradients twice.
        """
        super().__init__()
        language_model: Any = model.language_model
        decoder = language_model.get_decoder()
        self._model, self._first, self._last, self._twice = (model,), first, last, twice
        kept = nn.ModuleList(
            layer if number in layers else elsewhere(layer) for number, layer in enumerate(decoder.layers)
        )
        # One decoder for each chunk: they share modules and hooks, but not which layers run.
        self.decoder = copy.copy(decoder)
        self.decoder._modules = {**decoder._modules, "layers": kept}
        if not last:
            self.decoder._modules["norm"] = Elsewhere()
        if first:
            self.vision, self.projector = model.vision, model.projector
        if last or (first and is_tied(language_model)):
            self.head = language_model.get_output_embeddings()
        if not first and not (last and is_tied(language_model)):
            self.decoder._modules.pop("embed_tokens", None)

    def forward(self, *received: Tensor, row: Tensor) -> Tensor:
        """(1, longest, D) -> (1, longest, D), or the last chunk's loss (1,); the first takes nothing."""
        inputs = dict(self.rows[int(row)])
        (model,) = self._model
        ids, frames, route, labels = (inputs.pop(name) for name in ("input_ids", "frames", "route", "labels"))
        inputs.pop("begin")()
        if self._first:
            hidden = model.embed(ids, model.encode_all(frames.to(ids.device)), route)
        else:
            hidden = received[0][:, : ids.shape[1]]
        hidden = self.decoder(inputs_embeds=hidden, use_cache=False, **inputs).last_hidden_state
        if self._last:
            # No view: torch detaches it in place.
            return torch.stack([model.loss(hidden, labels, twice=self._twice)[0]])
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.requires_grad_()  # all before is frozen; stages send gradients back all the same
        return F.pad(hidden, (0, 0, 0, self.longest - ids.shape[1]))


def elsewhere(layer: nn.Module) -> Elsewhere:
    place = Elsewhere()
    for name in ("attention_type", "layer_type"):  # by which some decoders choose what they give a layer
        if hasattr(layer, name):
            setattr(place, name, getattr(layer, name))
    return place


def is_tied(language_model: Any) -> bool:
    return language_model.get_input_embeddings().weight is language_model.get_output_embeddings().weight


def stretches(layers: int, parallel: ParallelConfig) -> list[range]:
    """The layers of each stretch of a pipeline: as `parallel.stage_layers` says, or evenly.

    Raises:
        ConfigError: there are fewer layers than stretches, or other than they add up to.
    """
    count, sizes = parallel.pipeline * parallel.chunks, parallel.stage_layers
    if not sizes:
        if count > layers:
            raise ConfigError(
                f"parallel.pipeline={parallel.pipeline} x chunks={parallel.chunks} are {count} stretches of layers, "
                f"but the language model has {layers} layers; use fewer"
            )
        return [even_share(layers, number, count) for number in range(count)]
    if sum(sizes) != layers:
        raise ConfigError(
            f"parallel.stage_layers={list(sizes)} are {sum(sizes)} layers, but the language model has {layers}"
        )
    ends = list(accumulate(sizes))
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _leaves_inputs_alone(decoder: Any) -> bool:
    """Whether a decoder without layers and norm gives back its `inputs_embeds`. Some scale them (Granite)."""
    empty = copy.copy(decoder)
    empty._modules = {
        **decoder._modules, "layers": nn.ModuleList(map(elsewhere, decoder.layers)), "norm": Elsewhere()
    }  # fmt: skip
    weight = decoder.embed_tokens.weight
    embeds = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(1, 2, -1)
    with torch.no_grad():
        positions = torch.arange(2, device=weight.device)[None]
        out = empty(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    return torch.equal(out, embeds)


def keep_own_layers(model: LongVilaModel, fold: Fold, parallel: ParallelConfig) -> list[range]:
    """Drops the layers, and what lies before and behind them, that other stages hold, in place.

    Returns:
        The layers of each of this rank's chunks.

    Raises:
        ConfigError: layers cannot be shared out as asked, or a decoder is built otherwise.
    """
    if not isinstance(model, LongVilaModel):
        raise ConfigError(f"parallel.pipeline={fold.num_stages} goes with a LongVilaModel, not {type(model).__name__}")
    language_model: Any = model.language_model
    decoder = language_model.get_decoder()
    missing = [name for name in ("layers", "norm", "embed_tokens") if not hasattr(decoder, name)]
    if missing:
        raise ConfigError(
            f"parallel.pipeline={fold.num_stages}: {type(decoder).__name__} has no {' and no '.join(missing)}, so that "
            f"its layers cannot be shared out; use 1"
        )
    if not _leaves_inputs_alone(decoder):
        raise ConfigError(
            f"parallel.pipeline={fold.num_stages}: {type(decoder).__name__} changes what it is given before its first "
            f"layer, which every stage would do again; use 1"
        )
    own = stretches(len(decoder.layers), parallel)[fold.stage_number :: fold.num_stages]
    first, last = fold.stage_number == 0, fold.stage_number == fold.num_stages - 1
    tied = is_tied(language_model)
    for number, layer in enumerate(decoder.layers):
        if not any(number in layers for layers in own):
            decoder.layers[number] = elsewhere(layer)
    if not first:
        drop_parameters(model.vision)
        drop_parameters(model.projector)
    if not first and not (last and tied):
        drop_parameters(decoder.embed_tokens)
    if not last:
        drop_parameters(decoder.norm)
        if not (first and tied):
            drop_parameters(language_model.get_output_embeddings())
    return own


def make_chunks(model: LongVilaModel, fold: Fold, layers: list[range], twice: bool) -> list[ModelChunk]:
    """This rank's chunks of what `keep_own_layers` left, once all else is in place."""
    last = len(layers) - 1
    return [
        ModelChunk(
            model, each, first=number == 0 and fold.stage_number == 0,
            last=number == last and fold.stage_number == fold.num_stages - 1, twice=twice,
        )
        for number, each in enumerate(layers)
    ]  # fmt: skip


def drop_parameters(module: nn.Module) -> None:
    """Leaves what else the module knows: sizes, and whatever others ask it."""
    for each in module.modules():
        for name in each._parameters:
            each._parameters[name] = None
