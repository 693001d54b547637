"""The learning curve draws what the table says."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from ssm_retrieval.style import NAMES, family_colors
from ssm_retrieval.training.learning_curve import learning_curve, length_axis
from synthetic.display import terminal_curve


@pytest.fixture
def metrics():
    rows = []
    for model, scale in (("transformer", 1.0), ("mamba", 0.2)):
        for step in (3, 1, 2):  # out of order on purpose
            for length in (16, 64):
                accuracy = scale * step / 3
                rows.append(
                    dict(model=model, tokens=step * 1e6, length=length, train_length=16 * step, chance=1 / 64,
                         accuracy=accuracy, ci_low=accuracy - 0.1, ci_high=accuracy + 0.1)
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_lines_bands_and_labels(metrics):
    figure = learning_curve(metrics)
    top, bottom = figure.axes
    drawn = {line.get_label(): line for line in top.get_lines()}
    for model, scale in (("transformer", 1.0), ("mamba", 0.2)):
        line = drawn[NAMES[model]]
        np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), [scale / 3, 2 * scale / 3, scale])  # length 64 only
        assert matplotlib.colors.same_color(line.get_color(), family_colors()[model])
    bands = [c.get_paths()[0].get_extents() for c in top.collections]
    np.testing.assert_allclose(bands[0].ymax, 1.1)
    (chance,) = (line for name, line in drawn.items() if name.startswith("chance"))
    np.testing.assert_allclose(chance.get_ydata(), 1 / 64)
    assert top.get_title() == "Retrieval of a position out of 64"
    assert [list(line.get_ydata()) for line in bottom.get_lines()] == [[16, 32, 48]] * 2
    assert "tokens" in bottom.get_xlabel() and "accuracy" in top.get_ylabel()
    plt.close(figure)


def test_no_rows():
    with pytest.raises(ValueError, match="nothing was evaluated yet"):
        learning_curve(pd.DataFrame())


def test_terminal_curve_marks_each_family(metrics):
    text = terminal_curve(metrics, width=60, height=12)
    assert "T" in text and "M" in text and "length 64" in text
    assert max(map(len, text.splitlines())) <= 60


def test_lengths_of_a_short_run_are_the_ticks(metrics):
    """Where powers of two alone would leave one tick, or none."""
    for lengths in ((16, 32, 48), (5, 7, 7)):
        figure = learning_curve(
            metrics.assign(
                train_length=metrics["tokens"].map(dict(zip((1e6, 2e6, 3e6), lengths, strict=True)))
            )
        )
        bottom = figure.axes[1]
        figure.canvas.draw()
        low, high = bottom.get_ylim()
        ticks = [tick for tick in bottom.get_yticks() if low <= tick <= high]
        assert ticks == sorted({*lengths, 64})
        assert [text.get_text() for text in bottom.get_yticklabels()] == [str(tick) for tick in ticks]
        plt.close(figure)
    assert length_axis(range(1, 100))[0] == [14, 31, 48, 65, 82, 99]
