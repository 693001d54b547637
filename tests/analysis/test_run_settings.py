"""`analysis.settings`: which runs of a table belong together."""

import pytest
from readme_commands import ROOT

import analysis
from analysis import settings


def runs(*models):
    """Reported runs of the retrieval study that have learned positions."""
    table = analysis.load(ROOT / "studies" / "retrieval_cpu" / "results.parquet")
    wanted = table["model"].isin(models) & table["position"].eq("learned") & table["purpose"].eq("report")
    return table[wanted].copy()


@pytest.mark.parametrize("sizes, usual", [((4, 16, 64), {16}), ((4, 64, 64), {64}), ((64, 64, 64), {64})])
def test_the_usual_state_is_the_preset_s_or_else_the_commonest(sizes, usual):
    """Mamba's preset has 16 states a channel; runs that retrieve positions have more."""
    table = runs("mamba", "transformer")
    mamba = table["model"].eq("mamba")
    table.loc[mamba, "d_state"] = table["seed"].map(dict(enumerate(map(float, sizes))))
    labelled = settings.label(table)
    mine = labelled["model"].eq("mamba")
    assert set(labelled.loc[mine & labelled["usual_state"], "d_state"]) == usual
    assert labelled.loc[~mine, "usual_state"].all()  # attention has no state


def test_missing_positions_are_named_where_others_have_them():
    table = runs("mamba", "transformer")
    mamba = table["model"].eq("mamba")
    table["position"] = table["position"].astype(object)
    table.loc[mamba, "position"] = None
    assert set(settings.label(table[mamba])["variant"]) == {"Mamba"}
    table.loc[mamba & table["seed"].eq(0), "position"] = "learned"
    labelled = settings.label(table)
    named = labelled.groupby("variant")["seed"].agg(set)
    assert named["Mamba"] == {0} and named["Mamba, no positions"] == {1, 2}
    looks = settings.looks(labelled)
    assert looks["Mamba"]["linestyle"] != looks["Mamba, no positions"]["linestyle"]
