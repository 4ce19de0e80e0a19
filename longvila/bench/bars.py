"""Bars: figures that must keep to a bound. A figure that is absent misses it: nothing is assumed."""

from __future__ import annotations

from typing import Any


def at_most(name: str, value: float | None, bound: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bound": bound, "holds": value is not None and bool(value <= bound)}


def at_least(name: str, value: float | None, bound: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bound": f">= {bound:g}", "holds": value is not None and bool(value >= bound)}
