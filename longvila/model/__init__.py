"""Tower, projector and language model, one model of them, its chat format and its loss. Knows no ranks."""

from longvila.model.build import build_model, load_model, save_language_model, save_model
from longvila.model.projector import Projector
from longvila.model.tower import VisionTower
from longvila.model.vlm import LongVilaConfig, LongVilaModel, LongVilaOutput

__all__ = [
    "LongVilaConfig",
    "LongVilaModel",
    "LongVilaOutput",
    "Projector",
    "VisionTower",
    "build_model",
    "load_model",
    "save_language_model",
    "save_model",
]
