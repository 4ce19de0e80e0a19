"""The demo's questions: one right choice, no help from the text alone, no answer in an earlier turn."""

import collections
import importlib
import re

script = importlib.import_module("longvila._content.data.demo.script")
questions = importlib.import_module("longvila._content.data.demo.questions")


def asked(num_films: int = 400):
    """(script, question) for every question about films of three lengths."""
    for index in range(num_films):
        rng = script.generator("test", 1, index)
        film = script.event_script(rng, (10, 60, 400)[index % 3])
        yield from ((film, question) for question in questions.script_questions(film, rng))


def is_true(film, question, choice: str) -> bool:
    """Whether the script makes `choice` a right answer, found without the code that wrote the question."""
    order = [event.what for event in film.events]
    words = choice.split()
    match question.task_type:
        case "Spatial Perception":
            return choice == film.place
        case "OCR Problems":
            shown = [str(n.value) for n in film.numbers]
            return choice == shown[-1 if "last" in question.text else 0]
        case "Action Recognition":
            (thing,) = [o for o in film.objects if o.name in question.text]
            return choice == thing.direction
        case "Attribute Perception":
            (thing,) = [o for o in film.objects if o.shape in question.text]
            return choice == thing.colour
        case "Temporal Perception":
            shown = [f"number {o.value}" if isinstance(o, script.Number) else o.name for o in order]
            ranks = {c: shown.index(n) for c in question.choices if (n := " ".join(c.split()[1:])) in shown}
            return choice == min(ranks, key=ranks.__getitem__)
        case _ if question.text.startswith("What shape"):
            (thing,) = [o for o in film.objects if o.colour in question.text]
            return choice == thing.shape
        case _:
            return " ".join(words[1:]) == film.objects[0].name


def test_every_question_has_four_choices_and_exactly_the_right_one_is_true():
    kinds = collections.Counter()
    for film, question in asked():
        assert len(set(question.choices)) == 4
        assert [is_true(film, question, choice) for choice in question.choices] == [
            k == question.answer for k in range(4)
        ], question
        kinds[question.task_type] += 1
    assert len(kinds) == 6


def test_the_letter_of_the_right_answer_is_uniform():
    letters = collections.Counter(question.letter for _, question in asked())
    assert set(letters) == set("ABCD")
    assert all(0.22 < count / letters.total() < 0.28 for count in letters.values())


def test_the_choice_that_shares_most_words_with_the_others_is_right_one_time_in_four():
    hits = []
    for _, question in asked():
        words = collections.Counter(word for choice in question.choices for word in choice.split())
        scores = [sum(words[word] for word in choice.split()) for choice in question.choices]
        best = [k for k, score in enumerate(scores) if score == max(scores)]
        hits.append((question.answer in best) / len(best))
    assert 0.22 < sum(hits) / len(hits) < 0.28


def test_no_question_of_a_conversation_is_answered_by_an_earlier_turn():
    for index in range(600):
        rng = script.generator("test", 2, index)
        film = script.event_script(rng, (10, 60, 400)[index % 3])
        chosen = questions.independent(questions.script_questions(film, rng), 3)
        assert len(chosen) >= 2
        told = ""
        for question in chosen:
            key = question.short_answer.removeprefix("the number ").split()[-1]
            assert not re.search(rf"\b{key}\b", told), chosen
            told += f" {question.text} {question.short_answer}"


def test_the_prompt_is_that_of_videomme():
    question = questions.Question("OCR Problems", "Which?", ("7", "1", "2", "3"), 0, frozenset(), frozenset())
    assert questions.multiple_choice_prompt(question) == (
        "Select the best answer to the following multiple-choice question based on the video. "
        "Respond with only the letter (A, B, C, or D) of the correct option.\n"
        "Which?\nA. 7\nB. 1\nC. 2\nD. 3\nThe best answer is:"
    )
