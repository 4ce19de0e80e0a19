"""Draws what the script says over film frames: scenery, moving objects, number cards, needles.

Everything is large, bold and saturated: a tower that sees 64 x 64 pixels in patches of 16 must tell a 3 from an 8.
Sprites are drawn once at four times their size and averaged down, so a frame costs a few array operations.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .backdrops import SIZE

COLOURS = {
    "red": (235, 20, 25),
    "green": (10, 190, 40),
    "blue": (25, 60, 245),
    "yellow": (255, 230, 0),
    "purple": (150, 20, 200),
    "orange": (255, 130, 0),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = ("beach", "forest", "city", "desert", "snow")
SCENERY_HEIGHT = SIZE // 4
OBJECT_SIZE = 68
CARD_SIZE = 79
NEEDLE_FRAME = (255, 0, 200)
SCALE = 4  # sprites are drawn this much larger

Sprite = tuple[np.ndarray, np.ndarray]
"""(RGB premultiplied by opacity, 1 - opacity), uint16 (height, width, 3 or 1) in 0..255 and 0..256."""


def fade(frame: np.ndarray) -> np.ndarray:
    """The film at half contrast, a copy to draw on: uint8 (SIZE, SIZE, 3)."""
    return (frame >> 1) + 56


def draw_scenery(frame: np.ndarray, place: str) -> None:
    """Puts the place's strip along the bottom quarter of `frame`, in place."""
    frame[-SCENERY_HEIGHT:] = _scenery(place)


def draw_object(frame: np.ndarray, colour: str, shape: str, centre: tuple[float, float], size: int) -> None:
    """Pastes a coloured shape at `centre` (x, y as shares of the frame), in place; parts outside are cut off."""
    _paste(frame, _object(colour, shape, size), centre)


def draw_number(frame: np.ndarray, number: int, centre: tuple[float, float], size: int) -> None:
    """Pastes a white card with a black number, in place."""
    _paste(frame, _card(size, str(number)), centre)


def draw_needle(frame: np.ndarray, content: int | tuple[str, str], centre: tuple[float, float], size: int) -> None:
    """Frames the picture in magenta and pastes a card with a number or a (colour, shape), in place."""
    border = SIZE // 10
    for edge in (frame[:border], frame[-border:], frame[:, :border], frame[:, -border:]):
        edge[:] = NEEDLE_FRAME
    if isinstance(content, int):
        draw_number(frame, content, centre, size)
    else:
        _paste(frame, _card(size, ""), centre)
        _paste(frame, _object(*content, size * 3 // 4), centre)


def _paste(frame: np.ndarray, sprite: Sprite, centre: tuple[float, float]) -> None:
    colour, rest = sprite
    height, width = colour.shape[:2]
    left, top = round(centre[0] * SIZE - width / 2), round(centre[1] * SIZE - height / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, SIZE), min(top + height, SIZE)
    if x0 >= x1 or y0 >= y1:
        return
    inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    target = frame[y0:y1, x0:x1]
    target[:] = colour[inside] + (target * rest[inside] >> 8)


def _sprite(image: Image.Image) -> Sprite:
    """A large RGBA drawing, averaged down by SCALE."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    height, width = image.height // SCALE, image.width // SCALE
    pixels[..., :3] *= pixels[..., 3:]
    pixels = pixels.reshape(height, SCALE, width, SCALE, 4).mean(axis=(1, 3))
    colour = np.floor(pixels[..., :3] * 255).astype(np.uint16)
    return colour, np.round((1 - pixels[..., 3:]) * 256).astype(np.uint16)


@lru_cache(maxsize=512)
def _object(colour: str, shape: str, size: int) -> Sprite:
    size = size * 5 // 4 if shape == "star" else size  # its arms are thin
    side, margin = size * SCALE, 3 * SCALE
    image = Image.new("RGBA", (side, side))
    _draw_shape(ImageDraw.Draw(image), shape, side, margin, COLOURS[colour])
    return _sprite(image)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, side: int, margin: int, fill: tuple[int, int, int]) -> None:
    low, high, middle = margin, side - margin, side / 2
    radius = high - middle
    style = {"fill": fill, "outline": (0, 0, 0), "width": 2 * SCALE}
    if shape == "circle":
        pen.ellipse((low, low, high, high), **style)
    elif shape == "square":
        inset = margin + side // 16
        pen.rectangle((inset, inset, side - inset, side - inset), **style)
    elif shape == "triangle":
        pen.polygon([(middle, low), (high, high), (low, high)], **style)
    elif shape == "star":
        tips = [(-math.pi / 2 + k * math.pi / 5, radius if k % 2 == 0 else radius * 0.46) for k in range(10)]
        pen.polygon([(middle + r * math.cos(a), middle + r * math.sin(a)) for a, r in tips], **style)
    else:
        a, b = side * 0.34, side * 0.66
        corners = [(a, low), (b, low), (b, a), (high, a), (high, b), (b, b), (b, high), (a, high), (a, b), (low, b)]
        pen.polygon([*corners, (low, a), (a, a)], **style)


@lru_cache(maxsize=256)
def _card(size: int, text: str) -> Sprite:
    side = size * SCALE
    image = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((0, 0, side - 1, side - 1), side // 10, fill="white", outline="black", width=2 * SCALE)
    if text:
        font = ImageFont.load_default(side * 0.98)
        pen.text((side / 2, side * 0.5), text, "black", font, anchor="mm", stroke_width=side // 22)
    return _sprite(image)


@lru_cache(maxsize=len(PLACES))
def _scenery(place: str) -> np.ndarray:
    """uint8 (SCENERY_HEIGHT, SIZE, 3)."""
    width, height, unit = SIZE * SCALE, SCENERY_HEIGHT * SCALE, SIZE * SCALE // 16
    grounds = {
        "beach": (250, 225, 150),
        "forest": (20, 70, 25),
        "city": (60, 60, 70),
        "desert": (225, 120, 40),
        "snow": (245, 250, 255),
    }
    image = Image.new("RGBA", (width, height), grounds[place])
    pen = ImageDraw.Draw(image)
    for k in range(8):
        x = k * 2 * unit
        if place == "beach":
            pen.rectangle((x, 0, x + 2 * unit, height // 2), (0, 150 + 40 * (k % 2), 225))
        elif place == "forest":
            pen.polygon([(x, height * 0.8), (x + unit, 0), (x + 2 * unit, height * 0.8)], (0, 150, 50))
            pen.rectangle((x + unit * 0.7, height * 0.8, x + unit * 1.3, height), (100, 60, 20))
        elif place == "city":
            pen.rectangle((x + 6, height * (k % 3) // 5, x + 2 * unit - 6, height), (120, 120, 135))
            for y in range(height // 2, height, unit):
                pen.rectangle((x + 16, y, x + unit, y + unit // 2), (255, 240, 120))
        elif place == "desert":
            pen.ellipse((x - unit, height // 3, x + 3 * unit, height * 2), (245 - 30 * (k % 2), 150, 60))
        else:
            pen.ellipse((x - unit, height // 4, x + 3 * unit, height * 2), (205 + 40 * (k % 2), 225, 250))
    if place == "desert":
        for x in (3 * unit, 11 * unit):
            pen.rounded_rectangle((x, 0, x + unit, height), unit // 2, (30, 110, 50))
    if place == "beach":
        for x in (4 * unit, 12 * unit):
            pen.pieslice((x - unit * 1.5, height * 0.3, x + unit * 1.5, height * 1.3), 180, 360, (230, 40, 60))
    return np.asarray(image.convert("RGB").resize((SIZE, SCENERY_HEIGHT), Image.Resampling.BOX))
