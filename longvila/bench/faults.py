"""`longvila bench faults`: a run of two ranks is broken in many ways, and must go on to the same weights, bit for bit.

Every fault is put into a real `longvila train` under torchrun, on a tiny model and tiny films. It is survived where

- it is a step that has to be skipped, and the run ends with the weights of a run that leaves that step out; or
- every rank that is left says what happened, once, in one line and in time; the command fails; no process stays; no
  complete checkpoint is lost; and the same command, given again, ends with the weights of a run without the fault.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from longvila.bench.tiny import QUESTION, write_films, write_models

STEPS, EVERY, MAX_SKIPPED = 9, 2, 2
FOLDS = {"sequence": 2, "data": 1}
"""Ranks of a sequence group: two share every row, or each reads its own."""
SECONDS = 20.0
"""Within which the ranks that are left must have spoken; a hung rank is given HANG more."""
HANG = 25.0
"""`rank_timeout` of runs with a rank that hangs; it must suffice for one rank to start up later than the other."""
LIMIT = 900.0
"""Seconds after which a command counts as hanging, and is ended; many, for machines that do other work beside."""
NEVER = -1000
"""The status of such a command; no signal's."""
MARK = "LONGVILA_FAULT"
"""A variable in the environment of a command's processes, by which those it leaves behind are found."""

STAGE = f"""
from longvila.config import (
    PARTS, DataConfig, FrameSampling, ModelConfig, OptimizerConfig, Phase, SourceConfig, StageConfig,
)

def config(scale, models):
    data = DataConfig((SourceConfig("films"),), FrameSampling("fps", 4), row_tokens=128)
    phase = Phase("only", {STEPS}, data, 1e-3)
    model = ModelConfig(str(models / "tower.json"), None, str(models / "lm"))
    return StageConfig("faulty", scale, None, model, PARTS, (phase,), checkpoint_every={EVERY},
                       optimizer=OptimizerConfig(skip_norm=1e4, max_skipped={MAX_SKIPPED}))
"""


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong; `kind` is a method of `injected.Injected`."""

    name: str
    kind: str
    fold: str = "sequence"
    rank: int = 1
    steps: tuple[int, ...] = ()
    save: int = 0
    asynchronous: bool = False
    damage: Callable[[Path], None] | None = None
    """What happens to the newest checkpoint before the command is given again."""

    @property
    def left(self) -> tuple[int, ...]:
        """Ranks that are left to say what happened."""
        return tuple(rank for rank in range(2) if rank != self.rank or self.kind not in _DEADLY)

    @property
    def skipped(self) -> tuple[int, ...]:
        """Steps that the run must skip; those after a checkpoint it was stopped behind are taken again."""
        if self.kind not in ("nan", "explode"):
            return ()
        if len(self.steps) <= MAX_SKIPPED:
            return self.steps
        stopped = self.steps[0] + MAX_SKIPPED
        return tuple(range(self.steps[0], (stopped - 1) // EVERY * EVERY + 1))

    @property
    def stops(self) -> bool:
        return self.kind not in ("nan", "explode") or len(self.steps) > MAX_SKIPPED


_DEADLY = ("kill", "hang", "kill_in_save", "kill_before_rename")
_IN_SAVE = ("kill_in_save", "kill_before_rename", "full_disk")


def flip_bit(checkpoint: Path) -> None:
    path = checkpoint / "__1_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def plan(seed: int = 0) -> list[Fault]:
    """The twenty faults; where they strike is drawn."""
    draw = random.Random(seed)

    def rank() -> int:
        return draw.randrange(2)

    def step(first: int = 3) -> tuple[int]:
        return (draw.randint(first, STEPS - 1),)

    def save() -> int:
        return draw.randint(2, (STEPS - 1) // EVERY)

    endless = draw.randint(4, STEPS - MAX_SKIPPED)
    return [
        Fault("rank killed", "kill", "sequence", rank(), step()),
        Fault("rank killed", "kill", "data", rank(), step()),
        Fault("rank killed", "kill", "sequence", rank(), step(), asynchronous=True),
        Fault("killed while saving", "kill_in_save", "sequence", rank(), save=save()),
        Fault("killed while saving", "kill_in_save", "data", rank(), save=save(), asynchronous=True),
        Fault("killed before a save is named", "kill_before_rename", "sequence", 0, save=save()),
        Fault("rank hangs", "hang", "sequence", rank(), step()),
        Fault("rank hangs", "hang", "data", rank(), step()),
        Fault("disk full", "full_disk", "sequence", rank(), save=save()),
        Fault("disk full", "full_disk", "data", rank(), save=save()),
        Fault("disk full", "full_disk", "sequence", rank(), save=save(), asynchronous=True),
        Fault("checkpoint corrupted", "kill", "sequence", rank(), step(5), damage=flip_bit),
        Fault("checkpoint corrupted", "kill", "data", rank(), step(5), damage=flip_bit),
        Fault("checkpoint truncated", "terminate", "sequence", 0, step(4), damage=truncate),
        Fault("loss not a number", "nan", "sequence", rank(), step()),
        Fault("loss not a number for good", "nan", "data", rank(), tuple(range(endless, STEPS + 1))),
        Fault("gradient explodes", "explode", "data", rank(), step()),
        Fault("told to stop", "terminate", "data", 0, step()),
        Fault("loader cannot read", "read_error", "data", rank(), step()),
        Fault("shard unreadable on one rank", "lost_shards", "sequence", rank()),
    ]


QUICK = (0, 3, 8, 11, 14, 17)
"""Of the plan: one each of the kinds that differ most."""


def run(quick: bool, show: Callable[[str, list[dict[str, Any]], str], None]) -> dict[str, Any]:
    """Runs the faults one after the other and returns what is written as JSON.

    Args:
        quick: fewer faults.
        show: called with (title, rows, note).
    """
    faults = [fault for index, fault in enumerate(plan()) if not quick or index in QUICK]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        rows = []
        for number, fault in enumerate(faults, 1):
            rows.append(bench.row(number, fault))
            verdict = "survived" if rows[-1]["survived"] else rows[-1]["wrong"]
            log.info("%d of %d, %s: %s", number, len(faults), fault.name, verdict)
    shown = [{name: _short(value) for name, value in row.items() if name != "log"} for row in rows]
    show("faults", shown, f"{STEPS} steps, a checkpoint every {EVERY}, two ranks")
    return {"quick": quick, "faults": rows, "bars": _bars(rows)}


def _bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    survived = sum(row["survived"] for row in rows)
    identical = all(row["identical"] for row in rows)
    return [
        {"name": "faults_survived", "value": survived, "bound": len(rows), "holds": survived == len(rows)},
        {"name": "resume_bit_identical", "value": int(identical), "bound": 1, "holds": identical},
    ]


def _short(value: Any) -> Any:
    return value[:70] if isinstance(value, str) else value


@dataclass
class Outcome:
    """How a command ended."""

    status: int
    lines: list[tuple[float, str]] = field(default_factory=list)
    """What it said, and when."""
    left_over: int = 0
    """Processes still there when it had ended."""

    def find(self, pattern: str) -> list[tuple[float, str]]:
        return [(when, line) for when, line in self.lines if re.search(pattern, line)]


class Bench:
    """Films, models and the weights of undisturbed runs, below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._references: dict[tuple[str, tuple[int, ...]], dict[str, torch.Tensor]] = {}
        films = 16  # four rows of four: each of two data ranks has one in every step
        write_films(root / "data" / "films", films, shards=2)
        write_models(root / "models", [QUESTION, *(f"a film, number {number}" for number in range(films))])
        (root / "faulty.py").write_text(STAGE)

    def row(self, number: int, fault: Fault) -> dict[str, Any]:
        """Injects one fault, starts the run again where it stopped, and judges."""
        folder = self.root / f"fault{number}"
        begin = time.time()
        broken = self._start(folder, fault, injected=True)
        stage = folder / "faulty"
        reached = max((line["step"] for line in _lines(stage / "metrics.jsonl")), default=0)
        wrong: list[str] = []
        said, seconds, lost = "", 0.0, 0
        if fault.stops:
            said, seconds = self._judge_end(fault, broken, folder, wrong)
            newest = _checkpoints(stage)[-1:]
            if fault.damage is not None and newest:
                fault.damage(newest[0])
            again = self._start(folder, fault, injected=False)
            lost = reached - self._judge_resumed(fault, again, newest, reached, wrong)
        else:
            again = broken
            warnings = broken.find("step skipped")
            said = warnings[0][1] if warnings else ""
            if len(warnings) != 2 * len(fault.steps):
                wrong.append(f"{len(warnings)} warnings of {len(fault.steps)} skipped steps on two ranks")
        identical = self._judge_weights(fault, again, stage, wrong)
        return {
            "fault": number,
            "kind": fault.name,
            "fold": fault.fold,
            "rank": fault.rank,
            "step": fault.steps[0] if fault.steps else fault.save * EVERY or 1,
            "save": "async" if fault.asynchronous else "sync",
            "seconds": round(seconds, 1),
            "lost": lost,
            "identical": identical,
            "survived": not wrong,
            "said": said,
            "wrong": "; ".join(wrong),
            "took": round(time.time() - begin, 1),
            "log": [line for outcome in (broken, again) for _, line in outcome.lines] if wrong else [],
        }

    def _judge_end(self, fault: Fault, broken: Outcome, folder: Path, wrong: list[str]) -> tuple[str, float]:
        """What the ranks that are left said, and how many seconds after the fault the last of them did."""
        if broken.status == 0:
            wrong.append("the command did not fail")
        if broken.status == NEVER:
            wrong.append(f"the command was not over after {LIMIT:g} s")
        if broken.left_over:
            wrong.append(f"{broken.left_over} processes left over")
        if broken.find("Traceback"):
            wrong.append("a stack trace")
        fired = folder / "fired"
        if not fired.exists():
            wrong.append("the fault did not happen")
            return "", 0.0
        struck, last, said = float(fired.read_text()), 0.0, ""
        for rank in fault.left:
            errors = broken.find(rf"error \(rank {rank}\)")
            if len(errors) != 1:
                wrong.append(f"rank {rank} said {len(errors)} errors, not one")
            for when, line in errors:
                said, last = said or line, max(last, when - struck)
        if last > SECONDS + (HANG if fault.kind == "hang" else 0):
            wrong.append(f"said only after {last:.0f} s")
        return said, last

    def _judge_resumed(self, fault: Fault, again: Outcome, newest: list[Path], reached: int, wrong: list[str]) -> int:
        """The step from which the second run went on."""
        expected = reached // EVERY * EVERY
        if fault.kind in _IN_SAVE:
            expected -= EVERY
        if fault.kind == "terminate":
            expected = reached
        if fault.damage is not None:
            expected = (expected - 1) // EVERY * EVERY
            if not again.find(rf"set aside as \.bad: .*{newest[0].name}: __\d_0.distcp"):
                wrong.append("the damaged checkpoint was not named")
        found = again.find(r"continues at step \d+")
        resumed = int(re.findall(r"at step (\d+)", found[0][1])[0]) if found else 0
        # What was being saved in the background may not have been complete.
        if resumed < expected - (EVERY if fault.asynchronous else 0):
            wrong.append(f"went on from step {resumed}, not {expected}: a checkpoint is lost")
        return resumed

    def _judge_weights(self, fault: Fault, last: Outcome, stage: Path, wrong: list[str]) -> bool:
        if last.status:
            wrong.append(f"the run did not end: {last.lines[-1][1] if last.lines else 'silence'}")
            return False
        lines = _lines(stage / "metrics.jsonl")
        if [line["step"] for line in lines] != list(range(1, STEPS + 1)):
            wrong.append("metrics.jsonl does not hold every step once")
        skipped = tuple(line["step"] for line in lines if line["skipped"])
        if skipped != fault.skipped:
            wrong.append(f"steps {skipped} were skipped, not {fault.skipped}")
        weights, expected = _weights(stage), self._reference(fault.fold, fault.skipped)
        if not (identical := all(torch.equal(weights[name], weight) for name, weight in expected.items())):
            wrong.append("the weights differ")
        return identical

    def _reference(self, fold: str, left_out: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The weights of a run without a fault, whose optimizer leaves out some steps."""
        if (fold, left_out) not in self._references:
            fault = Fault("none", "leave_out", fold, steps=left_out)
            folder = self.root / f"reference{len(self._references)}"
            outcome = self._start(folder, fault, injected=bool(left_out))
            if outcome.status:
                raise RuntimeError("a run without a fault failed:\n" + "\n".join(line for _, line in outcome.lines))
            self._references[fold, left_out] = _weights(folder / "faulty")
        return self._references[fold, left_out]

    def _start(self, folder: Path, fault: Fault, injected: bool) -> Outcome:
        """`longvila train` under torchrun. The fault is no part of what the command asks for."""
        folder.mkdir(exist_ok=True)
        ranks = [0, 1] if fault.kind == "leave_out" else [fault.rank]
        what = {"kind": fault.kind, "ranks": ranks, "steps": fault.steps, "save": fault.save}
        module = (
            ["longvila.bench.injected", json.dumps({**what, "fired": str(folder / "fired")})]
            if injected
            else ["longvila.cli"]
        )
        settings = {
            "parallel.inner": FOLDS[fault.fold],
            "checkpoint_async": json.dumps(fault.asynchronous),
            "rank_timeout": HANG if fault.kind == "hang" else LIMIT,
        }
        return _watch(
            [sys.executable, "-m", "longvila.launch", "--standalone", "--nproc-per-node", "2"]
            + ["--module", "--", *module]
            + ["train", str(self.root / "faulty.py"), "--run", str(folder)]
            + ["--data", str(self.root / "data"), "--models", str(self.root / "models")]
            + [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        )


def _watch(command: Sequence[str]) -> Outcome:
    """Runs a command to its end, and notes when it said what and which of its processes stay."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    )
    assert process.stdout is not None
    stream, lines = process.stdout, []
    reader = threading.Thread(
        target=lambda: lines.extend((time.time(), line.strip()) for line in stream if line.strip()), daemon=True
    )
    reader.start()
    try:
        status = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        status = NEVER
        lines.append((time.time(), f"not over after {LIMIT:g} s"))
    left = _processes(mark)
    for number in left:
        os.kill(number, 9)
    process.wait()
    reader.join()
    stream.close()
    return Outcome(status, lines, len(left) if status != NEVER else 0)


def _processes(mark: str) -> list[int]:
    """Those with the mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # another user's, or gone since
            continue
    return found


def _checkpoints(stage: Path) -> list[Path]:
    return sorted(path.parent for path in stage.glob("checkpoints/step-*/manifest.json") if path.parent.suffix == "")


def _weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / "model" / "model.safetensors")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
