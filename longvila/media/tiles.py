"""Still images in more than one piece: the whole, and the tiles of a grid that keeps its shape.

A tower sees squares of one size, and a page or a wide photograph in one square loses what is small. Cut into a grid of
nearly square tiles, each resized to that square, it keeps its resolution (AnyRes, LLaVA-NeXT 2024; dynamic resolution,
InternVL 1.5, Chen et al. 2024). A tile is one frame to everything else.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from PIL import ExifTags

from longvila.media.container import Media, open_image

TURNED = (5, 6, 7, 8)
"""Orientations by which width and height change places (EXIF 2.3, tag 0x0112)."""
LEAST_FILL = 0.5
"""Pixels that a grid must have for each that its tiles come to: a finer one would only enlarge the image."""


class Tile(NamedTuple):
    """One cell of a grid over an image."""

    column: int
    row: int
    columns: int
    rows: int

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom in an image of this size."""
        return (
            self.column * width / self.columns, self.row * height / self.rows,
            (self.column + 1) * width / self.columns, (self.row + 1) * height / self.rows,
        )  # fmt: skip


WHOLE = Tile(0, 0, 1, 1)
"""The image in one piece."""

Views = tuple[float, ...] | tuple[Tile, ...]
"""What becomes frames: of a video, seconds of video time; of an image, tiles."""


@lru_cache(maxsize=4096)
def choose_tiles(width: int, height: int, size: int, most: int) -> tuple[Tile, ...]:
    """The whole, and after it, row by row, the tiles of the grid that suits an image of width x height pixels best.

    Of all grids of 2 to `most` tiles whose tiles would not be enlarged much, and the image in one piece, the one whose
    shape is nearest the image's; of equally near ones, the finest. `most` = 1: the whole alone.

    Args:
        size: pixels along a side of a frame.
    """
    room = min(most, int(width * height / (LEAST_FILL * size * size)))
    grids = [(1, 1)] + [
        (columns, rows)
        for columns in range(1, room + 1)
        for rows in range(1, room // columns + 1)
        if columns * rows > 1
    ]
    columns, rows = min(
        grids, key=lambda grid: (round(abs(math.log(grid[0] * height / (grid[1] * width))), 9), -grid[0] * grid[1])
    )
    if (columns, rows) == (1, 1):
        return (WHOLE,)
    return (WHOLE, *(Tile(column, row, columns, rows) for row in range(rows) for column in range(columns)))


def image_extent(media: Media, name: str) -> tuple[int, int]:
    """Width and height in pixels of a still image as it is shown, read from its header.

    Raises:
        MediaError: naming `name`, when the data are not an image.
    """
    with open_image(media, name) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
    return (height, width) if turned else (width, height)
