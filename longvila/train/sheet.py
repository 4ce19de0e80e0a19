"""A contact sheet of packed rows as the model will see them: frames, tokens, and which tokens are targets."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from longvila.config import DataConfig
from longvila.errors import ConfigError
from longvila.model.chat import ChatEncoder, prepare_tokenizer
from longvila.shards import Row, RowLoader
from longvila.shards.document import IGNORE
from longvila.shards.order import Cursor


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one kind."""

    kind: str
    """`frames`, `target` (the loss counts them), or `context`."""
    count: int
    text: str
    """What they decode to; empty for frames."""


@dataclass(frozen=True)
class Card:
    """One document of a row."""

    key: str
    tokens: int
    targets: int
    frames: tuple[str, ...]
    """Data URIs of its pictures."""
    runs: tuple[Run, ...]
    fault: str
    """Why it could not be read or decoded, if so."""


def write_sheet(
    path: Path,
    data: DataConfig,
    root: Path,
    tokenizer_name: str,
    tokens_per_frame: int,
    image_size: int,
    rows: int,
    chat_template: str | None = None,
) -> tuple[int, int]:
    """Writes the first `rows` rows of `data` to `path`, and returns how many rows and documents that are.

    Args:
        tokenizer_name: a language model or a finished stage, by folder or hub name; its tokenizer has a chat template.
        tokens_per_frame: what the model makes of one frame.
        chat_template: in place of the tokenizer's own.

    Raises:
        ConfigError: a tokenizer that cannot be loaded or used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer can be loaded from '{tokenizer_name}' ({error})") from error
    prepare_tokenizer(tokenizer, chat_template)
    loader = RowLoader(data, root, ChatEncoder(tokenizer, tokens_per_frame), image_size)
    shown = [row for row, _ in islice(loader.rows(Cursor()), rows) if row is not None]
    sheet = [make_cards(row, tokenizer, loader.encode.frame_token) for row in shown]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("sheet.html.j2").render(
        rows=sheet, row_tokens=data.row_tokens, bad=loader.bad, sources=[source.shards for source in data.sources]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return len(sheet), sum(map(len, sheet))


def make_cards(row: Row, tokenizer: PreTrainedTokenizerBase, frame_token: int) -> list[Card]:
    """The documents of a row whose frames are all here."""
    cards = []
    frames = iter(row.frames)
    faults = dict(row.failed)
    pieces = zip(row.keys, row.input_ids.split(row.lengths), row.labels.split(row.lengths), row.num_frames, strict=True)
    for number, (key, ids, labels, num_frames) in enumerate(pieces):
        # labels[i] is the target AFTER token i: the token itself is a target where the label before it stands.
        is_target = [False, *(labels[:-1] != IGNORE).tolist()]
        kinds = [
            "frames" if token == frame_token else "target" if target else "context"
            for token, target in zip(ids.tolist(), is_target, strict=True)
        ]
        runs, start = [], 0
        for kind, group in groupby(kinds):
            count = len(list(group))
            text = "" if kind == "frames" else str(tokenizer.decode(ids[start : start + count]))
            runs.append(Run(kind, count, text))
            start += count
        pictures = tuple(_data_uri(next(frames)) for _ in range(num_frames))
        cards.append(Card(key, len(ids), sum(is_target), pictures, tuple(runs), faults.get(number, "")))
    return cards


def _data_uri(frame: Tensor) -> str:
    file = io.BytesIO()
    picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
    picture.thumbnail((160, 160))
    picture.save(file, "jpeg", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
