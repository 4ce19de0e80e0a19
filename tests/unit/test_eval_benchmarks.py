"""The three benchmarks: what they ask, and how they score."""

import json
from pathlib import Path

import pytest
from PIL import Image

from longvila import content
from longvila.errors import ConfigError
from longvila.evaluate.runner import run_benchmark

from .eval_parts import FILMS, ScriptedAnswerer, evaluation_folder

needle, videomme, captioning = (content.load("eval", name) for name in ("needle", "videomme", "captioning"))
GRID = {"frames": (4, 10), "depths": (0.0, 0.5, 1.0), "answers": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluation_folder(tmp_path_factory.mktemp("eval") / "data")


# --- needle


def test_the_needle_is_an_extra_frame_at_its_depth_and_the_film_stays_whole(data):
    requests = needle.requests(data, **GRID)
    assert len(requests) == 2 * 3 * 2
    for request in requests:
        count, depth = request.metadata["frames"], request.metadata["depth"]
        at = [index for index, ref in enumerate(request.frames) if ref.seconds is None]
        assert at == [int(depth * count)]
        assert [ref.seconds for ref in request.frames if ref.seconds is not None] == [float(s) for s in range(count)]


def test_cells_take_turns_through_the_needles_and_never_ask_one_twice(data):
    requests = needle.requests(data, **{**GRID, "answers": 20})
    by_cell = {}
    for request in requests:
        cell = by_cell.setdefault((request.metadata["frames"], request.metadata["depth"]), [])
        cell.append(request.metadata["answer"])
    assert all(sorted(cell) == ["The 0.", "The 1.", "The 2."] for cell in by_cell.values())
    first = [r.metadata["answer"] for r in needle.requests(data, **{**GRID, "answers": 1})]
    assert len(set(first)) == 3


def test_the_needle_score_is_the_share_of_exact_answers_by_cell_and_none_counts_as_wrong(data):
    requests = needle.requests(data, **GRID)
    right = {request.id: request.metadata["answer"].upper() + "!" for request in requests}
    assert needle.score(requests, right)["mean"] == 1.0
    some = {**right, requests[0].id: None, requests[1].id: "Not The 1."}
    scores = needle.score(requests, some)
    assert scores["grid"]["4"] == {"0": 0.0, "0.5": 1.0, "1": 1.0}
    assert scores["mean"] == pytest.approx(5 / 6)
    assert scores["cells"][0] == {"frames": 4, "depth": 0.0, "answers": 2, "correct": 0, "no_response": 1}


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("The red ball.", "red ball", True),
        ("7", " 7! ", True),
        ("A", "B", False),
        ("A", "", False),
        ("red ball and more", "red ball", False),
        ("17", "7", False),
    ],
)
def test_answers_are_equal_up_to_case_punctuation_and_articles(left, right, equal):
    assert (needle.normalise(left) == needle.normalise(right)) == equal


def test_longva_needle_sets_are_read(data, tmp_path):
    folder = tmp_path / "needle"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(folder / "images" / "panda.png")
    (folder / "haystack.mp4").write_bytes((data / "needle" / "haystack.mp4").read_bytes())
    (folder / "dataset.json").write_text(
        json.dumps([{"path": "panda.png", "prompt": "\nThe scientist is a...\nA. Bird\nC. Panda", "answer": "C"}])
    )
    requests = needle.requests(tmp_path, **GRID)
    assert requests[0].question == "The scientist is a...\nA. Bird\nC. Panda"
    assert Path(requests[0].frames[0].path).name == "panda.png"
    assert len(requests) == 6  # one needle: once a cell


def test_a_grid_longer_than_the_film_and_a_missing_picture_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="give 12 frames at 1 a second, but the grid goes to 1400"):
        needle.requests(data)
    (tmp_path / "needle").mkdir()
    (tmp_path / "needle" / "needles.jsonl").write_text('{"image": "x.png", "question": "?", "answer": "1"}\n')
    with pytest.raises(ConfigError, match=r"the needle x\.png has no picture"):
        needle.requests(tmp_path)
    with pytest.raises(ConfigError, match="no needles here"):
        needle.requests(tmp_path / "elsewhere")


# --- VideoMME


@pytest.mark.parametrize(
    ("response", "official", "lmms_eval"),
    [
        ("Answer: B", "A", "B"),
        ("Clearly B", "C", "B"),
        ("B", "B", "B"),
        ("B.", "B", "B"),
        ("(C) because A is wrong", "C", "C"),
        ("The best answer is: D", "D", "D"),
        ("The best option is B", "B", "B"),
        ("Best answer: C", "B", "C"),  # official: this lead-in lacks its comma and stays, so the B of "Best" counts
        ("Best answer:Best option: D", "D", "D"),
        ("the answer is B or C, B that is", "B", "C"),  # lmms-eval: each letter where it first follows the phrase
        ("A dog; the answer is B, I think", "A", "A"),
        ("It could be A, but the correct answer is (D)", "A", "D"),
        ("the first one", "", ""),
        ("", "", ""),
    ],
)
def test_each_protocol_reads_the_letter_as_its_own_script_does(response, official, lmms_eval):
    assert (videomme.official_letter(response), videomme.lmms_letter(response)) == (official, lmms_eval)


def test_the_prompt_is_the_official_one(data):
    request = videomme.requests(data, frames=2)[0]
    assert request.question == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nWhat is number 1?\nA. One.\nB. Two.\nC. Three.\nD. Four.\n"
        "The best answer is:"
    )
    assert len(request.frames) == 2


def test_subtitles_are_only_those_of_the_sampled_frames(data):
    def lines(**options):
        return videomme.requests(data, subtitles=True, **options)[0].question.splitlines()[:-7]

    assert lines(frames=3, fps=1.0) == ["This video's subtitles are listed below:", "Early in 001"]  # at 0, 1, 2 s
    assert lines(frames=1, fps=None) == []  # at 1.5 s: nothing is shown, so nothing is said
    assert lines(frames=100, fps=None) == ["This video's subtitles are listed below:", "Early in 001", "Late in 001"]


def test_swapping_shows_every_question_with_another_film_of_its_length(data):
    requests = videomme.requests(data, swap=True)
    for request in requests:
        own, shown = request.metadata["film"]["video_id"], request.metadata["shown"]
        assert own != shown
        assert FILMS[own] == FILMS[shown]
        assert {Path(ref.path).stem for ref in request.frames} == {shown}
    assert {request.metadata["shown"] for request in requests} == set(FILMS)


def test_the_official_protocol_leaves_unanswered_questions_out_and_lmms_eval_counts_them_wrong(data):
    requests = videomme.requests(data)
    responses = {request.id: request.metadata["question"]["answer"] for request in requests}
    responses[requests[0].id] = "nothing to see"
    responses[requests[1].id] = None
    responses[requests[2].id] = "Answer: B"  # B is right
    scores = videomme.score(requests, responses)
    assert scores["official"]["overall"] == {
        **{"accuracy": 5 / 6, "correct": 5, "counted": 6, "unanswered": 2},
        "lower_95": pytest.approx(0.4365, abs=1e-3),
    }
    assert scores["lmms_eval"]["overall"]["accuracy"] == 6 / 8
    assert scores["lmms_eval"]["overall"]["unanswered"] == 2
    assert scores["no_response"] == 1
    assert list(scores["official"]["by_duration"]) == ["short", "long"]
    assert scores["official"]["by_duration"]["long"]["accuracy"] == 1.0
    assert set(scores["official"]["by_task_type"]) == {"Counting Problem", "Object Recognition"}


def test_the_result_file_has_the_official_layout(data, tmp_path):
    run_benchmark(videomme, ScriptedAnswerer(lambda question: "B"), data, tmp_path)
    films = json.loads((tmp_path / "videomme-result.json").read_text())
    assert [film["video_id"] for film in films] == list(FILMS)
    fields = {"video_id", "duration_category", "video_category", "video_subcategory", "questions", "missing"}
    assert set(films[0]) == fields
    assert [question["response"] for question in films[0]["questions"]] == ["B", "B"]
    assert films[0]["questions"][0]["choices"][1] == "B. Two."


def test_a_question_file_of_another_layout_is_refused_by_the_missing_field(tmp_path):
    with pytest.raises(ConfigError, match=r"videomme\.json: no such file"):
        videomme.requests(tmp_path)
    (tmp_path / "videomme.json").write_text(json.dumps([{"video_id": "001", "questions": []}]))
    with pytest.raises(ConfigError, match=r"film 001 lacks \['duration_category'"):
        videomme.requests(tmp_path)


# --- captioning


def test_an_event_is_found_where_its_words_stand_in_a_row():
    caption = "First a Red  circle moves left; then number 17."
    events = ["red circle", "moves left", "number 1", "circle left", "number 17"]
    assert captioning.named_events(caption, events) == ["red circle", "moves left", "number 17"]


def test_captions_are_scored_by_recall_overlap_and_how_many_differ(data):
    requests = captioning.requests(data, frames=2)
    right = {request.id: request.metadata["caption"] for request in requests}
    perfect = captioning.score(requests, right)
    assert perfect["event_recall"] == 1.0
    assert perfect["rouge_l"] == pytest.approx(1.0)
    assert perfect["chrf"] == pytest.approx(100.0)
    assert perfect["num_distinct"] == 4
    same = captioning.score(requests, {**dict.fromkeys(right, "A red circle."), requests[0].id: None})
    assert same["event_recall"] == 0.75
    assert (same["num_distinct"], same["no_response"]) == (2, 1)
    assert 0 < same["rouge_l"] < 0.8


def test_a_swapped_film_keeps_its_reference(data):
    for request in captioning.requests(data, swap=True):
        assert Path(request.frames[0].path).stem == request.metadata["shown"] != request.id


def test_a_bad_line_of_captions_is_refused_by_its_number(data, tmp_path):
    with pytest.raises(ConfigError, match=r"captions\.jsonl: no such file"):
        captioning.requests(tmp_path)
    (tmp_path / "captions.jsonl").write_text('{"video": "a", "caption": "b", "events": []}\n{"video": "a"}\n')
    with pytest.raises(ConfigError, match=r"captions\.jsonl, line 2"):
        captioning.requests(tmp_path)


def test_one_film_cannot_be_swapped(tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"video": "a", "caption": "b", "events": ["c"]}\n')
    with pytest.raises(ConfigError, match="two films or more"):
        captioning.requests(tmp_path, swap=True)
