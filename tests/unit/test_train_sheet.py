"""`longvila data show`: what the page says is what the rows hold."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from typer.testing import CliRunner

from longvila.cli import app
from longvila.model.chat import ChatEncoder
from longvila.shards import SourceSample
from longvila.shards.order import Cursor
from longvila.train.pretrain import train_tokenizer
from longvila.train.sheet import make_cards

from .shards_parts import conversation, make_loader, packed, video
from .video_fixtures import read_number


@pytest.fixture
def folder(tmp_path):
    text = SourceSample("a-text", [], None, "text", {"text": "rain <b>falls</b> on the street"})
    broken = SourceSample("wordy", conversation("rain " * 900), video("x").media, "video")
    packed(tmp_path / "data", [video("film", 3, number=5), text, broken])
    train_tokenizer(["What is it film rain falls on the street 5"] * 5, 400).save_pretrained(tmp_path / "lm")
    return tmp_path


def picture(uri):
    data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)


def test_cards_hold_the_frames_tokens_and_targets_of_their_documents(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
    loader = make_loader(folder, encode=ChatEncoder(tokenizer, 2), row_tokens=200)
    ((row, _),) = loader.rows(Cursor())
    cards = {card.key: card for card in make_cards(row, tokenizer, loader.encode.frame_token)}
    film, text = cards["film"], cards["a-text"]
    assert [read_number(picture(uri)) for uri in film.frames] == [5, 6, 7]
    assert [(run.kind, run.count) for run in film.runs if run.kind == "frames"] == [("frames", 6)]
    answer = "".join(run.text for run in film.runs if run.kind == "target")
    assert answer.startswith("film 5")
    assert "What is it" in "".join(run.text for run in film.runs if run.kind == "context")
    assert sum(run.count for run in film.runs) == film.tokens
    assert [run.kind for run in text.runs] == ["context", "target"]  # nothing comes before the first token
    assert text.targets == text.tokens - 1


def test_the_command_writes_one_page_that_needs_nothing_else(folder):
    out = folder / "pages" / "sheet.html"
    options = ["--model", str(folder / "lm"), "--out", str(out), "--row-tokens", "200", "--tokens-per-frame", "2"]
    result = CliRunner().invoke(app, ["data", "show", str(folder / "data"), *options, "--image-size", "48"])
    assert result.exit_code == 0, result.output
    assert "2 documents in 1 rows" in result.output
    page = out.read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "6 tokens of frames" in page
    assert "&lt;b&gt;falls" in page
    assert "<b>wordy</b>: its text has" in page
    assert "http" not in page


def test_a_template_of_ones_own_is_shown(folder):
    out = folder / "pages" / "own.html"
    options = ["--model", str(folder / "lm"), "--out", str(out), "--row-tokens", "200", "--tokens-per-frame", "2"]
    template = "{% for m in messages %}It was said: {{ m.content }}{% endfor %}"
    options += ["--image-size", "48", "--chat-template", template]
    result = CliRunner().invoke(app, ["data", "show", str(folder / "data"), *options])
    assert result.exit_code == 0, result.output
    assert "It was said: " in out.read_text()


def test_a_model_that_is_not_there_is_one_line(folder):
    result = CliRunner().invoke(app, ["data", "show", str(folder / "data"), "--model", str(folder / "gone")])
    assert result.exit_code == 1
    assert "no tokenizer can be loaded from" in result.output
