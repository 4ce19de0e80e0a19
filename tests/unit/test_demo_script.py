"""The demo's scripts: what happens when is decided by (kind, seed, index) alone, and leaves no question open."""

import importlib

import pytest

script = importlib.import_module("longvila._content.data.demo.script")

LENGTHS = (4, 5, 10, 16, 20, 21, 60, 96, 128, 700, 1400)


def scripts(num_each: int = 20):
    for seconds in LENGTHS:
        for index in range(num_each):
            yield script.event_script(script.generator("test", seconds, index), seconds)


def test_a_script_depends_on_nothing_but_kind_seed_and_index():
    def write(kind, seed, index):
        return script.event_script(script.generator(kind, seed, index), 60)

    assert write("medium", 3, 5) == write("medium", 3, 5)
    others = [write("medium", 3, 6), write("medium", 4, 5), write("evaluation", 3, 5)]
    assert all(write("medium", 3, 5) != other for other in others)


def test_events_follow_one_another_inside_the_film():
    for film in scripts():
        edges = [0, *(edge for event in film.events for edge in (event.start, event.end)), film.seconds]
        assert edges == sorted(edges)
        assert all(event.end - event.start >= 2 for event in film.events)


def test_nothing_in_a_film_repeats():
    for film in scripts():
        for seen in (
            [o.colour for o in film.objects],
            [o.shape for o in film.objects],
            [n.value for n in film.numbers],
        ):
            assert len(seen) == len(set(seen)) > 0


@pytest.mark.parametrize("seconds", LENGTHS)
def test_few_frames_spread_over_a_film_see_every_event(seconds):
    num_frames = 4 if seconds <= 20 else 32 if seconds <= 120 else 128
    times = [(k + 0.5) * seconds / num_frames for k in range(num_frames)]
    for index in range(50):
        for write in (script.event_script, script.needle_script):
            film = write(script.generator("test", seconds, index), seconds)
            for event in film.events:
                assert any(event.start <= time < event.end for time in times)


@pytest.mark.parametrize("direction", ["left", "right", "up", "down"])
def test_an_object_moves_the_way_its_script_says(direction):
    thing = script.Object("red", "star", direction, 0.0, 50)
    (x0, y0), (x1, y1) = thing.centre(0.0), thing.centre(1.0)
    moved = {"left": x1 - x0, "right": x0 - x1, "up": y1 - y0, "down": y0 - y1}
    assert moved[direction] < -0.5
    assert sorted(map(abs, moved.values()))[:2] == [0, 0]


def test_a_needle_film_shows_one_needle_as_briefly_as_it_can():
    for seconds, shown in ((1, 1), (4, 1), (16, 4), (96, 3), (128, 1), (1400, 11)):
        for index in range(50):
            film = script.needle_script(script.generator("test", 0, index), seconds)
            (event,) = film.events
            assert film.place is None
            assert event.end - event.start == shown
            assert 0 <= event.start < event.end <= seconds
