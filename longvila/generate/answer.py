"""Answers to questions about frames: greedy decoding with a K/V cache that outlives one question.

The cache of the last prompt is kept and cut back to what the next prompt shares with it. Questions about one film, and
needles in one haystack, then pay for the shared frames once; the rest of a prompt goes through the model in chunks,
which bounds the memory of a prompt of many thousand tokens. Neither changes an answer beyond rounding.

Hugging Face's `generate` recomputes a prompt given as embeddings, does not chunk it, and streams from a second thread,
so the loop here is its own.

Prompts longer than one device holds are shared by the ranks of a sequence group (`parallel/cache.py`): each decodes and
encodes its share of the frames, and holds its share of the keys and values. All of them are asked the same, and all
have the answer. The weights, the frame tokens and the prompt's embeddings are whole on each.

Shapes: F frames, T tokens per frame, S pixels along a side of a frame, N tokens of a prompt, D width.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from longvila.apply import apply_cache
from longvila.errors import ConfigError, DataError, LongvilaError
from longvila.model.chat import encode_prompt
from longvila.model.vlm import LongVilaModel
from longvila.parallel.batch import even_share
from longvila.parallel.cache import ShardedCache
from longvila.parallel.tensor import gather_tokens

ENCODE_FRAMES = 32
"""Frames that go through the tower together."""
PREFILL_TOKENS = 1024
"""Tokens of a prompt that go through the language model together, on each rank."""

T = TypeVar("T")
Film = tuple[int, Callable[[int, int], Tensor]]
"""Number of frames, and what decodes some of them: (first, last + 1) -> uint8 (F, 3, S, S)."""


class Answerer:
    """A model that answers questions, one after the other. Not safe for threads: the cache is shared."""

    def __init__(
        self, model: LongVilaModel, tokenizer: PreTrainedTokenizerBase, group: dist.ProcessGroup | None = None
    ):
        """
        Args:
            group: ranks that share each prompt, the model whole on each. They make the same calls.

        Raises:
            ConfigError: prompts of this model cannot be shared.
        """
        self.model = model.eval()
        self._group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.group_rank, self._num_ranks = 0, 1
        if self._group is not None:
            self.group_rank, self._num_ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
            if model.device.type == "cuda" and model.dtype not in (torch.bfloat16, torch.float16):
                raise ConfigError(
                    f"prompts that ranks share go through flash attention, which takes bf16 or fp16 on a GPU, not "
                    f"{model.dtype}; give --dtype bf16"
                )
            apply_cache(model.language_model, self._num_ranks)
        self.tokenizer = tokenizer
        language_model = model.language_model
        self._device = language_model.get_input_embeddings().weight.device
        self._text_config = language_model.config.get_text_config()
        # transformers renamed this argument in 5.20; the old name warns now and goes away later.
        parameters = inspect.signature(language_model.forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._stop_ids = self._find_stop_ids()
        self._cache: DynamicCache | ShardedCache | None = None
        self._cached_embeddings: Tensor | None = None
        self.was_cut = False
        """Whether the last answer ended because it may be no longer, not at a special token."""

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights and the chat template: equal for equal models, wherever they are stored."""
        digest = hashlib.sha256(str(self.tokenizer.chat_template).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def encode(self, frames: Tensor) -> Tensor:
        """Frame tokens (F, T, D) of uint8 frames (F, 3, S, S)."""
        return self.encode_film(lambda: (len(frames), lambda start, stop: frames[start:stop]))

    def encode_film(self, open_film: Callable[[], Film]) -> Tensor:
        """Frame tokens (F, T, D) of a film; the ranks of a group share out its frames, and all have all tokens.

        Raises:
            DataError: what opening and decoding raise, on every rank; or ranks see other numbers of frames.
        """
        if self._group is None:
            count, decode = open_film()
            return self._encode(decode(0, count))
        tokens, outcome = None, None
        try:
            count, decode = open_film()
            mine = even_share(count, self.group_rank, self._num_ranks)
            outcome = count
            if mine:
                tokens = self._encode(decode(mine.start, mine.stop))
        except DataError as error:
            outcome = error
        outcomes: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(outcomes, outcome, group=self._group)
        for each in outcomes:
            if isinstance(each, DataError):
                raise each
        if len(set(outcomes)) > 1:
            raise DataError(f"ranks that share a film found {outcomes} frames in it; they must read the same file")
        if tokens is None:
            size = self.model.vision.image_size
            tokens = self._encode(torch.zeros((1, 3, size, size), dtype=torch.uint8))[:0]
        counts = [len(even_share(outcomes[0], rank, self._num_ranks)) for rank in range(self._num_ranks)]
        with torch.inference_mode():
            return gather_tokens(tokens, counts, self._group, "frames")

    def on_first(self, ask: Callable[[], T]) -> T:
        """What `ask` returns on the first rank of the group, on every rank; or the LongvilaError it raises there."""
        if self._group is None:
            return ask()
        said: list[Any] = [None]
        if self.group_rank == 0:
            try:
                said = [ask()]
            except LongvilaError as error:
                said = [error]
        dist.broadcast_object_list(said, group=self._group, group_src=0)
        if isinstance(said[0], LongvilaError):
            raise said[0]
        return said[0]

    @torch.inference_mode()
    def _encode(self, frames: Tensor) -> Tensor:
        return torch.cat([self.model.encode_frames(part.to(self._device)) for part in frames.split(ENCODE_FRAMES)])

    def answer(self, frames: Tensor, question: str, max_new_tokens: int) -> str:
        """The whole answer of `stream`, without surrounding white space."""
        return "".join(self.stream(frames, question, max_new_tokens)).strip()

    def stream(self, frames: Tensor, question: str, max_new_tokens: int) -> Iterator[str]:
        """Pieces of the answer, as they come.

        Args:
            frames: uint8 frames (F, 3, S, S), or their tokens (F, T, D) from `encode` or `encode_film`; F >= 1.
            question: goes after the frames, in one user message.
            max_new_tokens: the answer ends there, or at any special token (end of turn, end of text).

        Raises:
            DataError: the prompt and the answer do not fit into the model's context, or the question is unusable.
        """
        tokens = self.encode(frames) if frames.dtype == torch.uint8 else frames
        messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
        ids = encode_prompt(self.tokenizer, messages, [tokens.shape[0]], tokens.shape[1])
        self._check_length(len(ids), max_new_tokens, *tokens.shape[:2])
        answer: list[int] = []
        text = shown = ""
        for token in self._decode(ids, tokens, max_new_tokens):
            answer.append(token)
            text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
            if not text.endswith("\ufffd"):  # half of a character: the next token may complete it
                yield text[len(shown) :]
                shown = text
        if text != shown:
            yield text[len(shown) :]

    def _check_length(self, num_prompt: int, max_new_tokens: int, num_frames: int, tokens_per_frame: int) -> None:
        context = self._text_config.max_position_embeddings
        if num_prompt + max_new_tokens > context:
            num_frame_tokens = num_frames * tokens_per_frame
            raise DataError(
                f"the prompt has {num_prompt} tokens ({num_frames} frames of {tokens_per_frame} tokens, and "
                f"{num_prompt - num_frame_tokens} of text) and the answer may have {max_new_tokens}, but the model's "
                f"context is {context} tokens; give fewer frames or a shorter question"
            )

    @torch.inference_mode()
    def _next_token(self, **inputs: Tensor) -> int:
        """Runs tokens through the language model, appends them to the cache, and returns the likeliest next id."""
        if isinstance(self._cache, ShardedCache):
            return self._next_shared_token(self._cache, **inputs)
        kwargs = {**inputs, self._cache_argument: self._cache}
        output = self.model.language_model(use_cache=True, logits_to_keep=1, **kwargs)
        return int(output.logits[0, -1].argmax())

    def _next_shared_token(self, cache: ShardedCache, **inputs: Tensor) -> int:
        start, count = cache.length, next(iter(inputs.values())).shape[1]
        mine = cache.begin(count) or range(start, start + 1)  # where there is nothing to do, any token will do
        local = {name: x[:, mine.start - start : mine.stop - start] for name, x in inputs.items()}
        positions = torch.arange(mine.start, mine.stop, device=self._device)[None]
        output = self.model.language_model(
            **local, position_ids=positions, plan=cache, use_cache=False, logits_to_keep=1
        )
        token = torch.zeros(1, dtype=torch.long, device=self._device)
        last = self._num_ranks - 1
        if self.group_rank == last:
            token[0] = output.logits[0, -1].argmax()
        dist.broadcast(token, group=self._group, group_src=last)
        return int(token)

    def _decode(self, ids: list[int], tokens: Tensor, max_new_tokens: int) -> Iterator[int]:
        """Ids of the answer, greedily, without the token that ended it."""
        self.was_cut = False
        input_ids = torch.tensor([ids], device=self._device)
        with torch.inference_mode():
            embeddings = self.model.embed(input_ids, tokens.to(self._device))
        num_cached = self._rewind(embeddings[0])
        chunk = PREFILL_TOKENS * self._num_ranks if self._positions_are_fixed() else len(ids)
        token = -1
        for part in embeddings[:, num_cached:].split(chunk, dim=1):
            token = self._next_token(inputs_embeds=part)
        self._cached_embeddings = embeddings[0]
        for step in range(max_new_tokens):
            if token in self._stop_ids:
                return
            yield token
            if step + 1 < max_new_tokens:
                token = self._next_token(input_ids=torch.tensor([[token]], device=self._device))
        self.was_cut = True

    def _rewind(self, embeddings_ND: Tensor) -> int:
        """Cuts the cache back to the tokens it shares with a new prompt, and returns how many those are (< N)."""
        cache, before = self._cache, self._cached_embeddings
        self._cached_embeddings = None  # set again once the new prompt is in the cache, whatever happens until then
        if cache is None or before is None or not self._can_rewind(cache):
            self._cache = ShardedCache(self._group) if self._group else DynamicCache(config=self._text_config)
            return 0
        num_common = min(len(before), len(embeddings_ND) - 1)  # the last token always runs: its logits are needed
        differs = (before[:num_common] != embeddings_ND[:num_common]).any(dim=-1)
        num_shared = int(differs.int().argmax()) if bool(differs.any()) else num_common
        cache.crop(num_shared if isinstance(cache, ShardedCache) else num_shared - cache.get_seq_length())
        return num_shared

    def _can_rewind(self, cache: DynamicCache | ShardedCache) -> bool:
        """Whether every layer can forget its last tokens (sliding windows and recurrent states cannot)."""
        if isinstance(cache, ShardedCache):
            return True
        return self._positions_are_fixed() and all(type(layer) is DynamicLayer for layer in cache.layers)

    def _positions_are_fixed(self) -> bool:
        """Whether a position is rotated by the same angle in every prompt: LongRoPE has other angles for long ones.

        ("dynamic" scaling has, too, but only past the context, which is refused.)
        """
        # One set of parameters, or one for each kind of layer.
        return "longrope" not in str(getattr(self._text_config, "rope_parameters", None))

    def _find_stop_ids(self) -> set[int]:
        """Every special token ends an answer, and so does what the checkpoint's generation settings name."""
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        named = self.model.language_model.generation_config.eos_token_id
        return special | set(self.tokenizer.all_special_ids) | set(named if isinstance(named, list) else [named])
