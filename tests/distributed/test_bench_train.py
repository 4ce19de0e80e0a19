"""The training bench: a real cell and its limits, the search for the longest row, and bars that claim only what ran."""

import importlib.util

import pytest

from longvila.bench import cell, train
from longvila.bench.cell import GIB, Cell, Limits, Result, TextModel, run_cell
from longvila.bench.longest import find_longest

TINY = TextModel(vocabulary=64, hidden=32, mlp=64)
ROOMY = Limits(4 * GIB, 600)


def test_a_cell_of_two_ranks_gives_the_gradients_of_one_plain_process():
    plain = run_cell(Cell("plain", TINY, 64, gradients=True), ROOMY)
    ours = Cell("longvila", TINY, 64, steps=2, ranks=2, gradients=True, inner=2, tile_tokens=10)
    result = run_cell(ours, ROOMY)
    assert result.why_not is None
    assert plain.gradients is not None
    assert result.gradients is not None
    _, error = train._worst(result.gradients, plain.gradients)
    assert error < 1e-4
    assert result.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
    assert [len(steps) for steps in result.seconds] == [len(result.losses)] * 2 == [2, 2]
    assert min(result.peaks) > 0
    assert not result.without_gradient


@pytest.mark.parametrize(("limits", "words"), [(Limits(1, 600), "memory: more than"), (Limits(4 * GIB, 0.1), "time")])
def test_a_cell_that_passes_a_limit_is_ended_and_says_which(limits, words):
    result = run_cell(Cell("longvila", TINY, 64, inner=1), limits)
    assert result.why_not is not None
    assert result.why_not.startswith(words)
    assert (result.over_memory, result.over_time) == (words.startswith("memory"), words == "time")
    assert result.seconds == ()


def test_a_cell_that_fails_says_what_it_said_last():
    result = run_cell(Cell("longvila", TINY, 64, inner=3), ROOMY)
    assert result.why_not is not None
    assert "does not divide the world of 1 ranks" in result.why_not


def test_a_rank_that_the_machine_ends_is_told_from_one_that_fails(monkeypatch):
    start = cell._start_rank

    def start_and_kill(*arguments):
        process = start(*arguments)
        process.kill()
        return process

    monkeypatch.setattr(cell, "_start_rank", start_and_kill)
    assert run_cell(Cell("longvila", TINY, 64), ROOMY).why_not == "rank 0 was ended by signal 9"


def test_time_is_the_least_of_each_rank_over_steps_and_rounds():
    assert cell.least_seconds([[[3.0, 2.0], [5.0, 9.0]], [[4.0, 2.5], [4.5, 6.0]]]) == 2.0 + 4.5


def search(bytes_per_token, fixed=0.0, seconds=0.0):
    """A search under a limit of 1000 bytes and 100 s, on a machine that takes `seconds` for 1024 tokens."""
    limits, tried = Limits(1000, 100), []

    def run(tokens):
        tried.append(tokens)
        peak = round(fixed + bytes_per_token * tokens)
        return (
            Result(f"memory: {peak}", True)
            if peak > limits.memory
            else Result(peaks=(peak,), seconds=((seconds * (tokens / 1024) ** 2,),))
        )

    return find_longest(run, limits, 1024), tried


@pytest.mark.parametrize("bytes_per_token", [0.9, 0.5, 0.1, 0.01, 0.0023])
@pytest.mark.parametrize("fixed", [0, 300])
def test_the_search_closes_in_on_the_longest_row(bytes_per_token, fixed):
    found, tried = search(bytes_per_token, fixed)
    longest = (1000 - fixed) / bytes_per_token
    assert found.tokens <= longest < found.too_long
    assert found.too_long <= max(1.1 * found.tokens, found.tokens + 512)
    assert len(tried) == len(set(tried)) < 14


def test_a_row_that_would_take_too_long_ends_the_search_with_a_lower_bound():
    found, _ = search(0.001, seconds=10)
    assert found.too_long is None
    assert found.tokens == 2048
    assert "would take about" in found.why


def context(trainer, alst, ours):
    names = (train.TRAINER, train.ALST, train.OURS)
    found = zip(names, (trainer, alst, ours), strict=True)
    return [{"contender": name, "longest": one[0], "too_long": one[1]} for name, one in found]


def test_a_ratio_is_known_only_where_the_peer_met_its_limit():
    by_name = {bar["name"]: bar for bar in train.context_bars(context((1000, 1100), (3000, None), (5000, None)))}
    assert by_name["context_ratio_vs_trainer"]["value"] == 5
    assert by_name["context_ratio_vs_trainer"]["holds"]
    assert by_name["context_ratio_vs_alst"]["value"] is None
    assert not by_name["context_ratio_vs_alst"]["holds"]


def test_a_peer_with_other_gradients_is_not_compared_in_time():
    rows = [
        {"contender": name, "tokens_per_step": 8192, "cpu_us_per_token": time}
        for name, time in ((train.OURS, 10.0), (train.TRAINER, 20.0), (train.ALST, 5.0))
    ]
    errors = [{"contender": train.TRAINER, "error": 1e-6}, {"contender": train.ALST, "error": 0.5}]
    assert train.time_bar(rows, errors)["value"] == 0.5
    assert train.time_bar(rows, [{**errors[0]}, {**errors[1], "error": 1e-5}])["value"] == 2
    assert not train.time_bar(rows, [{**errors[0], "error": None}, errors[1]])["holds"]


def test_a_contender_that_was_ended_has_no_peak_to_compare():
    rows = [
        {"contender": train.OURS, "peak_mib_of_all_ranks": 10, "why_not": ""},
        {"contender": train.TRAINER, "peak_mib_of_all_ranks": 100, "why_not": "memory: more than 10 GiB"},
    ]
    assert train.memory_bar(rows)["value"] is None
    rows[1]["why_not"] = ""
    assert train.memory_bar(rows)["holds"]


def test_an_absent_peer_is_reported(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = train._run(Cell(train.ALST, TINY, 64), ROOMY)
    assert rows.why_not == "accelerate and deepspeed not installed; pip install 'longvila[deepspeed]'"


def engine_row(gradients, norm, within, first=1e-7):
    return {"gradients": gradients, "norm_error": norm, "first_gradient_error": first, "within": within}


def test_engine_bars_take_the_worst_engine_and_demand_that_halved_gradients_are_seen():
    rows = [engine_row("right", 1e-7, True), engine_row("right", 2e-5, False), engine_row("halved", 0.5, False)]
    norm, first, within, halved = train.engine_bars(rows)
    assert (within["value"], within["holds"]) == (1, False)
    assert (norm["value"], norm["holds"]) == (2e-5, False)
    assert (first["value"], first["holds"], halved["holds"]) == (1e-7, True, True)
    assert not train.engine_bars([*rows, engine_row("halved", 0.0, True)])[3]["holds"]
    assert not train.engine_bars(rows[:2])[3]["holds"]


def test_an_engine_that_could_not_run_leaves_its_bars_without_a_figure():
    bars = train.engine_bars([engine_row("right", 1e-7, True), engine_row("right", None, None, None)])
    assert [(bar["value"], bar["holds"]) for bar in bars[:2]] == [(None, False)] * 2
