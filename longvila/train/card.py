"""The model card of an export: how to load it, and what it was trained with, as far as the stage's folder tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longvila.config import StageConfig, to_json
from longvila.train.metrics import read_jsonl

WHOLE = """\
```python
import longvila  # makes the architecture known to transformers
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

    longvila caption film.mp4 --checkpoint {folder}

Several questions about one film, whose frames go through the model once:

```python
from pathlib import Path
from longvila.config import FrameSampling
from longvila.generate.answer import Answerer
from longvila.generate.caption import watch
from longvila.model import load_model

answerer = Answerer(*load_model(Path("{folder}")))
film = watch(answerer, Path("film.mp4"), FrameSampling("fps", frames=256, fps=1.0))
for question in ("What happens in this film?", "Who is in it?"):
    print(answerer.answer(film, question, max_new_tokens=128))
```
"""

LANGUAGE_MODEL = """\
The language model alone; it takes text and needs nothing but transformers.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""


def model_card(
    name: str, part: str, dtype: str, config: StageConfig | None, step: int | None, stage: Path | None
) -> str:
    """The text of README.md.

    Args:
        name: of the exported folder.
        part: `all` or `language_model`.
        dtype: type of the weights.
        config, stage: of the stage that was exported, where known; `stage` is its folder.
        step: the step of the checkpoint that was exported; None for the final model.
    """
    task = "video-text-to-text" if part == "all" else "text-generation"
    header = f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [longvila]\n---\n\n# {name}\n\n"
    load = (WHOLE if part == "all" else LANGUAGE_MODEL).format(folder=name)
    text = f"{header}{load}\nWeights are {dtype}."
    if config is None or stage is None:
        return text + "\n"
    rows = "\n".join(f"| {key} | {value} |" for key, value in _training(config, step, stage).items())
    whole = f"The stage's whole configuration:\n\n```json\n{to_json(config)}\n```\n"
    return f"{text}\n\n## Training\n\n| | |\n|---|---|\n{rows}\n\n{whole}"


def _training(config: StageConfig, step: int | None, stage: Path) -> dict[str, Any]:
    lines = [line for line in read_jsonl(stage / "metrics.jsonl") if step is None or line["step"] <= step]
    facts: dict[str, Any] = {
        "stage": f"{config.name}, scale {config.scale}",
        "step": f"{step} of {config.steps}, in the middle of the stage" if step else f"{config.steps}, the stage's end",
        "starts from": config.starts_from or f"{config.model.tower} and {config.model.language_model}",
        "trains": ", ".join(config.trains) + (f" (LoRA of rank {config.lora.rank}, merged)" if config.lora else ""),
        "data": "; ".join(
            f"{phase.name}: " + ", ".join(f"{s.shards} (weight {s.weight:g})" for s in phase.data.sources)
            for phase in config.phases
        ),
    }
    if lines:
        facts["loss"] = (
            f"{lines[0]['loss']:.4g} at step {lines[0]['step']}, {lines[-1]['loss']:.4g} at {lines[-1]['step']}"
        )
        facts["tokens"] = f"{sum(line['tokens'] for line in lines):,.0f}"
        facts["frames"] = f"{sum(line['frames'] for line in lines):,.0f}"
    summary = stage / "summary.json"
    if step is None and summary.is_file():
        written = json.loads(summary.read_text())
        facts["parameters"] = (
            f"{written['total_parameters']:,}, of which {written['trained_parameters']:,} were trained"
        )
        facts["ranks"] = f"{written['ranks']}, {written['sequence_ranks']} of them to a row"
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in written["versions"].items())
    return facts
