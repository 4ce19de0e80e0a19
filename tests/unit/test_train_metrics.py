"""What a run shows: figures of its speed, losses that leap, and chosen steps profiled."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import random

import pytest
import torch

from longvila.errors import ConfigError
from longvila.train.anomaly import WARM_UP, LossWatch
from longvila.train.metrics import Metrics, describe, peak_memory, read_jsonl, speed
from longvila.train.profiler import StepProfiler

FIGURES = {
    "phase": "only",
    "loss": 2.5,
    "lr": 1e-4,
    "tokens": 4000.0,
    "flops": 6e12,
    "seconds": 2.0,
    "data_seconds": 0.5,
    "memory": 3 * 2**29,
}


def losses(seed: int, count: int, spread: float) -> list[float]:
    """A curve that falls from 6 to 1, with noise that is now and then large."""
    noise = random.Random(seed)
    return [(1 + 5 * math.exp(-step / 30)) * noise.lognormvariate(0, spread) for step in range(count)]


def test_speed_is_per_second_and_mfu_by_the_peak_of_all_devices():
    assert speed(FIGURES, None) == {"tokens_per_second": 2000, "flops_per_second": 3e12}
    assert speed(FIGURES, 12e12)["mfu"] == 0.25


def test_the_line_of_a_step_shows_mfu_or_the_rate_where_no_peak_is_known():
    known, unknown = ({**FIGURES, **speed(FIGURES, peak)} for peak in (12e12, None))
    assert describe(known) == "loss 2.500  2,000 tokens/s  25.0% MFU  1.50 GiB  25% data"
    assert describe(unknown) == "loss 2.500  2,000 tokens/s  3 TFLOP/s  1.50 GiB  25% data"


def test_a_log_tells_when_the_run_will_end(tmp_path, capsys):
    with Metrics(tmp_path, "tune", 10, 6, None, active=True) as metrics:
        for step, seconds in ((7, 1800.0), (8, 5400.0)):
            metrics.record(step, {**FIGURES, "seconds": seconds})
    assert capsys.readouterr().err.count("ETA 2:00:00") == 1  # two steps of an hour are left
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [7, 8]
    assert lines[0]["tokens_per_second"] == 4000 / 1800
    assert lines[0]["memory"] == 3 * 2**29


def test_memory_of_a_process_is_in_bytes_and_has_all_that_it_holds():
    held = torch.ones(2**28, dtype=torch.uint8)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert held.nbytes < peak_memory(torch.device("cpu")) < whole


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_curve_that_falls_is_no_leap(seed):
    watch = LossWatch()
    assert [told for loss in losses(seed, 400, 0.15) if (told := watch.see(loss))] == []


def test_a_leap_is_told_with_its_figures_and_the_next_step_is_not():
    watch = LossWatch()
    told = [watch.see(loss) for loss in [*losses(0, 200, 0.05), 4.0, 1.0]]
    assert told[:200] == [None] * 200
    assert "loss 4 is" in str(told[200])
    assert "above the last 50 steps" in str(told[200])
    assert told[201] is None


def test_a_leap_that_stays_is_not_told_for_ever():
    watch = LossWatch()
    told = [watch.see(loss) for loss in [*losses(0, 200, 0.05), *[4.0] * 50]]
    assert 1 <= sum(message is not None for message in told) <= 3


def test_nothing_is_told_in_the_first_steps():
    watch = LossWatch()
    assert [watch.see(loss) for loss in [*[1.0] * (WARM_UP - 1), 100.0]] == [None] * WARM_UP
    watch = LossWatch()
    assert [watch.see(loss) for loss in [*[1.0] * WARM_UP, 100.0]][-1] is not None


@pytest.mark.parametrize(("spread", "deviation"), [(0.1, 0.1), (0.0, 0.02)])
def test_a_leap_is_more_than_six_deviations_above_the_mean(spread, deviation):
    calm = [1 + spread, 1 - spread] * 25
    for loss, is_leap in ((1 + 5.99 * deviation, False), (1 + 6.01 * deviation, True), (1 - 20 * deviation, False)):
        watch = LossWatch()
        assert [watch.see(each) for each in calm] == [None] * 50
        assert (watch.see(loss) is not None) == is_leap


def steps_with(profiler: StepProfiler, count: int) -> None:
    with profiler:
        for step in range(1, count + 1):
            profiler.before(step)
            torch.ones(8, 8) @ torch.ones(8, 8 * step)
            profiler.after(step)


def test_the_steps_that_were_asked_for_are_in_the_trace_and_no_other(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        steps_with(StepProfiler(tmp_path / "profile", (2, 3), 0, 5, active=True), 5)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "steps-2-3.json.gz").read_bytes()))
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == 2
    assert "steps 2 to 3 are profiled" in caplog.text
    assert "aten::mm" in caplog.text


def test_a_run_that_ends_among_the_steps_leaves_what_there_is(tmp_path):
    steps_with(StepProfiler(tmp_path / "profile", (2, 9), 0, 9, active=True), 3)
    assert (tmp_path / "profile" / "steps-2-9.json.gz").is_file()


@pytest.mark.parametrize(("steps", "active"), [(None, True), ((1, 2), False)])
def test_without_the_switch_or_on_other_ranks_nothing_is_written(tmp_path, steps, active):
    steps_with(StepProfiler(tmp_path / "profile", steps, 0, 5, active), 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [(0, 2), (3, 2), (4, 6), (2, 4)])
def test_steps_that_are_not_left_are_refused(tmp_path, steps):
    with pytest.raises(ConfigError, match="within the steps that are left, 3:5"):
        StepProfiler(tmp_path, steps, 2, 5, active=False)


def test_the_metrics_of_before_survive_a_disk_that_is_full_when_a_run_goes_on(tmp_path, monkeypatch):
    with Metrics(tmp_path, "tune", 10, 0, None, active=True) as metrics:
        metrics.record(1, FIGURES)
    before = (tmp_path / "metrics.jsonl").read_text()

    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space"):
        Metrics(tmp_path, "tune", 10, 1, None, active=True).__enter__()
    assert (tmp_path / "metrics.jsonl").read_text() == before
