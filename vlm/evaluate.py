"""`python -m vlm.evaluate RUN`: ask a trained VLM, score its answers, add them to the results store."""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from synthetic import store
from synthetic.evaluate import autocast
from synthetic.run import explain, fail, write_anything
from vlm import parts, results
from vlm.config import Run, from_dict, read_file
from vlm.data.samples import Sample, Source
from vlm.layout import image_ids, sequence
from vlm.model import VLM
from vlm.prompts import END
from vlm.stages import RESULT, WEIGHTS, fill

BATCH = 64
PREDICTIONS = "predictions.jsonl"


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluate trained VLMs on what their config names, beside what a guess without the image gets."""

    run: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, as vlm.train prints them, or config files: every run of theirs."""
    out: Path = Path("runs/vlm")
    """Folder that vlm.train wrote to, for config files."""
    only: str = ""
    """Of a config file, only the runs whose name contains this."""
    threads: int = 0
    """CPU threads; 0 = as PyTorch chooses."""
    again: bool = False
    """Also the runs that were evaluated before."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input."""
    write_anything()
    options = tyro.cli(Options, args=argv, prog="python -m vlm.evaluate")
    try:
        return evaluate_all(options)
    except (ValueError, ImportError) as error:
        return fail(str(error))
    except OSError as error:
        return fail(explain(error, str(options.out)))


def evaluate_all(options: Options) -> int:
    import pandas as pd
    from rich.console import Console

    if options.threads:
        torch.set_num_threads(options.threads)
    console, rows = Console(), []
    for path in options.run:
        if path.suffix == ".py":
            found = [(run, options.out) for run in read_file(path) if options.only in run.name]
        else:
            found = [(saved_run(path), path.parent)]
        for run, out in found:
            table = out / results.RESULTS / f"{run.name}.parquet"
            if options.again or not table.exists() or not current(table, run):
                results.write(table, evaluate(run, out, progress=console.is_terminal))
            rows.append(pd.read_parquet(table))
    if not rows:
        raise ValueError(f"--only {options.only}: no run has that in its name")
    console.print(summary(pd.concat(rows)))
    console.print(f"results: {out / results.RESULTS}", highlight=False, soft_wrap=True)
    return 0


def saved_run(folder: Path) -> Run:
    """The run whose last stage is in a folder. Raises ValueError, in one line, for other folders."""
    path = folder / "config.json"
    if not path.exists() or not (folder / RESULT).exists():
        raise ValueError(
            f"{folder} holds no trained VLM; give a folder that vlm.train printed, or a config file"
        )
    plans = store.read_json(path)["plans"]
    return from_dict(plans[0])


def current(table: Path, run: Run) -> bool:
    """Whether a table is of this very run, and not of one that had its name before."""
    import pandas as pd

    return set(pd.read_parquet(table, columns=["stage"])["stage"]) == {run.stage_ids()[-1]}


def load(run: Run, out: Path, device: str = "cpu") -> VLM:
    """The trained model, without encoder. Raises ValueError if it has not been trained in `out`."""
    folder = out / run.stage_ids()[-1]
    if not (folder / RESULT).exists():
        raise ValueError(f"run {run.name!r} is not trained in {out}; run python -m vlm.train first")
    model = parts.model(run, parts.eyes(run.encoder, run.image_size, out, device).width)
    fill(model, folder / WEIGHTS)
    return model.to(device).eval()


def evaluate(run: Run, out: Path, progress: bool = False, device: str | None = None) -> list[dict[str, Any]]:
    """Rows of the results table (`vlm.results.COLUMNS`); the answers go to the run's predictions.jsonl."""
    from rich.progress import track

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(run, out, device)
    features = parts.features(run, run.image_size, out, device)
    folder = out / run.stage_ids()[-1]
    spent = [store.read_json(out / name / RESULT) for name in run.stage_ids()]
    fixed = dict(
        run=run.name,
        stage=folder.name,
        family=run.family,
        model=run.model,
        layout=run.layout,
        image_size=run.image_size,
        image_tokens=len(image_ids(parts.eyes(run.encoder, run.image_size, out, device).side)),
        seed=run.seed,
        parameters=sum(p.numel() for p in model.parameters()),
        steps=sum(stage["steps"] for stage in spent),
        seconds=sum(stage["seconds"] for stage in spent),
        commit=store.read_json(folder / "environment.json")["commit"],
    )
    rows: list[dict[str, Any]] = []
    written: list[dict[str, Any]] = []
    for task, data in track(run.evaluation.items(), run.name, disable=not progress):
        source = data.build(answers=False)
        features.fill(source, progress=False)
        samples = [source[i] for i in range(len(source))]
        answers = answer_all(model, run, features, source, samples, device, out)
        blind = blind_rows(run, task, samples)
        for row in results.score(samples, answers):
            more = dict(
                task=task, split=data.split, chance=data.chance(), question_only=blind.get(row["metric"])
            )
            rows.append(fixed | more | row)
        for sample, said in zip(samples, answers, strict=True):
            written.append(
                dict(task=task, id=sample.id, image=sample.image, asked=results.asked(sample))
                | dict(said=said, right=results.right(sample, said), target=dict(sample.target))
            )
    store.write_rows(folder / PREDICTIONS, written)
    return rows


def blind_rows(run: Run, task: str, test: Sequence[Sample]) -> dict[str, float]:
    """Metrics of answering without the image, as training samples of the same kind teach; {} if none fit."""
    data = run.evaluation[task].training()
    if data is None:
        return {}
    source = data.build(answers=False)
    said = results.question_only((source[i] for i in range(len(source))), test)
    return {row["metric"]: row["value"] for row in results.score(test, said)}


@torch.no_grad()
def answer_all(
    model: VLM, run: Run, features: Any, source: Source, samples: Sequence[Sample], device: str, out: Path
) -> list[str]:
    """Greedy answers; prompts of one length are asked together, so that none is padded."""
    text = parts.text(run.tokenizer)
    side = parts.eyes(run.encoder, run.image_size, out, device).side
    groups: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for i, sample in enumerate(samples):
        ids, _ = sequence(sample.chunks, text.encode, side, run.layout, markers=text.markers)
        groups[len(ids)].append((i, ids))
    answers = [""] * len(samples)
    for group in groups.values():
        for start in range(0, len(group), BATCH):
            part = group[start : start + BATCH]
            asked = torch.tensor([ids for _, ids in part], device=device)
            seen = features.get(source, [samples[i].image for i, _ in part]).to(device)
            with autocast(device, "bfloat16" if run.precision == "bf16" else "float32"):
                said = model.generate(asked, seen, run.max_new_tokens, eos_token_id=text.encode(END)[0])
            for (i, _), row in zip(part, said.tolist(), strict=True):
                answers[i] = text.decode(row)
    return answers


def summary(rows: Any) -> Any:
    """A table: tasks down, runs across, in per cent."""
    from rich import box
    from rich.table import Table

    main = rows[rows["metric"].isin(["accuracy", "iou@0.5"])]
    runs = list(dict.fromkeys(main["run"]))
    table = Table(title="Right answers in per cent", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("task (split)")
    for name in ("chance", "question only", *runs):
        table.add_column(name, justify="right")
    for (task, split), part in main.groupby(["task", "split"], sort=False):
        values = part.drop_duplicates("run").set_index("run")
        first = values.iloc[0]
        cells = [first["chance"], first["question_only"], *(values["value"].get(name) for name in runs)]
        printed = ["-" if cell is None or cell != cell else f"{100 * cell:.1f}" for cell in cells]
        table.add_row(f"{task} ({split})", *printed)
    return table


if __name__ == "__main__":
    sys.exit(main())
