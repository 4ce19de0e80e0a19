"""Runs a function on several gloo ranks of this machine, for checks and tests. Training is launched by torchrun."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankError(RuntimeError):
    """A rank raised; the message holds the traceback of each that did."""


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `function(*args)` on `ranks` forked processes that share a gloo world, one thread each.

    Forked, since spawning imports torch anew in each; the parent must not hold CUDA.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RankError: with every rank's own traceback (that of its threads where a signal ended it), or the ranks that did
            not answer within `timeout` seconds.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pipes, processes = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            target = (function, args, rank, ranks, folder, sender, timeout)
            process = context.Process(target=_rank_main, args=target, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        deadline = time.monotonic() + timeout
        received = [_receive(pipe, max(0.0, deadline - time.monotonic()), timeout) for pipe in pipes]
        answers = []
        for rank, (process, answer) in enumerate(zip(processes, received, strict=True)):
            process.join(timeout=5)
            process.kill()
            answers.append(answer or (False, _epitaph(process.exitcode, folder / f"rank{rank}")))
    if failed := [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]:
        raise RankError("\n".join(failed))
    return [value for _, value in answers]


def run_cases(
    function: Callable[..., Any], ranks: int, cases: Iterable[tuple[Any, ...]], timeout: float = 600.0
) -> list[list[Any]]:
    """`function(*case)` of each case in turn, on ranks that start once.

    Returns:
        By case, what each rank returned.

    Raises:
        RankError: as `run_ranks`; the traceback says in which case.
    """
    by_rank = run_ranks(_run_each, ranks, function, tuple(cases), timeout=timeout)
    return [list(of_case) for of_case in zip(*by_rank, strict=True)]


def _run_each(function: Callable[..., Any], cases: tuple[tuple[Any, ...], ...]) -> list[Any]:
    found = []
    for case in cases:
        try:
            found.append(function(*case))
        except Exception as error:
            error.add_note(f"in the case {case}")
            raise
    return found


def _receive(pipe: Any, left: float, timeout: float) -> tuple[bool, Any] | None:
    """The answer; None where the process ended before it gave one."""
    try:
        if pipe.poll(left):
            return pickle.loads(pipe.recv_bytes())
        return False, f"no answer within {timeout} s"
    except EOFError:
        return None


def _epitaph(code: int | None, trace: Path) -> str:
    cause = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return f"the process ended without an answer ({cause})\n{trace.read_text() if trace.exists() else ''}"


def _rank_main(
    function: Callable[..., Any], args: tuple, rank: int, ranks: int, folder: Path, pipe: Any, timeout: float
) -> None:
    torch.set_num_threads(1)
    # Garbage of the parent is not to be destroyed here: the threads that its destructors would join were not forked.
    gc.freeze()
    faulthandler.enable((folder / f"rank{rank}").open("w"))
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), ranks),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout),
        )
        dist.barrier()  # else a rank that fails at once would break others that are still connecting to it
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    # Plain pickle copies tensors; multiprocessing's would share memory with a process that is about to end.
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    if answer[0]:  # else a rank that is done at once would break others that are still connecting to it
        with suppress(Exception):
            dist.barrier()
    # No clean-up: peers of a failed rank would wait for each other in it.
    os._exit(0)
