"""Traces and layouts of plotly that several sections draw, with the colours of `ssm_retrieval.style`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.report.parts import Key, Move
from ssm_retrieval.style import CONTROLS, FAMILIES, family_colors

ACCENT = "#e6308a"  # of marks on maps
# From -1 to 1 on any page: 0 is transparent.
DIVERGING = (
    (0.0, "rgba(36,113,205,1)"),
    (0.5, "rgba(36,113,205,0)"),
    (0.5, "rgba(214,40,60,0)"),
    (1.0, "rgba(214,40,60,1)"),
)
OF_MATPLOTLIB = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
SYMBOLS = {"o": "circle", "s": "square"}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")  # of runs, in their order

Array = Any  # what numpy.asarray takes
Scale = list[tuple[float, str]]  # colours at places 0 .. 1

# --- colours ------------------------------------------------------------------------------------------------


def color_of(family: str) -> str:
    """The family's one colour, as #rrggbb."""
    from matplotlib.colors import to_hex

    return str(to_hex(family_colors()[family]))


def shade(color: str, alpha: float) -> str:
    """#rrggbb -> rgba(...)."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return f"rgba({parts[0]},{parts[1]},{parts[2]},{alpha:.3g})"


def viridis(count: int = 9) -> Scale:
    """matplotlib's colour map as a colour scale of plotly."""
    import matplotlib
    from matplotlib.colors import to_hex

    places = [i / (count - 1) for i in range(count)]
    return [(place, str(to_hex(matplotlib.colormaps["viridis"](place)))) for place in places]


def logarithmic(scale: Sequence[tuple[float, str]], limits: tuple[float, float]) -> Scale:
    """A colour scale for values, whose colours follow their logarithm: plotly itself interpolates linearly.

    So the map holds the values themselves, for hovering and for whoever reads the file.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    colors = LinearSegmentedColormap.from_list("", list(scale))
    low, high = limits
    places = (np.geomspace(low, high, 33) - low) / (high - low)
    places[[0, -1]] = 0.0, 1.0
    return [(float(place), str(to_hex(colors(i / 32)))) for i, place in enumerate(places)]


def control(name: str) -> dict[str, Any]:
    """Colour, dash and width of one of `ssm_retrieval.style.CONTROLS`, as `curve` takes them."""
    look = CONTROLS[name]
    return dict(color=look["color"], dash=OF_MATPLOTLIB[look["linestyle"]], width=look["lw"])


def control_key(name: str) -> Key:
    """The entry of a legend for a control."""
    return Key(name, dash=control(name)["dash"])


def in_order(names: Any) -> list[str]:
    """Families among `names`, in the order of every figure."""
    there = set(names)
    return [family for family in FAMILIES if family in there]


# --- traces -------------------------------------------------------------------------------------------------


def small(values: Array) -> np.ndarray:
    """float32, which plotly writes as base64 and which is a tenth of the digits."""
    return np.asarray(values, dtype=np.float32)


def packed(values: np.ndarray) -> dict[str, str]:
    """An array as plotly writes it: float32 in base64, with its shape."""
    content = small(values)
    shape = ", ".join(map(str, content.shape))
    return {"dtype": "f4", "bdata": base64.b64encode(content.tobytes()).decode(), "shape": shape}


def hover(words: Sequence[str], first: Sequence[str]) -> str:
    """A hover label: plotly's own variables in `first`, then a line for each column of customdata."""
    lines = [*first, *(f"{word} %{{customdata[{i}]:.4~g}}" for i, word in enumerate(words))]
    return "<br>".join(lines) + "<extra></extra>"


def curve(
    name: str,
    x: Array,
    y: Array,
    axes: tuple[str, str],
    color: str,
    *,
    low: Array | None = None,
    high: Array | None = None,
    more: Mapping[str, Array] | None = None,
    dash: str = "solid",
    alpha: float = 1.0,
    width: float = 2.0,
    mode: str = "lines+markers",
    symbol: str = "circle",
    bars: bool = False,
) -> list[go.Scatter]:
    """Make a line with its interval.

    Args:
        name: Of the series, for hovering and for readers of the numbers.
        x: Places (points,).
        y: Values (points,).
        axes: What x and y are.
        color: #rrggbb.
        low: Lower ends of the intervals (points,); no interval where all are nan.
        high: Upper ends (points,).
        more: Further columns (points,) that hovering shows, by name.
        dash: Plotly's.
        alpha: Opacity.
        width: Of the line in pixels.
        mode: Plotly's.
        symbol: Plotly's; one that ends in "-open" is drawn larger.
        bars: Draw intervals as bars, not as a band behind the line.

    Returns:
        The traces: the two of the band, if any, then the line.
    """
    if low is not None and not np.isfinite(np.asarray(low, float)).any():
        low = high = None
    columns: dict[str, Any] = {} if low is None else {"low": low, "high": high}
    columns |= more or {}
    traces, extra = [], {}
    if low is not None and bars:
        extra["error_y"] = dict(
            type="data",
            symmetric=False,
            array=small(np.asarray(high) - np.asarray(y)),
            arrayminus=small(np.asarray(y) - np.asarray(low)),
            thickness=1.2,
            width=3,
        )
    elif low is not None:
        band = dict(x=small(x), mode="lines", line=dict(width=0), hoverinfo="skip", meta={"band": True})
        fill = shade(color, 0.18 * alpha)
        traces = [
            go.Scatter(y=small(low), **band),
            go.Scatter(y=small(high), fill="tonexty", fillcolor=fill, **band),
        ]
    hollow = symbol.endswith("-open")
    line = go.Scatter(
        name=name,
        x=small(x),
        y=small(y),
        mode=mode,
        opacity=alpha,
        line=dict(color=color, dash=dash, width=width),
        marker=dict(color=color, size=8 if hollow else 6, symbol=symbol),
        customdata=small(np.stack([np.asarray(v, float) for v in columns.values()], 1)) if columns else None,
        hovertemplate=hover(
            list(columns), [f"<b>{name}</b>", f"{axes[0]} %{{x:,.5~g}}", f"{axes[1]} %{{y:.4~g}}"]
        ),
        meta={"axes": list(axes), "columns": list(columns)},
        **extra,
    )
    return [*traces, line]


def line_moves(trace: int, rows: Mapping[str, np.ndarray]) -> list[Move]:
    """What a slider changes in a line of `curve` with bars.

    Args:
        trace: Its number in the panel.
        rows: value, low and high, each (steps, points).

    Returns:
        The changes of its values, of what hovering shows, and of its bars.
    """
    value, low, high = (rows[name] for name in ("value", "low", "high"))
    return [
        Move(trace, "y", value),
        Move(trace, "customdata", np.stack([low, high], -1)),
        Move(trace, "error_y.array", high - value),
        Move(trace, "error_y.arrayminus", value - low),
    ]


def chance_line(at: float, ends: tuple[float, float], axis: str) -> go.Scatter:
    """Draw chance as a horizontal line.

    Args:
        at: Its value.
        ends: Where it begins and ends on the x axis.
        axis: What the y axis shows.

    Returns:
        The trace.
    """
    return go.Scatter(
        name="chance",
        x=small(ends),
        y=small([at, at]),
        mode="lines",
        line=control("chance"),
        hovertemplate="chance %{y:.4~g}<extra></extra>",
        meta={"axes": ["x", axis], "columns": []},
    )


def heat(
    values: Array,
    x: Array,
    y: Array,
    axes: tuple[str, str, str],
    *,
    log: bool = False,
    limits: tuple[float, float],
    colors: Sequence[tuple[float, str]] = (),
    x_texts: Sequence[str] | None = None,
) -> go.Heatmap:
    """Make a map; what is nan stays empty.

    Args:
        values: (len(y), len(x)).
        x: Places of the columns.
        y: Places or names of the rows.
        axes: What x, y and the values are.
        log: Colours follow the logarithm of the values.
        limits: Of the colours, in values.
        colors: Plotly's colour scale; by default viridis.
        x_texts: Names of the columns, for hovering.

    Returns:
        The trace.
    """
    scale = list(colors) or (logarithmic(viridis(), limits) if log else viridis())
    return go.Heatmap(
        z=small(values),
        x=small(x),
        y=y,
        zmin=limits[0],
        zmax=limits[1],
        colorscale=scale,
        showscale=False,
        hoverongaps=False,
        xgap=0,
        ygap=1 if len(y) < 20 else 0,
        text=None if x_texts is None else [list(x_texts)] * len(y),
        hovertemplate=f"{axes[0]} {'%{x}' if x_texts is None else '%{text}'}<br>{axes[1]} %{{y}}<br>"
        f"{axes[2]} %{{z:.4~g}}<extra></extra>",
        meta={"axes": list(axes), "columns": []},
    )


def plot(traces: Sequence[Any], x: str, y: str, **layout: Any) -> go.Figure:
    """Make a figure without plotly's own template: the page has two, a light and a dark one.

    Args:
        traces: What it shows.
        x: Label of the x axis.
        y: Label of the y axis.
        **layout: Plotly's; `xaxis` and `yaxis` are added to the labels.

    Returns:
        The figure.
    """
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    merged = {name: axis | layout.pop(name, {}) for name, axis in axes.items()}
    return go.Figure(
        list(traces), go.Layout(template=go.layout.Template(), showlegend=False, **merged, **layout)
    )


def frame(axis: str, low: float, high: float, dash: str = "solid") -> dict[str, Any]:
    """Make a frame around a column or row of a map.

    Args:
        axis: "x" for a column, "y" for a row.
        low: Where it begins.
        high: Where it ends; if that is `low`, the frame is a line.
        dash: Plotly's.

    Returns:
        A shape of plotly.
    """
    other = "y" if axis == "x" else "x"
    return {
        "type": "rect",
        f"{axis}0": low,
        f"{axis}1": high,
        f"{axis}ref": axis,
        f"{other}ref": "paper",
        f"{other}0": 0,
        f"{other}1": 1,
        "line": {"color": ACCENT, "width": 1.5, "dash": dash},
    }
