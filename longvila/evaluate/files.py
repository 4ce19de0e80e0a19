"""JSON and parquet files of a run or a benchmark, read so that what is wrong is said with the file's name and line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from longvila.errors import ConfigError

KINDS = {str: "text", list: "a list", list[str]: "a list of texts"}
"""What a field may have to be, and what that is called."""


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ConfigError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of text that is not UTF-8
        raise ConfigError(f"{path}: not a JSON file ({error}); write it again or remove it") from None


def read_json_list(path: Path) -> list[Any]:
    """The entries of a JSON file that holds a list. Raises ConfigError where it does not."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: must hold a list [...], not {str(entries)[:40]}")
    return entries


def read_json_lines(path: Path) -> list[tuple[int, Any]]:
    """Each line of a file of JSON lines with its number, from 1; empty lines are left out.

    Raises:
        ConfigError: a line is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}); write it again") from None
    lines = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which a U+2028 inside JSON would end
        if not line.strip():
            continue
        try:
            lines.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: not JSON ({error}); mend or remove the line") from None
    return lines


def read_parquet_rows(path: Path, instead: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file.

    Args:
        instead: the JSON file that is read where it holds the same rows.

    Raises:
        ConfigError: not a parquet file, or pyarrow is not installed.
    """
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            f"{path}: reading parquet takes pyarrow, which is not installed; pip install pyarrow, or write the rows "
            f"as a JSON list to {instead}"
        ) from None
    try:
        return parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as error:  # what pyarrow raises is one or the other
        raise ConfigError(f"{path}: not a parquet file ({error}); fetch it again") from None


def check_fields(entry: Any, where: str, fields: Mapping[str, Any]) -> None:
    """Raises ConfigError where `entry` is not an object that has all of `fields`, each of its kind (one of `KINDS`).

    Args:
        where: what the error calls the entry: its file, and its line or number.
    """
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must be an object with {', '.join(fields)}, not {str(entry)[:40]}")
    for name, kind in fields.items():
        if name not in entry:
            raise ConfigError(f"{where}: lacks '{name}'; it must have {', '.join(fields)}")
        if not _is(entry[name], kind):
            raise ConfigError(f"{where}: '{name}' is {str(entry[name])[:40]!r}; it must be {KINDS[kind]}")


def _is(value: Any, kind: Any) -> bool:
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)
