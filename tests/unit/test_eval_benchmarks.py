"""The three benchmarks: what they ask, and how they score."""

import json
import shutil
import sys
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


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("needles.jsonl", "", "the list of needles is empty"),
        ("needles.jsonl", '{"image": "0.png"', r"needles\.jsonl, line 1: not JSON"),
        ("needles.jsonl", '\n{"image": "0.png", "answer": "1"}', r"needles\.jsonl, line 2: lacks 'question'"),
        ("needles.jsonl", '{"image": "0.png", "question": "?"}', r"needles\.jsonl, line 1: lacks 'answer'"),
        (
            "needles.jsonl",
            '{"image": "0.png", "question": "?", "answer": 7}',
            r"needles\.jsonl, line 1: 'answer' is '7'; it must be text",
        ),
        ("dataset.json", "[", r"dataset\.json: not a JSON file"),
        ("dataset.json", "{}", r"dataset\.json: must hold a list"),
        ("dataset.json", '[{"path": "0.png", "answer": "1"}]', r"dataset\.json, entry 1: lacks 'prompt'"),
    ],
)
def test_needles_that_are_not_as_they_must_be_are_refused_by_line(tmp_path, file, text, words):
    (tmp_path / "needle" / "images").mkdir(parents=True)
    (tmp_path / "needle" / "images" / "0.png").write_bytes(b"")
    (tmp_path / "needle" / file).write_text(text)
    with pytest.raises(ConfigError, match=words):
        needle.requests(tmp_path)


def test_the_haystack_is_the_one_film_of_its_name(data, tmp_path):
    shutil.copytree(data / "needle", tmp_path / "needle")
    (tmp_path / "needle" / "haystack.json").write_text("{}")
    assert Path(needle.requests(tmp_path, **GRID)[0].frames[1].path).name == "haystack.mp4"
    (tmp_path / "needle" / "haystack.mkv").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"'haystack' may be any of haystack\.mkv, haystack\.mp4"):
        needle.requests(tmp_path, **GRID)
    for film in (tmp_path / "needle").glob("haystack.m*"):
        film.unlink()
    with pytest.raises(ConfigError, match=r"no haystack\.mp4 here"):
        needle.requests(tmp_path, **GRID)


def test_a_needle_whose_picture_cannot_be_read_is_counted_and_costs_no_other_answer(data, tmp_path):
    shutil.copytree(data / "needle", tmp_path / "needle")
    (tmp_path / "needle" / "images" / "0.png").write_bytes(b"not a picture")
    options = {"frames": (4,), "depths": (0.0, 0.5), "answers": 3}
    scores = run_benchmark(needle, ScriptedAnswerer(), tmp_path, tmp_path / "out", options=options)
    assert set(scores["failed"]) == {"4-0-0", "4-0.5-0"}
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["failed"] == scores["failed"]
    # The example that is shown is one of them: the frames around its needle are kept.
    (example,) = scores["examples"]
    assert example["id"] in scores["failed"]
    assert len(example["frames"]) == 2


# --- VideoMME


@pytest.mark.parametrize(
    ("response", "official", "lmms_eval"),
    [
        ("Answer: B", "B", "B"),
        ("ANSWER: B", "A", "B"),  # official: lead-ins in this case only
        ("Option: C", "C", "C"),
        ("The correct option: (D)", "D", "D"),
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


def test_films_that_are_listed_for_each_question_are_swapped_with_others(data, tmp_path):
    films = json.loads((data / "videomme.json").read_text())
    each = [{**film, "questions": [question]} for film in films for question in film["questions"]]
    shutil.copytree(data / "videos", tmp_path / "videos")
    (tmp_path / "videomme.json").write_text(json.dumps(each))
    requests = videomme.requests(tmp_path, swap=True)
    assert len(requests) == 8
    for request in requests:
        own, shown = request.metadata["film"]["video_id"], request.metadata["shown"]
        assert own != shown
        assert FILMS[own] == FILMS[shown]


def test_the_official_protocol_leaves_unanswered_questions_out_and_lmms_eval_counts_them_wrong(data):
    requests = videomme.requests(data)
    responses = {request.id: request.metadata["question"]["answer"] for request in requests}
    responses[requests[0].id] = "nothing to see"
    responses[requests[1].id] = None
    responses[requests[2].id] = "Clearly B"  # B is right
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
    assert set(films[0]) == {"video_id", "duration", "domain", "sub_category", "questions", "missing"}
    assert [question["response"] for question in films[0]["questions"]] == ["B", "B"]
    assert films[0]["questions"][0]["options"][1] == "B. Two."


def test_the_spelling_of_2024_is_read_and_written_too(data, tmp_path):
    earlier = tmp_path / "earlier"
    shutil.copytree(data / "videos", earlier / "videos")
    text = (data / "videomme.json").read_text()
    for name, old in videomme.EARLIER.items():
        text = text.replace(f'"{name}"', f'"{old}"')
    films = [{**film, "duration": 83.5} for film in json.loads(text)]  # seconds, of no meaning here
    (earlier / "videomme.json").write_text(json.dumps(films))
    answerers = [ScriptedAnswerer(lambda question: "B") for _ in range(2)]
    ours, theirs = (
        run_benchmark(videomme, answerer, folder, tmp_path / folder.name / "out")
        for answerer, folder in zip(answerers, (data, earlier), strict=True)
    )
    assert answerers[0].asked == answerers[1].asked
    assert ours["official"] == theirs["official"]
    assert [example["question"] for example in ours["examples"]] == [e["question"] for e in theirs["examples"]]
    assert set(ours["official"]["by_duration"]) == {"short", "long"}
    written = json.loads((earlier / "out" / "videomme-result.json").read_text())
    assert [{**film, "questions": []} for film in written] == [{**f, "missing": False, "questions": []} for f in films]
    assert [{**q, "response": "B"} for film in films for q in film["questions"]] == [
        question for film in written for question in film["questions"]
    ]


def test_examples_are_right_where_the_headline_accuracy_says_so(data):
    requests = videomme.requests(data)
    scores = videomme.score(requests, {request.id: "Clearly B" for request in requests})  # read as B; officially as C
    assert [example["correct"] for example in scores["examples"]] == [
        example["reference"] == "B" for example in scores["examples"]
    ]
    assert {example["reference"] for example in scores["examples"]} == {"B"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"duration": None}, r"videomme\.json, film 1: lacks 'duration'"),
        ({"domain": None}, r"videomme\.json, film 1: lacks 'domain'"),
        ({"questions": {}}, "film 1: 'questions' is '{}'; it must be a list"),
        ({"questions": ["?"]}, "film 001, question 1: must be an object with question_id, task_type"),
        ({"questions": [{"question_id": "1"}]}, "film 001, question 1: lacks 'task_type'"),
        (
            {
                "questions": [
                    {**dict.fromkeys(("question_id", "task_type", "question", "answer"), "A"), "options": "AB"}
                ]
            },
            "film 001, question 1: 'options' is 'AB'; it must be a list of texts",
        ),
    ],
)
def test_a_question_file_of_another_layout_is_refused_by_the_missing_field(tmp_path, change, words):
    film = {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Law", "questions": []}
    film = {name: value for name, value in {**film, **change}.items() if value is not None}
    (tmp_path / "videomme.json").write_text(json.dumps([film]))
    with pytest.raises(ConfigError, match=words):
        videomme.requests(tmp_path)


def test_a_question_file_that_is_missing_or_no_list_of_films_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"videomme\.json: no such file"):
        videomme.requests(tmp_path)
    for text, words in (("[", "not a JSON file"), ("{}", "must hold a list"), ("[3]", "film 1: must be an object")):
        (tmp_path / "videomme.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            videomme.requests(tmp_path)


def release(data: Path, folder: Path) -> list[dict]:
    """`data` as the hub has it: films and subtitles by another name, and what is asked as a row for each question."""
    rows = []
    for film in json.loads((data / "videomme.json").read_text()):
        name = f"yt-{film['video_id']}"
        for ours, theirs in (("videos/{}.mp4", "data/{}.mp4"), ("subtitles/{}.srt", "subtitle/{}.srt")):
            (folder / theirs).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(data / ours.format(film["video_id"]), folder / theirs.format(name))
        known = {**film, "url": f"https://videos.example/{name}", "videoID": name}
        del known["questions"]
        rows += [{**known, **question} for question in film["questions"]]
    return rows


def parts(requests: list) -> list:
    """All of the requests but where their frames lie."""
    return [(r.id, r.question, [ref.seconds for ref in r.frames], r.metadata["question"]) for r in requests]


def test_rows_of_the_release_ask_what_the_official_layout_asks(data, tmp_path):
    rows = release(data, tmp_path)
    order = [*rows[::2], *rows[1::2]]  # the questions of a film need not stand together
    (tmp_path / "videomme.json").write_text(json.dumps(order))
    asked = videomme.requests(tmp_path, frames=3, subtitles=True)
    assert parts(asked) == parts(videomme.requests(data, frames=3, subtitles=True))
    assert [Path(request.frames[0].path).name for request in asked[::2]] == [f"yt-{name}.mp4" for name in FILMS]
    assert "Early in 001" in asked[0].question
    videomme.export(asked, {request.id: "B" for request in asked}, tmp_path)
    (film, *_) = json.loads((tmp_path / "videomme-result.json").read_text())
    assert (film["videoID"], film["domain"], len(film["questions"])) == ("yt-001", "Knowledge", 2)
    assert set(film["questions"][0]) == {"question_id", "task_type", "question", "options", "answer", "response"}


@pytest.mark.parametrize("names", [("videos", "subtitles"), ("data", "subtitles"), ("videos", "subtitle")])
@pytest.mark.parametrize("prefix", ["", "yt-"])
def test_films_and_subtitles_are_found_by_either_name_in_either_folder(data, tmp_path, names, prefix):
    (tmp_path / "videomme.json").write_text(json.dumps(release(data, tmp_path / "release")))
    for ours, theirs in zip(("videos", "subtitles"), names, strict=True):
        for file in sorted((data / ours).iterdir()):
            (tmp_path / theirs).mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / theirs / f"{prefix}{file.name}")
    for request in videomme.requests(tmp_path, frames=3, subtitles=True):
        assert Path(request.frames[0].path) == tmp_path / names[0] / f"{prefix}{request.id[:3]}.mp4"
        assert f"Early in {request.id[:3]}" in request.question


@pytest.mark.parametrize("folder", [".", "videomme"])
def test_the_parquet_of_the_release_is_read_part_by_part(data, tmp_path, folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = release(data, tmp_path)
    (tmp_path / folder).mkdir(exist_ok=True)
    for part, some in enumerate((rows[:3], rows[3:])):  # a film's questions in two parts
        parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / folder / f"test-0000{part}-of-00002.parquet")
    assert parts(videomme.requests(tmp_path, frames=3, subtitles=True)) == parts(
        videomme.requests(data, frames=3, subtitles=True)
    )
    (tmp_path / folder / "test-00000-of-00002.parquet").write_bytes(b"a page, not found")
    with pytest.raises(ConfigError, match=r"test-00000-of-00002\.parquet: not a parquet file"):
        videomme.requests(tmp_path)


def test_parquet_without_pyarrow_is_refused_with_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ConfigError, match=r"test-00000-of-00001\.parquet: .* pip install pyarrow, or .* to .*videomme\.json"
    ):
        videomme.requests(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"domain": None}, "film 2: lacks 'domain'"),
        ({"options": "AB"}, "film 2: 'options' is 'AB'; it must be a list of texts"),
        ({"videoID": "other"}, r"film 2: film 001 is not as in .*film 1; one of the rows is wrong"),
    ],
)
def test_a_row_that_is_not_as_it_must_be_is_refused_by_its_place(data, tmp_path, change, words):
    rows = release(data, tmp_path)
    rows[1] = {name: value for name, value in {**rows[1], **change}.items() if value is not None}
    (tmp_path / "videomme.json").write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=rf"videomme\.json, {words}"):
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


def test_without_events_the_recall_is_left_out_and_the_rest_is_scored(data, tmp_path):
    shutil.copytree(data / "videos", tmp_path / "videos")
    lines = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    none = [{name: value for name, value in line.items() if name != "events"} for line in lines]
    none[1]["events"], none[2]["events"] = None, []
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in none))
    answerers = [ScriptedAnswerer(lambda question: "A red circle, then a dog.") for _ in range(2)]
    with_events, without = (
        run_benchmark(captioning, answerer, folder, tmp_path / f"out{number}")
        for number, (answerer, folder) in enumerate(zip(answerers, (data, tmp_path), strict=True))
    )
    assert (with_events["event_recall"], with_events["num_events"]) == (1.0, 4)
    assert (without["event_recall"], without["num_events"]) == (None, 0)
    for name in ("rouge_l", "chrf", "num_films", "num_distinct"):
        assert without[name] == with_events[name] > 0
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [lines[0], *none[1:]]))
    some = captioning.requests(tmp_path)
    assert captioning.score(some, {request.id: "A red circle." for request in some})["event_recall"] == 1.0  # of one


def test_a_swapped_film_keeps_its_reference(data):
    for request in captioning.requests(data, swap=True):
        assert Path(request.frames[0].path).stem == request.metadata["shown"] != request.id


def test_a_bad_line_of_captions_is_refused_by_its_number(data, tmp_path):
    with pytest.raises(ConfigError, match=r"captions\.jsonl: no such file"):
        captioning.requests(tmp_path)
    line = {"video": "a", "caption": "b", "events": ["c"]}
    for wrong, words in (
        ('{"video": "b"}', "line 3: lacks 'caption'"),
        ("{", "line 3: not JSON"),
        (json.dumps({**line, "video": "b", "events": "red"}), "line 3: 'events' is 'red'; it must be a list of texts"),
        ('{"video": "b", "caption": " - "}', "line 3: ' - ' has no word"),
        (json.dumps({**line, "video": "b", "events": ["c", ""]}), "line 3: '' has no word"),
        (json.dumps({**line, "caption": "d"}), "lines 1 and 3: the film 'a' is listed twice"),
    ):
        (tmp_path / "captions.jsonl").write_text(f"{json.dumps(line)}\n\n{wrong}\n")
        with pytest.raises(ConfigError, match=rf"captions\.jsonl, {words}"):
            captioning.requests(tmp_path)


def test_one_film_cannot_be_swapped(tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"video": "a", "caption": "b", "events": ["c"]}\n')
    with pytest.raises(ConfigError, match="two films or more"):
        captioning.requests(tmp_path, swap=True)


# --- options and files


@pytest.mark.parametrize(
    ("benchmark", "options", "words"),
    [
        (needle, {"frames": ()}, "option 'frames' is empty"),
        (needle, {"frames": (16, 0)}, "option 'frames' is 0; it must be at least 1"),
        (needle, {"depths": ()}, "option 'depths' is empty"),
        (needle, {"depths": (0.5, 1.01)}, "option 'depths' has 1.01"),
        (needle, {"depths": (-0.1,)}, "option 'depths' has -0.1"),
        (needle, {"depths": (float("nan"),)}, "option 'depths' has nan"),
        (needle, {"answers": 0}, "option 'answers' is 0; it must be at least 1"),
        (needle, {"max_new_tokens": 0}, "option 'max_new_tokens' is 0"),
        *(
            (benchmark, *case)
            for benchmark in (videomme, captioning)
            for case in (
                ({"frames": 0}, "option 'frames' is 0; it must be at least 1"),
                ({"fps": 0.0}, "option 'fps' is 0; it must be above 0, or none"),
                ({"fps": -1.0}, "option 'fps' is -1"),
                ({"fps": float("nan")}, "option 'fps' is nan"),
                ({"max_new_tokens": 0}, "option 'max_new_tokens' is 0"),
            )
        ),
    ],
)
def test_an_option_out_of_its_range_is_refused_by_name(data, benchmark, options, words):
    with pytest.raises(ConfigError, match=words):
        benchmark.requests(data, **{**(GRID if benchmark is needle else {}), **options})


@pytest.mark.parametrize("benchmark", [videomme, captioning])
def test_a_long_film_is_shown_by_as_many_frames_as_stage_five_trains(benchmark):
    trained = content.entry("stages", "5_long_sft")("7b", Path("models")).phases[-1].data.frames
    assert content.parameters(benchmark.requests)["frames"].default == trained.frames == 256


def test_files_beside_a_film_are_not_taken_for_it(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for name in ("001.info.json", "001.a.mp4"):
        (tmp_path / "data" / "videos" / name).write_bytes(b"")
    for benchmark in (videomme, captioning):
        request = benchmark.requests(tmp_path / "data")[0]
        assert {Path(ref.path).name for ref in request.frames} == {"001.mp4"}
        assert len(request.frames) == 3
