"""Base models of a small scale: tokenizer, tower and language model, made from a little content."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from longvila.config import ModelConfig
from longvila.errors import ConfigError
from longvila.model import build_model
from longvila.shards.sample import SourceSample
from longvila.train.base import BaseContent, BaseRecipe, _beside, make_base_models
from longvila.train.contrastive import ContrastiveRecipe
from longvila.train.pretrain import LanguageRecipe, encode, train_tokenizer

ROOT = Path(__file__).parents[2]
PHRASE = "Answer with one letter:"
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def frames(seed, count):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        name = rng.choice(list(COLOURS))
        yield np.full((64, 64, 3), COLOURS[name], np.uint8), f"The picture is {name}."


def samples(seed, count):
    for index in range(count):
        letter = "ABCD"[(seed + index) % 4]
        messages = [
            {"role": "user", "content": f"The letter is {letter}. {PHRASE}"},
            {"role": "assistant", "content": letter},
        ]
        yield SourceSample(f"text-{index}", messages, None, "text", {})


def content():
    return BaseContent(frames, samples, [PHRASE], {"colour": list(COLOURS)})


def recipe(steps=20):
    return BaseRecipe(
        "tiny",
        ROOT / "stages" / "towers" / "tiny.json",
        ContrastiveRecipe(num_frames=64, steps=4, batch=16, matrix_rate=6e-3, other_rate=1e-3),
        LanguageRecipe(
            hidden=32, layers=2, heads=4, kv_heads=2, vocabulary=300, num_documents=64, steps=steps, batch_tokens=512,
            matrix_rate=1e-2, other_rate=1e-2,
        ),
    )  # fmt: skip


def make(folder, steps=20):
    make_base_models(recipe(steps), content(), folder, folder / "cache", Progress(disable=True))


def test_a_phrase_is_one_token_and_digits_stand_alone():
    tokenizer = train_tokenizer(["numbers 1 2 12", PHRASE], 300, [PHRASE])
    (phrase,) = tokenizer(PHRASE, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([phrase]) == PHRASE
    digits = [i for i in tokenizer("12", add_special_tokens=False)["input_ids"] if tokenizer.decode([i]) in "12"]
    assert len(digits) == 2
    text = f"The letter is A. {PHRASE}"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_labels_of_a_conversation_are_its_answer_and_the_end_of_the_turn():
    tokenizer = train_tokenizer([PHRASE], 300, [PHRASE])
    ids, labels = encode(tokenizer, next(samples(0, 1)))
    targets = [i for i, label in zip(ids, labels, strict=True) if label != -100]
    assert tokenizer.decode(targets) == "A<|im_end|>"


def test_base_models_build_a_vision_language_model_and_say_what_they_are(tmp_path):
    folder = tmp_path / "models"
    make(folder)
    figures = json.loads((folder / "base.json").read_text())
    assert figures["language_model"]["last_loss"] < figures["language_model"]["first_loss"]
    assert figures["tower"]["probe_accuracy"]["colour"] > 0.9
    model, _ = build_model(
        ModelConfig(str(folder / "tower.json"), str(folder / "tower.safetensors"), str(folder / "language_model"))
    )
    assert sum(p.numel() for p in model.vision.parameters()) == figures["tower"]["parameters"]


def test_models_that_are_there_are_kept_and_those_of_another_scale_refused(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "base.json").write_text(json.dumps({"scale": "tiny"}))
    make(folder)
    assert [path.name for path in folder.iterdir()] == ["base.json"]
    (folder / "base.json").write_text(json.dumps({"scale": "small"}))
    with pytest.raises(ConfigError, match="'small', not 'tiny'"):
        make(folder)


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        make(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_language_model_whose_process_dies_is_an_error_and_no_hang():
    with pytest.raises(RuntimeError, match="died"), _beside(lambda report: os._exit(9), print) as wait:
        wait()


def test_an_error_beside_is_raised_here():
    def fail(report):
        raise ConfigError("no such package")

    with pytest.raises(ConfigError, match="no such package"), _beside(fail, print) as wait:
        wait()
