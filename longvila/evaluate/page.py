"""The report as one self-contained HTML page: pictures, charts and styles are inside it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from longvila.evaluate.charts import grouped_bars, heat_colour, loss_curve

VARIANT_TITLES = {
    "final": "final checkpoint",
    "stage1": "after stage 1",
    "swapped": "final, another film's frames",
}
BAR_TITLES = {
    "stage1_only_projector_moved": "Stage 1 moves the projector alone, and its loss falls",
    "needle_128_generated": "Needles are found, at every length up to 128 frames",
    "videomme_over_chance": "VideoMME is answered from the frames, above chance",
    "caption_over_stage1": "Captions name what happens, unlike stage 1's or another film's",
    "gradient_max_error": "Gradients of several ranks equal those of one process",
    "demo_minutes": "The whole demo takes no longer than it may",
}
CHANCE = 0.25
"""Of four options."""


def render_page(report: dict[str, Any], run: Path) -> str:
    """HTML of a report. Pictures are read from `run`; one that is not there is left out."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals.update(
        heat_colour=heat_colour,
        loss_curve=loss_curve,
        variant_title=lambda name: VARIANT_TITLES.get(name, name),
        bar_title=lambda name: BAR_TITLES.get(name, name),
    )
    environment.filters.update(
        figure=_figure, percent=_percent, count=_count, picture=lambda name: _data_uri(run / name)
    )
    evaluations = report["evaluations"]
    return environment.get_template("report.html.j2").render(
        report=report,
        needle=evaluations.get("needle", {}),
        videomme=evaluations.get("videomme", {}),
        captioning=evaluations.get("captioning", {}),
        accuracy_chart=_accuracy_chart(evaluations.get("videomme", {})),
        chance=CHANCE,
    )


def _accuracy_chart(variants: dict[str, Any]) -> str | None:
    """Bars of accuracy (lmms-eval's protocol) by length of film and over all of them."""
    if not variants:
        return None
    groups: dict[str, dict[str, float]] = {}
    for variant, scores in variants.items():
        tables = scores["lmms_eval"]
        for name, table in {**tables["by_duration"], "all": tables["overall"]}.items():
            groups.setdefault(name, {})[variant] = table["accuracy"]
    return grouped_bars(groups, list(variants), CHANCE)


def _figure(value: Any) -> str:
    """A number with three digits; text and whole numbers as they are; a dash for what is absent."""
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _data_uri(path: Path) -> str | None:
    if not path.is_file():
        return None
    kind = "png" if path.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
