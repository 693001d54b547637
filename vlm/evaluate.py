"""`python -m vlm.evaluate RUN`: ask a trained VLM, score its answers, add them to the results store."""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from models.errors import UserError
from synthetic import store
from synthetic.cli import guarded, parse, use_threads
from synthetic.evaluate import autocast
from vlm import parts, results
from vlm.config import Data, Run, from_dict, read_file
from vlm.data.samples import Sample, Source
from vlm.layout import image_ids
from vlm.model import VLM
from vlm.prompts import END
from vlm.stages import RESULT, WEIGHTS, fill

BATCH = 64
MOST_ACROSS = 4  # runs whose names fit beside each other


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
    options = parse(Options, argv, "python -m vlm.evaluate")
    return guarded(lambda: evaluate_all(options), out=options.out)


def evaluate_all(options: Options) -> int:
    import pandas as pd
    from rich.console import Console

    use_threads(options.threads)
    if not options.run:
        raise UserError("RUN is missing; give folders that vlm.train printed, or config files")
    console, rows = Console(), []
    if not console.is_terminal:
        console.width = 120  # a file has no edge
    for path in options.run:
        if path.suffix == ".py":
            found = [(run, options.out) for run in read_file(path) if options.only in run.name]
        else:
            found = [(saved_run(path), path.parent)]
        for run, out in found:
            table = results.table_path(out, run.name)
            if options.again or not table.exists() or not current(table, run):
                results.write(table, evaluate(run, out, progress=console.is_terminal))
            rows.append(pd.read_parquet(table))
    if not rows:
        raise UserError(f"--only {options.only}: no run has that in its name")
    console.print(summary(pd.concat(rows)))
    console.print(f"results: {out / results.RESULTS}", highlight=False, soft_wrap=True)
    return 0


def saved_run(folder: Path) -> Run:
    """The run whose last stage is in a folder. Raises UserError, in one line, for other folders."""
    path = folder / "config.json"
    if not path.exists() or not (folder / RESULT).exists():
        raise UserError(
            f"{folder} holds no trained VLM; give a folder that vlm.train printed, or a config file"
        )
    plans = store.read_json(path)["plans"]
    return from_dict(plans[0])


def current(table: Path, run: Run) -> bool:
    """Whether a table is of this very run, and not of one that had its name before."""
    import pandas as pd

    return set(pd.read_parquet(table, columns=["stage"])["stage"]) == {run.stage_ids()[-1]}


def load(run: Run, out: Path, device: str = "cpu") -> VLM:
    """The trained model, without encoder. Raises UserError if it has not been trained in `out`."""
    folder = out / run.stage_ids()[-1]
    if not (folder / RESULT).exists():
        raise UserError(f"run {run.name!r} is not trained in {out}; run python -m vlm.train first")
    model = parts.model(run, parts.eyes(run.encoder, run.image_size, out, device).width)
    fill(model, folder / WEIGHTS)
    return model.to(device).eval()


def evaluate(run: Run, out: Path, progress: bool = False, device: str | None = None) -> list[dict[str, Any]]:
    """Rows of the results table (`vlm.results.COLUMNS`); the answers go to `vlm.results.answers_path`."""
    from rich.progress import track

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(run, out, device)
    features = parts.features(run, run.image_size, out, device)
    side = parts.eyes(run.encoder, run.image_size, out, device).side
    folder = out / run.stage_ids()[-1]
    spent = [store.read_json(out / name / RESULT) for name in run.stage_ids()]
    fixed = dict(
        run=run.name,
        stage=folder.name,
        family=run.family,
        model=run.model,
        layout=run.layout,
        image_size=run.image_size,
        image_tokens=len(image_ids(side)),
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
        samples = _samples(source)
        answers = answer_all(model, run, features, source, samples, side, device)
        blind = blind_rows(data)
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
    path = results.answers_path(out, run.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_rows(path, written)
    return rows


def blind_rows(data: Data) -> Mapping[str, float]:
    """Metrics of answering without the image, as training samples of the same kind teach; {} if none fit."""
    training = data.training()
    return {} if training is None else _blind(data, training)


@lru_cache(maxsize=64)  # the same for every run that is asked the same
def _blind(data: Data, training: Data) -> Mapping[str, float]:
    known, test = (_samples(asked.build(answers=False)) for asked in (training, data))
    return {row["metric"]: row["value"] for row in results.score(test, results.question_only(known, test))}


def _samples(source: Source) -> list[Sample]:
    return [source[i] for i in range(len(source))]


def alike(keys: Iterable[Hashable], size: int) -> Iterator[list[int]]:
    """Numbers of what has equal keys, such as lengths, at most `size` together: batches without padding."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        groups[key].append(number)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


@torch.no_grad()
def say(model: VLM, run: Run, input_ids: Tensor, features: Tensor) -> list[list[int]]:
    """Greedy answers to prompts of one length, (B, L) int64 with features (B, P, F), in the run's precision.

    Ids up to and with the end token, which rows that end early repeat.
    """
    end = parts.text(run.tokenizer).encode(END)[0]
    with autocast(input_ids.device.type, "bfloat16" if run.precision == "bf16" else "float32"):
        return model.generate(input_ids, features, run.max_new_tokens, eos_token_id=end).tolist()


def answer_all(
    model: VLM, run: Run, features: Any, source: Source, samples: Sequence[Sample], side: int, device: str
) -> list[str]:
    """Answers to samples of a source, whose images have side x side patches."""
    text = parts.text(run.tokenizer)
    prompts = [parts.prompt(run, sample, side)[0] for sample in samples]
    answers = [""] * len(samples)
    for numbers in alike(map(len, prompts), BATCH):
        ids = torch.tensor([prompts[i] for i in numbers], device=device)
        seen = features.get(source, [samples[i].image for i in numbers]).to(device)
        for i, said in zip(numbers, say(model, run, ids, seen), strict=True):
            answers[i] = text.decode(said)
    return answers


def summary(rows: Any) -> Any:
    """A table in per cent: tasks down, runs across, or, of more than a few runs, the other way round."""
    from rich import box
    from rich.table import Table

    main = rows[rows["metric"].isin(["accuracy", "iou@0.5"])]
    runs = list(dict.fromkeys(main["run"]))
    cells = [["", "chance", "question only", *runs]]
    for (task, split), part in main.groupby(["task", "split"], sort=False):
        values = part.drop_duplicates("run").set_index("run")
        first = values.iloc[0]
        numbers = [first["chance"], first["question_only"], *(values["value"].get(name) for name in runs)]
        printed = ["-" if cell is None or cell != cell else f"{100 * cell:.1f}" for cell in numbers]
        cells.append([f"{task} ({split})", *printed])
    if len(runs) > MOST_ACROSS:
        cells = [list(line) for line in zip(*cells, strict=True)]
    table = Table(title="Right answers in per cent", box=box.SIMPLE_HEAD, padding=(0, 1))
    for i, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if i else "left", overflow="fold", no_wrap=not i)
    for line in cells[1:]:
        table.add_row(*line)
    return table


if __name__ == "__main__":
    sys.exit(main())
