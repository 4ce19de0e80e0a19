"""Chat messages to tokens: labels on the answers only, one token for each patch of a frame."""

from itertools import groupby

import pytest

from longvila.errors import ConfigError, DataError
from longvila.model.chat import encode_messages, encode_prompt, encode_text, prepare_tokenizer

from .model_parts import CHATML, byte_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which digit?"}]},
    {"role": "assistant", "content": "Sept, écrit 7."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": [{"type": "text", "text": "assistant\n8"}]},
]


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    prepare_tokenizer(tokenizer)
    return tokenizer


def runs_of_labels(tokenizer, labels):
    """The texts of the maximal runs of tokens that are targets."""
    runs, run = [], []
    for label in [*labels, -100]:
        if label != -100:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def test_labels_stand_on_each_answer_and_its_end_mark_only(tokenizer):
    ids, labels = encode_messages(tokenizer, CONVERSATION, frames=[3], tokens_per_frame=4)
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert runs_of_labels(tokenizer, labels) == ["Sept, écrit 7.<|im_end|>", "assistant\n8<|im_end|>"]


def test_the_frames_become_one_run_of_placeholders_where_the_video_was(tokenizer):
    frame = tokenizer.convert_tokens_to_ids("<frame>")
    ids, labels = encode_messages(tokenizer, CONVERSATION, frames=[3], tokens_per_frame=4)
    start = ids.index(frame)
    assert ids[start : start + 12] == [frame] * 12
    assert ids.count(frame) == 12
    assert tokenizer.decode(ids[:start]).endswith("<|im_start|>user\n")
    assert labels[start : start + 12] == [-100] * 12


def test_a_prompt_is_what_stands_before_the_answer_in_training(tokenizer):
    ids, labels = encode_messages(tokenizer, CONVERSATION[:3], [2], 4)
    prompt = encode_prompt(tokenizer, CONVERSATION[:2], [2], 4)
    first = next(index for index, label in enumerate(labels) if label != -100)
    assert prompt == ids[:first]


def test_plain_text_is_all_targets_and_ends_with_the_end_of_text(tokenizer):
    ids, labels = encode_text(tokenizer, "once upon a time")
    assert ids == labels
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "once upon a time"


def test_several_media_take_their_places_in_order(tokenizer):
    parts = [{"type": "video"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "text", "text": "or"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "the second"}]
    messages += [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a cat"}]
    frame = prepare_tokenizer(tokenizer)
    ids, labels = encode_messages(tokenizer, messages, [3, 1, 2], 4)
    runs = [len(list(run)) for is_frame, run in groupby(ids, lambda token: token == frame) if is_frame]
    assert runs == [12, 4, 8]
    single, single_labels = encode_messages(tokenizer, messages, [1, 1, 1], 1)
    assert [token for token in ids if token != frame] == [token for token in single if token != frame]
    assert [label for label in labels if label != -100] == [label for label in single_labels if label != -100]
    assert all(label == -100 for token, label in zip(ids, labels, strict=True) if token == frame)
    assert encode_prompt(tokenizer, messages[:1], [3, 1], 4).count(frame) == 16


def test_frames_need_exactly_one_place(tokenizer):
    text_only = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with pytest.raises(DataError, match="0 video or image parts for 1 videos and images"):
        encode_messages(tokenizer, text_only, [3], 4)
    with pytest.raises(DataError, match="1 video or image parts for 0 videos and images"):
        encode_messages(tokenizer, CONVERSATION, [], 4)
    twice = [CONVERSATION[1], *CONVERSATION[1:]]
    with pytest.raises(DataError, match="2 video or image parts"):
        encode_messages(tokenizer, twice, [3], 4)


def test_text_that_contains_the_reserved_word_is_refused(tokenizer):
    with pytest.raises(DataError, match="reserved word <frame>"):
        encode_messages(tokenizer, [{"role": "user", "content": "a <frame> b"}], [], 4)
    with pytest.raises(DataError, match="reserved word <frame>"):
        encode_text(tokenizer, "a <frame> b")


def test_a_template_that_rewrites_earlier_answers_is_refused_by_name():
    last_only = CHATML.replace(
        "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}(thinking){% endif %}{{ m.content }}"
    )
    tokenizer = byte_tokenizer(last_only)
    tokenizer.name_or_path = "some/tokenizer"
    prepare_tokenizer(tokenizer)
    with pytest.raises(ConfigError, match="some/tokenizer rewrites earlier messages"):
        encode_messages(tokenizer, CONVERSATION, [3], 4)
    _, labels = encode_messages(tokenizer, CONVERSATION[:3], [3], 4)  # a single answer is fine
    assert runs_of_labels(tokenizer, labels) == ["(thinking)Sept, écrit 7.<|im_end|>"]


def test_a_template_of_ones_own_takes_the_place_of_one_that_rewrites():
    thinking = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_tokenizer(thinking)
    prepare_tokenizer(tokenizer)
    with pytest.raises(ConfigError, match=r"rewrites earlier messages .* give another as model\.chat_template"):
        encode_messages(tokenizer, CONVERSATION, [3], 4)
    prepare_tokenizer(tokenizer, CHATML)
    _, labels = encode_messages(tokenizer, CONVERSATION, [3], 4)
    assert runs_of_labels(tokenizer, labels) == ["Sept, écrit 7.<|im_end|>", "assistant\n8<|im_end|>"]
    assert prepare_tokenizer(byte_tokenizer(None), CHATML) == 259


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("chat.jinja", r"model\.chat_template writes 'chat\.jinja' for .* without \['a question', 'its answer'\]"),
        ("{% for m in messages %}{{ m.content }", r"model\.chat_template: the chat template .* refuses"),
    ],
)
def test_a_template_of_ones_own_that_is_none_is_refused(template, words):
    with pytest.raises(ConfigError, match=words):
        prepare_tokenizer(byte_tokenizer(), template)


def test_messages_that_the_template_refuses_are_refused():
    tokenizer = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    prepare_tokenizer(tokenizer)
    with pytest.raises(DataError, match="roles must alternate"):
        encode_messages(tokenizer, CONVERSATION, [3], 4)


def test_a_tokenizer_that_cannot_be_used_is_refused():
    with pytest.raises(ConfigError, match="no chat template"):
        prepare_tokenizer(byte_tokenizer(chat_template=None))
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-text token"):
        prepare_tokenizer(tokenizer)


def test_the_frame_token_is_added_once():
    tokenizer = byte_tokenizer()
    first = prepare_tokenizer(tokenizer)
    assert prepare_tokenizer(tokenizer) == first == 259


def test_a_conversation_may_begin_with_an_answer(tokenizer):
    """As documents of text and images do: MMC4's."""
    document = [{"type": "image"}, {"type": "text", "text": "Lock it."}, {"type": "image"}]
    ids, labels = encode_messages(tokenizer, [{"role": "assistant", "content": document}], [1, 1], 2)
    assert tokenizer.decode(ids) == f"<|im_start|>assistant\n{'<frame>' * 2}\nLock it.\n{'<frame>' * 2}<|im_end|>\n"
    assert runs_of_labels(tokenizer, labels) == ["\nLock it.\n", "<|im_end|>"]
    greeting = {"role": "assistant", "content": "Hello."}
    ids, labels = encode_messages(tokenizer, [greeting, *CONVERSATION[1:3]], [1], 2)
    assert runs_of_labels(tokenizer, labels) == ["Hello.<|im_end|>", "Sept, écrit 7.<|im_end|>"]


def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    torn = "A cat \ud83d"
    with pytest.raises(DataError, match=r"half of a surrogate pair: '.ud83d'"):
        encode_text(tokenizer, torn)
    with pytest.raises(DataError, match="half of a surrogate pair"):
        encode_messages(tokenizer, [{"role": "user", "content": torn}], [], 2)
