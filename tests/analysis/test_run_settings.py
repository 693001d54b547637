"""`analysis.settings`: which runs of a table belong together."""

import pytest
from readme_commands import ROOT

import analysis
from analysis import settings


@pytest.mark.parametrize("sizes, usual", [((4, 16, 64), 16), ((4, 64), 64), ((64,), 64)])
def test_the_usual_state_is_the_preset_s_or_else_the_commonest(sizes, usual):
    """Mamba's preset has 16 states a channel; runs that retrieve positions have more."""
    table = analysis.load(ROOT / "studies" / "retrieval_cpu" / "results.parquet")
    table = table[table["model"].ne("mamba") | table["d_state"].isin(sizes)]
    rest = settings.label(table[table["model"].eq("mamba")])
    assert set(rest.loc[rest["usual_state"], "d_state"]) == {usual}
    others = settings.label(table)
    assert others.loc[others["model"].eq("transformer"), "usual_state"].all()  # it has no state


def test_missing_positions_are_named_where_others_have_them():
    table = analysis.load(ROOT / "studies" / "retrieval_cpu" / "results.parquet")
    table = table[table["model"].isin(("mamba", "transformer")) & table["purpose"].eq("report")].copy()
    table["position"] = table["position"].astype(object)
    mamba = table["model"].eq("mamba")
    table.loc[mamba, "position"] = None
    assert set(settings.label(table[mamba])["variant"]) == {"Mamba"}
    table.loc[mamba & table["seed"].eq(0), "position"] = "learned"
    named = settings.label(table).groupby("variant")["seed"].agg(set)
    assert named["Mamba"] == {0} and not named["Mamba, no positions"] & {0}
