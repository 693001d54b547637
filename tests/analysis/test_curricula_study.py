"""studies/curricula: its page is its results, and its sweep varies the growth alone."""

import dataclasses
import re

import pandas as pd
import pytest
from readme_commands import ROOT

from studies.curricula import report
from studies.curricula.config import FAMILIES, GROWTHS, LENGTH, get_config
from synthetic.grid import group

PAGE = (ROOT / "studies" / "curricula" / "README.md").read_text(encoding="utf-8")


def test_tables_of_the_page_are_its_results():
    assert report.filled(PAGE) == PAGE


def test_a_row_against_the_store():
    runs = pd.read_parquet(report.RESULTS)
    runs = runs[(runs["purpose"] == "report") & (runs["model"] == "mamba") & (runs["growth"] == "gap")]
    final = runs[runs["kind"] == "final"].set_index("seed")["accuracy"].sort_index()
    (row,) = re.findall(r"^\| Mamba \| gap \| (.*) \|$", PAGE, flags=re.MULTILINE)[:1]
    seeds, tokens, accuracies, *_ = row.split(" | ")
    assert accuracies == ", ".join(f"{value:.2f}" for value in final)
    during = runs[(runs["kind"] == "during") & (runs["length"] == LENGTH) & (runs["accuracy"] >= 0.95)]
    first = during.groupby("seed")["tokens"].min().reindex(final.index)
    first = first.where(final >= 0.95)  # an evaluation that passed by luck does not count
    assert seeds.startswith(f"{first.notna().sum()} of {len(final)} ")
    median = first.fillna(float("inf")).sort_values().iloc[1]
    assert median == float("inf") or f"to {median:,.0f} " in tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_growths_differ_in_nothing_else_and_choose_their_rates_by_themselves(family):
    runs = [run for run in get_config().runs if run.model == (family,) and run.seed == 0]
    assert [run.growth for run in runs] == list(GROWTHS)
    same = [dataclasses.asdict(run) | {"growth": None} for run in runs]
    assert all(other == same[0] for other in same)
    assert len({group(run) for run in runs}) == len(GROWTHS)
