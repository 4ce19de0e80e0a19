"""The command line of one rank, with a fault in it: `longvila.bench.injected '{"kind": ..., ...}' train ...`.

Faults are put around what the product calls, from outside: the product itself has no hooks for them. `faults.py` starts
this module under torchrun in place of `longvila.cli`.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter

from longvila.model.vlm import LongVilaModel
from longvila.shards.loader import RowLoader

EXPLOSION = 1e9
"""Factor of an exploding gradient."""
FULL = 20_000
"""Bytes of a file beyond which the disk is full."""


class Injected:
    """What a fault is to do, and when.

    Args:
        kind: a method of this class.
        ranks: where; other ranks are left as they are.
        steps: the steps (from 1) in which it happens; a step is one forward pass.
        save: the save (from 1) in which it happens.
        fired: a file that gets the time at which it happened.
    """

    def __init__(self, kind: str, ranks: list[int], steps: list[int], save: int, fired: str) -> None:
        self.kind, self.ranks, self.steps, self.save, self.fired = kind, ranks, steps, save, Path(fired)
        self.step = self.saves = 0

    def apply(self) -> None:
        self._count_steps()
        if int(os.environ["RANK"]) in self.ranks:
            getattr(self, self.kind)()

    def note(self) -> None:
        if not self.fired.exists():
            self.fired.write_text(str(time.time()))

    def kill(self) -> None:
        self._at_step(lambda output: self._signal(os.getpid(), signal.SIGKILL))

    def hang(self) -> None:
        self._at_step(lambda output: self._signal(os.getpid(), signal.SIGSTOP))

    def terminate(self) -> None:
        """As a scheduler does, which tells the launcher."""
        self._at_step(lambda output: self._signal(os.getppid(), signal.SIGTERM))

    def nan(self) -> None:
        def poison(output: Any) -> None:
            self.note()
            output.loss_sum = output.loss_sum * float("nan")

        self._at_step(poison)

    def explode(self) -> None:
        def scale(output: Any) -> None:
            self.note()
            output.loss_sum.register_hook(lambda gradient: gradient * EXPLOSION)

        self._at_step(scale)

    def leave_out(self) -> None:
        """No fault: the optimizer does nothing at these steps. What a run that skips them must come to."""

        def around(real: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kw: None if self.step in self.steps else real(*args, **kw)

        _wrap(torch.optim.AdamW, "step", around)

    def read_error(self) -> None:
        """The loader cannot read on."""

        def around(real: Callable[..., Any]) -> Callable[..., Any]:
            def start(*args: Any) -> Any:
                if self.step + 1 in self.steps:
                    self.note()
                    raise OSError(errno.EIO, "Input/output error", "/films")
                return real(*args)

            return start

        _wrap(RowLoader, "_start", around)

    def lost_shards(self) -> None:
        """This rank sees shards that the other does not: it cannot open the first."""
        lost: list[Path] = []

        def around(real: Callable[..., Any]) -> Callable[..., Any]:
            def open_(path: Path, *args: Any, **kw: Any) -> Any:
                if path.suffix == ".tar" and (not lost or path in lost):
                    lost.append(path)
                    self.note()
                    raise OSError(errno.EIO, "Input/output error", str(path))
                return real(path, *args, **kw)

            return open_

        _wrap(Path, "open", around)

    def kill_in_save(self) -> None:
        """When its share is written, and the others' may not be."""

        def write(real: Callable[[], Any]) -> Any:
            real()
            self._signal(os.getpid(), signal.SIGKILL)

        self._at_save(write)

    def kill_before_rename(self) -> None:
        """Of the first rank, with everything written and nothing in its place."""

        def around(real: Callable[..., Any]) -> Callable[..., Any]:
            def rename(path: Path, target: Path) -> Any:
                if path.suffix == ".part":
                    self.saves += 1
                    if self.saves == self.save:
                        self._signal(os.getpid(), signal.SIGKILL)
                return real(path, target)

            return rename

        _wrap(Path, "rename", around)

    def full_disk(self) -> None:
        """While this save writes, no file may grow beyond FULL bytes."""

        def write(real: Callable[[], Any]) -> Any:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            self.note()
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, hard))
            try:
                return real()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        self._at_save(write)

    def _signal(self, process: int, number: signal.Signals) -> None:
        self.note()
        os.kill(process, number)

    def _at_step(self, act: Callable[[Any], None]) -> None:
        """Calls `act` with what the forward pass of the chosen steps gave."""

        def around(real: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kw: Any) -> Any:
                output = real(*args, **kw)
                if self.step in self.steps:
                    act(output)
                return output

            return forward

        _wrap(LongVilaModel, "forward", around)

    def _count_steps(self) -> None:
        def around(real: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kw: Any) -> Any:
                self.step += 1
                return real(*args, **kw)

            return forward

        _wrap(LongVilaModel, "forward", around)

    def _at_save(self, act: Callable[[Callable[[], Any]], Any]) -> None:
        """Calls `act` with what would write this rank's share of the chosen save."""

        def around(real: Callable[..., Any]) -> Callable[..., Any]:
            def write_data(*args: Any) -> Any:
                self.saves += 1
                return act(lambda: real(*args)) if self.saves == self.save else real(*args)

            return write_data

        _wrap(FileSystemWriter, "write_data", around)


def _wrap(owner: type, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces a method by what `around` makes of it."""
    setattr(owner, name, around(getattr(owner, name)))


if __name__ == "__main__":
    Injected(**json.loads(sys.argv.pop(1))).apply()
    runpy.run_module("longvila.cli", run_name="__main__")
