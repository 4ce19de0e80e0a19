"""Trains a small tokenizer and a small language model from nothing, on conversations and plain texts.

Base models only: language models with published weights never come here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from longvila.model.chat import FRAME_TOKEN, IGNORE, encode_messages, encode_text, prepare_tokenizer
from longvila.shards.sample import SourceSample
from longvila.train.scratch import FromScratch

PADDING, END = "<|endoftext|>", "<|im_end|>"
SPECIAL = (PADDING, "<|im_start|>", END, FRAME_TOKEN)
"""The first tokens of the vocabulary, in this order. END closes a turn and a text."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TURNS = ("<|im_start|>user\n", "<|im_start|>assistant\n")
"""Openings of turns, one token each."""

GROWING = 0.4
"""Share of the steps over which documents grow longer."""
ANSWER_WEIGHT = 2.0
"""Of the mean loss over answers, beside the mean over all tokens."""

Document = tuple[list[int], list[int]]
"""Token ids, and the same ids inside answers, -100 elsewhere."""


@dataclass(frozen=True)
class LanguageRecipe:
    """Size of a language model and how it is trained."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    num_documents: int
    steps: int
    batch_tokens: int
    matrix_rate: float
    other_rate: float
    """Learning rates of hidden matrices and of everything else."""


def train_tokenizer(texts: Iterable[str], vocabulary: int, phrases: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose digits stand alone, with a ChatML template and the frame token.

    Each of `phrases` is one token: sentences that every prompt repeats would otherwise be half of all tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING)
    fast.chat_template = CHAT_TEMPLATE
    fast.add_tokens([AddedToken(phrase, normalized=False) for phrase in (*TURNS, *phrases)])
    prepare_tokenizer(fast)
    return fast


def plain_text(sample: SourceSample) -> str:
    """What a tokenizer is trained on: a sample's words, without its template."""
    return "\n".join(message["content"] for message in sample.messages) or sample.metadata["text"]


def encode(tokenizer: PreTrainedTokenizerBase, sample: SourceSample) -> Document:
    """A sample without media as a document; a plain text has no answers."""
    if sample.messages:
        return encode_messages(tokenizer, sample.messages, (), 0)
    ids, _ = encode_text(tokenizer, sample.metadata["text"])
    return ids, [IGNORE] * len(ids)


def pretrain(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    recipe: LanguageRecipe,
    seed: int,
    report: Callable[[int, float], None],
) -> tuple[Qwen3ForCausalLM, dict[str, Any]]:
    """Trains a Qwen3 model on every token, and on answers more.

    Args:
        report: called with (step, loss of the answers) after each step.

    Returns:
        The model, and figures: parameters, tokens seen, first and last loss of the answers.
    """
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=3 * recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.hidden // recipe.heads,
            tie_word_embeddings=True,
            initializer_range=recipe.hidden**-0.5,  # 0.02, the default, is for widths of thousands
            eos_token_id=SPECIAL.index(END),
            pad_token_id=SPECIAL.index(PADDING),
            bos_token_id=None,
        )
    )
    optimizer = FromScratch(model, recipe.steps, recipe.matrix_rate, recipe.other_rate)
    losses: list[float] = []
    num_tokens = 0
    batches = growing_batches(documents, recipe.batch_tokens, recipe.steps, seed)
    for step, batch in enumerate(batches, start=1):
        ids, targets, is_answer = collate(batch)
        every = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), targets.flatten(), reduction="none")
        answers = every[is_answer.flatten()].sum() / is_answer.sum().clamp(min=1)
        loss = ANSWER_WEIGHT * answers + every[targets.flatten() != IGNORE].mean()
        optimizer.step(loss)
        losses.append(answers.item())
        num_tokens += ids.numel()
        report(step, losses[-1])
    last = losses[-20:]
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": recipe.steps,
        "tokens": num_tokens,
        "first_loss": losses[0],
        "last_loss": sum(last) / len(last),
    }
    return model.eval(), figures


@torch.no_grad()
def answer_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> dict[str, float]:
    """Share of answers predicted right in every token: those that are one letter ("letter") and the others ("open")."""
    letters = {tokenizer.get_vocab()[letter] for letter in "ABCD"}
    right: dict[str, list[bool]] = {"letter": [], "open": []}
    for ids, labels in documents:
        predicted = model(input_ids=torch.tensor([ids])).logits[0, :-1].argmax(-1).tolist()
        start = 1
        while start < len(ids):
            end = start
            while end < len(ids) and labels[end] != IGNORE:
                end += 1
            if end > start:
                kind = "letter" if ids[start] in letters and end - start == 2 else "open"
                right[kind].append(predicted[start - 1 : end - 1] == labels[start:end])
            start = end + 1
    return {kind: sum(hits) / max(1, len(hits)) for kind, hits in right.items()}


def growing_batches(documents: Sequence[Document], tokens: int, steps: int, seed: int) -> Iterator[list[Document]]:
    """`steps` batches of documents of nearly one length, at most `tokens` tokens with their padding.

    For the first GROWING share of the steps there are conversations only, the shortest tenth at first, then longer and
    longer ones: a small model learns to copy an answer from a short text, and only then to find one among options.
    Started on everything (with AdamW), letters stayed at chance for a million tokens.
    """
    rng = random.Random(seed)
    everything = sorted(documents, key=lambda document: len(document[0]))
    conversations = [document for document in everything if any(label != IGNORE for label in document[1])]
    for step in range(steps):
        grown = step / (GROWING * steps)
        pool = everything if grown >= 1 else conversations[: math.ceil(len(conversations) * (0.1 + 0.9 * grown))]
        last = rng.randrange(len(pool))
        count = max(1, tokens // len(pool[last][0]))
        yield pool[max(0, last + 1 - count) : last + 1]


def collate(documents: Sequence[Document]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, next tokens, whether they belong to an answer), each (batch, longest). Padding follows the text, where
    causal attention cannot see it, and is no target."""
    longest = max(len(ids) for ids, _ in documents)
    ids = torch.zeros((len(documents), longest), dtype=torch.long)
    targets = torch.full_like(ids, IGNORE)
    is_answer = torch.zeros_like(ids, dtype=torch.bool)
    for row, (tokens, labels) in enumerate(documents):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        targets[row, : len(tokens) - 1] = torch.tensor(tokens[1:])
        is_answer[row, : len(tokens) - 1] = torch.tensor(labels[1:]) != IGNORE
    return ids, targets, is_answer
