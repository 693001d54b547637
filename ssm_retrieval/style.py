"""How every figure looks: one colour and label per architecture, from its record, and one theme."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ssm_retrieval.registry import ARCHITECTURES

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

SINGLE, DOUBLE = 3.03, 6.30  # inches: one column of the ACL's pages, and both
FAMILIES = ARCHITECTURES  # names, in the order of every figure
NEUTRAL = "#7d8590"  # of controls: to be seen on white and on black
# What is not a model's own: properties of a line in matplotlib, which the report turns into plotly's.
CONTROLS: Mapping[str, dict[str, Any]] = {
    "untrained weights": dict(color=NEUTRAL, linestyle=":", lw=1.2),
    "shuffled labels": dict(color=NEUTRAL, linestyle="--", lw=1.2),
    "distractors": dict(color=NEUTRAL, linestyle="--", lw=1.4),
    "chance": dict(color=NEUTRAL, linestyle="-.", lw=1.2),
}


class _Names(Mapping[str, str]):
    """Name of an architecture -> its label."""

    def __getitem__(self, name: str) -> str:
        return ARCHITECTURES[name].label

    def __iter__(self) -> Iterator[str]:
        return iter(ARCHITECTURES)

    def __len__(self) -> int:
        return len(ARCHITECTURES)


NAMES = _Names()


def family_colors() -> dict[str, Any]:
    """(r, g, b) of every architecture; one without a colour of its own gets a free one of the palette."""
    import seaborn
    from matplotlib.colors import to_rgb

    chosen = {name: to_rgb(record.color) for name, record in ARCHITECTURES.items() if record.color}
    free = [color for color in seaborn.color_palette("colorblind") if color not in chosen.values()]
    rest = [name for name in ARCHITECTURES if name not in chosen]
    return chosen | {name: free[i % len(free)] for i, name in enumerate(rest)}


def faintness(layer: Any, layers: Iterable[int]) -> float:
    """Opacity of a layer's line: layers go from faint to full, so that one colour serves a whole model."""
    order = sorted(layers)
    return 1.0 if len(order) < 2 else 0.4 + 0.6 * order.index(layer) / (len(order) - 1)


def panels(rows: int, columns: int, size: tuple[float, float], **more: Any) -> Any:
    """A figure with a grid of axes.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        size: Width and height of one panel, inches.
        **more: Options of `plt.subplots`.

    Returns:
        The figure and a 2-D array of axes.
    """
    import matplotlib.pyplot as plt

    shape = (max(4.5, size[0] * columns), size[1] * rows + 0.5)
    return plt.subplots(rows, columns, figsize=shape, squeeze=False, layout="constrained", **more)


def legend(figure: Figure, looks: dict[str, dict[str, Any]], width: float = 1.6, **more: Any) -> None:
    """One legend for all panels, below them.

    Args:
        figure: The figure.
        looks: Label -> properties of its line.
        width: Width of an entry, inches.
        **more: Options of `Figure.legend`.
    """
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    columns = max(2, min(len(lines), int(figure.get_figwidth() // width)))
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, **more)


@contextmanager
def theme() -> Iterator[None]:
    """seaborn's white grid; text in PDF and SVG files stays text."""
    import matplotlib
    import seaborn

    settings: Any = {
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        "svg.hashsalt": "ssm-retrieval",
        "figure.constrained_layout.use": True,
    }
    with (
        seaborn.axes_style("whitegrid"),
        seaborn.plotting_context("notebook", font_scale=0.9),
        matplotlib.rc_context(settings),
    ):
        yield


def save(figure: Figure, stem: Path, kinds: tuple[str, ...] = ("png", "pdf"), dpi: int = 150) -> None:
    """Write `<stem>.<kind>` for every kind and close the figure.

    The files hold no dates, so the same table gives the same bytes.

    Args:
        figure: The figure.
        stem: Path of the files, without ending.
        kinds: Endings: png, pdf, svg.
        dpi: Dots per inch of the PNG.
    """
    import io

    import matplotlib.pyplot as plt

    from ssm_retrieval.files import write_bytes

    undated: dict[str, Any] = {
        "png": dict(dpi=dpi),
        "pdf": dict(metadata={"CreationDate": None}),
        "svg": dict(metadata={"Date": None}),
    }
    for kind in kinds:
        content = io.BytesIO()
        figure.savefig(content, format=kind, **undated[kind])
        write_bytes(stem.with_name(f"{stem.name}.{kind}"), content.getvalue())
    plt.close(figure)
