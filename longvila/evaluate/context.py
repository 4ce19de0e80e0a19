"""Whether the frames a benchmark shows fit into the model's context, said before the first question is asked.

A prompt that is too long costs its answer, and a film's length decides which prompts those are: a benchmark that shows
too many frames would lose its long films one by one, and score the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longvila.errors import ConfigError, DataError
from longvila.evaluate.request import Request
from longvila.generate.answer import Answerer
from longvila.model.chat import encode_prompt


def check_frames_fit(
    requests: Sequence[Request], answerer: Answerer, ask: Callable[..., Any], options: Mapping[str, Any]
) -> None:
    """Raises ConfigError where prompts are longer than the model's context, and fewer frames would make them fit.

    A prompt whose words leave no room for a single frame is not counted: it costs its own answer only.

    Args:
        ask: the benchmark's function that made `requests`, and `options` what it was given.
    """
    per_frame = answerer.model.projector.tokens_per_frame
    context = answerer.model.language_model.config.get_text_config().max_position_embeddings
    words = {question: _num_words(answerer, question) for question in {request.question for request in requests}}
    room = {request.id: context - words[request.question] - request.max_new_tokens for request in requests}
    too_long = [request for request in requests if 1 <= room[request.id] // per_frame < len(request.frames)]
    if not too_long:
        return
    longest = max(len(request.frames) for request in too_long)
    most = min(room[request.id] // per_frame for request in too_long)
    raise ConfigError(
        f"{len(too_long)} of {len(requests)} prompts are too long for the model: they show up to {longest} frames of "
        f"{per_frame} tokens, but beside its words and its answer each can have {most} in the model's context of "
        f"{context} tokens; {_way_out(most, longest, ask, options)}"
    )


def _num_words(answerer: Answerer, question: str) -> int:
    """Tokens of a prompt that are no frame's."""
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    try:
        return len(encode_prompt(answerer.tokenizer, messages, [0], 1))
    except DataError:  # told again where it is asked, with the reason
        return 0


def _way_out(most: int, longest: int, ask: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """What to give instead: `frames` is the most of any film, a list of lengths, or no option of this benchmark."""
    parameter = inspect.signature(ask).parameters.get("frames")
    asked = options.get("frames", parameter.default) if parameter else None
    if isinstance(asked, int):
        return f"give -o frames={most}"
    lengths = asked if isinstance(asked, tuple | list) else ()
    largest = most - max(longest - max(lengths, default=longest), 0)  # a needle is one more than its haystack has
    if not lengths or largest < 1:
        return f"show at most {most} in each"
    lengths = [length for length in lengths if length <= largest] or [largest]
    return f"give lengths of up to {largest}: -o frames={','.join(map(str, lengths))}"
