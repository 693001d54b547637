"""Sections -> one HTML file: template.html, style.css and report.js filled in, plotly.js inlined once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis.report.parts import Block, Figure, Mark, Move, Panel, View
from analysis.report.runs import Run
from analysis.report.sections import SECTIONS
from analysis.report.traces import packed

HERE = Path(__file__).parent


def page(runs: Sequence[Run]) -> str:
    """The whole HTML file, as text; a table that cannot be read raises UserError."""
    sections = [section(runs) for section in SECTIONS]
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html").render(
        title="Report of " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        runs=runs,
        sections=sections,
        data={figure.name: _script(_pooled(_figure(figure))) for s in sections for figure in s.figures},
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
    )


def _script(value: Any) -> Markup:
    """JSON that may stand in a <script> element: nothing in it can end the element."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _pooled(figure: dict[str, Any]) -> dict[str, Any]:
    """The same with every array that occurs in it once, in `arrays`, and {"array": number} in its places."""
    arrays: dict[str, Any] = {}
    number: dict[str, int] = {}

    def replaced(value: Any) -> Any:
        if isinstance(value, dict) and "bdata" in value:
            key = json.dumps(value, sort_keys=True)
            arrays.setdefault(key, value)
            return {"array": number.setdefault(key, len(number))}
        if isinstance(value, dict):
            return {name: replaced(part) for name, part in value.items()}
        return [replaced(part) for part in value] if isinstance(value, list) else value

    return replaced(figure) | {"arrays": list(arrays.values())}


def _figure(figure: Figure) -> dict[str, Any]:
    return dict(views=[_view(view) for view in figure.views])


def _view(view: View) -> dict[str, Any]:
    found: dict[str, Any] = dict(label=view.label, blocks=[_block(block) for block in view.blocks])
    if view.slider is not None:
        found["slider"] = dict(
            label=view.slider.label, texts=list(view.slider.texts), start=view.slider.start
        )
    return found


def _block(block: Block) -> dict[str, Any]:
    return dict(
        title=block.title, note=block.note, wide=block.wide, panels=[_panel(panel) for panel in block.panels]
    )


def _panel(panel: Panel) -> dict[str, Any]:
    return dict(
        title=panel.title,
        alt=panel.alt,
        height=panel.height,
        wide=panel.wide,
        figure=json.loads(panel.figure.to_json()),
        moves=[_move(move) for move in panel.moves],
        marks=[_mark(mark) for mark in panel.marks],
        scale=None if panel.scale is None else dict(colors=panel.scale.colors, ends=panel.scale.ends),
    )


def _move(move: Move) -> dict[str, Any]:
    return dict(trace=move.trace, path=move.path, rows=packed(move.rows))


def _mark(mark: Mark) -> dict[str, Any]:
    return dict(shape=mark.shape, axis=mark.axis, low=packed(mark.low), high=packed(mark.high))
