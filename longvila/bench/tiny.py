"""A run small enough to start many times: two shards of films of a moving square, and base models made from nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from longvila.shards import SourceSample, write_shards
from longvila.train.pretrain import END, PADDING, SPECIAL, train_tokenizer

QUESTION = "What is shown?"


def write_models(folder: Path, texts: list[str]) -> None:
    """`folder/lm`, a language model whose tokenizer knows `texts`, and a tower, `folder/tower.json`."""
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.save_pretrained(folder / "lm")
    text = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, eos_token_id=SPECIAL.index(END), pad_token_id=SPECIAL.index(PADDING),
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(text).save_pretrained(folder / "lm")
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
    (folder / "tower.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": {}}))


def write_films(folder: Path, films: int, shards: int) -> None:
    """Packs `films` films of three seconds, each with a question and an answer, into shards."""
    samples = []
    for number in range(films):
        question = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}
        messages = [question, {"role": "assistant", "content": f"a film, number {number}"}]
        samples.append(SourceSample(f"film{number}", messages, _film(number), "video"))
    write_shards(samples, folder, max_samples=-(-films // shards))


def _film(number: int) -> bytes:
    """12 frames at 4 a second; a square moves one way or the other, in a colour of its own."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=4)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for time in range(12):
            picture = np.zeros((64, 64, 3), dtype=np.uint8)
            place = 4 * (time if number % 2 else 11 - time)
            picture[24:40, place : place + 16] = (255, 40 * number % 256, 90 * number % 256)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()
