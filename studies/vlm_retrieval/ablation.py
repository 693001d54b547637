"""What carries the recipe: the base cell of runs.py, and the first stage of words.py, with one thing changed.

    python -m vlm.train studies/vlm_retrieval/ablation.py --out runs/vlm
    python -m vlm.evaluate studies/vlm_retrieval/ablation.py --out runs/vlm
    python -m studies.vlm_retrieval.ablation runs/vlm      # writes ablation.csv and reading.csv

Pictures: right answers after the budget of the base cell, which is in runs.py. Words: steps until a model
reads the digit and the word of a scene (both losses below 0.05), at most READ.steps.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from ssm_retrieval.training import store
from studies.vlm_retrieval.runs import CELLS, PAPER, run
from vlm import folders
from vlm.config import Run, Scenes, Stage
from vlm.configs.words import MODELS, READ
from vlm.results import table_path

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)  # of the study's own, so that the base cell is there


def _data(stage: Stage, **changed: Any) -> Stage:
    """The stage with other scenes."""
    data = {name: dataclasses.replace(scenes, **changed) for name, scenes in stage.data.items()}
    return dataclasses.replace(stage, data=data)


def _each(change: Callable[[Stage], Stage]) -> Callable[[Run], Run]:
    """Change every stage of a run."""
    return lambda one: dataclasses.replace(one, stages=tuple(change(stage) for stage in one.stages))


# Pictures: a run -> the run without one thing, with equally many questions.
CHANGES: dict[str, Callable[[Run], Run]] = {
    "from scratch": lambda one: dataclasses.replace(one, init=None, model_overrides=MODELS[one.model]),
    "no stage for the connector alone": lambda one: dataclasses.replace(one, stages=one.stages[1:]),
    "boxes without smoothing": _each(lambda stage: dataclasses.replace(stage, box_spread=0.0)),
    "one question a picture and task": _each(lambda stage: _data(stage, draws=1)),
    "four questions a sample": _each(
        lambda stage: dataclasses.replace(_data(stage, turns=4, draws=4), batch_size=stage.batch_size // 4)
    ),
}
# Words: changes of a model's options.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "transformer": {
        "as it is": {},
        "embedding_std 0.02": {"embedding_std": 0.02},
        "init_std 0.02": {"init_std": 0.02},
        "two layers, wider": {"n_layer": 2, "d_model": 132},
    },
    "mamba": {
        "as it is": {},
        "embedding_std 0.02": {"embedding_std": 0.02},
        "convolution as published": {"ssm_init": "default"},
        "two layers, wider": {"n_layer": 2, "d_model": 184},
    },
}


def pictures() -> list[Run]:
    """Return the runs on pictures: every change, family and seed."""
    made = []
    for name, change in CHANGES.items():
        for seed in SEEDS:
            for family in PAPER:
                what = f"{family}-{name.replace(' ', '-')}-seed{seed}"
                made.append(dataclasses.replace(change(run(CELLS[0], family, seed)), name=what))
    return made


def words() -> list[Run]:
    """Return the runs on scenes in words: every option, family and seed."""
    return [
        Run(
            name=f"{family}-reads-{name.replace(' ', '-').replace(',', '')}-seed{seed}",
            model=f"{family}-tiny",
            model_overrides=MODELS[f"{family}-tiny"] | options,
            stages=(READ,),
            evaluation={"reading-word": Scenes("reading-word", 200, "heldout")},
            encoder="words",
            image_size=96,
            seed=seed,
        )
        for family, changed in OPTIONS.items()
        for name, options in changed.items()
        for seed in SEEDS
    ]


def get_config() -> list[Run]:
    """Return all runs."""
    return pictures() + words()


def main(out: Path) -> None:
    """Write ablation.csv (right answers) and reading.csv (steps)."""
    rows = []
    base = [run(CELLS[0], family, seed) for seed in SEEDS for family in PAPER]
    for one in base + pictures():
        found: Any = pd.read_parquet(table_path(out, one.name))
        main_metric = found["metric"].isin(["accuracy", "iou@0.5"])
        change = next((c for c in CHANGES if c.replace(" ", "-") in one.name), "as it is")
        for _, row in found[main_metric].iterrows():
            about = {"change": change, "family": one.family, "seed": one.seed}
            rows.append(about | {"task": row["task"], "value": row["value"]})
    _write("ablation", rows)
    steps = []
    for one in words():
        (name,) = one.stage_ids()
        result = folders.finished(out / name)
        options = next(
            n for n, o in OPTIONS[one.family].items() if one.model_overrides == MODELS[one.model] | o
        )
        steps.append(
            {"change": options, "family": one.family, "seed": one.seed, "steps": result.steps}
            | {"read": result.steps < READ.steps}
        )
    _write("reading", steps)


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    text = pd.DataFrame(rows).to_csv(index=False, float_format="%.4f")
    store.write_bytes(HERE / f"{name}.csv", text.encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
