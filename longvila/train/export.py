"""Exports a stage to a folder in Hugging Face format: its final model, or what stands in a checkpoint of its middle.

The language model alone loads as plain transformers; the whole model loads after `import longvila`. One process is
enough, whatever ranks wrote the checkpoint. A model card says how to load it and how it was trained.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedTokenizerBase

from longvila import config as configuration
from longvila.config import StageConfig
from longvila.errors import ConfigError
from longvila.model.build import load_model, save_language_model, save_model
from longvila.model.vlm import LongVilaModel
from longvila.train.card import model_card
from longvila.train.checkpoint import newest, read_position
from longvila.train.loop import assemble
from longvila.train.manifest import find_fault
from longvila.train.optimizer import phase_at

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """What is exported."""

    folder: Path
    """A model folder, or a resumable checkpoint."""
    stage: Path | None
    """The folder of its stage, where it has one."""
    step: int | None = None
    """The step of the checkpoint; None for a model folder."""


def export(
    folder: Path,
    out: Path,
    dtype: Literal["fp32", "bf16"] | None = None,
    part: Literal["all", "language_model"] = "all",
) -> Source:
    """Writes `out`, complete or not at all.

    Args:
        folder: a stage's folder (its final model, or its newest checkpoint where it is not finished), one of its
            checkpoints, or a model folder.
        dtype: type of the weights; None keeps theirs.
        part: the whole model, or the language model alone.

    Raises:
        ConfigError: for an `out` that is not empty, or a folder with nothing to export.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; give a new folder, nothing is overwritten")
    source = find_source(folder)
    model, tokenizer = _load(source)
    if dtype is not None:
        nn.Module.to(model, DTYPES[dtype])
    # Read by whoever builds the language model inside the whole one; the outer type is written by transformers.
    model.config.text_config.dtype = model.dtype
    work = out.with_name(out.name + ".part")
    shutil.rmtree(work, ignore_errors=True)
    (save_model if part == "all" else save_language_model)(model, tokenizer, work)
    config = stage_config(source.stage) if source.stage else None
    name = str(model.dtype).removeprefix("torch.")
    (work / "README.md").write_text(
        model_card(out.name, part, name, config, source.step, source.stage), encoding="utf-8"
    )
    if out.exists():
        out.rmdir()
    work.rename(out)
    return source


def find_source(folder: Path) -> Source:
    """What there is to export in `folder`.

    Raises:
        ConfigError: nothing is.
    """
    folder = Path(os.path.abspath(folder))  # its parents are asked for, and links may lead elsewhere
    if (folder / "checkpoint.json").is_file():
        if fault := find_fault(folder):
            raise ConfigError(f"{folder}: {fault}; export another checkpoint of the stage")
        return Source(folder, folder.parent.parent, read_position(folder).step)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: nothing to export (config.json is missing); give runs/NAME/STAGE or a model folder"
        )
    if "phases" not in json.loads((folder / "config.json").read_text()):
        stage = folder.parent if (folder.parent / "summary.json").is_file() else None
        return Source(folder, stage)
    if (folder / "model" / "config.json").is_file():
        return Source(folder / "model", folder)
    if found := newest(folder / "checkpoints"):
        return find_source(found)
    raise ConfigError(f"{folder}: this stage has neither a final model nor a checkpoint yet; let it train on")


def _load(source: Source) -> tuple[LongVilaModel, PreTrainedTokenizerBase]:
    if source.stage is None or source.step is None:
        model, tokenizer = load_model(source.folder)
        saved = json.loads((source.folder / "config.json").read_text())["dtype"]
        nn.Module.to(model, getattr(torch, saved))  # `load_model` gives fp32, which holds bf16 exactly
        return model, tokenizer
    config = stage_config(source.stage)
    index, _ = phase_at(config, source.step - 1)
    return assemble(config, source.stage.parent, read_weights(source.folder), config.phases[: index + 1])


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's weights in a resumable checkpoint, whole, whichever ranks wrote it; the optimizer's are not read."""
    reader = dcp.FileSystemReader(checkpoint)
    weights: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata):
            weights[name.removeprefix("model.")] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says that one process reads, as meant
        dcp.load({"model": weights}, storage_reader=reader, no_dist=True)
    return weights


def stage_config(stage: Path) -> StageConfig:
    """The configuration that a stage's folder keeps."""
    path = stage / "config.json"
    if not path.is_file():
        raise ConfigError(f"{stage}: the stage's config.json is missing, which says what the checkpoint is made of")
    return configuration.from_json(StageConfig, path.read_text())
