"""How every figure looks: one colour, marker and name per family, one theme."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# One colour per family everywhere, from seaborn's colour-blind-safe palette.
FAMILIES = ("transformer", "mamba", "mamba2", "hybrid")
NAMES = {"transformer": "Transformer", "mamba": "Mamba", "mamba2": "Mamba-2", "hybrid": "Hybrid"}


def family_colors() -> dict[str, Any]:
    import seaborn

    palette = seaborn.color_palette("colorblind")
    return dict(zip(FAMILIES, (palette[0], palette[1], palette[2], palette[4]), strict=True))


@contextmanager
def theme() -> Iterator[None]:
    """seaborn's white grid, text as text in PDF files."""
    import matplotlib
    import seaborn

    settings: Any = {"pdf.fonttype": 42, "figure.constrained_layout.use": True}
    with (
        seaborn.axes_style("whitegrid"),
        seaborn.plotting_context("notebook", font_scale=0.9),
        matplotlib.rc_context(settings),
    ):
        yield
