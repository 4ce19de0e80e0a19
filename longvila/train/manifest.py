"""Files that last: flushed to the disk, and listed with size and checksum, so that damage is seen and named."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def find_fault(checkpoint: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint, as far as this rank's share of its files tells; None where nothing is."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        for name in sorted(files)[rank::ranks]:
            size = (checkpoint / name).stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes, not {files[name]['bytes']}"
            if describe(checkpoint / name) != files[name]:
                return f"{name} is corrupted (its SHA-256 is not that of the manifest)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is corrupted"
    return None


def describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_file(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """A new name is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
