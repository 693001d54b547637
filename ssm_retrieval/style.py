"""How every figure looks: one colour, marker and name per family, one theme."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

# One colour per family everywhere, from seaborn's colour-blind-safe palette.
FAMILIES = ("transformer", "mamba", "mamba2", "hybrid")
SINGLE, DOUBLE = 3.03, 6.30  # inches: one column of the ACL's pages, and both
NAMES = {"transformer": "Transformer", "mamba": "Mamba", "mamba2": "Mamba-2", "hybrid": "Hybrid"}


def family_colors() -> dict[str, Any]:
    import seaborn

    palette = seaborn.color_palette("colorblind")
    return dict(zip(FAMILIES, (palette[0], palette[1], palette[2], palette[4]), strict=True))


def panels(rows: int, columns: int, size: tuple[float, float], **more: Any) -> Any:
    """Figure and 2-D array of axes; size: inches of one panel; more: options of `plt.subplots`."""
    import matplotlib.pyplot as plt

    shape = (max(4.5, size[0] * columns), size[1] * rows + 0.5)
    return plt.subplots(rows, columns, figsize=shape, squeeze=False, layout="constrained", **more)


def legend(figure: Figure, looks: dict[str, dict[str, Any]], width: float = 1.6, **more: Any) -> None:
    """One for all panels, below them. looks: label -> properties of a line; width: inches of an entry."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    columns = max(2, min(len(lines), int(figure.get_figwidth() // width)))
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, **more)


@contextmanager
def theme() -> Iterator[None]:
    """seaborn's white grid, text as text in PDF and SVG files."""
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
    """Write `<stem>.<kind>` for every kind and close the figure; dpi: of the PNG.

    Without dates, so that the same table gives the same bytes.
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
