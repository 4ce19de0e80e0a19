"""The projector: patch features of a frame to tokens of the language model.

`downsample_mlp` is VILA's (Lin et al. 2024, "mlp_downsample"), the one LongVILA uses: each 2x2 block of patches becomes
one token. An odd grid gets one row and one column of zeros at the end, so 27x27 patches become 14x14 = 196 tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from longvila.errors import ConfigError

KINDS = ("downsample_mlp", "mlp", "linear")


class Projector(nn.Module):
    """Maps (F, grid * grid, vision_width) to (F, tokens_per_frame, text_width).

    Args:
        kind: `downsample_mlp` joins 2x2 patches, normalises, and applies two layers; `mlp` (LLaVA-1.5) applies two
            layers to every patch; `linear` (LLaVA) one.
        grid: patches along each side of a frame.
    """

    def __init__(self, kind: str, vision_width: int, text_width: int, grid: int):
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"projector is {kind!r}; it must be one of {list(KINDS)}")
        self.downsample = kind == "downsample_mlp"
        self.grid = grid
        self.tokens_per_frame = ((grid + 1) // 2) ** 2 if self.downsample else grid**2
        if kind == "linear":
            self.layers = nn.Sequential(nn.Linear(vision_width, text_width))
            return
        width = 4 * vision_width if self.downsample else vision_width
        norm = [nn.LayerNorm(width)] if self.downsample else []
        self.layers = nn.Sequential(*norm, nn.Linear(width, text_width), nn.GELU(), nn.Linear(text_width, text_width))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(join_blocks(features, self.grid) if self.downsample else features)


def join_blocks(features: Tensor, grid: int) -> Tensor:
    """Concatenates each 2x2 block of patches: (F, grid * grid, C) -> (F, ceil(grid / 2) ** 2, 4 * C).

    Inside a block the order is top left, top right, bottom left, bottom right.
    """
    num_frames, _, width = features.shape
    half = (grid + 1) // 2
    padding = 2 * half - grid
    x = features.view(num_frames, grid, grid, width)
    x = F.pad(x, (0, 0, 0, padding, 0, padding)) if padding else x
    x = x.view(num_frames, half, 2, half, 2, width).transpose(2, 3)
    return x.reshape(num_frames, half * half, 4 * width)
