"""Chat messages to token ids and labels, with the tokenizer's own chat template.

A video or image part of a message becomes one frame token per projected patch. Labels stand on the assistant's answers
only, found by character offsets in ONE rendering of the conversation, so that training sees exactly what the template
writes. Labels here are not shifted.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from longvila.errors import ConfigError, DataError
from longvila.model.loss import IGNORE

FRAME_TOKEN = "<frame>"

Messages = list[dict[str, Any]]


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> int:
    """Adds the frame token to `tokenizer` where it lacks it, and returns its id.

    Args:
        chat_template: replaces the tokenizer's own.

    Raises:
        ConfigError: the tokenizer has no chat template, no end-of-text token, or no character offsets; or
            `chat_template` does not write what messages say.
    """
    name = tokenizer.name_or_path
    if chat_template is not None:
        tokenizer.chat_template = chat_template
        _check_template(tokenizer)
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer {name} is a slow one without character offsets; convert it to a fast tokenizer")
    if not tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer {name} has no chat template; use an instruction-tuned model, or give model.chat_template"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {name} has no end-of-text token; set its eos_token")
    if FRAME_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([FRAME_TOKEN], special_tokens=True)
    return tokenizer.get_vocab()[FRAME_TOKEN]


class ChatEncoder:
    """Conversations and texts to token ids and labels, for one tokenizer and one number of tokens a frame."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens_per_frame: int) -> None:
        self.frame_token = prepare_tokenizer(tokenizer)
        self.tokens_per_frame = tokens_per_frame
        self._tokenizer = tokenizer

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides the tokens of a sample."""
        tokenizer = self._tokenizer
        backend: Any = tokenizer.backend_tokenizer  # pyright: ignore
        parts = (
            backend.to_str(), tokenizer.chat_template, str(tokenizer.special_tokens_map),
            self.tokens_per_frame, transformers.__version__, tokenizers.__version__,
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __call__(self, messages: Messages, text: str | None, frames: Sequence[int]) -> tuple[list[int], list[int]]:
        """See `encode_messages`; without messages, `encode_text`."""
        if messages:
            return encode_messages(self._tokenizer, messages, frames, self.tokens_per_frame)
        return encode_text(self._tokenizer, text or "")


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, frames: Sequence[int], tokens_per_frame: int
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels (the same ids inside the answers, -100 elsewhere; not shifted).

    `frames` says how many frames each video or image has that the messages mark, in order. An answer ends with what
    the template puts behind it (its end-of-turn token), without trailing white space.

    Raises:
        DataError: a message that cannot be rendered, or places for media other than `frames` says.
        ConfigError: the template rewrites earlier messages when later ones arrive.
    """
    messages = _flatten(messages, len(frames))
    text = _render(tokenizer, messages)
    answers = _answer_spans(tokenizer, messages, text)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    starts = [start for start, _ in encoding["offset_mapping"]]
    labels = [IGNORE] * len(ids)
    for start, end in answers:
        answer = slice(bisect_left(starts, start), bisect_left(starts, end))
        labels[answer] = ids[answer]
    return _expand(tokenizer, ids, labels, [count * tokens_per_frame for count in frames])


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, frames: Sequence[int], tokens_per_frame: int
) -> list[int]:
    """Token ids of a conversation up to where the assistant's next answer begins; `frames` as in `encode_messages`."""
    text = _render(tokenizer, _flatten(messages, len(frames)), add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return _expand(tokenizer, ids, ids, [count * tokens_per_frame for count in frames])[0]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of plain text, closed by the end-of-text token: every token is a target."""
    _check_text(text)
    ids = list(tokenizer(text)["input_ids"])
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids, list(ids)


def _flatten(messages: Messages, expected: int) -> Messages:
    """Messages whose content is plain text, with one FRAME_TOKEN where each media part was."""
    num_media = 0
    flat = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        lines = []
        for part in parts:
            if part["type"] in ("video", "image"):
                num_media += 1
                lines.append(FRAME_TOKEN)
            elif part["type"] == "text":
                _check_text(part["text"])
                lines.append(part["text"])
            else:
                raise DataError(f"a message part has the type {part['type']!r}; known are text, video and image")
        flat.append({**message, "content": "\n".join(lines)})
    if num_media != expected:
        raise DataError(f"the messages have {num_media} video or image parts for {expected} videos and images")
    return flat


def _check_text(text: str) -> None:
    if FRAME_TOKEN in text:
        raise DataError(f"a text contains the reserved word {FRAME_TOKEN}: {text[:80]!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"a text holds half of a surrogate pair: {text[error.start : error.start + 80]!a}") from error


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, **kwargs: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    except Exception as error:  # templates raise what they like, jinja2 errors among it
        raise DataError(f"the chat template of {tokenizer.name_or_path} refuses these messages: {error}") from None


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "its answer"}]
    try:
        text = _render(tokenizer, messages)
    except DataError as error:
        raise ConfigError(f"model.chat_template: {error}") from None
    if missing := [message["content"] for message in messages if message["content"] not in text]:
        raise ConfigError(
            f"model.chat_template writes {text[:80]!r} for a question and its answer, without {missing}; it must be "
            f"the text of a Jinja template, not the path of one"
        )


def _answer_spans(tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str) -> list[tuple[int, int]]:
    """Character ranges of the assistant's answers in `text`, the rendering of `messages`."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = (
            _render(tokenizer, messages[:index], add_generation_prompt=True) if index else _opening(tokenizer, message)
        )
        through = text if index + 1 == len(messages) else _render(tokenizer, messages[: index + 1])
        if not (through.startswith(before) and text.startswith(through)):
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path} rewrites earlier messages (message {index} reads "
                f"otherwise alone than in the conversation), so answers cannot be trained as they will be generated; "
                f"give another as model.chat_template, or conversations of one answer"
            )
        spans.append((len(before), len(through.rstrip())))
    return spans


def _opening(tokenizer: PreTrainedTokenizerBase, message: Mapping[str, Any]) -> str:
    """What the template puts before the content of a first message. (Templates refuse a conversation of no message.)"""
    one, other = (_render(tokenizer, [{**message, "content": content}]) for content in "01")
    same = next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return one[:same]


def _expand(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int], counts: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Repeats each frame placeholder as often as `counts` says."""
    frame_id: Any = tokenizer.convert_tokens_to_ids(FRAME_TOKEN)
    ids_, labels_, start = [], [], 0
    for count in counts:
        at = ids.index(frame_id, start)
        ids_ += [*ids[start:at], *[frame_id] * count]
        labels_ += [*labels[start:at], *[IGNORE] * count]
        start = at + 1
    return [*ids_, *ids[start:]], [*labels_, *labels[start:]]
