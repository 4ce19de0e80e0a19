"""The vision tower: uint8 frames to patch features, with any ViT that open_clip can name or a JSON file can describe.

The features are those of the last block but one, without the final norm, as LLaVA (Liu et al. 2023) and VILA (Lin et
al. 2024) take them: a contrastive loss leaves the last block's patches to the pooling alone. Whatever lies behind that
block (last block, pooling, projection) is removed, so that every parameter of the tower takes part in the model.

Knows nothing of language models, videos or ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import load_state_dict
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from longvila.errors import ConfigError, DataError

FEATURE_BLOCK = -2


class VisionTower(nn.Module):
    """An open_clip image encoder cut down to its patch features.

    Args:
        config: as `read_tower_config` returns it; it is all that is needed to build the tower again.
        weights: state dict of open_clip's `visual` module, whole; random weights without.
    """

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor] | None = None):
        super().__init__()
        self.visual: Any = build_visual(config)
        if weights is not None:
            try:
                self.visual.load_state_dict(weights)
            except RuntimeError as error:
                raise ConfigError(f"tower {config['name']}: these weights are of another tower: {error}") from None
        self.mean = tuple(config["preprocess_cfg"]["mean"])
        self.std = tuple(config["preprocess_cfg"]["std"])
        height, width = self.visual.image_size
        if height != width:
            raise ConfigError(f"tower {config['name']} takes {height}x{width} images; only square ones are supported")
        self.image_size: int = height
        if len(self.blocks) < -FEATURE_BLOCK:
            raise ConfigError(
                f"tower {config['name']} has {len(self.blocks)} block; features are those of the last but one"
            )
        _remove_what_follows_the_features(self.visual)
        self.grid: int = self.image_size // self.patch_projection.stride[0]
        if self.grid < 1:
            raise ConfigError(
                f"tower {config['name']}: images of {height} pixels hold no patch of {self.patch_projection.stride[0]}"
            )
        self.width: int = self.patch_projection.out_channels

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The transformer blocks, first to last."""
        visual: Any = self.visual
        return visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks

    @property
    def patch_projection(self) -> nn.Conv2d:
        """The layer that cuts an image into patches."""
        visual: Any = self.visual
        return visual.trunk.patch_embed.proj if hasattr(visual, "trunk") else visual.conv1

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens (class, registers) that go through the blocks beside the patches."""
        visual: Any = self.visual
        return visual.trunk.num_prefix_tokens if hasattr(visual, "trunk") else 1

    def forward(self, frames: Tensor) -> Tensor:
        """Patch features of frames.

        Args:
            frames: uint8 RGB (F, 3, S, S), S = `image_size`.

        Returns:
            (F, grid * grid, width), rows of the image one after the other, in the type of the weights.
        """
        size = self.image_size
        if frames.dtype != torch.uint8 or frames.shape[1:] != (3, size, size):
            raise DataError(
                f"frames are {frames.dtype} {tuple(frames.shape)}; this tower takes torch.uint8 (F, 3, {size}, {size})"
            )
        weight = self.patch_projection.weight
        images = (frames.to(weight.dtype) / 255 - weight.new_tensor(self.mean).view(3, 1, 1)) / weight.new_tensor(
            self.std
        ).view(3, 1, 1)
        features = self.visual.forward_intermediates(images, indices=[-1], intermediates_only=True, output_fmt="NLC")
        return features["image_intermediates"][0]


def read_tower_config(tower: str) -> dict[str, Any]:
    """What `VisionTower` needs to build a tower by name: {"name", "model_cfg", "preprocess_cfg": {"mean", "std"}}.

    Args:
        tower: an open_clip model name, or the path of a JSON file, either open_clip's model configuration or its
            `open_clip_config.json` ({"model_cfg", "preprocess_cfg"}).

    Raises:
        ConfigError: neither a known name nor such a file.
    """
    if tower.endswith(".json"):
        try:
            data = json.loads(Path(tower).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"tower {tower}: not a readable JSON file: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"tower {tower}: holds a {type(data).__name__}, not an open_clip configuration")
        model_cfg = data.get("model_cfg", data)
        preprocess = data.get("preprocess_cfg", {})
    else:
        model_cfg = open_clip.get_model_config(tower)
        tags = open_clip.list_pretrained_tags_by_model(tower) if model_cfg else []
        preprocess = (open_clip.get_pretrained_cfg(tower, tags[0]) or {}) if tags else {}
    if not model_cfg or not {"embed_dim", "vision_cfg"} <= set(model_cfg):
        raise ConfigError(
            f"tower {tower}: neither an open_clip model (`open_clip.list_models()`) nor an open_clip JSON file "
            f"with embed_dim and vision_cfg"
        )
    normalisation = {
        "mean": list(preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        "std": list(preprocess.get("std") or open_clip.OPENAI_DATASET_STD),
    }
    model_cfg = {key: model_cfg[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in model_cfg}
    return {"name": tower, "model_cfg": model_cfg, "preprocess_cfg": normalisation}


def load_tower_weights(tower: str, weights: str) -> dict[str, Tensor]:
    """State dict of open_clip's `visual` module, from a pretrained tag of `tower` or from a file.

    The file holds a whole open_clip model (its `visual.` part is taken) or the visual module alone.

    Raises:
        ConfigError: for a file that cannot be read, a tag that does not exist or cannot be fetched.
    """
    path = Path(weights)
    if path.is_file():
        try:
            state: dict[str, Tensor] = load_state_dict(str(path))  # pyright: ignore[reportAssignmentType]
        except Exception as error:  # each format that open_clip reads fails in its own way
            raise ConfigError(f"tower {tower}: {path} cannot be read as weights: {error}") from error
        visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        return visual or state
    tags = open_clip.list_pretrained_tags_by_model(tower)
    if weights not in tags:
        raise ConfigError(f"tower {tower}: weights '{weights}' are no file, nor one of its pretrained tags {tags}")
    try:
        model: Any = open_clip.create_model(tower, pretrained=weights)
        return model.visual.state_dict()
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"tower {tower}: the pretrained weights '{weights}' could not be fetched ({error}); "
            f"give the path of a downloaded state dict instead"
        ) from error


def build_visual(config: dict[str, Any]) -> VisionTransformer | TimmModel:
    """open_clip's image encoder with random weights, pooling and projection included.

    open_clip builds it only as a part of a CLIP; the text tower beside it is as small as it can be, and dropped.
    """
    try:
        vision_cfg = open_clip.CLIPVisionCfg(**{**config["model_cfg"]["vision_cfg"], "timm_model_pretrained": False})
    except TypeError as error:
        raise ConfigError(f"tower {config['name']}: vision_cfg has what open_clip does not know: {error}") from None
    text_cfg = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1)
    clip = open_clip.CLIP(
        config["model_cfg"]["embed_dim"], vision_cfg, text_cfg, quick_gelu=config["model_cfg"].get("quick_gelu", False)
    )
    visual: Any = clip.visual
    trunk = visual.trunk if isinstance(visual, TimmModel) else visual
    if not isinstance(trunk, VisionTransformer | TimmVisionTransformer):
        raise ConfigError(
            f"tower {config['name']} is a {type(trunk).__name__}; patch features are taken from vision transformers "
            f"only (open_clip's own, or timm's VisionTransformer as in the SigLIP models)"
        )
    return visual


def _remove_what_follows_the_features(visual: Any) -> None:
    """Cuts the encoder behind FEATURE_BLOCK, in place, with the two libraries' own pruning."""
    if hasattr(visual, "trunk"):
        visual.trunk.prune_intermediate_layers([FEATURE_BLOCK], prune_norm=True, prune_head=True)
        visual.head = nn.Sequential()
    else:
        visual.prune_intermediate_layers([FEATURE_BLOCK], prune_norm=True, prune_head=True)
        visual.attn_pool = None
