"""What happens in a demo film, decided before a pixel is drawn: the truth that captions and questions come from.

A script is a pure function of (kind, seed, index). Events take turns, on whole seconds, so sampling at one frame a
second sees each of them; colours, shapes and numbers do not repeat within a film, so every question has one answer.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Literal

from .draw import CARD_SIZE, COLOURS, OBJECT_SIZE, PLACES, SHAPES

DIRECTIONS = ("left", "right", "up", "down")
SEEN_BY = {20: 4, 120: 32}
"""Films of up to this many seconds: so many frames, spread evenly, see every event. Longer films: SEEN_BY_LONG."""
SEEN_BY_LONG = 128

Centre = tuple[float, float]


@dataclass(frozen=True)
class Object:
    """A coloured shape that crosses the frame."""

    colour: str
    shape: str
    direction: str
    offset: float
    """Distance of its track from the usual one, as a share of the frame."""
    size: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def centre(self, progress: float) -> Centre:
        """Where it is after `progress` (0 to 1) of its event: (x, y) as shares of the frame."""
        along = 0.16 + 0.68 * (1 - progress if self.direction in ("left", "up") else progress)
        return (along, 0.38 + self.offset) if self.direction in ("left", "right") else (0.5 + 2 * self.offset, along)


@dataclass(frozen=True)
class Number:
    """A digit on a white card."""

    value: int
    centre: Centre
    size: int


@dataclass(frozen=True)
class Needle:
    """A picture framed in magenta, with a number or a (colour, shape) on its card."""

    content: int | tuple[str, str]
    centre: Centre
    size: int


@dataclass(frozen=True)
class Event:
    """One thing on screen during start <= t < end, in whole seconds."""

    what: Object | Number | Needle
    start: int
    end: int

    def progress(self, time: float) -> float:
        """0 at the first frame, 1 at the end."""
        return (time - self.start) / (self.end - self.start)


@dataclass(frozen=True)
class Script:
    """A film in words."""

    seconds: int
    place: str | None
    """Whose scenery is seen all through the film; None in a needle film, which is bare film but for its needle."""
    events: tuple[Event, ...]
    """In order of time, never overlapping."""

    @property
    def objects(self) -> list[Object]:
        return [event.what for event in self.events if isinstance(event.what, Object)]

    @property
    def numbers(self) -> list[Number]:
        return [event.what for event in self.events if isinstance(event.what, Number)]

    @property
    def facts(self) -> list[str]:
        """The strings a caption is checked for, e.g. ["city", "red circle", "moves left", "number 7"]."""
        facts = [self.place] if self.place else []
        for event in self.events:
            if isinstance(event.what, Object):
                facts += [event.what.name, f"moves {event.what.direction}"]
            elif isinstance(event.what, Number):
                facts.append(f"number {event.what.value}")
        return list(dict.fromkeys(facts))  # two objects may move the same way


def generator(kind: str, seed: int, index: int) -> random.Random:
    """The random numbers of one thing, the same on every machine and independent of every other (kind, seed, index)."""
    return random.Random(f"{kind}/{seed}/{index}")


def random_needle(rng: random.Random, content: Literal["number", "shape"] | None = None) -> Needle:
    """A needle with a number or a coloured shape, either at equal chance when `content` is None."""
    content = content or rng.choice(("number", "shape"))
    value = rng.randrange(10) if content == "number" else (rng.choice(list(COLOURS)), rng.choice(SHAPES))
    return Needle(value, (rng.uniform(0.44, 0.56), rng.uniform(0.44, 0.56)), rng.randint(70, 82))


def event_script(rng: random.Random, seconds: int) -> Script:
    """One object and one number in films up to 20 s, two of each up to 120 s, three in longer ones, in random order."""
    pairs = 1 if seconds <= 20 else 2 if seconds <= 120 else 3
    colours, shapes = rng.sample(list(COLOURS), pairs), rng.sample(SHAPES, pairs)
    things: list[Object | Number] = [
        Object(colour, shape, rng.choice(DIRECTIONS), rng.uniform(-0.06, 0.06), OBJECT_SIZE + rng.randint(-4, 4))
        for colour, shape in zip(colours, shapes, strict=True)
    ]
    for value in rng.sample(range(10), pairs):
        centre = (rng.uniform(0.32, 0.68), rng.uniform(0.33, 0.42))
        things.append(Number(value, centre, CARD_SIZE + rng.randint(-4, 4)))
    rng.shuffle(things)
    return Script(seconds, rng.choice(PLACES), _spread(rng, things, seconds))


def needle_script(rng: random.Random, seconds: int) -> Script:
    """Bare film with one needle anywhere, shown as briefly as `shortest_event` allows."""
    length = shortest_event(seconds)
    start = rng.randint(0, seconds - length)
    return Script(seconds, None, (Event(random_needle(rng), start, start + length),))


def shortest_event(seconds: int) -> int:
    """Seconds that something must be shown, lest few frames, spread evenly over the film, miss it."""
    frames = next((frames for longest, frames in SEEN_BY.items() if seconds <= longest), SEEN_BY_LONG)
    return math.ceil(seconds / frames)


def still_script(rng: random.Random) -> tuple[Script, float]:
    """(script, time) of a single picture: an object on its way, a number, or a needle."""
    if rng.random() < 0.25:
        return needle_script(rng, 1), 0.0
    script = event_script(rng, 12)
    is_object = rng.random() < 0.6
    (event,) = [e for e in script.events if isinstance(e.what, Object) == is_object]
    progress = rng.choice((0.0, 0.5, 0.99)) + rng.uniform(-0.1, 0.1)
    time = event.start + min(max(progress, 0.0), 0.99) * (event.end - event.start)
    return replace(script, events=(event,)), time


def _spread(rng: random.Random, things: list[Object | Number], seconds: int) -> tuple[Event, ...]:
    """Gives each thing its own stretch of the film, and a place and length inside it."""
    events = []
    for k, thing in enumerate(things):
        first, last = seconds * k // len(things), seconds * (k + 1) // len(things)
        wanted = rng.randint(4, 6) if isinstance(thing, Object) else rng.randint(3, 4)
        length = min(max(wanted, shortest_event(seconds)), last - first)
        start = rng.randint(first, last - length)
        events.append(Event(thing, start, start + length))
    return tuple(events)
