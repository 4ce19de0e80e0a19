"""Resumable checkpoints: model, optimizer and position, through torch's distributed checkpoint (DCP).

A checkpoint is written to `step-N.part` and renamed when every rank is done, so that a save that dies leaves the last
good one. DCP reshards on load: another number of ranks, or another fold, may continue.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from longvila.errors import ConfigError
from longvila.parallel.agree import barrier
from longvila.train.engine import Engine


@dataclass(frozen=True)
class Position:
    """Where in a stage a run stands: steps taken, and rows read of an epoch of the current phase."""

    step: int = 0
    epoch: int = 0
    rows: int = 0


def save_checkpoint(folder: Path, state: dict[str, Any], position: Position, keep: int) -> None:
    """Writes `folder/step-N`, complete or not at all, and removes all but the newest `keep`. Collective."""
    final = folder / f"step-{position.step:06d}"
    part = final.with_name(final.name + ".part")
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    barrier()
    dcp.save(state, checkpoint_id=part)
    if dist.get_rank() == 0:
        (part / "position.json").write_text(json.dumps(asdict(position)))
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    barrier()


def load_checkpoint(folder: Path, engine: Engine) -> Position | None:
    """Restores the newest checkpoint in `folder`; None where there is none. Collective.

    Raises:
        ConfigError: where the checkpoint does not fit the model (another architecture, other trained parameters).
    """
    found = checkpoints(folder)
    if not found:
        return None
    state = engine.state()
    try:
        dcp.load(state, checkpoint_id=found[-1])
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{found[-1]}: cannot continue from this checkpoint with this configuration ({reason}); "
            f"remove the folder {folder} to start the stage again"
        ) from error
    engine.load_state(state)
    return Position(**json.loads((found[-1] / "position.json").read_text()))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p.parent for p in folder.glob("step-*/position.json") if not p.parent.name.endswith(".part"))
