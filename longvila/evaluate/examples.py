"""Pictures of the frames behind an answer, kept beside the scores so that a report needs no film."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from PIL import Image

from longvila.errors import MediaError
from longvila.evaluate.frames import decode_refs
from longvila.evaluate.request import FrameRef
from longvila.media import image_extent, probe

LONG_SIDE = 288
"""Pixels along the longer side of a picture."""


def save_example_frames(examples: list[dict[str, Any]], out: Path) -> None:
    """Writes the frames of each example, and puts their file names (below `out`) where the addresses were.

    Args:
        examples: each with "id" and "frames", a list of FrameRefs; a frame that cannot be read is left out.
    """
    (out / "examples").mkdir(exist_ok=True)
    for example in examples:
        stem = re.sub(r"[^\w-]+", "-", example["id"])
        names = []
        for index, ref in enumerate(example["frames"]):
            name = f"examples/{stem}-{index}.jpg"
            try:
                _picture(ref).save(out / name, quality=80)
            except MediaError:
                continue
            names.append(name)
        example["frames"] = names


def _picture(ref: FrameRef) -> Image.Image:
    """The frame in the shape of its file: decoding for the model squeezes every frame into a square."""
    if ref.seconds is None:
        width, height = image_extent(Path(ref.path), ref.path)
    else:
        info = probe(Path(ref.path), ref.path)
        width, height = (info.width, info.height) if info.rotation % 180 == 0 else (info.height, info.width)
    pixels = decode_refs(ref.path, [ref], LONG_SIDE)[0].permute(1, 2, 0).numpy()
    scale = LONG_SIDE / max(width, height)
    return Image.fromarray(pixels).resize((max(round(width * scale), 1), max(round(height * scale), 1)))
