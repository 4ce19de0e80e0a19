"""What benches share: their sections, and bars, which are figures that must keep to a bound. A figure that is absent
misses it: nothing is assumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]


def sections(figures: dict[str, Any], show: Callable[[str, Rows, str], None]) -> Callable[..., Rows]:
    """What keeps a section's rows in `figures` by its name, shows them with a note, and returns them."""

    def section(name: str, rows: Rows, note: str = "") -> Rows:
        figures[name] = rows
        show(name, rows, note)
        return rows

    return section


def at_most(name: str, value: float | None, bound: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bound": bound, "holds": value is not None and bool(value <= bound)}


def at_least(name: str, value: float | None, bound: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bound": f">= {bound:g}", "holds": value is not None and bool(value >= bound)}
