"""A miniature evaluation folder, and answerers for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from transformers import Qwen3Config

from longvila.evaluate.runner import FrameRef
from longvila.generate.answer import Answerer
from longvila.model import build_model
from longvila.model.chat import prepare_tokenizer

from .model_parts import byte_tokenizer, model_config
from .video_fixtures import make_video

FILMS = {"001": "short", "002": "short", "003": "long", "004": "long"}


def tiny_answerer(folder: Path, language_model=None) -> Answerer:
    """A model with random weights, 4 tokens per frame, on frames of 32 pixels."""
    folder.mkdir(exist_ok=True)
    return Answerer(*build_model(model_config(folder, language_model)))


def evaluation_folder(folder: Path, haystack_seconds: int = 12) -> Path:
    """The layout that `eval/` reads: four films of 3 seconds, a haystack, three needles."""
    for name in ("videos", "subtitles", "needle/images"):
        (folder / name).mkdir(parents=True)
    films, captions = [], []
    for index, (video_id, duration) in enumerate(FILMS.items()):
        (folder / "videos" / f"{video_id}.mp4").write_bytes(make_video(12, first_number=100 * index))
        (folder / "subtitles" / f"{video_id}.srt").write_text(
            f'1\n00:00:00,500 --> 00:00:01,500\n<font color="white">Early in {video_id}</font>\n\n'
            f"2\n00:00:02,500 --> 00:00:02,900\nLate in {video_id}\n"
        )
        questions = [
            {
                "question_id": f"{video_id}-{number}",
                "task_type": "Counting Problem" if number == 1 else "Object Recognition",
                "question": f"What is number {number}?",
                "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
                "answer": "ABCD"[number],
            }
            for number in (1, 2)
        ]
        categories = {"duration": duration, "domain": "Knowledge", "sub_category": "Law"}
        films.append({"video_id": video_id, **categories, "questions": questions})
        captions.append({"video": video_id, "caption": f"A red circle, then number {index}.", "events": ["red circle"]})
    (folder / "videomme.json").write_text(json.dumps(films))
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in captions))
    (folder / "needle" / "haystack.mp4").write_bytes(make_video(haystack_seconds, fps=1, first_number=1000))
    needles = []
    for index in range(3):
        Image.new("RGB", (48, 32), (80 * index, 0, 0)).save(folder / "needle" / "images" / f"{index}.png")
        needles.append({"image": f"images/{index}.png", "question": f"Question {index}?", "answer": f"The {index}."})
    (folder / "needle" / "needles.jsonl").write_text("".join(json.dumps(needle) + "\n" for needle in needles))
    return folder


class ScriptedAnswerer:
    """Answers by rule instead of by model, and counts what it was asked; each frame is one token, its mean colour."""

    fingerprint = "scripted"
    group_rank = 0

    def __init__(self, rule=lambda question: "A", context: int = 32_768):
        self.rule = rule
        self.asked: list[str] = []
        self.num_encoded = 0
        self.tokenizer = byte_tokenizer()
        prepare_tokenizer(self.tokenizer)
        self.model = SimpleNamespace(
            vision=SimpleNamespace(image_size=32),
            projector=SimpleNamespace(tokens_per_frame=1),
            language_model=SimpleNamespace(config=Qwen3Config(max_position_embeddings=context)),
        )

    def on_first(self, ask):
        return ask()

    def encode_film(self, open_film) -> torch.Tensor:
        count, decode = open_film()
        frames = decode(0, count)
        self.num_encoded += count
        return frames.float().mean(dim=(2, 3)).unsqueeze(1)

    def answer(self, frames: torch.Tensor, question: str, max_new_tokens: int) -> str:
        self.asked.append(question)
        return self.rule(question)


def film(path: Path, *seconds: float) -> tuple[FrameRef, ...]:
    return tuple(FrameRef(str(path), second) for second in seconds)
