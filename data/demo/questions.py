"""Questions with four options about a script, in VideoMME's form, and the same questions with short answers.

Options are drawn so that text alone answers one in four: each right one looks like the wrong ones (four numbers; two
colours times two shapes; all four directions). Options stand in order, numbers by size and words by the alphabet, so
that the letter of what is right is uniform, and a model of a million parameters can learn some of it in minutes: where
"7" is right, C and D are likelier than A.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .draw import COLOURS, PLACES, SHAPES
from .script import DIRECTIONS, Needle, Object, Script

LETTERS = "ABCD"
INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the {medium}. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n"
)


@dataclass(frozen=True)
class Question:
    """One question about a video, an image or a text."""

    task_type: str
    """One of VideoMME's twelve."""
    text: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""
    asks: frozenset[str]
    """The facts its answer gives away; a question about one of them must not follow it in a conversation."""
    tells: frozenset[str]
    """The facts its wording gives away."""

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]

    @property
    def short_answer(self) -> str:
        return self.choices[self.answer]


def fixed_phrases() -> list[str]:
    """The sentences that every prompt with options repeats; a small tokenizer may give each one token."""
    return ["The best answer is:", *(INSTRUCTION.format(medium=medium) for medium in ("video", "image", "text"))]


def multiple_choice_prompt(question: Question, medium: str = "video") -> str:
    """VideoMME's prompt. The answer expected is one letter."""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{INSTRUCTION.format(medium=medium)}{question.text}\n{options}\nThe best answer is:"


def script_questions(script: Script, rng: random.Random, medium: str = "video") -> list[Question]:
    """Every question the script answers, in random order."""
    questions = [] if script.place is None else [_place(script.place, rng, medium)]
    if script.numbers:
        questions.append(_number(script, rng, medium))
    if script.objects:
        questions += [_first_object(script, rng, medium), *_one_object(rng.choice(script.objects), rng)]
    if script.objects and script.numbers:
        questions.append(_first_event(script, rng, medium))
    rng.shuffle(questions)
    return questions


def independent(questions: list[Question], limit: int) -> list[Question]:
    """The first `limit` questions whose answers cannot be read in the ones before them."""
    known: set[str] = set()
    chosen: list[Question] = []
    for question in questions:
        if len(chosen) < limit and not question.asks & known:
            chosen.append(question)
            known |= question.asks | question.tells
    return chosen


def needle_questions(needle: Needle, rng: random.Random) -> list[tuple[str, str]]:
    """(question, answer) pairs about the card in the magenta frame; mostly the colour first, which is learned last."""
    if isinstance(needle.content, int):
        return [("What number is in the magenta frame?", str(needle.content))]
    colour, shape = needle.content
    pairs = [
        ("What shape is in the magenta frame?", shape),
        ("What color is the shape in the magenta frame?", colour),
    ]
    return pairs[::-1] if rng.random() < 0.75 else pairs


def position_question(thing: Object, position: str, positions: tuple[str, ...], rng: random.Random) -> Question:
    """Where an object is in a single picture."""
    text = f"Where is the {thing.name}?"
    return _ask(rng, "Spatial Perception", text, position, list(positions), {"position"}, {thing.name})


def _ask(
    rng: random.Random, task: str, text: str, right: str, others: list[str], asks: set[str], tells: set[str]
) -> Question:
    choices = sorted([right, *rng.sample([other for other in others if other != right], 3)])
    return Question(task, text, tuple(choices), choices.index(right), frozenset(asks), frozenset(tells))


def _place(place: str, rng: random.Random, medium: str) -> Question:
    return _ask(rng, "Spatial Perception", f"Which place is in the {medium}?", place, list(PLACES), {"place"}, set())


def _number(script: Script, rng: random.Random, medium: str) -> Question:
    shown = [str(number.value) for number in script.numbers]
    which = rng.choice(("first", "last")) if len(shown) > 1 else f"in the {medium}"
    right = shown[-1] if which == "last" else shown[0]
    others = [str(value) for value in range(10) if str(value) not in shown]
    decoys = [value for value in shown if value != right] + rng.sample(others, 4 - len(shown))
    text = f"Which number appears {which}?"
    return _ask(rng, "OCR Problems", text, right, decoys, {"numbers"}, set())


def _first_object(script: Script, rng: random.Random, medium: str) -> Question:
    """Two colours times two shapes; with several objects, the pairs of the first and of a later one."""
    right, *later = script.objects
    if later:
        other = rng.choice(later)
        colour, shape, which = other.colour, other.shape, "first"
    else:
        colour = rng.choice([c for c in COLOURS if c != right.colour])
        shape = rng.choice([s for s in SHAPES if s != right.shape])
        which = f"in the {medium}"
    others = [f"{right.colour} {shape}", f"{colour} {right.shape}", f"{colour} {shape}"]
    others = [with_article(other) for other in others]
    names = {thing.name for thing in script.objects}
    text = f"Which object appears {which}?"
    return _ask(rng, "Object Recognition", text, with_article(right.name), others, names, set())


def _one_object(thing: Object, rng: random.Random) -> list[Question]:
    """Its direction, and its colour or its shape (each tells the other)."""
    direction = _ask(
        rng,
        "Action Recognition",
        f"In which direction does the {thing.name} move?",
        thing.direction,
        list(DIRECTIONS),
        {f"direction {thing.name}"},
        {thing.name},
    )
    colour = _ask(
        rng,
        "Attribute Perception",
        f"What color is the {thing.shape}?",
        thing.colour,
        list(COLOURS),
        {thing.name},
        {thing.name},
    )
    shape = _ask(
        rng,
        "Object Recognition",
        f"What shape is the {thing.colour} object?",
        thing.shape,
        list(SHAPES),
        {thing.name},
        {thing.name},
    )
    return [direction, colour, shape]


def _first_event(script: Script, rng: random.Random, medium: str) -> Question:
    """An object and a number that are shown, the one and the other not: which of the four comes first?"""
    thing, number = rng.choice(script.objects), rng.choice(script.numbers)
    order = [event.what for event in script.events]
    absent_number = rng.choice([v for v in range(10) if v not in {n.value for n in script.numbers}])
    taken = {o.colour for o in script.objects}, {o.shape for o in script.objects}
    colour, shape = (
        rng.choice([c for c in pool if c not in used]) for pool, used in zip((COLOURS, SHAPES), taken, strict=True)
    )
    shown = [with_article(thing.name), f"the number {number.value}"]
    right = shown[order.index(number) < order.index(thing)]
    others = [*shown, with_article(f"{colour} {shape}"), f"the number {absent_number}"]
    asks = {"order", "numbers", thing.name}
    text = f"Which of these comes first in the {medium}?"
    return _ask(rng, "Temporal Perception", text, right, others, asks, {"numbers", thing.name})


def with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
