"""`longvila bench train`: training on long rows beside Hugging Face Trainer and DeepSpeed ALST, in one run.

All train the same small language model in fp32 on a CPU, one thread a process, fresh processes for every cell; all use
activation checkpointing and AdamW. Sections are lists of rows, as in the JSON file; bars are computed from them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from torch import Tensor

from longvila.bench import engines
from longvila.bench.bars import at_least, at_most, sections
from longvila.bench.cell import GIB, Cell, Limits, Result, TextModel, least_seconds, run_cell
from longvila.bench.longest import find_longest
from longvila.difference import relative_error

Rows = list[dict[str, Any]]
Show = Callable[[str, Rows, str], None]

OURS, TRAINER, ALST = "longvila", "Trainer", "Trainer + ALST"
RANKS = {OURS: 2, TRAINER: 1, ALST: 2}
WIDE = TextModel(vocabulary=4096, hidden=2048, mlp=2048)
CONTEXT = TextModel(vocabulary=32_000, hidden=2048, mlp=2048)
"""As many words as the smallest vocabularies in use (Llama 2, Mistral): their logits are a part of what a row takes."""
WORDY = TextModel(vocabulary=151_936, hidden=256, mlp=1024, layers=4, tied=True)
"""The words of Qwen2 and Qwen3, which tie them in their small sizes."""
VIDEO = TextModel(vocabulary=4096, hidden=256, mlp=1024)
TILE = 1024
"""Tokens of a tile, and of ALST's at this width about as many: tokens / width tiles."""
CELL = Limits(memory=10 * GIB, seconds=1200, of_all=True)
LENGTHS = (8192, 32_768, 131_072)
ROUNDS = 3
WORDY_TOKENS = 4096
GRADIENT_TOKENS = 2048
FRAMES, TOKENS_PER_FRAME, TEXT = 1400, 196, 64

GRADIENT, PEER_GRADIENT = 1e-4, 1e-3
"""Of ours, and of a peer whose time is worth comparing."""
TIME = 1.0
MEMORY = 0.25
CONTEXT_TRAINER, CONTEXT_ALST = 4.0, 1.2
MEMORY_NOTE = "peak: resident memory of a rank beyond its imports"


def run(quick: bool, budget: float, show: Show) -> dict[str, Any]:
    """Runs all sections and returns what is written as JSON.

    Args:
        quick: short rows, and no search; about two minutes on two cores.
        budget: GiB a rank, of the search for the longest context.
        show: called with (title, rows, note) as each section is done.
    """
    figures: dict[str, Any] = {"quick": quick}

    section = sections(figures, show)

    note = "the same steps as a textbook's on one process; the worst step or parameter, weights by the sum of the rates"
    engine_rows = section("engines", engines.measure(quick), note)
    tokens = 512 if quick else GRADIENT_TOKENS
    note = f"first step, {tokens} tokens: max |difference| / max |reference| of the worst parameter; one plain process"
    gradients = section("gradients", compare_gradients(tokens), note)
    measured = measure_lengths((1024,), rounds=1) if quick else measure_lengths(LENGTHS, ROUNDS)
    lengths = section("lengths", measured, f"{WIDE}; {CELL}; {MEMORY_NOTE}")
    if quick:
        skipped = [{"section": name, "why": "--quick"} for name in ("vocabulary", "context", "film")]
        section("skipped", skipped, "their bars are not claimed, nor those of 8K tokens")
        figures["bars"] = [*engine_bars(engine_rows), _gradient_bar(gradients)]
        return figures
    wordy = section("vocabulary", measure_vocabulary(), f"{WORDY}; {WORDY_TOKENS} tokens; {MEMORY_NOTE}")
    limits = Limits(round(budget * GIB), CELL.seconds)
    context = section("context", measure_context(limits), f"{CONTEXT}; the longest row that fits; {limits}")
    film = section("film", [measure_film()], f"{VIDEO}; tower, projector and language model train")
    figures["bars"] = [
        *engine_bars(engine_rows),
        _gradient_bar(gradients),
        time_bar(lengths, gradients),
        memory_bar(wordy),
        *context_bars(context),
        {"name": "step_274400_tokens", "value": film[0]["done"], "bound": 1, "holds": film[0]["done"] == 1},
    ]
    return figures


def compare_gradients(tokens: int) -> Rows:
    """Every contender's first step on the wide model, against the model's own loss and backward on one process."""
    reference = run_cell(Cell("plain", WIDE, tokens, gradients=True), CELL).gradients
    if reference is None:
        raise RuntimeError("the plain process gave no gradients")
    rows = []
    for name in RANKS:
        result = _run(replace(_cell(name, WIDE, tokens), gradients=True), CELL)
        worst, error = _worst(result.gradients, reference) if result.gradients else ("", None)
        rows.append({"contender": name, "error": error, "parameter": worst, "why_not": _reason(result)})
    return rows


def measure_lengths(lengths: tuple[int, ...], rounds: int) -> Rows:
    """Time and memory of a step. Up to 8K tokens, `rounds` times two steps of each contender, in turns, so that a
    machine that grows busier favours none, and of each process the least time counts; else one step.

    Cores that share caches and memory are slower together: up to 8K tokens two Trainers at once, each a step of its
    own, tell how much of a difference between one process and two ranks is the machine's. No bar counts them.
    """
    rows = []
    for tokens in lengths:
        short = tokens <= LENGTHS[0]
        cells = {name: _cell(name, WIDE, tokens, steps=2 if short else 1) for name in RANKS}
        if short:  # ours alone: memory to spare, so weights are gathered once a step, not twice
            cells[OURS] = replace(cells[OURS], parameters="none")
        found: dict[str, list[Result]] = {name: [] for name in cells}
        pairs: list[Result] = []
        for _ in range(rounds if short else 1):
            for name, cell in cells.items():
                found[name].append(_run(cell, CELL))
            if short:
                with ThreadPoolExecutor(2) as both:
                    pairs += both.map(lambda cell: _run(cell, CELL), [cells[TRAINER]] * 2)
        rows += [_length_row(name, tokens, RANKS[name], results) for name, results in found.items()]
        if pairs:
            rows.append(_length_row(f"{TRAINER}, two at once", tokens, 1, pairs))
    return rows


def _length_row(name: str, tokens: int, ranks: int, results: Sequence[Result]) -> dict[str, Any]:
    return {
        "contender": name, "tokens_per_step": tokens, "ranks": ranks,
        "peak_mib_per_rank": round(max(peak for result in results for peak in (0, *result.peaks)) / 2**20),
        "cpu_us_per_token": _us_per_token(results, tokens),
        "why_not": "; ".join(dict.fromkeys(filter(None, map(_reason, results)))),
    }  # fmt: skip


def measure_vocabulary() -> Rows:
    """Memory of two steps of a model with many words, summed over ranks: the second has AdamW's moments."""
    rows = []
    for name in RANKS:
        result = _run(_cell(name, WORDY, WORDY_TOKENS, steps=2), CELL)
        rows.append(
            {
                "contender": name, "ranks": RANKS[name], "peak_mib_of_all_ranks": round(sum(result.peaks) / 2**20),
                "cpu_us_per_token": _us_per_token([result], WORDY_TOKENS),
                "why_not": _reason(result),
            }
        )  # fmt: skip
    return rows


def measure_context(limits: Limits) -> Rows:
    """The longest row of each contender within the budget, which every rank has for itself."""
    rows = []
    for name, first in ((TRAINER, 1024), (ALST, 8192), (OURS, 8192)):
        absent = _absent(name)
        if absent:
            rows.append(dict.fromkeys(("contender", "longest", "too_long", "peak_mib_per_rank", "why"), None))
            rows[-1] |= {"contender": name, "why": absent}
            continue
        found = find_longest(lambda n, name=name: _run(_cell(name, CONTEXT, n, recompute="all"), limits), limits, first)
        rows.append(
            {
                "contender": name, "longest": found.tokens, "too_long": found.too_long,
                "peak_mib_per_rank": round(max(found.result.peaks) / 2**20) if found.result else None,
                "why": found.why,
            }
        )  # fmt: skip
    return rows


def measure_film() -> dict[str, Any]:
    """One step of a vision-language model on 1,400 frames; `done` is 1 where every trained parameter got a gradient."""
    tokens = FRAMES * TOKENS_PER_FRAME + TEXT
    cell = replace(_cell(OURS, VIDEO, tokens), contender="longvila video", frames=FRAMES, tile_tokens=4 * TILE)
    result = run_cell(cell, replace(CELL, seconds=4 * 3600))
    done = int(result.why_not is None and not result.without_gradient)
    return {
        "done": done, "tokens": tokens, "frames": FRAMES, "ranks": cell.ranks,
        "loss": result.losses[0] if result.losses else None, "gradient_norm": result.norm,
        "cpu_seconds": sum(map(sum, result.seconds)), "peak_mib_per_rank": round(max(result.peaks) / 2**20),
        "why_not": result.why_not or ", ".join(result.without_gradient),
    }  # fmt: skip


def engine_bars(rows: Rows) -> list[dict[str, Any]]:
    """Of every engine the worst error, no figure where one could not run; and how many keep all bounds, fp64's and the
    weights' too. Halved gradients must fail them."""
    right, halved = ([row for row in rows if row["gradients"] == kind] for kind in ("right", "halved"))
    bars = []
    for name, key, bound in (
        ("engines_gradient_norm_error", "norm_error", engines.NORM),
        ("engines_first_gradient_error", "first_gradient_error", engines.FIRST_GRADIENT),
    ):
        errors = [row[key] for row in right]
        bars.append(at_most(name, None if None in errors else max(errors), bound))
    bars.append(at_least("engines_within_bounds", sum(bool(row["within"]) for row in right), len(right)))
    caught = int(bool(halved) and not any(row["within"] for row in halved))
    return [*bars, at_least("halved_gradients_caught", caught, 1)]


def time_bar(lengths: Rows, gradients: Rows) -> dict[str, Any]:
    """CPU time per token at 8K tokens over that of the faster peer whose gradients are right."""
    exact = {row["contender"] for row in gradients if row["error"] is not None and row["error"] <= PEER_GRADIENT}
    at = {row["contender"]: row["cpu_us_per_token"] for row in lengths if row["tokens_per_step"] == LENGTHS[0]}
    peers = [at[name] for name in (TRAINER, ALST) if name in exact and at.get(name) is not None]
    value = at[OURS] / min(peers) if peers and at.get(OURS) is not None else None
    return at_most("time_per_token_vs_trainer_8k", value, TIME)


def memory_bar(wordy: Rows) -> dict[str, Any]:
    """Peak of both ranks over Trainer's. A contender that was ended has no peak to compare."""
    peaks = {row["contender"]: row["peak_mib_of_all_ranks"] for row in wordy if not row["why_not"]}
    value = peaks[OURS] / peaks[TRAINER] if OURS in peaks and TRAINER in peaks else None
    return at_most("peak_memory_vs_trainer", value, MEMORY)


def context_bars(context: Rows) -> list[dict[str, Any]]:
    """Ours over each peer's. Where a peer's search ended before anything was too long, no ratio is known; where ours
    did, it is at least this."""
    rows = {row["contender"]: row for row in context}
    bars = []
    for name, peer, bound in (("trainer", TRAINER, CONTEXT_TRAINER), ("alst", ALST, CONTEXT_ALST)):
        known = rows[peer]["longest"] and rows[peer]["too_long"] is not None
        value = rows[OURS]["longest"] / rows[peer]["longest"] if known else None
        bars.append(at_least(f"context_ratio_vs_{name}", value, bound))
    return bars


def _cell(name: str, model: TextModel, tokens: int, steps: int = 1, recompute: Any = "save_attention") -> Cell:
    cell = Cell(name, model, tokens, steps, RANKS[name])
    return replace(cell, inner=RANKS[OURS], recompute=recompute, tile_tokens=TILE) if name == OURS else cell


def _run(cell: Cell, limits: Limits) -> Result:
    absent = _absent(cell.contender)
    return Result(absent) if absent else run_cell(cell, limits)


def _absent(name: str) -> str | None:
    needed = {TRAINER: ("accelerate",), ALST: ("accelerate", "deepspeed")}.get(name, ())
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    return f"{' and '.join(missing)} not installed; pip install 'longvila[deepspeed]'" if missing else None


def _us_per_token(rounds: Sequence[Result], tokens: int) -> float | None:
    """CPU time, summed over ranks."""
    if not all(result.seconds for result in rounds):
        return None
    return least_seconds([result.seconds for result in rounds]) / tokens * 1e6


def _reason(result: Result) -> str:
    return result.why_not or ""


def _worst(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[str, float]:
    if gradients.keys() != reference.keys():
        raise RuntimeError(f"gradients of {sorted(gradients.keys() ^ reference.keys())} have no counterpart")
    errors = {name: relative_error(gradients[name], g) for name, g in reference.items()}
    worst = max(errors, key=errors.__getitem__)
    return worst, errors[worst]


def _gradient_bar(gradients: Rows) -> dict[str, Any]:
    return at_most("first_step_gradient_error", gradients[0]["error"], GRADIENT)
