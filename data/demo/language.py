"""What is said about a script: captions, conversations, subtitles, and plain text for the small language model.

The vocabulary is small and closed (a few hundred words), with two or three wordings of each thing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from .questions import (
    Question,
    independent,
    multiple_choice_prompt,
    needle_questions,
    position_question,
    script_questions,
    with_article,
)
from .script import Event, Needle, Number, Object, Script, event_script, generator, random_needle, still_script

PLACE_PHRASES = {
    "beach": "on the beach",
    "forest": "in the forest",
    "city": "in the city",
    "desert": "in the desert",
    "snow": "in the snow",
}
CAPTION_REQUESTS = (
    "Elaborate on the visual and narrative elements of the {medium} in detail.",
    "Describe the {medium}.",
    "What happens in the {medium}?",
)
POSITIONS = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")

Messages = list[dict[str, Any]]


def film_caption(script: Script, rng: random.Random) -> str:
    """The place and every event in order, e.g. "In the city, a red circle moves left. Then the number 7 appears." """
    assert script.place is not None
    opening = rng.choice((f"{PLACE_PHRASES[script.place].capitalize()}, ", f"The place is the {script.place}. "))
    happenings = [_happening(event) for event in script.events]
    link = rng.choice(("", "Then "))
    sentences = [happenings[0], *(f"{link}{happening}" for happening in happenings[1:])]
    text = " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)
    return opening + (text[0].lower() + text[1:] if opening.endswith(", ") else text)


def still_caption(script: Script, time: float, rng: random.Random) -> str:
    """One picture of a script, e.g. "In the city, a red circle is on the left." """
    event = script.events[0]
    what = event.what
    if isinstance(what, Needle):
        return _needle_statement(what)
    if isinstance(what, Number):
        clause = f"the number {what.value} appears"
    else:
        clause = f"{with_article(what.name)} is {position(event, time)}"
    assert script.place is not None
    place = PLACE_PHRASES[script.place]
    return rng.choice(
        (f"{place.capitalize()}, {clause}.", f"{clause[0].upper()}{clause[1:]}. The place is the {script.place}.")
    )


def position(event: Event, time: float) -> str:
    """Where an object is on its way, in one of POSITIONS."""
    assert isinstance(event.what, Object)
    progress = event.progress(time)
    if 0.25 < progress < 0.75:
        return "in the middle"
    forward = event.what.direction in ("right", "down")
    ends = (
        ("on the left", "on the right")
        if event.what.direction in ("left", "right")
        else ("at the top", "at the bottom")
    )
    return ends[forward == (progress >= 0.75)]


def caption_messages(caption: str, medium: str, rng: random.Random) -> Messages:
    """A request for a description, and it."""
    return _conversation([(rng.choice(CAPTION_REQUESTS).format(medium=medium), caption)], medium)


def question_messages(
    questions: list[Question], medium: str, rng: random.Random, limit: int = 3, subtitle_lines: str | None = None
) -> Messages:
    """Up to `limit` questions that do not answer each other, two of three with options, the others open."""
    turns = []
    for question in independent(questions, limit):
        if rng.random() < 0.67:
            turns.append((multiple_choice_prompt(question, medium), question.letter))
        else:
            turns.append((question.text, question.short_answer))
    if subtitle_lines:
        turns[0] = (f"This video's subtitles are listed below:\n{subtitle_lines}\n{turns[0][0]}", turns[0][1])
    return _conversation(turns, medium)


def needle_messages(needle: Needle, medium: str, rng: random.Random) -> Messages:
    """Questions about the card in the magenta frame."""
    return _conversation(needle_questions(needle, rng), medium)


def still_messages(script: Script, time: float, rng: random.Random) -> Messages:
    """A description of one picture (three of four: a small model must learn to read pictures), or questions."""
    event = script.events[0]
    if isinstance(event.what, Needle) and rng.random() < 0.8:
        return needle_messages(event.what, "image", rng)
    if isinstance(event.what, Needle) or rng.random() < 0.75:
        return caption_messages(still_caption(script, time, rng), "image", rng)
    questions = [q for q in script_questions(script, rng, "image") if q.task_type != "Action Recognition"]
    if isinstance(event.what, Object):
        questions.append(position_question(event.what, position(event, time), POSITIONS, rng))
        rng.shuffle(questions)
    return question_messages(questions, "image", rng)


def narration(script: Script, rng: random.Random) -> list[tuple[int, int, str]]:
    """(start, end, line), in seconds. It tells the place in one film of two, and nothing else that is asked."""
    spacing = max(2, script.seconds // 12)
    starts = range(0, script.seconds, spacing)
    lines = [_filler(rng) for _ in starts]
    if script.place and rng.random() < 0.5:
        lines[rng.randrange(len(lines))] = f"We are {PLACE_PHRASES[script.place]}."
    ends = [*starts[1:], script.seconds]
    return list(zip(starts, ends, lines, strict=True))


def subtitles(lines: list[tuple[int, int, str]]) -> str:
    """The narration as an SRT file."""
    blocks = (
        f"{k}\n{_srt_time(start)} --> {_srt_time(end)}\n{line}\n" for k, (start, end, line) in enumerate(lines, start=1)
    )
    return "\n".join(blocks)


def text_messages(rng: random.Random) -> Messages:
    """Questions about a written description, so that a language model learns to pick letters from text."""
    if rng.random() < 0.2:
        needle = random_needle(rng)
        turns = needle_questions(needle, rng)
        return _conversation([(f"{_needle_statement(needle)}\n{turns[0][0]}", turns[0][1]), *turns[1:]], "text")
    script = event_script(rng, rng.choice((10, 10, 60, 200)))
    messages = question_messages(script_questions(script, rng, "text"), "text", rng)
    messages[0]["content"] = f"{film_caption(script, rng)}\n{messages[0]['content']}"
    return messages


def texts(seed: int, count: int) -> Iterator[str]:
    """`count` short plain texts: descriptions, stories, questions with options, each pure in (seed, index)."""
    for index in range(count):
        rng = generator("text", seed, index)
        kind = rng.random()
        if kind < 0.25:
            yield film_caption(event_script(rng, rng.choice((10, 10, 60, 200))), rng)
        elif kind < 0.4:
            yield still_caption(*still_script(rng), rng)
        elif kind < 0.5:
            yield " ".join(_filler(rng) for _ in range(rng.randint(2, 5)))
        else:
            turns = text_messages(rng)
            yield "\n".join(
                f"{turn['content']} {answer['content']}" for turn, answer in zip(turns[::2], turns[1::2], strict=True)
            )


def long_text(rng: random.Random, num_words: int) -> str:
    """A story of about `num_words` words with two facts planted anywhere in it, asked for at its end."""
    needle = random_needle(rng, "number")
    script = event_script(rng, 10)
    facts = [_needle_statement(needle), film_caption(script, rng)]
    sentences: list[str] = []
    words = 0
    while words < num_words:
        sentences.append(_filler(rng))
        words += len(sentences[-1].split())
    for fact in facts:
        sentences.insert(rng.randint(0, len(sentences)), fact)
    questions = independent(script_questions(script, rng, "text"), 2)
    asked = [f"{multiple_choice_prompt(question, 'text')} {question.letter}" for question in questions]
    asked += [f"{question} {answer}" for question, answer in needle_questions(needle, rng)]
    rng.shuffle(asked)
    return "\n".join([" ".join(sentences), *asked])


def _conversation(turns: list[tuple[str, str]], medium: str) -> Messages:
    messages: Messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if medium != "text":
        messages[0]["content"] = [{"type": medium}, {"type": "text", "text": turns[0][0]}]
    return messages


def _happening(event: Event) -> str:
    if isinstance(event.what, Object):
        return f"{with_article(event.what.name)} moves {event.what.direction}"
    assert isinstance(event.what, Number)
    return f"the number {event.what.value} appears"


def _needle_statement(needle: Needle) -> str:
    content = needle.content
    shown = f"the number {content}" if isinstance(content, int) else with_article(" ".join(content))
    return f"The magenta frame shows {shown}."


def _filler(rng: random.Random) -> str:
    """A sentence that answers no question."""
    who = rng.choice(
        ("The rabbit", "A bird", "The squirrel", "A butterfly", "The old tree", "A quiet voice", "Someone")
    )
    does = rng.choice(("looks", "walks", "waits", "listens", "sleeps", "turns", "rests", "smiles"))
    how = rng.choice(
        ("slowly", "near the grass", "in the wind", "under the sky", "for a while", "again", "by the stones")
    )
    return f"{who} {does} {how}."


def _srt_time(seconds: int) -> str:
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02},000"
