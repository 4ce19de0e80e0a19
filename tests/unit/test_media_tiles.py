"""Grids of tiles over still images, and the pixels that each tile shows."""

from __future__ import annotations

import io
import math
import random

import pytest
import torch
from PIL import ExifTags, Image

from longvila.errors import MediaError
from longvila.media import WHOLE, Decoder, FrameMemory, Tile, choose_tiles, decode_image, decode_tiles, image_extent

from .video_fixtures import make_mosaic, read_number


def grid_of(tiles):
    return tiles[-1].columns, tiles[-1].rows


@pytest.mark.parametrize(("width", "height", "most", "grid"), [
    (800, 800, 1, (1, 1)),
    (800, 800, 12, (3, 3)),
    (1600, 800, 12, (4, 2)),
    (800, 2400, 12, (2, 6)),
    (1000, 700, 6, (3, 2)),
    (5000, 500, 6, (6, 1)),
    (90, 60, 12, (1, 1)),  # smaller than a frame
    (110, 100, 12, (1, 1)),  # every grid would be further from its shape
    (130, 65, 12, (1, 1)),  # a grid of two would enlarge it
    (300, 100, 12, (3, 1)),
])  # fmt: skip
def test_the_grid_keeps_the_shape_and_does_not_enlarge(width, height, most, grid):
    tiles = choose_tiles(width, height, 100, most)
    assert tiles[0] == WHOLE
    assert grid_of(tiles) == grid
    assert len(tiles) == 1 + (math.prod(grid) if grid != (1, 1) else 0)


def test_no_grid_is_nearer_and_tiles_cover_the_image_once():
    random.seed(0)
    for _ in range(300):
        width, height, most = random.randint(1, 4000), random.randint(1, 4000), random.randint(1, 12)
        whole, *tiles = choose_tiles(width, height, 224, most)
        assert whole == WHOLE
        assert len(tiles) <= most
        assert len(set(tiles)) == len(tiles) != 1
        boxes = [tile.box(width, height) for tile in tiles]
        area = sum((right - left) * (low - top) for left, top, right, low in boxes)
        assert not tiles or area == pytest.approx(width * height)
        columns, rows = grid_of(tiles or [whole])
        assert columns * rows == max(1, len(tiles))
        distance = abs(math.log(columns / rows * height / width))
        for other in range(1, most + 1):
            for deep in range(1, most // other + 1):
                if other * deep == 1 or other * deep * 224 * 224 / 2 <= width * height:
                    assert distance <= abs(math.log(other / deep * height / width)) + 1e-8


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_each_tile_shows_its_part(format):
    data = make_mosaic(3, 2, format)
    tiles = choose_tiles(*image_extent(data, "mosaic"), 48, 6)
    frames = decode_tiles(data, tiles, 48, "mosaic")
    assert [read_number(frame) for frame in frames[1:]] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(frames[0], decode_image(data, 48, "mosaic"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_part_of_the_tiles_is_decoded_as_they_are_in_all(workers):
    frames, decoder = FrameMemory(48).take(2), Decoder(workers)
    decoder.start(make_mosaic(3, 2), choose_tiles(288, 192, 48, 6)[3:5], 48, "mosaic")(frames)
    assert [read_number(frame) for frame in frames] == [3, 4]


def test_a_turned_image_is_cut_as_it_is_shown():
    upright = Image.open(io.BytesIO(make_mosaic(3, 2)))
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be shown turned clockwise by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(file, format="JPEG", exif=exif, quality=95)
    assert image_extent(file.getvalue(), "turned") == (288, 192)
    frames = decode_tiles(file.getvalue(), choose_tiles(288, 192, 48, 6), 48, "turned")
    assert [read_number(frame) for frame in frames[1:]] == [1, 2, 3, 4, 5, 6]


def test_a_tile_of_an_uneven_cut_begins_between_pixels():
    assert Tile(1, 0, 3, 1).box(100, 50) == pytest.approx((100 / 3, 0, 200 / 3, 50))


def test_what_is_no_image_is_refused_by_name():
    with pytest.raises(MediaError, match="page: cannot be read as an image"):
        image_extent(b"<html>", "page")
