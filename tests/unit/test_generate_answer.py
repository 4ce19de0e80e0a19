"""Answers: equal to Hugging Face's own greedy decoding, whatever the cache held before."""

from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from longvila.errors import DataError
from longvila.generate import answer as answering
from longvila.generate.answer import Answerer
from longvila.model import load_model, save_model
from longvila.model.chat import encode_prompt

from .eval_parts import tiny_answerer
from .model_parts import qwen3, random_frames


@pytest.fixture
def answerer(tmp_path: Path) -> Answerer:
    return tiny_answerer(tmp_path / "base")


def reference_answer(answerer: Answerer, frames: torch.Tensor, question: str, max_new_tokens: int) -> str:
    """What `generate` of transformers answers, from nothing."""
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    ids = torch.tensor([encode_prompt(answerer.tokenizer, messages, [len(frames)], 4)])
    stop = sorted(answerer._stop_ids - {None})
    new = answerer.model.generate(
        ids, frames, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    return str(answerer.tokenizer.decode(new[0], skip_special_tokens=True)).strip()


def sliding_window_model() -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(
        MistralConfig(vocab_size=259, num_key_value_heads=2, sliding_window=16, initializer_range=0.2, **sizes)
    )


def longrope_model():
    """Its angles change in a prompt of more than 60 tokens: one of the questions below is shorter."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0]}
    rope = {"rope_type": "longrope", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": 60}
    return qwen3(max_position_embeddings=480, rope_parameters={**rope, **factors})


def questions():
    """Frames and questions that share more or less with those before them."""
    frames = random_frames(6)
    other = frames.flip(0)
    return [
        (frames, "What is shown?"),
        (frames, "What is shown?"),  # the same again: all but the last token is shared
        (frames, "Which number comes first?"),  # shares the frames
        (torch.cat([frames[:3], other[:1], frames[3:]]), "Which number comes first?"),  # shares three frames
        (other, "What?"),  # shares nothing but the template
        (frames[:2], "What?"),
    ]


@pytest.mark.parametrize("make", [qwen3, sliding_window_model, longrope_model])
def test_answers_equal_those_of_transformers_whatever_was_asked_before(tmp_path, make, monkeypatch):
    monkeypatch.setattr(answering, "PREFILL_TOKENS", 7)
    answerer = tiny_answerer(tmp_path / "base", make())
    for shown, question in questions():
        assert answerer.answer(shown, question, 12) == reference_answer(answerer, shown, question, 12)


def test_frames_that_two_questions_share_go_through_the_model_once(answerer):
    tokens = answerer.encode(random_frames(50))
    seen = []
    hook = answerer.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs.get("inputs_embeds", kwargs.get("input_ids"))).shape[1]),
        with_kwargs=True,
    )
    answerer.answer(tokens, "First?", 1)
    first = sum(seen)
    seen.clear()
    answerer.answer(tokens, "Second?", 1)
    hook.remove()
    assert first > 200 > 40 > sum(seen)


def test_the_streamed_pieces_join_to_the_answer_and_no_piece_is_half_a_character(answerer):
    frames = random_frames(2)
    forced = iter([*answerer.tokenizer("né 漢")["input_ids"], answerer.tokenizer.eos_token_id])
    answerer._next_token = lambda **inputs: next(forced)
    assert list(answerer.stream(frames, "What?", 20)) == ["n", "é", " ", "漢"]


def test_an_answer_ends_at_any_special_token(answerer):
    forced = iter([*answerer.tokenizer("ok")["input_ids"], answerer.tokenizer.convert_tokens_to_ids("<|im_start|>"), 5])
    answerer._next_token = lambda **inputs: next(forced)
    assert answerer.answer(random_frames(1), "What?", 20) == "ok"


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(tmp_path):
    answerer = tiny_answerer(tmp_path / "base", qwen3(max_position_embeddings=100))
    with pytest.raises(DataError, match=r"\(30 frames of 4 tokens, and \d+ of text\).* context is 100 tokens"):
        answerer.answer(random_frames(30), "What?", 10)


def test_the_fingerprint_tells_weights_apart_and_does_not_depend_on_where_they_lie(tmp_path):
    first, again = tiny_answerer(tmp_path / "a"), tiny_answerer(tmp_path / "b")
    assert first.fingerprint == again.fingerprint
    with torch.no_grad():
        next(iter(again.model.projector.parameters())).add_(1e-3)
    assert first.fingerprint != Answerer(again.model, again.tokenizer).fingerprint


def test_a_model_in_bf16_keeps_its_rotary_frequencies_and_everything_it_computes_is_bf16(answerer, tmp_path):
    save_model(answerer.model, answerer.tokenizer, tmp_path / "saved")
    exact = Answerer(*load_model(tmp_path / "saved"))
    half = Answerer(*load_model(tmp_path / "saved", torch.bfloat16))
    assert {parameter.dtype for parameter in exact.model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    rounded, frequencies = (one.model.language_model.model.rotary_emb.inv_freq for one in (half, exact))
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, frequencies)

    frames, seen = random_frames(3), []
    half.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].dtype), with_kwargs=True
    )
    tokens = half.encode(frames)
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), exact.encode(frames), rtol=0.05, atol=0.05)
    half.answer(tokens, "What?", 1)
    assert seen == [torch.bfloat16]
    assert half.fingerprint != exact.fingerprint  # an answer of the one is not taken for the other's
