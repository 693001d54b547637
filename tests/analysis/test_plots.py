"""Figures of probes: the page and the pictures show the same rows, in one order, with human words."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from report_pages import lines, panels, table, views

from analysis.plots import attention, lens, linear, retention, updates
from analysis.plots.common import shown
from ssm_retrieval.style import FAMILIES
from synthetic.config import RunConfig, plan
from synthetic.identity import comparison

CONTROLS = ("chance", "uniform attention")  # lines that are no series of a table


def tables(folder, probe):
    found = []
    for family in ("transformer", "mamba"):
        if family == "mamba" or probe not in ("retention", "updates"):  # of states
            found.append(table(folder, probe, family).assign(family=family))
    return pd.concat(found, ignore_index=True)


def on_page(text, probe):
    """(x, y) of every series of a section's first view, without chance."""
    found = [lines(panel) for panel in panels(views(text)[probe][0])]
    return [(t["x"], t["y"]) for panel in found for name, t in panel.items() if not name.startswith(CONTROLS)]


def in_figures(*figures):
    """(x, y) of every line in pictures; not of those across a whole panel."""
    found = []
    for figure in figures:
        for ax in figure.axes:
            across = (ax.get_yaxis_transform(), ax.get_xaxis_transform())
            found += [line.get_data() for line in ax.lines if line.get_transform() not in across]
        plt.close(figure)
    return found


@pytest.mark.parametrize(
    ("probe", "draws"),
    [
        ("lens", [lens.draw]),
        ("linear", [linear.draw_lags, linear.draw_answer]),
        ("retention", [retention.draw_curves]),
    ],
)
def test_the_page_shows_what_the_pictures_show(report, probed_run, probe, draws):
    """Each series once here and once there, chosen and cut alike."""
    rows = tables(probed_run, probe)

    def key(series):
        return [tuple(np.round(np.asarray(values, float), 5)) for values in series]

    here, there = (
        sorted(map(key, found))
        for found in (on_page(report.text, probe), in_figures(*(draw(rows) for draw in draws)))
    )
    assert len(here) > 3 and len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        np.testing.assert_allclose(np.ravel(one), np.ravel(other), rtol=1e-4, atol=2e-5)


def test_rows_are_chosen_and_ordered_and_only_trained_weights_have_intervals():
    rows = pd.DataFrame(
        [
            dict(family=f, weights=w, layer=k, value=1.0, low=0.5, high=2.0)
            for w in ("trained", "untrained")
            for k in (2, 0, 1)
            for f in ("mamba", "other", "transformer")
        ]
    )
    found = shown(rows, ["layer"], family=FAMILIES, weights=("untrained", "trained"))
    assert list(dict.fromkeys(found["family"])) == [f for f in FAMILIES if f in ("mamba", "transformer")]
    for _, part in found.groupby("family"):
        assert part["weights"].tolist() == 3 * ["untrained"] + 3 * ["trained"]
        assert part["layer"].tolist() == [0, 1, 2, 0, 1, 2]
    assert found["low"].isna().equals(found["weights"] == "untrained")
    assert found["high"].notna().equals(found["weights"] == "trained")
    assert (rows["low"] == 0.5).all()  # the table that was given is left as it was


def test_long_contexts_give_every_lag_as_much_room(probed_run):
    """Lags 0-3 and 96-99 of 100: eight places side by side; ticks name the lags themselves."""
    short = linear.lag_table(tables(probed_run, "linear"))
    assert (short["place"] == short["lag"] + 1).all()
    rows = tables(probed_run, "linear")
    rows = rows[(rows["part"] != "token") | rows["lag"].isin(range(8))]
    far = rows.assign(lag=rows["lag"].where(rows["lag"] < 4, rows["lag"] + 92))
    found = linear.lag_table(far).drop_duplicates("lag").sort_values("lag")
    assert found["place"].tolist() == list(range(8))
    places, labels = linear.lag_ticks(found)
    assert dict(zip(labels, places, strict=True))["100"] == 7 and labels[0] == "1"


def test_roles_have_human_names_and_an_axis_without_values_says_so(probed_run):
    rows = tables(probed_run, "updates")
    figure = updates.draw_roles(rows)
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert "query marker" in words and not any("_" in word for word in words)
    plt.close(figure)
    endless = rows.assign(value=rows["value"].where(rows["quantity"] != "horizon", np.inf))
    figure = updates.draw_roles(endless)
    said = [(ax, text.get_text()) for ax in figure.axes for text in ax.texts if text.get_text()]
    assert [text for _, text in said] == [updates.ENDLESS] * len(said) and said
    assert all(len(ax.get_yticks()) == 0 for ax, _ in said)
    assert len(said) == rows.loc[rows["part"] == "role", "family"].nunique()
    plt.close(figure)


def test_heads_stand_in_order_with_their_labels(probed_run):
    rows = tables(probed_run, "attention")
    found = attention.score_table(rows.sample(frac=1, random_state=0))
    for (_, family, _), part in found.groupby(["quantity", "family", "weights"]):
        pairs = list(zip(part["layer"], part["head"], strict=True))
        assert pairs == sorted(pairs) and part["place"].tolist() == list(range(len(part)))
        wanted = [f"{k:g}.{h:g}" if family == "transformer" else f"{k:g}" for k, h in pairs]
        assert part["label"].tolist() == wanted


def test_a_comparison_is_all_but_the_architecture():
    def shared(family, **options):
        config = RunConfig(model=(family,), seq_len=16, steps=2, **options)
        return comparison(plan(config, family), {"lr": config.lr, "preset": config.preset})

    assert shared("mamba") == shared("transformer") == shared("mamba2")
    assert shared("mamba", preset="150m") == shared("transformer", preset="150m") != shared("mamba")
    for change in (dict(seed=1), dict(lr=1e-4), dict(layout="prefix")):
        assert shared("mamba", **change) != shared("mamba"), change
