"""The report: every figure from the run's files, every absence told, every bar computed."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from longvila.errors import ConfigError
from longvila.evaluate.bars import compute_bars
from longvila.evaluate.charts import grouped_bars, heat_colour, loss_curve
from longvila.evaluate.report import write_report

from .report_run import edit, make_run

NAMES = [
    "stage1_only_projector_moved",
    "needle_128_generated",
    "videomme_over_chance",
    "caption_over_stage1",
    "gradient_max_error",
    "demo_minutes",
]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(finished_run, tmp_path / "demo"))


def bar(report: dict, name: str) -> dict:
    return next(entry for entry in report["bars"] if entry["name"] == name)


def test_the_report_holds_the_figures_of_every_file(run):
    report = write_report(run)
    assert json.loads((run / "report.json").read_text()) == json.loads(json.dumps(report))
    assert [stage["stage"] for stage in report["stages"]] == ["1_alignment", "2_pretraining", "5_long_sft"]
    first = report["stages"][0]
    assert (first["steps"], first["trained_parameters"], first["parts_moved"]["vision"]) == (40, 136_576, False)
    assert first["minutes"] == pytest.approx(40 * 0.5 / 60)  # its steps took longer than its last session
    assert first["curve"][0] == (1, pytest.approx(6.0))
    assert report["evaluations"]["needle"]["final"]["mean"] == 1.0
    assert list(report["evaluations"]["videomme"]) == ["final", "stage1", "swapped"]
    assert report["minutes"] == 15.0
    assert report["versions"]["torch"] == "2.14.1"
    assert [entry["name"] for entry in report["bars"]] == NAMES


def test_a_run_without_a_finished_stage_is_refused_and_says_what_is_missing(run, tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        write_report(tmp_path / "nowhere")
    for path in run.glob("*/summary.json"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"no stage has finished here \(there is no STAGE/summary\.json\)"):
        write_report(run)


def test_a_run_that_is_not_the_demo_has_figures_and_no_bars(run):
    (run / "timing.json").unlink()
    report = write_report(run)
    assert (report["bars"], report["minutes"]) == ([], None)
    assert report["evaluations"]["needle"]["final"]["mean"] == 1.0
    assert "What the run is held to" not in (run / "report.html").read_text()


def test_what_is_absent_is_shown_as_absent_and_fails_its_bar(run):
    for path in ("eval", "gradients.json"):
        shutil.rmtree(run / path) if (run / path).is_dir() else (run / path).unlink()
    (run / "2_pretraining" / "summary.json").unlink()
    report = write_report(run)
    assert report["unfinished_stages"] == ["2_pretraining"]
    assert report["evaluations"] == {}
    assert [entry["name"] for entry in report["bars"] if entry["holds"]] == [NAMES[0], "demo_minutes"]
    assert all(bar(report, name)["value"] is None for name in NAMES[1:-1])
    page = (run / "report.html").read_text()
    assert "Begun, but not finished: 2_pretraining" in page
    for benchmark in ("needle", "VideoMME", "captioning"):
        assert f"This run has no {benchmark} evaluation" in page


def test_a_damaged_file_is_refused_by_name(run):
    (run / "timing.json").write_text("{")
    with pytest.raises(ConfigError, match=r"timing\.json: not a JSON file"):
        write_report(run)


def test_the_page_is_one_file_with_its_pictures_inside(run):
    write_report(run)
    page = (run / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 12
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("<svg") == 1 + 3 + 1  # pipeline, three losses, accuracy
    assert "Red circle" not in page  # captions are as generated
    assert "after stage 1: mean" in page


def test_text_of_answers_cannot_become_markup(run):
    scores = run / "eval" / "final" / "captioning" / "scores.json"
    text = scores.read_text().replace("A red circle", "<script>alert(1)</script>")
    scores.write_text(text)
    write_report(run)
    assert "<script>" not in (run / "report.html").read_text()


@pytest.mark.parametrize("moved", [[], ["projector", "vision"]])
def test_stage_one_must_move_the_projector_alone(run, moved):
    parts = {part: part in moved for part in ("vision", "projector", "language_model")}
    edit(run / "1_alignment" / "summary.json", parts_moved=parts)
    assert not bar(write_report(run), NAMES[0])["holds"]


def test_stage_one_must_lower_its_loss(run):
    path = run / "1_alignment" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    flipped = [{**line, "loss": other["loss"]} for line, other in zip(lines, reversed(lines), strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in flipped))
    assert not bar(write_report(run), NAMES[0])["holds"]


def needle_cells(share: float = 1.0, answers: int = 20, longest: int = 128) -> dict:
    cells = [{"frames": 16, "depth": depth, "answers": answers, "correct": answers} for depth in (0.0, 1.0)]
    cells += [{"frames": longest, "depth": d, "answers": answers, "correct": share * answers} for d in (0.0, 1.0)]
    cells.append({"frames": 1400, "depth": 0.0, "answers": answers, "correct": 0})
    return {"cells": cells}


@pytest.mark.parametrize(
    ("scores", "value", "holds"),
    [
        (needle_cells(), 1.0, True),
        (needle_cells(share=0.9), 0.9, True),
        (needle_cells(share=0.85), 0.85, False),
        (needle_cells(answers=19), 1.0, False),
        (needle_cells(longest=64), 1.0, False),
    ],
)
def test_the_needle_bar_takes_the_worst_length_up_to_128_frames(scores, value, holds):
    entry = compute_bars(empty_report({"needle": {"final": scores}}))[1]
    assert (entry["value"], entry["holds"]) == (pytest.approx(value), holds)


@pytest.mark.parametrize(
    ("lower", "questions", "swapped", "holds"),
    [(0.36, 300, 0.30, True), (0.35, 300, 0.2, False), (0.9, 299, 0.2, False), (0.9, 600, 0.31, False)],
)
def test_the_videomme_bar_needs_frames_questions_and_a_clear_lead(lower, questions, swapped, holds):
    overall = {"lower_95": lower, "counted": questions, "accuracy": 0.5}
    variants = {
        "final": {"lmms_eval": {"overall": overall}},
        "swapped": {"lmms_eval": {"overall": {**overall, "accuracy": swapped}}},
    }
    assert compute_bars(empty_report({"videomme": variants}))[2]["holds"] == holds


@pytest.mark.parametrize(
    ("final", "stage1", "swapped", "distinct", "holds"),
    [
        (0.61, 0.4, 0.1, 10, True),
        (0.6, 0.41, 0.1, 10, False),
        (0.6, 0.1, 0.41, 10, False),
        (0.6, 0.1, 0.1, 8, False),
        (0.0, 0.0, 0.0, 10, False),
    ],
)
def test_the_caption_bar_needs_one_and_a_half_times_each_control(final, stage1, swapped, distinct, holds):
    variants = {
        "final": {"event_recall": final, "num_distinct": distinct, "num_distinct_references": 10},
        "stage1": {"event_recall": stage1},
        "swapped": {"event_recall": swapped},
    }
    assert compute_bars(empty_report({"captioning": variants}))[3]["holds"] == holds


@pytest.mark.parametrize(("error", "minutes", "holds"), [(1e-11, 20.0, [True, True]), (2e-11, 20.1, [False, False])])
def test_the_last_two_bars_are_plain_bounds(error, minutes, holds):
    report = {**empty_report({}), "gradients": {"max_error": error}, "minutes": minutes}
    assert [entry["holds"] for entry in compute_bars(report)[4:]] == holds


@pytest.mark.parametrize(("scale", "bound"), [("tiny", "20"), ("small", "90")])
def test_the_page_names_the_minutes_of_the_scale_alone(run, scale, bound):
    edit(run / "5_long_sft" / "summary.json", scale=scale)
    write_report(run)
    card = (run / "report.html").read_text().split("The whole demo takes no longer than it may")[1].split("</div>")[0]
    assert f"(at most {bound})" in card
    assert "20 minutes" not in (run / "report.html").read_text()


def empty_report(evaluations: dict) -> dict:
    return {"scale": "tiny", "stages": [], "evaluations": evaluations, "gradients": None, "minutes": None}


def test_either_order_of_the_folders_below_eval_is_read(run):
    (run / "eval" / "needle").mkdir()
    (run / "eval" / "final" / "needle").rename(run / "eval" / "needle" / "final")
    report = write_report(run)
    assert report["evaluations"]["needle"]["final"]["mean"] == 1.0
    names = [name for example in report["evaluations"]["needle"]["final"]["examples"] for name in example["frames"]]
    assert names
    assert all((run / name).is_file() for name in names)


def test_the_heat_map_goes_from_pink_over_gold_to_green():
    assert [heat_colour(share) for share in (0.0, 0.5, 1.0)] == [
        "rgb(240,73,110)",
        "rgb(235,184,57)",
        "rgb(12,215,159)",
    ]


@pytest.mark.parametrize("losses", [[5.0], [2.0, 2.0], [0.001, 0.0009], [1e4, 3.0]])
def test_a_loss_curve_stays_inside_its_picture(losses):
    picture = str(loss_curve(list(enumerate(losses, 1)), "a"))
    points = re.search(r'points="([^"]*)"', picture).group(1)
    numbers = [float(number) for number in re.split("[ ,]", points)]
    assert all(0 <= number <= 320 and math.isfinite(number) for number in numbers)


def test_bars_stand_as_high_as_their_share():
    picture = str(grouped_bars({"short": {"final": 1.0, "stage1": 0.5}}, ["final", "stage1"], 0.25))
    full, half = (float(height) for height in re.findall(r'<rect class="series\d"[^>]*height="([\d.]+)"', picture))
    assert half == pytest.approx(full / 2, abs=0.1)
