"""The vision-language model: tower -> projector -> an unmodified Hugging Face causal language model.

A row of tokens holds a placeholder for every frame token; the forward pass puts the projected patches in their place.
The placeholder's id needs no row in the embedding matrix, so the language model keeps its vocabulary.

Knows no ranks: a caller that splits frames or tokens passes `route`, and keyword arguments for the attention it plugged
into `language_model`.

Shapes: N tokens, F frames, T tokens per frame, S pixels along a side of a frame, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.generic import ModelOutput

from longvila.errors import DataError
from longvila.model.loss import LogitHead, chunked_cross_entropy
from longvila.model.projector import Projector
from longvila.model.tower import VisionTower

Route = Callable[[Tensor], Tensor]


class LongVilaConfig(PretrainedConfig):
    """Architecture of a LongVilaModel, complete: nothing else is looked up to build one.

    Args:
        tower: as `read_tower_config` returns it.
        projector: kind of projector.
        text_config: the language model's own configuration.
        frame_token_id: id that stands for one frame token in `input_ids`.
    """

    model_type = "longvila"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # pyright: ignore

    def __init__(
        self,
        tower: dict[str, Any] | None = None,
        projector: str = "downsample_mlp",
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        frame_token_id: int = -1,
        **kwargs: Any,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.tower = tower
        self.projector = projector
        self.text_config = text_config
        self.frame_token_id = frame_token_id
        super().__init__(**kwargs)


@dataclass
class LongVilaOutput(ModelOutput):
    """`loss_sum` is the SUM of the cross-entropy over `num_targets` targets; dividing is the caller's, once, by the
    global count. `logits` (1, N, vocabulary) only where no labels were given."""

    loss_sum: Tensor | None = None
    num_targets: Tensor | None = None
    logits: Tensor | None = None


class LongVilaModel(PreTrainedModel):
    """See the module. `vision` and `language_model`, when given, are used as they are; else they get random weights."""

    config_class = LongVilaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: LongVilaConfig,
        vision: VisionTower | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision = vision or VisionTower(config.tower or {})
        self.language_model: Any = language_model or AutoModelForCausalLM.from_config(config.text_config)
        config.text_config = self.language_model.config  # one object: what changes in it is saved with the model
        text_width = self.language_model.get_input_embeddings().weight.shape[1]
        self.projector = Projector(config.projector, self.vision.width, text_width, self.vision.grid)
        self.post_init()

    def init_weights(self) -> None:
        """The parts come initialised; doing it again, as the base class would, overwrites pretrained weights."""
        self.tie_weights(recompute_mapping=False)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Frame tokens (F, T, D) of uint8 frames (F, 3, S, S)."""
        return self.projector(self.vision(frames))

    def forward(
        self,
        input_ids: Tensor,
        frames: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        route: Route | None = None,
        loss_chunk: int | None = None,
        **attention_kwargs: Any,
    ) -> LongVilaOutput:
        """Loss of one packed row, or its logits.

        Args:
            input_ids: (1, N); documents one after the other, `config.frame_token_id` where a frame token goes.
            frames: uint8 (F, 3, S, S), all frames of the row in order, or this rank's share of them.
            position_ids: (1, N), restarting at 0 in each document (that is how documents are told apart).
            labels: (1, N), already shifted: the target after each token, -100 for none. None: logits are returned.
            route: frame tokens of this rank (F, T, D) -> those of the placeholders in `input_ids` (K, D), in order.
                None: all placeholders are here, in the order of the frames.
            loss_chunk: targets whose logits exist at one time; None: as many as `LogitHead.chunk` says.
            attention_kwargs: given to the language model unchanged.

        Raises:
            DataError: the number of placeholders is not the number of frame tokens.
        """
        embeddings = self.embed(input_ids, self.encode_all(frames), route)
        hidden = self.language_model.get_decoder()(
            inputs_embeds=embeddings, position_ids=position_ids, use_cache=False, **attention_kwargs
        ).last_hidden_state
        if labels is None:
            return LongVilaOutput(logits=LogitHead(self.language_model)(hidden))
        loss_sum, num_targets = self.loss(hidden, labels, loss_chunk)
        return LongVilaOutput(loss_sum=loss_sum, num_targets=num_targets)

    def loss(
        self, hidden: Tensor, labels: Tensor, loss_chunk: int | None = None, twice: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropy of last hidden states (1, N, D) over targets (1, N), and the number of targets.

        Args:
            twice: whether a backward may ask for its gradients twice.
        """
        head = LogitHead(self.language_model)
        return chunked_cross_entropy(
            hidden[0], labels[0], head.linear, loss_chunk or head.chunk, head.finish, twice=twice
        )

    def embed(self, input_ids: Tensor, frame_tokens: Tensor, route: Route | None = None) -> Tensor:
        """Embeddings (1, N, D) of a row, with frame tokens (F, T, D) in the place of its placeholders."""
        is_frame = input_ids == self.config.frame_token_id
        embeddings = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_frame, 0))
        tokens = route(frame_tokens) if route is not None else frame_tokens.flatten(0, 1)
        num_placeholders = int(is_frame.sum())
        if num_placeholders != len(tokens):
            raise DataError(
                f"the row has {num_placeholders} frame placeholders, but {len(tokens)} frame tokens arrived "
                f"({frame_tokens.shape[0]} frames here, {frame_tokens.shape[1]} tokens each)"
            )
        return embeddings.masked_scatter(is_frame.unsqueeze(-1), tokens.to(embeddings.dtype))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, frames: Tensor, **generate_kwargs: Any) -> Tensor:
        """Continues one prompt; returns the new token ids (1, n).

        Args:
            input_ids: (1, N), as in `forward`.
            frames: uint8 frames (F, 3, S, S), or their tokens (F, T, D) from `encode_frames`.
            generate_kwargs: those of Hugging Face's `generate`.
        """
        tokens = self.encode_all(frames) if frames.dtype == torch.uint8 else frames
        embeddings = self.embed(input_ids, tokens)
        return self.language_model.generate(
            inputs_embeds=embeddings, attention_mask=torch.ones_like(input_ids), **generate_kwargs
        )

    def encode_all(self, frames: Tensor) -> Tensor:
        """`encode_frames`, also for no frames: then a black one is encoded and none of its tokens is used, so that
        every parameter takes part in the backward pass of every rank (FSDP2 waits for all of them)."""
        if len(frames):
            return self.encode_frames(frames)
        size = self.vision.image_size
        black = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=frames.device)
        return self.encode_frames(black)[:0]


AutoConfig.register(LongVilaConfig.model_type, LongVilaConfig)
AutoModel.register(LongVilaConfig, LongVilaModel)
