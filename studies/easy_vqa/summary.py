"""Tables of README.md, from the runs of this study:

    python -m studies.easy_vqa.summary [RUNS]

With RUNS (what `vlm.train --out` named) it first writes results.parquet, kinds.csv (right answers of every
run by kind of question) and features.csv (what a linear probe reads from the encoder) beside this file;
mixed.csv has earlier runs that README.md describes. What stands between the markers `<!-- NAME -->` and
`<!-- /NAME -->` in README.md is made from these tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.tables import by_seed, fill
from ssm_retrieval.style import NAMES
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store
from studies import scores as scores_of
from vlm.data import easy_vqa

HERE = Path(__file__).parent
RESULTS, KINDS, FEATURES = HERE / "results.parquet", HERE / "kinds.csv", HERE / "features.csv"
MIXED = HERE / "mixed.csv"
FAMILIES = ("transformer", "mamba")
ORDER = ("what color", "what shape", "is there a color", "is there a shape")
BATCH = 100  # pictures encoded together


def main(runs: Path | None) -> None:
    """Make the tables of README.md anew; first from a folder of runs, if given."""
    if runs is not None:
        collect(runs)
    path = HERE / "README.md"
    store.write_bytes(path, filled(path.read_text(encoding="utf-8")).encode())


# --- from the runs ------------------------------------------------------------------------------------------


def collect(out: Path) -> None:
    """Write the committed tables of trained and evaluated runs."""
    from vlm.config import read_file
    from vlm.results import answers_path

    runs = read_file(HERE / "runs.py")
    scores_of.collect(runs, out, RESULTS)
    counted = [
        dict(run=run.name, family=run.family, seed=run.seed) | row
        for run in runs
        if "easy-vqa" in run.evaluation
        for row in by_kind(store.read_rows(answers_path(out, run.name)))
    ]
    store.write_bytes(KINDS, pd.DataFrame(counted).to_csv(index=False).encode())
    probed = pd.DataFrame(probes(out))
    store.write_bytes(FEATURES, probed.to_csv(index=False, float_format="%.5g").encode())


def by_kind(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count right answers by what a question is about, the kinds in ORDER."""
    table = pd.DataFrame(
        {"kind": kind_of(row["asked"], row["target"]), "right": bool(row["right"])} for row in answers
    )
    parts = table.groupby("kind")["right"]
    return [
        dict(kind=kind, right=int(parts.sum()[kind]), count=int(parts.count()[kind]))
        for kind in ORDER
        if kind in parts.groups
    ]


def kind_of(asked: str, target: Mapping[str, Any]) -> str:
    """Return which of ORDER a question is."""
    if target["kind"] != "yes/no":
        return f"what {target['kind']}"
    named = re.search("|".join(easy_vqa.SHAPES), asked)
    return f"is there a {'shape' if named else 'color'}"


def probes(out: Path) -> list[dict[str, Any]]:
    """Read shape and color of a picture from the mean of its patches' features, by logistic regression.

    Trained on the training pictures whose shape or color an open question tells; the score is that of the
    test pictures.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from vlm import components
    from vlm.config import Files

    features: dict[str, Any] = {}
    eyes = components.eyes("scenes", 64, out)
    for split in ("train", "test"):
        source = Files("easy-vqa", split).build(answers=True)
        keys = list(source.keys())
        cut = [keys[i : i + BATCH] for i in range(0, len(keys), BATCH)]
        means = [eyes([source.picture(key) for key in part]).mean(1).float().numpy() for part in cut]
        features[split] = dict(zip(keys, np.concatenate(means), strict=True))
    found = []
    for kind in ("shape", "color"):
        known = {
            split: {
                record.image: record.answers[0]
                for record in easy_vqa.easy_vqa(easy_vqa.installed(), split)
                if record.kind == kind
            }
            for split in features
        }
        x, y = ({s: [of[s][image] for image in known[s]] for s in known} for of in (features, known))
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000))
        probe.fit(x["train"], y["train"])
        found.append(dict(kind=kind, pictures=len(y["test"]), accuracy=probe.score(x["test"], y["test"])))
    return found


# --- the tables of README.md --------------------------------------------------------------------------------


def filled(text: str) -> str:
    """README with its tables made anew."""
    results = pd.read_parquet(RESULTS)
    made = {
        "features": probed(pd.read_csv(FEATURES)),
        "mixed": by_family(pd.read_csv(MIXED)),
        "rates": rates(results),
        "test": scores(results),
        "cost": scores_of.cost(results[results["task"] == "easy-vqa"], FAMILIES),
        "kinds": by_family(pd.read_csv(KINDS)),
    }
    return fill(text, made)


def percent(values: Any) -> str:
    """Shares of every seed in per cent, their mean before them."""
    data = 100 * np.asarray(values, float)
    return f"{data.mean():.1f}" if data.size == 1 else f"{data.mean():.1f} ({by_seed(data, 1)})"


def probed(table: pd.DataFrame) -> str:
    """What a linear probe reads of the pictures."""
    rows = [
        [row["kind"], row["pictures"], f"{100 * row['accuracy']:.1f}"] for row in table.to_dict("records")
    ]
    return markdown(["property", "test pictures", "linear probe"], rows)


def rates(results: pd.DataFrame) -> str:
    """Held-out open questions by learning rate."""
    part = results[results["task"] == "held-out"]
    names = sorted({name.partition("-lr")[2] for name in part["run"]}, key=float)
    values = part.set_index("run")["value"]
    rows = [
        [NAMES[family], *(f"{100 * values[f'{family}-lr{name}']:.1f}" for name in names)]
        for family in FAMILIES
    ]
    return markdown(["learning rate", *names], rows)


def test_split(results: pd.DataFrame, family: str) -> pd.DataFrame:
    """Choose a family's rows of the test split, in the order of seeds."""
    mine = results[(results["task"] == "easy-vqa") & (results["family"] == family)]
    return mine.sort_values("seed")


def scores(results: pd.DataFrame) -> str:
    """Accuracy on the test split beside the guess without the image."""
    blind = test_split(results, FAMILIES[0])["question_only"].iloc[0]
    rows = [["most frequent answer to the same question", f"{100 * blind:.1f}"]]
    rows += [[NAMES[family], percent(test_split(results, family)["value"])] for family in FAMILIES]
    return markdown(["", "right answers in per cent"], rows)


def by_family(kinds: pd.DataFrame) -> str:
    """Accuracy by what a question is about, every seed of a family in the order of the table."""
    shares = kinds.assign(share=kinds["right"] / kinds["count"])
    rows = []
    for kind in ORDER:
        mine = shares[shares["kind"] == kind]
        of = [percent(mine.loc[mine["family"] == family, "share"]) for family in FAMILIES]
        rows.append([kind, int(mine["count"].iloc[0]), *of])
    return markdown(["question", "asked", *(NAMES[family] for family in FAMILIES)], rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
