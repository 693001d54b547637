"""docs/claims.md: its tables are the committed results, and its words agree with them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import published
from analysis.capacity_law import facts_at
from studies import claims
from studies.why_mamba_lags import contrasts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
BODIES = {match["title"]: match["body"] for match in claims.CLAIM.finditer(PAGE)}


def table(name: str) -> pd.DataFrame:
    """A table of the page, by its marker; the first column is the index."""
    lines = PAGE.split(f"<!-- {name} -->\n")[1].split("\n<!--")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return pd.DataFrame(rows, columns=head).set_index(head[0])


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"[-+]?[\d,]*\.?\d+", text)]


def finals(**wanted: object) -> pd.Series:
    """Final accuracies of the retrieval study's reported runs with learned positions, by seed."""
    runs = pd.read_parquet(ROOT / "studies" / "retrieval_cpu" / "results.parquet")
    runs = runs[(runs["purpose"] == "report") & (runs["kind"] == "final") & (runs["position"] == "learned")]
    for name, value in wanted.items():
        runs = runs[runs[name] == value]
    return runs.set_index("seed")["accuracy"].sort_index()


def test_tables_are_the_committed_results():
    """If not: `python -m studies.claims`, and look at what changed."""
    assert claims.rewritten(PAGE) == PAGE


@pytest.mark.parametrize(
    "name, row, column, wanted",
    [
        ("lengths", "Mamba", "accuracy at 64", dict(model="mamba", queries=64, seq_len=64)),
        ("lengths", "Hybrid", "accuracy at 64", dict(model="hybrid", queries=64, seq_len=64)),
        ("layouts", "Mamba-2", "accuracy, query last", dict(model="mamba2", queries=1, layout="suffix")),
        (
            "layouts",
            "Transformer",
            "accuracy, query first",
            dict(model="transformer", queries=1, layout="prefix"),
        ),
        ("positions", "Transformer", "accuracy at 16", dict(model="transformer", queries=16, seq_len=16)),
    ],
)
def test_accuracies_are_those_of_the_seeds(name, row, column, wanted):
    values = finals(**wanted)
    assert values.index.tolist() == [0, 1, 2]
    assert numbers(table(name).loc[row, column]) == pytest.approx(values.tolist(), abs=5.1e-4)


def test_shares_of_seeds_come_with_clopper_and_pearsons_interval():
    """In closed form, by the quantiles of beta distributions; 3 of 3 seeds are not certainty."""
    shown = re.findall(r"\d of \d \[[^]]*\]", ", ".join(table("lengths").iloc[:, 1]))
    assert len(shown) >= 5
    for cell in shown:
        k, n, low, high = numbers(cell)
        want = stats.beta.ppf([0.025, 0.975], [k or 1, k + 1], [n - k + 1, n - k or 1])
        assert (low, high) == pytest.approx((want[0] if k else 0, want[1] if k < n else 1), abs=5.1e-3)


def test_costs_against_the_evaluations_themselves():
    """The first evaluation at 0.95 or more of every seed, ∞ for seeds that have none or end below."""
    runs = pd.read_parquet(ROOT / "studies" / "retrieval_cpu" / "results.parquet")
    runs = runs[(runs["purpose"] == "report") & (runs["kind"] == "during") & (runs["length"] == 64)]
    runs = runs[(runs["model"] == "mamba") & (runs["seq_len"] == 64) & (runs["queries"] == 1)]
    for layout, column in (("suffix", "tokens, query last"), ("prefix", "tokens, query first")):
        mine = runs[runs["layout"] == layout]
        ended = finals(model="mamba", queries=1, layout=layout)
        first = mine[mine["accuracy"] >= 0.95].groupby("seed")["tokens"].min()
        good = sorted(first[ended[first.index] >= 0.95]) + ["∞"] * 3
        words = [f"{value:,}" if value != "∞" else value for value in good[:3]]
        assert table("layouts").loc["Mamba", column] == f"{words[1]} [{words[0]}, {words[2]}]"


def test_updates_are_geometric_means_of_the_measurements():
    probed = pd.read_parquet(ROOT / "studies" / "why_mamba_lags" / "measured.parquet")
    part = probed[
        (probed["model"] == "mamba") & (probed["layer"] == 1) & (probed["quantity"] == "write")
        & (probed["layout"] == "prefix") & (probed["weights"] == "trained")
    ]  # fmt: skip
    rows = table("updates").loc["Mamba"]
    (shown,) = rows.loc[rows.iloc[:, 0].eq("2") & rows.iloc[:, 1].eq("written"), "query first"]
    values = part["value"].to_numpy(float)
    assert len(values) == 3
    wanted = [values.prod() ** (1 / 3), values.min(), values.max()]
    assert numbers(shown) == pytest.approx(wanted, rel=0.06)  # two digits


def test_ratios_are_geometric():
    assert contrasts.ratio(pd.Series([0.5, 4.0])) == "1.41 (0.50 to 4.00)"


def test_published_table_gives_the_gaps_known_from_it():
    """Means of Pythia - Mamba over six and five benchmarks, worked out by hand from the authors' table."""
    shown = table("published-scale")
    assert shown["mean gap of 6"].astype(float).tolist() == [4.31, 4.57, 4.91]
    assert shown["without RefCOCOplus_testA"].astype(float).tolist() == [7.70, 4.70, 5.14]
    assert shown.iloc[:, -1].tolist() == ["–", "1 of 6", "4 of 6"]


def test_words_about_published_numbers():
    """What claims 5 to 7 say in words."""
    ahead = claims.differences()
    groups = {group: list(columns) for group, columns in published.GROUPS.items()}
    assert sorted(name for columns in groups.values() for name in columns) == sorted(ahead.columns)
    for group in ("captioning", "question answering", "reading"):
        assert (ahead[groups[group]].mean(axis=1) > 0).all()
    assert (ahead[groups["reading"]] > 0).all(axis=None)
    small = ahead.loc["1B and 790M", groups["question answering"]].round(6)
    assert (small > 0).sum() == (small < 0).sum() == 2
    lost = ahead[groups["grounding"]] < 0
    assert lost.size - lost.sum(axis=None) == 1 and not lost.loc["1B and 790M", published.SUSPECT[1]]
    own = pd.read_csv(ROOT / "analysis" / "published" / "results.csv").set_index("model")
    apart = own["RefCOCOplus_testA"] - own["RefCOCOplus_testB"]
    assert apart.idxmin() == "Pythia-VL-1B" and apart.min() < 0 and (apart.drop("Pythia-VL-1B") > 15).all()


def test_words_about_measured_numbers():
    """What the verdicts of claims 1, 2, 4, 9, 11 and 12 say in words."""
    longest = table("lengths").iloc[:, 0]
    assert longest[["Transformer", "Mamba", "Mamba-2", "Hybrid"]].tolist() == ["64", "64", "128", "64"]
    default = table("default-run")
    assert min(numbers(default.loc["Transformer", "at 1,024"])) > 0.99
    assert max(numbers(default.loc["Mamba", "at 1,024"])) < 0.2
    assert min(numbers(default.loc["Mamba", "at 256"])) > 0.95
    layouts = table("layouts")
    assert layouts.iloc[:, -1]["Mamba"] == "3 and 0 of 3"
    assert max(numbers(layouts.loc["Mamba", "accuracy, query last"])) < 0.95
    for order in ("last", "first"):
        assert min(numbers(layouts.loc["Mamba-2", f"accuracy, query {order}"])) > 0.95
    updates = table("updates")
    told = updates[updates.iloc[:, 0].eq("2") & updates.iloc[:, 1].eq("written")]["query first"]
    assert len(told) == 2 and all(min(numbers(cell)) > 10 for cell in told)
    (law,) = table("capacity-fits").query("model == 'Mamba'").to_dict("records")
    _, low, high = numbers(law["a [95 %]"])
    assert low < float(law["published a"]) < high
    order = table("geometry")
    rows = order[order["table"].eq("output rows of position tokens")]
    assert set(rows.iloc[:, -1]) == {"3 of 3"}
    schemes = table("positions")
    learned = {
        name: [sum(value >= 0.95 for value in numbers(row[f"accuracy at {length}"])) for length in (16, 64)]
        for name, row in schemes.iterrows()
    }
    assert learned["Transformer, no positions"] == [2, 0] and learned["Transformer, RoPE 25 %"] == [1, 0]
    assert learned["Transformer"][1] == 3


def test_words_about_grounding():
    """What claim 6 and its study say in words, worked out from the study's files."""
    found = pd.read_parquet(ROOT / "studies" / "vlm_retrieval" / "results.parquet")
    found = found[found["metric"].isin(["accuracy", "iou@0.5"]) & found["run"].str.contains("-base-")]
    wide = 100 * found.pivot_table(index="seed", columns=["family", "task"], values="value")
    gap = wide["mamba"] - wide["transformer"]
    means = gap.mean().round(1)
    assert (gap[["grounding", "attribute"]] < 0).all(axis=None)
    assert means["grounding"] == -5.5 and round(means["attribute"]) == -19
    assert round(means["grounding-combination"]) == 42 and round(means["grounding-2shapes"]) == -8
    hybrid = wide["hybrid"].round(1)
    learned = hybrid[hybrid["grounding"] > 50]
    assert len(learned) == 6 and len(hybrid) == 8
    assert (learned["grounding"].min(), learned["grounding"].max()) == (91.0, 99.8)
    assert (learned["grounding"] > wide["mamba", "grounding"].max()).all()
    assert round(hybrid["grounding-combination"].mean()) == 40
    body = BODIES["6. Mamba VLMs lose grounding"]
    study = (ROOT / "studies" / "vlm_retrieval" / "README.md").read_text(encoding="utf-8")
    shown = "Mamba finds 6 points [2, 9] fewer", "19 points fewer", "42 points [34, 50] *more*"
    assert all(words in " ".join(body.split()) for words in shown)
    table = study.split("<!-- families -->")[1].split("<!-- /families -->")[0]
    assert "-5.5 [-9.0, -1.9]" in table and "41.8 [34.0, 49.5]" in table
    after = pd.read_csv(ROOT / "studies" / "vlm_retrieval" / "changed.csv")
    after = after[after["change"].eq("exchanged") & after["cell"].eq("base")]
    mean = (100 * after.groupby("family")[["target", "target_x", "other_x", "target_y"]].mean()).round()
    assert mean.loc["transformer", "target"] == 89
    assert mean.loc["mamba"].tolist() == [20, 6, 62, 75] and mean.loc["hybrid", "target"] == 43
    room = [facts_at(128, 16, 300, n_layer=4, a=a) / (8 * 8) for a in (2.13, 0.48)]  # 8 facts of 8 objects
    assert [round(float(times)) for times in room] == [3, 12]


def grounding_by_cell() -> pd.DataFrame:
    """Boxes found in per cent: seeds down; family, cell and task across."""
    found = pd.read_parquet(ROOT / "studies" / "vlm_retrieval" / "results.parquet")
    found = found[found["metric"].eq("iou@0.5")]
    cell = found["run"].str.extract(r"^[a-z]+-(.*)-seed\d+$", expand=False)
    return 100 * found.assign(cell=cell).pivot_table(
        index="seed", columns=["family", "cell", "task"], values="value"
    )


def words_of(difference: pd.Series) -> str:
    """Mean and interval for all 116 comparisons of the study at once, as the page's words have them."""
    half = stats.t.ppf(1 - 0.025 / 116, 7) * difference.std() / np.sqrt(8)
    mean, low, high = (
        round(float(x)) for x in (difference.mean(), *(difference.mean() + half * np.array((-1, 1))))
    )
    return f"{mean} [{low}, {high}]".replace("[-", "[−")


def test_words_about_layouts_and_resolution():
    """What claims 3, 6 and 8 say in words, by Student's quantiles."""
    wide = grounding_by_cell()
    assert len(wide) == 8

    def gained(family: str, cell: str, before: str) -> str:
        return words_of(wide[family, cell, "grounding"] - wide[family, before, "grounding"])

    third = " ".join(BODIES["3. Task-aware encoding helps grounding only marginally"].split())
    for cell, said in (("instruction-first", "changes grounding by"), ("query-first", "changes it by")):
        number, interval = gained("mamba", cell, "image-first").split(" ", 1)
        assert f"{said} {number} " in third and interval in third
    assert (wide["transformer", "image-first", "grounding"] < 70).sum() == 2  # that lost their lookups
    eighth = " ".join(BODIES["8. Resolution: 336 against 480 pixels"].split())
    number, interval = gained("transformer", "36-patches", "16-patches").split(" ", 1)
    assert f"{number} points {interval} more objects" in eighth
    assert f"Mamba {gained('mamba', '36-patches', '16-patches')}" in eighth
    gaps = {
        cell: wide["transformer", cell, "grounding"] - wide["mamba", cell, "grounding"]
        for cell in ("base", "16-patches", "36-patches")
    }
    assert f"the gap grows by {words_of(gaps['36-patches'] - gaps['16-patches'])}" in eighth
    study = " ".join((ROOT / "studies" / "vlm_retrieval" / "README.md").read_text(encoding="utf-8").split())
    number, interval = words_of(gaps["36-patches"] - gaps["base"]).split(" ", 1)
    assert f"it is {number} points larger {interval}" in study
    two = wide["transformer", "base", "grounding-2shapes"] - wide["mamba", "base", "grounding-2shapes"]
    number, interval = words_of(gaps["base"] - two).split(" ", 1)
    assert f"it is {number[1:]} points smaller than among two {interval}" in study
    assert "writes the patches of the object asked for 1.84 times" in study
    looks = pd.read_csv(ROOT / "studies" / "vlm_retrieval" / "looks.csv")
    written = looks[looks["quantity"].eq("write") & looks["layer"].eq(3) & looks["family"].eq("mamba")]
    ratios = written.groupby("cell")["ratio"].agg(lambda values: np.exp(np.log(values).mean())).round(2)
    assert ratios["query-first"] == 1.84 and ratios["image-first"] == 1.0
    lead = [
        (
            wide["mamba", cell, "grounding-combination"] - wide["transformer", cell, "grounding-combination"]
        ).mean()
        for cell in ("image-first", "instruction-first", "query-first")
    ]
    assert (round(min(lead)), round(max(lead))) == (39, 43)
    assert "(39 to 43 points)" in " ".join(BODIES["6. Mamba VLMs lose grounding"].split())


def test_words_about_the_quick_start():
    """What claim 5 says in words, in every seed."""
    found = pd.read_parquet(ROOT / "studies" / "vlm_pretrained" / "results.parquet")
    wide = found.pivot_table(index="seed", columns=["task", "metric", "family"], values="value")
    named = wide["caption", "object_precision"]
    assert named["transformer"].between(0.85, 0.95).all() and named["mamba"].between(0.55, 0.65).all()
    counted = wide["count", "accuracy"]
    assert (counted["mamba"] > 0.99).all() and (counted["transformer"] < 0.9).all()
    for task in ("reading-digit", "reading-word", "existence", "comparison"):
        apart = wide[task, "accuracy", "mamba"].mean() - wide[task, "accuracy", "transformer"].mean()
        assert abs(apart) < 0.02, task
    for task in ("attribute", "spatial", "pointing"):
        assert (wide[task, "accuracy", "transformer"] > wide[task, "accuracy", "mamba"]).all()
    assert wide["spatial", "accuracy", "mamba"].max() < 0.52


def test_words_about_the_convolution_and_the_recall_law():
    """What claims 14 and 15 say in words."""
    body = " ".join(BODIES["14. Mamba's convolution keeps it from recall"].split())
    assert "no seed of Mamba learns" in body and "Mamba-2 learns with the published convolution" in body
    rows = table("ingredients").reset_index().set_index(["model", "ingredients"])["seeds at 0.95 [95 %]"]
    learned = rows.map(lambda cell: numbers(cell)[0])
    for name in ("with all four ingredients", "without a convolution"):
        assert learned["Mamba", name] == 5
    for name in (
        "without positions",
        "with the published convolution",
        "with the published memory",
        "with C apart from B",
    ):
        assert learned["Mamba", name] == 0
    steps = table("ingredients").reset_index().set_index(["model", "ingredients"])["median steps to it"]
    assert learned["Mamba-2", "with the published convolution"] == 5
    slow, fast = (
        numbers(steps["Mamba-2", name])[0]
        for name in ("with the published convolution", "with all four ingredients")
    )
    assert slow > fast
    law = table("recall-law").reset_index().set_index("model")["a [95 %]"].map(numbers)
    assert law["Mamba"][1] > law["Linear SSM"][2]  # Mamba's whole interval above that of the linear model


def test_costs_are_the_seconds_of_the_runs():
    shown = table("costs").reset_index().set_index("study")
    default = pd.read_csv(ROOT / "studies" / "retrieval_cpu" / "default_run.csv")
    one = default.drop_duplicates(["model", "seed"])["seconds"].sum() / 60
    row = shown.loc["[the default run](../README.md)"]
    assert (int(row["runs"]), float(row["minutes"])) == (6, pytest.approx(one, abs=0.5))
    runs = pd.read_parquet(ROOT / "studies" / "vlm_retrieval" / "results.parquet").drop_duplicates("run")
    row = shown.loc["[vlm_retrieval](../studies/vlm_retrieval/README.md)"]
    assert int(row["runs"]) == len(runs)
    assert float(row["minutes"]) == pytest.approx(runs["seconds"].sum() / 60, abs=0.5)


def test_the_rule_says_when_each_verdict_is_given():
    rule = PAGE.split("| verdict | when |\n| --- | --- |\n")[1].split("\n\n")[0]
    said = {line.split("|")[1].strip() for line in rule.splitlines()}
    assert said == {verdict.removesuffix(" at this size") for verdict in claims.VERDICTS}


def test_seeds_that_agree_stand_beside_what_chance_gives():
    """Three architectures of three pairs: coins agree once in four. One table in forty is above 97.5 %."""
    by_chance = PAGE.split("<!-- layouts-by-chance -->\n")[1].splitlines()[0]
    assert len(table("layouts")) == 3
    assert by_chance.startswith(
        "3 differences between query first and last are compared in this table. 1 of them"
    )
    assert "in all 3 seeds; coins would give 1." in by_chance
    above, models = np.array([numbers(cell) for cell in table("geometry").iloc[:, -1]]).sum(axis=0)
    by_chance = PAGE.split("<!-- geometry-by-chance -->\n")[1].splitlines()[0]
    assert by_chance.startswith(f"{models:.0f} tables") and f"{above:.0f} of them lie above" in by_chance
    assert by_chance.endswith("one in forty there, 1 of them.") and round(models / 40) == 1


def test_every_claim_says_the_four_things():
    assert len(BODIES) == 15
    for title, body in BODIES.items():
        for part in ("**Stated**", "**Measured", "**Verdict: ", "**What would change it:**"):
            assert body.count(part) == 1, (title, part)
    assert table("verdicts").shape[0] == len(BODIES)


def test_numbers_stand_in_tables():
    """Words hold no decimal number that a new result could make wrong."""
    words = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    words = re.sub(r"arXiv \d+\.\d+|\(http\S+\)|```.*?```|`[^`]*`|0\.5 M", "", words, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+\b", words.replace("## ", "")) == []


@pytest.mark.parametrize(
    "verdict", ["", "**Verdict: proven.**", "**Verdict: not tested.** **Verdict: not tested.**"]
)
def test_a_claim_without_one_known_verdict_is_refused(verdict):
    with pytest.raises(ValueError, match=r"'1\. Sky' needs one verdict out of: supported"):
        claims.verdicts(f"# Page\n\n## 1. Sky\n\n{verdict}\n")
