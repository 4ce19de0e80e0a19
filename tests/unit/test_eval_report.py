"""The report of captions whose references name no events: a recall that nobody measured is no recall of 0."""

import json
from pathlib import Path

from longvila.evaluate.report import write_report

from .report_run import VARIANTS, evaluate, make_run


def test_a_recall_that_was_not_measured_is_shown_as_absent_and_fails_its_bar(tmp_path: Path):
    run = make_run(tmp_path / "demo")
    path = run / "data" / "evaluation" / "captions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"video": line["video"], "caption": line["caption"]}) + "\n" for line in lines))
    for variant, (options, one_in) in VARIANTS.items():
        evaluate(run, path.parent, "captioning", variant, one_in, options)
    report = write_report(run)
    assert {scores["event_recall"] for scores in report["evaluations"]["captioning"].values()} == {None}
    (bar,) = [bar for bar in report["bars"] if bar["name"] == "caption_over_stage1"]
    assert not bar["holds"]
    assert [(each["value"], each["bound"]) for each in bar["conditions"]] == [(None, None), (None, None), (1.0, 0.9)]
    captions = (run / "report.html").read_text().split("<h2>Captions</h2>")[1].split("<h2>")[0]
    assert "not measured, since no reference names events" in captions
    assert "<td>final checkpoint</td><td>4</td><td>-</td>" in captions
    assert "<dt>found</dt>" not in captions
