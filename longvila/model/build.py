"""Builds a vision-language model from a ModelConfig, and saves and loads a trained one with its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from longvila.config import ModelConfig
from longvila.errors import ConfigError
from longvila.model.chat import FRAME_TOKEN, prepare_tokenizer
from longvila.model.loss import check_logit_head
from longvila.model.tower import VisionTower, load_tower_weights, read_tower_config
from longvila.model.vlm import LongVilaConfig, LongVilaModel


def build_model(
    config: ModelConfig, device: str = "cpu", seed: int = 0
) -> tuple[LongVilaModel, PreTrainedTokenizerBase]:
    """The model before any stage: pretrained parts, and a projector (and a tower without weights) drawn from `seed`.

    Args:
        device: where the model is put; "meta" gives shapes without memory and reads no weights: of the language model
            only its configuration and tokenizer.

    Returns:
        The model in fp32, and the language model's tokenizer with the frame token added.

    Raises:
        ConfigError: a part that cannot be found, read or used, by name.
    """
    tokenizer = _fetch(AutoTokenizer, config.language_model)
    text_config = _fetch(AutoConfig, config.language_model)
    tower = read_tower_config(config.tower)
    model_config = LongVilaConfig(
        tower=tower,
        projector=config.projector,
        text_config=text_config,
        frame_token_id=prepare_tokenizer(tokenizer, config.chat_template),
        dtype="float32",
    )
    text_config.dtype = "float32"
    if device == "meta":
        with torch.device("meta"):
            return LongVilaModel(model_config), tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = load_tower_weights(config.tower, config.tower_weights) if config.tower_weights else None
        vision = VisionTower(tower, weights)
        language_model = _fetch(AutoModelForCausalLM, config.language_model, dtype=torch.float32)
        check_logit_head(language_model)
        model = LongVilaModel(model_config, vision, language_model)
    model.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    return model, tokenizer


def save_model(model: LongVilaModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes weights, configuration, generation settings and tokenizer to `folder`, complete or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    model.language_model.generation_config.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def save_language_model(model: LongVilaModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the language model alone to `folder`, as transformers loads it without longvila.

    The tokenizer is written without the frame token: its id may lie behind the last row of the embedding matrix.
    """
    model.language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != FRAME_TOKEN]
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[LongVilaModel, PreTrainedTokenizerBase]:
    """Inverse of `save_model`; the model is on the CPU.

    Args:
        dtype: type of the weights, whatever they are stored in. To change it later with `.to` is not the same: that
            would also round the rotary frequencies, and the weights that transformers keeps in fp32.

    Raises:
        ConfigError: no such folder, or a checkpoint of another architecture.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no model here (config.json is missing); give the folder a stage wrote, .../model")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, LongVilaConfig):
        raise ConfigError(f"{folder}: a model of the type '{config.model_type}', not a longvila checkpoint")
    loaded: Any = LongVilaModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, report = loaded
    if wrong := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise ConfigError(f"{folder}: {len(wrong)} weights are missing, unknown or of another shape, e.g. {wrong[0]}")
    check_logit_head(model.language_model)
    if (folder / "generation_config.json").is_file():
        model.language_model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(folder)


def _fetch(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(name)`, with one readable error."""
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"language model {name}: {auto_class.__name__} cannot read it ({str(error).splitlines()[0]}); "
            f"give a hub name that is reachable or a folder with config.json, weights and tokenizer"
        ) from error
