"""Runs a benchmark: asks its questions, on any number of ranks, and scores the answers.

Ranks do not talk. Each takes its stretch of the same sorted list and appends answers to its own `responses-R.jsonl`;
rank 0 then reads every rank's file until all answers are there, and gives up with an error when nothing new comes for
`patience` seconds. An answer that is already there, from this checkpoint to the same question about the same files, is
not asked for again: a run that stopped goes on, on as many ranks as you like. On several machines `out` must be a
shared folder. Where ranks share prompts, a group of them is what is called a rank here, and its first one writes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import track

from longvila.errors import ConfigError, DataError
from longvila.evaluate.context import check_frames_fit
from longvila.evaluate.examples import save_example_frames
from longvila.evaluate.frames import FrameTokens
from longvila.evaluate.request import FrameRef, Request, evaluation_order, request_key, share_of_rank
from longvila.generate.answer import Answerer

__all__ = ["FrameRef", "Request", "run_benchmark"]


@dataclass(frozen=True)
class Answered:
    """One line of a responses file: the answer, or the reason why there is none."""

    response: str | None
    error: str | None


def run_benchmark(
    benchmark: ModuleType,
    answerer: Answerer,
    data: Path,
    out: Path,
    *,
    options: Mapping[str, Any] | None = None,
    rank: int = 0,
    world: int = 1,
    patience: float = 600.0,
) -> dict[str, Any] | None:
    """Answers and scores `benchmark` on `data`.

    Args:
        benchmark: a module of `eval/`: `requests(data, **options)`, `score(requests, responses)` and, where the
            benchmark has a result file of its own, `export(requests, responses, out)`.
        out: gets `responses-R.jsonl`, and from rank 0 `scores.json`, the example frames and the result file.
        options: keyword arguments for `requests`.
        rank, world: of ranks that share the questions; those of one group that shares prompts are given the same.
        patience: seconds that rank 0 waits without a new answer from another rank.

    Returns:
        What rank 0 wrote to `scores.json`; None on the other ranks.

    Raises:
        ConfigError: the benchmark has no requests, asks two under one id, or shows more frames than fit.
        DataError: no request at all could be answered, or another rank stopped answering.
    """
    begin = time.monotonic()
    requests = answerer.on_first(lambda: benchmark.requests(data, **(options or {})))
    _check_requests(requests, data)
    check_frames_fit(requests, answerer, benchmark.requests, options or {})
    out.mkdir(parents=True, exist_ok=True)
    keys = {request.id: request_key(request, answerer.fingerprint) for request in requests}
    mine = share_of_rank(evaluation_order(requests), rank, world)
    pending = answerer.on_first(lambda: _find_pending(mine, keys, out))  # files may be of other dates elsewhere
    _answer_all(pending, keys, answerer, out / f"responses-{rank}.jsonl", f"rank {rank}: " if world > 1 else "")
    if (rank, answerer.group_rank) != (0, 0):
        return None
    answered = _await_all(requests, keys, out, patience)
    failed = {name: entry.error for name, entry in answered.items() if entry.error is not None}
    if len(failed) == len(requests):
        raise DataError(
            f"none of the {len(requests)} requests could be answered; the first: {next(iter(failed.values()))}"
        )
    responses = {name: entry.response for name, entry in answered.items()}
    scores = {
        "benchmark": benchmark.__name__.rpartition(".")[2],
        "data": str(data),
        "options": dict(options or {}),
        "checkpoint_fingerprint": answerer.fingerprint,
        "num_requests": len(requests),
        "num_reused": len(mine) - len(pending),
        "failed": failed,
        "seconds": round(time.monotonic() - begin, 2),
        **benchmark.score(requests, responses),
    }
    save_example_frames(scores.get("examples", []), out)
    if hasattr(benchmark, "export"):
        benchmark.export(requests, responses, out)
    _write_whole(out / "scores.json", json.dumps(scores, indent=2))
    return scores


def _find_pending(requests: list[Request], keys: Mapping[str, str], out: Path) -> list[Request]:
    known = read_responses(out)
    return [request for request in requests if keys[request.id] not in known]


def read_responses(out: Path) -> dict[str, Answered]:
    """Every answer in a folder, by key. A half line, left by a process that was killed, is no answer."""
    known = {}
    for path in sorted(out.glob("responses-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                known[entry["key"]] = Answered(entry["response"], entry["error"])
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return known


def _check_requests(requests: list[Request], data: Path) -> None:
    if not requests:
        raise ConfigError(f"{data}: the benchmark found nothing to ask here")
    if len({request.id for request in requests}) < len(requests):
        seen: set[str] = set()
        twice = next(request.id for request in requests if request.id in seen or seen.add(request.id))
        raise ConfigError(f"{data}: two requests have the id '{twice}'; ids must differ")


def _answer_all(requests: list[Request], keys: Mapping[str, str], answerer: Answerer, path: Path, label: str) -> None:
    """Appends one line for each request to `path`, at once, so that nothing is lost when the process stops."""
    tokens, console = FrameTokens(answerer, requests), Console(stderr=True, quiet=answerer.group_rank > 0)
    path = path if answerer.group_rank == 0 else Path(os.devnull)
    with path.open("a+b") as check:  # a line cut short must not swallow the next one
        if check.tell() and check.seek(-1, 2) is not None and check.read() != b"\n":
            check.write(b"\n")
    with path.open("a", encoding="utf-8") as file:
        for request in track(requests, f"{label}answering", console=console, transient=True):
            _answer_one(request, keys[request.id], answerer, tokens, file)


def _answer_one(request: Request, key: str, answerer: Answerer, tokens: FrameTokens, file: TextIO) -> None:
    response = error = None
    try:
        response = answerer.answer(tokens(request.frames), request.question, request.max_new_tokens)
    except DataError as reason:  # counted and named in the scores; the answer counts as none
        error = str(reason)
    file.write(json.dumps({"id": request.id, "key": key, "response": response, "error": error}) + "\n")
    file.flush()


def _await_all(requests: list[Request], keys: Mapping[str, str], out: Path, patience: float) -> dict[str, Answered]:
    """Answers of all ranks by request id, in the order of `requests`."""
    last_count, last_change = -1, time.monotonic()
    while True:
        known = read_responses(out)
        missing = [request.id for request in requests if keys[request.id] not in known]
        if not missing:
            return {request.id: known[keys[request.id]] for request in requests}
        if len(missing) != last_count:
            last_count, last_change = len(missing), time.monotonic()
        elif time.monotonic() - last_change > patience:
            raise DataError(
                f"{out}: {len(missing)} of {len(requests)} answers are missing and none came for {patience:g} s, e.g. "
                f"'{missing[0]}'; another rank has stopped. The answers so far are kept: run the same command again"
            )
        time.sleep(0.2)


def _write_whole(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
