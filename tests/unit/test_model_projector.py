"""The projector: which patches make a token, and how many tokens a frame has."""

import pytest
import torch

from longvila.errors import ConfigError
from longvila.model.projector import Projector, join_blocks


@pytest.mark.parametrize(
    ("kind", "grid", "tokens"),
    [("downsample_mlp", 4, 4), ("downsample_mlp", 27, 196), ("mlp", 4, 16), ("linear", 3, 9)],
)
def test_each_kind_gives_its_number_of_tokens(kind, grid, tokens):
    projector = Projector(kind, 8, 12, grid)
    assert projector.tokens_per_frame == tokens
    assert projector(torch.randn(2, grid * grid, 8)).shape == (2, tokens, 12)


def test_a_block_joins_four_neighbours_in_reading_order():
    grid = torch.arange(16.0).view(1, 16, 1)
    assert join_blocks(grid, 4)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_an_odd_grid_is_filled_with_zeros_at_its_end():
    grid = torch.arange(1.0, 10.0).view(1, 9, 1)
    assert join_blocks(grid, 3)[0].tolist() == [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="'resampler'"):
        Projector("resampler", 8, 8, 4)
