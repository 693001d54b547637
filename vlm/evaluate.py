"""`python -m vlm.evaluate RUN`: ask a trained VLM, score its answers, add them to the results store."""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from ssm_retrieval.cli import guarded, parse, use_threads
from ssm_retrieval.errors import UserError
from ssm_retrieval.terminal import plain_console
from vlm import components, folders, results
from vlm.config import Data, Run, read_file
from vlm.data.samples import Sample, Source
from vlm.folders import RESULT
from vlm.guesses import asked
from vlm.layout import image_ids
from vlm.model import VLM
from vlm.prompts import END

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
    """Only the runs whose name contains this."""
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

    use_threads(options.threads)
    if not options.run:
        raise UserError("RUN is missing; give folders that vlm.train printed, or config files")
    console, tables = plain_console(), []
    if not console.is_terminal:
        console.width = 120  # a file has no edge
    for path in options.run:
        if path.suffix == ".py":
            found, out = read_file(path), options.out
        else:
            found, out = folders.saved_runs(path), path.resolve().parent
        for run in found:
            if options.only not in run.name:
                continue
            table = None if options.again else current(out, run)
            if table is None:
                rows, answers = evaluate(run, out, progress=console.is_terminal)
                table = results.write(out, run.name, rows, answers)
            tables.append(table)
    if not tables:
        raise UserError(f"--only {options.only}: no run has that in its name")
    console.print(summary(pd.concat(tables)))
    console.print(f"results: {out / results.RESULTS}", soft_wrap=True)
    return 0


def current(out: Path, run: Run) -> Any:
    """The table of this very run, asked and scored as now; None if there is none.

    A damaged one is said on standard error and counts as none: it is made anew.
    """
    path = results.table_path(out, run.name)
    if not path.exists():
        return None
    try:
        table = results.read(path)
    except UserError as error:
        print(f"{error}; it is evaluated again", file=sys.stderr)
        return None
    made = set(zip(table["stage"], table["evaluation"], strict=True))
    return table if made == {(run.stage_ids()[-1], results.fingerprint(run))} else None


def load(run: Run, out: Path, device: str = "cpu") -> VLM:
    """The trained model, without encoder. Raises UserError if it has not been trained in `out`."""
    folder = out / run.stage_ids()[-1]
    if not (folder / RESULT).exists():
        raise UserError(f"run {run.name!r} is not trained in {out}; run python -m vlm.train first")
    model = components.model(run, components.eyes(run.encoder, run.image_size, out, device).width)
    folders.load_weights(folder, model)
    return model.to(device).eval()


def evaluate(
    run: Run, out: Path, progress: bool = False, device: str | None = None
) -> tuple[list[results.Row], list[results.Row]]:
    """Rows of the results table (`vlm.results.COLUMNS`), and the answers, a row each."""
    from rich.markup import escape
    from rich.progress import track

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(run, out, device)
    features = components.features(run, run.image_size, out, device)
    side = components.eyes(run.encoder, run.image_size, out, device).side
    folder = out / run.stage_ids()[-1]
    spent = [folders.finished(out / name) for name in run.stage_ids()]
    fixed = dict(
        run=run.name,
        stage=folder.name,
        evaluation=results.fingerprint(run),
        family=run.family,
        model=run.model,
        layout=run.layout,
        image_size=run.image_size,
        image_tokens=len(image_ids(side)),
        seed=run.seed,
        parameters=sum(p.numel() for p in model.parameters()),
        steps=sum(stage.steps for stage in spent),
        seconds=sum(stage.seconds for stage in spent),
        commit=folders.commit(folder),
    )
    rows: list[dict[str, Any]] = []
    written: list[dict[str, Any]] = []
    for task, data in track(run.evaluation.items(), escape(run.name), disable=not progress):
        source = data.build(answers=False)
        features.fill(source, progress=False)
        samples = _samples(source)
        answers = answer_all(model, run, features, source, samples, side, device)
        blind, chance = blind_rows(data), data.declared().chance
        for row in results.score(samples, answers):
            more = dict(task=task, split=data.split, chance=chance, question_only=blind.get(row["metric"]))
            rows.append(fixed | more | row)
        for sample, said in zip(samples, answers, strict=True):
            written.append(
                dict(task=task, id=sample.id, image=sample.image, asked=asked(sample))
                | dict(said=said, right=results.right(sample, said), target=dict(sample.target))
            )
    return rows, written


def blind_rows(data: Data) -> Mapping[str, float]:
    """Metrics of answering without the image, as training samples of the same kind teach; {} if none fit."""
    training, guess = data.training(), data.declared().blind
    if training is None or guess is None:
        return {}
    key = repr((data, guess))
    if key not in _blind:
        known, test = (_samples(one.build(answers=False)) for one in (training, data))
        _blind[key] = {row["metric"]: row["value"] for row in results.score(test, guess(known, test))}
    return _blind[key]


_blind: dict[str, Mapping[str, float]] = {}  # by question: the same for every run that is asked the same


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
def say(
    model: VLM, run: Run, input_ids: Tensor, features: Tensor, most: int | None = None
) -> list[list[int]]:
    """Greedy answers to prompts of one length, (B, L) int64 with features (B, P, F), in the run's precision.

    Ids up to and with the end token, which rows that end early repeat; at most as many as the run allows, and
    as `most`.
    """
    length = min(run.max_new_tokens, most or run.max_new_tokens)
    end = components.text(run.tokenizer).encode(END)[0]
    with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
        return model.generate(input_ids, features, length, eos_token_id=end).tolist()


def answer_all(
    model: VLM, run: Run, features: Any, source: Source, samples: Sequence[Sample], side: int, device: str
) -> list[str]:
    """Answers to samples of a source, whose images have side x side patches."""
    text = components.text(run.tokenizer)
    prompts = [components.prompt(run, sample, side)[0] for sample in samples]
    answers, most = [""] * len(samples), results.declared(samples[0]).max_new_tokens
    for numbers in alike(map(len, prompts), BATCH):
        ids = torch.tensor([prompts[i] for i in numbers], device=device)
        seen = features.get(source, [samples[i].image for i in numbers]).to(device)
        for i, said in zip(numbers, say(model, run, ids, seen, most), strict=True):
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
