"""Trains a small vision tower from nothing on frames and their captions, with open_clip's own CLIP model and loss.

Base models only: towers with published weights never come here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longvila.errors import ConfigError
from longvila.model.tower import VisionTower, read_tower_config
from longvila.train.scratch import FromScratch

MAX_LOGIT_SCALE = math.log(100)  # as CLIP (Radford et al. 2021)


@dataclass(frozen=True)
class ContrastiveRecipe:
    """How long and how fast a tower is trained."""

    num_frames: int
    steps: int
    batch: int
    matrix_rate: float
    other_rate: float
    """Learning rates of hidden matrices and of everything else."""
    weight_decay: float = 0.05


def train_tower(
    config_file: Path,
    frames: Tensor,
    captions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    recipe: ContrastiveRecipe,
    report: Callable[[int, float], None],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trains the image tower of `config_file` beside its text tower (Radford et al. 2021).

    Args:
        frames: uint8 (n, 3, S, S) at the tower's own size.
        tokenizer: pads with id 0; its eos token is the text tower's `eos_id`.
        report: called with (step, loss) after each step.

    Returns:
        State dict of the image tower, and figures: first and last loss, and the share of the last batches' frames whose
        own caption is the nearest of the batch.
    """
    clip = build_clip(config_file, len(tokenizer))
    tokens = _tokenize(captions, tokenizer, clip.context_length)
    config = read_tower_config(str(config_file))["preprocess_cfg"]
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    optimizer = FromScratch(clip, recipe.steps, recipe.matrix_rate, recipe.other_rate, recipe.weight_decay)
    loss_of = open_clip.ClipLoss()
    losses, hits = [], []
    for step, rows in enumerate(_batches(len(frames), recipe.batch, recipe.steps), start=1):
        images = (frames[rows].float() / 255 - mean) / std
        image_features, text_features, scale = clip(images, tokens[rows])
        loss = loss_of(image_features, text_features, scale)
        optimizer.step(loss)
        with torch.no_grad():
            clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            nearest = (image_features @ text_features.T).argmax(1)
        losses.append(loss.item())
        hits.append((nearest == torch.arange(len(rows))).float().mean().item())
        report(step, losses[-1])
    figures = {
        "steps": recipe.steps,
        "first_loss": losses[0],
        "last_loss": _mean(losses[-20:]),
        "matched_in_batch": _mean(hits[-20:]),
    }
    return clip.visual.state_dict(), figures


def build_clip(config_file: Path, num_words: int) -> open_clip.CLIP:
    """open_clip's CLIP of a JSON configuration, with random weights."""
    model_cfg = json.loads(config_file.read_text())["model_cfg"]
    vocabulary = model_cfg["text_cfg"]["vocab_size"]
    if vocabulary < num_words:
        raise ConfigError(f"{config_file}: the text tower knows {vocabulary} words, the tokenizer has {num_words}")
    vision_cfg = open_clip.CLIPVisionCfg(**model_cfg["vision_cfg"])
    return open_clip.CLIP(model_cfg["embed_dim"], vision_cfg, open_clip.CLIPTextCfg(**model_cfg["text_cfg"]))


@torch.no_grad()
def probe_accuracy(
    tower: VisionTower, frames: Tensor, captions: Sequence[str], classes: Mapping[str, Sequence[str]], num_test: int
) -> dict[str, float]:
    """How well a linear map of a frame's patch features names what its caption says.

    For each entry of `classes` ({"digit": ("0", "1", ...)}) the captions that hold exactly one of its words are taken;
    ridge regression on all but the last `num_test` frames, accuracy on those.
    """
    tower.eval()
    features = torch.cat([tower(part).flatten(1) for part in frames.split(512)])
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    features = F.pad(features, (0, 1), value=1.0)
    accuracy = {}
    for name, words in classes.items():
        found = [[k for k, word in enumerate(words) if re.search(rf"\b{word}\b", text)] for text in captions]
        labels = torch.tensor([hits[0] if len(hits) == 1 else -1 for hits in found])
        known = labels >= 0
        train, test = known.clone(), known.clone()
        train[-num_test:], test[:-num_test] = False, False
        x, y = features[train], F.one_hot(labels[train], len(words)).float()
        ridge = 0.1 * len(x) * torch.eye(x.shape[1])
        weights = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
        accuracy[name] = ((features[test] @ weights).argmax(1) == labels[test]).float().mean().item()
    return accuracy


def _tokenize(captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    rows = [[*ids[: length - 1], tokenizer.eos_token_id] for ids in tokenizer(list(captions))["input_ids"]]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def _batches(count: int, batch: int, steps: int) -> list[Tensor]:
    """`steps` batches of row numbers, every row once before any twice."""
    rows = torch.cat([torch.randperm(count) for _ in range(math.ceil(steps * batch / count))])
    return list(rows.split(batch)[:steps])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
