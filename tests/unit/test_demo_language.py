"""The demo's captions, conversations, subtitles and texts say what their scripts say."""

import importlib
import itertools
import re

import pytest

script = importlib.import_module("longvila._content.data.demo.script")
language = importlib.import_module("longvila._content.data.demo.language")
draw = importlib.import_module("longvila._content.data.demo.draw")


def test_a_caption_names_every_fact_in_the_order_of_the_film():
    for index in range(200):
        rng = script.generator("test", 0, index)
        film = script.event_script(rng, (10, 60, 400)[index % 3])
        caption = language.film_caption(film, rng)
        assert all(fact in caption for fact in film.facts)
        names = [fact for fact in film.facts[1:] if not fact.startswith("moves")]
        places = [caption.index(name) for name in names]
        assert places == sorted(places), caption


def test_a_caption_names_nothing_that_is_not_in_the_film():
    for index in range(200):
        rng = script.generator("test", 1, index)
        film = script.event_script(rng, 60)
        words = set(re.findall(r"\w+", language.film_caption(film, rng)))
        shown = {w for fact in film.facts for w in fact.split()}
        everything = {*draw.COLOURS, *draw.SHAPES, *draw.PLACES, *script.DIRECTIONS, *map(str, range(10))}
        assert words & everything == shown & everything


@pytest.mark.parametrize(
    ("direction", "progress", "expected"),
    [
        ("left", 0.0, "on the right"),
        ("left", 0.9, "on the left"),
        ("right", 0.0, "on the left"),
        ("up", 0.9, "at the top"),
        ("down", 0.9, "at the bottom"),
        ("down", 0.5, "in the middle"),
    ],
)
def test_the_position_in_a_picture_follows_the_motion(direction, progress, expected):
    event = script.Event(script.Object("red", "star", direction, 0.0, 50), 10, 20)
    assert language.position(event, 10 + 10 * progress) == expected


def test_conversations_alternate_and_mark_their_medium_once():
    for index in range(200):
        rng = script.generator("test", 2, index)
        film, time = script.still_script(rng)
        messages = language.still_messages(film, time, rng)
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert messages[0]["content"][0] == {"type": "image"}
        assert all(isinstance(m["content"], str) and m["content"] for m in messages[1:])


def test_a_written_description_holds_the_answers_to_its_questions():
    for index in range(200):
        messages = language.text_messages(script.generator("test", 3, index))
        description = messages[0]["content"].split("\n")[0]
        for turn, answer in zip(messages[::2], messages[1::2], strict=True):
            said = answer["content"]
            if said in "ABCD":
                (said,) = re.findall(rf"^{said}\. (.*)$", turn["content"], re.MULTILINE)
            assert said.split()[-1] in re.findall(r"\w+", description)


def test_subtitles_are_srt_from_the_first_second_to_the_last():
    rng = script.generator("test", 4, 0)
    film = script.event_script(rng, 75)
    lines = language.narration(film, rng)
    assert lines[0][0] == 0
    assert lines[-1][1] == 75
    assert all(end == start for (_, end, _), (start, _, _) in itertools.pairwise(lines))
    text = language.subtitles(lines)
    assert text.startswith("1\n00:00:00,000 --> 00:00:06,000\n")
    assert "00:01:12,000 --> 00:01:15,000" in text


def test_texts_are_pure_in_seed_and_index():
    assert list(language.texts(0, 30)) == list(language.texts(0, 50))[:30]
    assert list(language.texts(0, 30)) != list(language.texts(1, 30))


def test_a_long_text_has_its_length_and_holds_its_answers():
    positions = []
    for index in range(50):
        text = language.long_text(script.generator("test", 5, index), 1000)
        story, *rest = text.split("\n")
        assert 1000 < len(story.split()) < 1040
        (answer,) = re.findall(r"What number is in the magenta frame\? (\d)", "\n".join(rest))
        positions.append(story.index(f"The magenta frame shows the number {answer}.") / len(story))
    assert min(positions) < 0.2
    assert max(positions) > 0.8
