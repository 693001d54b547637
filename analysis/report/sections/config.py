"""What was run: final results, what differs between the models and runs, what they share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.plots.sweep import THRESHOLD
from analysis.report.parts import Section, Table
from analysis.report.runs import Run
from analysis.tables import by_seed, seeds
from ssm_retrieval.style import NAMES

READING = (
    "The first table has what every model reached on held-out sequences after training. Runs that differ in "
    "nothing but the seed have a table of their own: how many of them ended at 0.95 or above, with the "
    "interval of Clopper and Pearson, and their mean with its range, which is no interval of the mean. "
    "Another table lists every option that is not the same in all columns; highlighted and marked with ≠ are "
    "those that differ between runs for the same family, so that they, and not the architecture, may be "
    "behind a difference further down. What all columns share is in the folded table."
)


def section(runs: Sequence[Run]) -> Section:
    """The section on configuration and results of all runs."""
    columns = [(run, family) for run in runs for family in run.plans]
    values = [dict(_flat(run.plans[family])) | dict(_made(run)) for run, family in columns]
    names = sorted({name for column in values for name in column}, key=_place)
    rows = {name: [_word(column.get(name)) for column in values] for name in names}
    differs = [name for name in names if len(set(rows[name])) > 1 and name not in ("family", "run.folder")]
    between = {name for name in differs if _between_runs(columns, rows[name])}
    headers = ["option", *(run.title(family) for run, family in columns)]
    differing = [[f"≠ {name}" if name in between else name, *rows[name]] for name in differs]
    shared = [[name, rows[name][0]] for name in names if len(set(rows[name])) == 1]
    tables = [_results(columns), *_repeated(columns), _folders(runs)]
    if differing:
        marked = frozenset(i for i, name in enumerate(differs) if name in between)
        caption = "Options that are not the same everywhere"
        tables.append(Table(caption, headers, differing, marked))
    tables.append(Table("Options that are the same everywhere", ["option", "value"], shared, folded=True))
    return Section("config", "Configuration and results", READING, tables)


def _folders(runs: Sequence[Run]) -> Table:
    rows = [[run.letter or "-", run.name, run.train_command()] for run in runs]
    return Table("Runs and the commands that make them", ["run", "folder", "command"], rows)


def _results(columns: Sequence[tuple[Run, str]]) -> Table:
    headers = [
        "model",
        "parameters",
        "steps",
        "training tokens",
        "seconds",
        "accuracy [95 % CI]",
        "chance",
        "learned up to length",
    ]
    rows = []
    for run, family in columns:
        found = run.results.get(family)
        if found is None:
            rows.append([run.title(family), *["-"] * 4, "not finished", "-", "-"])
            continue
        rows.append(
            [
                run.title(family),
                f"{found['parameters']:,}",
                f"{found['step']:,}",
                f"{found['tokens']:,}",
                f"{found['seconds']:.0f}",
                f"{found['accuracy']:.3f} [{found['ci_low']:.3f}, {found['ci_high']:.3f}]",
                f"{found['chance']:.4f}",
                str(found["longest_length"] or "-"),
            ]
        )
    return Table(
        "Final held-out accuracy at the full length (Wilson intervals over sequences)", headers, rows
    )


def _repeated(columns: Sequence[tuple[Run, str]]) -> Iterator[Table]:
    """What finished runs came to that differ in nothing but the seed, if there are any."""
    alike: dict[str, list[tuple[Run, str]]] = {}
    for run, family in columns:
        if family in run.results:
            plan = {name: value for name, value in run.plans[family].items() if name != "seed"}
            alike.setdefault(json.dumps(plan, sort_keys=True), []).append((run, family))
    rows = []
    for group in alike.values():
        if len(group) > 1:
            group.sort(key=lambda column: column[0].plans[column[1]]["seed"])
            accuracy = np.array([run.results[family]["accuracy"] for run, family in group])
            family, letters = group[0][1], ", ".join(run.letter for run, _ in group)
            rows.append([NAMES[family], letters, seeds(accuracy, accuracy >= THRESHOLD), by_seed(accuracy)])
    if rows:
        headers = ["model", "runs", f"ended at {THRESHOLD} [95 %]; mean (range)", "accuracy, by seed"]
        yield Table("Over seeds: runs that differ in nothing else", headers, rows)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """`task_options.layout` and the like for options inside options."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def _made(run: Run) -> Iterator[tuple[str, Any]]:
    """What a reader of the numbers may want to know of the machine."""
    names = ("version", "python", "platform", "cpus", "threads", "gpu", "commit")
    yield from ((f"environment.{name}", run.environment.get(name)) for name in names)
    yield "environment.torch", run.environment.get("packages", {}).get("torch")


def _between_runs(columns: Sequence[tuple[Run, str]], values: Sequence[str]) -> bool:
    """Whether a family has several values, in several runs."""
    found: dict[str, set[str]] = {}
    for (_, family), value in zip(columns, values, strict=True):
        found.setdefault(family, set()).add(value)
    return any(len(different) > 1 for different in found.values())


def _place(name: str) -> tuple[int, str]:
    """The task first, then the model, then how it was trained, then the machine."""
    groups = ("task", "seq_len", "model", "environment")
    place = next((i for i, group in enumerate(groups) if name.startswith(group)), 2)
    return place + (name.startswith("environment")), name


def _word(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
