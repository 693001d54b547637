"""Linear probes at the answer: which context tokens, and the answer itself, can be read off linearly?

Read at the position where the answer is due: the residual stream after every block, and the state h_t of
every SSM layer (d_inner d_state numbers). Parts of the table: "token" (accuracy by lag, the number of context
symbols since), "answer" (which of equal parts of the context holds the target) and "capacity" (expected
number of tokens that can be recovered, from the accuracies at all lags).

A probe with more features than sequences measures its sequences. So more than `WIDTH` numbers are first
projected at random to `WIDTH`, which makes states of different size comparable, and there are at least four
training sequences for each feature wherever that is affordable. Even so a capacity is a lower bound that
grows with the sequences. Part "samples" has it for halves, quarters and eighths of them, each share a probe
of its own; column `half` is the mean of the halves, and `limit` is where this curve ends
(`probes.extrapolation`), nan where nothing says that it ends below all symbols.

There are as many symbols as places, far too many classes for a probe. Where there are more than 64, each
probed place gets one of a few symbols of its own in every sequence (they change places with what was there,
so contexts are still permutations, and held out): the probe tells those apart. They all occur in every
context, so knowing which symbols occur does not help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.cache import recorded
from probes.extrapolation import limit
from probes.linear import capacity, controlled, probe, project, split
from probes.scan import layers_with
from probes.suite.common import (
    NotApplicable,
    Options,
    Probe,
    answer_at,
    interval,
    require_roles,
    rows_within,
    single_query,
)
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.statistics import wilson
from ssm_retrieval.tables import markdown
from synthetic.tasks import Batch, Task, sampling
from synthetic.tasks.sampling import IntArray

WIDTH = 512  # features of a probe at most
EXAMPLES = 4096  # sequences, of which 60 % train: more than 4 * WIDTH
FEWER = 1024  # of them at great lengths
TOKENS = 2**20  # of all sequences, above which there are fewer
ENOUGH = 4  # training sequences for each feature
FEW = 64  # symbols up to which all of them are classes
POOL = 16  # symbols of a probed place, and parts of the context, otherwise
ENDS = 10  # places probed from each end of a long context
LEAST = 20  # sequences that can be split in three
SHARES_OF_ALL = (2, 4, 8)  # equal shares of the sequences, for the learning curve
MOST_SHARES = 3  # of each size that train a probe
SITES = {"residual": "blocks.{}.hook_resid_post", "state": "blocks.{}.mixer.hook_ssm_state"}


def spread(n: int) -> IntArray:
    """Lags 0 .. n - 1, dense at both ends: the last and the first symbols are those that states keep."""
    near = np.unique(np.geomspace(1, n // 2, ENDS).round().astype(int)) - 1
    return np.concatenate([near, n - 1 - near[::-1]])


@dataclass(frozen=True)
class Plan:
    """What is probed.

    Attributes:
        places: Context symbols probed, by number.
        lags: Their lags, symbols since; 0 is the last one.
        classes: Symbols that a probe tells apart.
        pooled: Whether each place has symbols of its own.
    """

    places: IntArray
    lags: IntArray
    classes: int
    pooled: bool

    @classmethod
    def of(cls, task: Task) -> Plan:
        """The plan for a task of position type."""
        n, symbols = task.seq_len, task.vocabulary.num_symbols
        lags = np.arange(n) if n <= 32 else spread(n)
        pooled = symbols > FEW and task.name == "position"
        classes = min(POOL, symbols // len(lags)) if pooled else symbols
        return cls(n - 1 - lags, lags, classes, pooled)

    def seeded(self, rng: np.random.Generator, context: IntArray) -> IntArray:
        """Contexts (rows, N) in which probed place j holds one of its own symbols.

        Args:
            rng: Of the draw.
            context: (rows, N) 0-based symbols.

        Returns:
            Contexts in which place j holds a symbol of j classes .. (j + 1) classes - 1.
        """
        if not self.pooled:
            return context
        context, rows = context.copy(), np.arange(len(context))
        drawn = rng.integers(self.classes, size=(len(context), len(self.places)))
        for j, place in enumerate(self.places):
            symbol = drawn[:, j] + j * self.classes
            here = (context == symbol[:, None]).argmax(1)
            context[rows, here], context[rows, place] = context[rows, place], symbol
        return context

    def labels(self, context: Tensor) -> Tensor:
        """Classes (B, places) of contexts (B, N) of 0-based symbols."""
        found = context[:, self.places]
        return found - torch.arange(len(self.places)) * self.classes if self.pooled else found


def _contexts(task: Task, plan: Plan, rows: int, seed: int, index: int) -> tuple[Batch, IntArray]:
    rng = sampling.stream(seed, "heldout", index)

    def draw(count: int) -> tuple[IntArray, IntArray]:
        context, target = task.draw(rng, count, task.seq_len, 1)
        queried = np.take_along_axis(context, target, axis=1)
        context = plan.seeded(rng, context)
        return context, (context == queried).argmax(1)[:, None] if plan.pooled else target

    cells = max(task.seq_len, task.vocabulary.num_symbols)
    context, target = sampling.draw_split(draw, rows, "heldout", row_cells=cells)
    return task.assemble(context, target), context


def measure(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """Measure a model.

    Args:
        model: The model.
        task: A task of position type.
        options: Sequences, seed and progress.

    Returns:
        Rows by site and layer, with the accuracy of shuffled labels and chance beside each. Capacity rows
        have n, the training sequences; features of the probe; numbers of the site before the projection;
        half, the same with half of the sequences (nan where those are too few); and limit, what any number
        of sequences would come to, with its interval limit_low, limit_high. Rows "samples" have n and value
        of every share.

    Raises:
        NotApplicable: The task has no roles or too few symbols, or there are too few sequences to split.
    """
    require_roles(task, "linear")
    task, plan = single_query(task), Plan.of(task)
    if plan.classes < 2:
        raise NotApplicable(f"{task.vocabulary.num_symbols} symbols are too few for {len(plan.lags)} places")
    examples = options.examples or max(FEWER, min(EXAMPLES, TOKENS // task.seq_len))
    if examples < LEAST:
        raise NotApplicable(f"{examples} sequences cannot be split in three; give --examples {LEAST} or more")
    blocks: list[Any] = list(model.blocks)
    sites = [(site, i) for site in SITES for i in layers_with(model, SITES[site].partition(".{}.")[2])]
    features: dict[tuple[str, int], list[Tensor]] = {site: [] for site in sites}
    maps: dict[int, Tensor | None] = {}  # a state of 16,384 numbers is projected batch by batch
    labels, parts = [], []
    rows = rows_within(task, 4 * 16 * model.config.d_model)
    for index, start in enumerate(range(0, examples, rows)):
        batch, context = _contexts(task, plan, min(rows, examples - start), options.seed, index)
        at = answer_at(batch)
        ids = batch.input_ids[:, : at + 1]
        cache = recorded(model, ids, [SITES[site].format(i) for site, i in sites], positions=[at])
        for site, i in sites:
            x = cache[SITES[site].format(i)].flatten(1)
            numbers = x.shape[1]
            to = maps.setdefault(numbers, project(numbers, WIDTH, options.seed))
            features[site, i].append(x if to is None else x.float() @ to)
        labels.append(plan.labels(torch.from_numpy(context)))
        parts.append(batch.target_index[:, 0] * min(POOL, task.seq_len) // task.seq_len)
        options.progress(0.7 * (start + len(ids)) / examples)
    gold = torch.cat(labels), torch.cat(parts)[:, None]
    tables = []
    for k, (site, i) in enumerate(sites):
        config = blocks[i].mixer.config if site == "state" else None
        numbers = config.d_inner * config.d_state if config else model.config.d_model
        x = torch.cat(features.pop((site, i)))
        made = _probed(x, *gold, plan, min(POOL, task.seq_len), options.seed, numbers)
        tables.append(made.assign(site=site, layer=i))
        options.progress(0.7 + 0.3 * (k + 1) / len(sites))
    return pd.concat(tables, ignore_index=True)


def _probed(
    x: Tensor, labels: Tensor, parts: Tensor, plan: Plan, spans: int, seed: int, numbers: int
) -> pd.DataFrame:
    """Accuracies of one site and layer, and the capacity that they come to; x: (n, F) of so many numbers."""
    tokens = controlled(x, labels, plan.classes, seed)
    tokens = tokens.assign(part="token", quantity="accuracy", lag=plan.lags, chance=1 / plan.classes)
    answer = controlled(x, parts, spans, seed)
    answer = answer.assign(part="answer", quantity="accuracy", chance=1 / spans)
    table = pd.concat([tokens, answer]).rename(columns=dict(accuracy="value", count="n"))
    row: dict[str, Any] = _capacity(tokens, plan, numbers) | dict(part="capacity", quantity="expected tokens")
    row |= dict(n=len(split(len(x), seed).train), features=x.shape[1], numbers=numbers)
    shares = [dict(n=row["n"], value=row["value"]), *_shares(x, labels, plan, seed, numbers)]
    halves = [share["value"] for share in shares if share["n"] == len(split(len(x) // 2, seed).train)]
    end = limit([s["n"] for s in shares], [s["value"] for s in shares], int(plan.lags.max()) + 1)
    row |= dict(half=np.mean(halves) if halves else np.nan)
    row |= dict(limit=end.value, limit_low=end.low, limit_high=end.high)
    rows = [row, *(s | dict(part="samples", quantity="expected tokens") for s in shares)]
    return pd.concat([table.drop(columns="penalty"), pd.DataFrame(rows)], ignore_index=True)


def _shares(x: Tensor, labels: Tensor, plan: Plan, seed: int, numbers: int) -> Iterator[dict[str, float]]:
    """Capacities by the number n of training sequences, of probes that each see another share of all."""
    for count in SHARES_OF_ALL:
        size = len(x) // count
        for k in range(min(count, MOST_SHARES) if size >= LEAST else 0):
            rows, where = slice(k * size, (k + 1) * size), split(size, seed)
            found = probe(x[rows], labels[rows], plan.classes, where).assign(shuffled=0.0)
            yield dict(n=len(where.train), value=_capacity(found, plan, numbers)["value"])


def _capacity(tokens: pd.DataFrame, plan: Plan, size: int) -> dict[str, float]:
    """Expected number of symbols recovered: value, low, high, and with shuffled labels.

    Between lags that were probed, what a straight line says. There lags whose interval reaches down to chance
    count nothing: else the noise of one, times the hundreds it stands for, would be the result.
    """
    lags, chance = np.arange(int(plan.lags.max()) + 1), 1 / plan.classes
    counts = tokens["count"].to_numpy()
    hits = (tokens["shuffled"] * counts).round().astype(int)
    mixed = np.array([wilson(h, c)[0] for h, c in zip(hits, counts, strict=True)])
    found = {}
    for name in ("value", "low", "high", "shuffled"):
        column = tokens["accuracy" if name == "value" else name].to_numpy()
        if len(lags) > len(plan.lags):
            least = mixed if name == "shuffled" else tokens["low"].to_numpy()
            column = np.where(least > chance, column, chance)
        each = np.interp(lags, plan.lags, column)
        found[name] = float(capacity({len(each): each}, chance, size).table["expected"].iloc[0])
    return found


def summary(table: pd.DataFrame) -> str:
    """Accuracies and capacities beside untrained weights, shuffled labels and chance, as Markdown."""
    words = (
        "Ridge probes of what stands where the answer is due, after block `layer`, on held-out sequences, "
        "with accuracies of a test part (Wilson 95 % intervals). Controls: untrained, weights as "
        "initialised; shuffled, the same labels dealt out at random. Capacity: sum over lags of "
        "(accuracy - chance) / (1 - chance), "
        "interpolated between the lags probed, where only those above chance count; its bounds are those of "
        f"all accuracies at once, so wider than 95 %. More than {WIDTH} numbers are projected at random to "
        f"{WIDTH} features. A capacity is a lower bound that grows with the sequences that train the probe: "
        "compare capacities with the same n and features, and see how far half of the sequences gets. Limit: "
        "where the curve over halves, quarters and eighths of the sequences ends by a power law, with the 95 "
        "% interval of the fit; only its lower end where the curve may as well go on to all symbols."
    )
    text = [words, "Which part of the context holds the target:"]
    keys = ["family", "site", "layer"]
    capacities = table[table["part"] == "capacity"]
    for part, name in (("answer", "accuracy"), ("capacity", "expected symbols recovered")):
        mine = table[table["part"] == part]
        untrained = mine[mine["weights"] == "untrained"].set_index(keys)["value"]
        rows = []
        for row in mine[mine["weights"] == "trained"].sort_values(keys).to_dict("records"):
            key = tuple(row[k] for k in keys)
            more = [f"{row['chance']:.3g}"] if part == "answer" else _sample(row)
            rows.append([*key, interval(row), f"{untrained[key]:.3g}", f"{row['shuffled']:.3g}", *more])
        more = ["chance"] if part == "answer" else ["half of n", "limit", "n", "features", "of numbers"]
        text.append(markdown([*keys, name, "untrained", "shuffled", *more], rows))
        if part == "answer":
            text.append("How many context symbols can be read off:")
    if (capacities["n"] < ENOUGH * capacities["features"]).any():
        text.append(
            f"Some probes have fewer than {ENOUGH} sequences for each feature: their capacities say more "
            "of the number of sequences than of the state. Give more --examples."
        )
    return "\n\n".join(text)


def _sample(row: dict[Any, Any]) -> list[str]:
    """What a capacity rests on: with half the sequences and with any number of them, sequences, features,
    numbers before projection."""
    end = f"at least {row['limit_low']:.3g}" if np.isfinite(row["limit_low"]) else ""
    if np.isfinite(row["limit"]):
        end = f"{row['limit']:.3g} [{row['limit_low']:.3g}, {row['limit_high']:.3g}]"
    return [f"{row['half']:.3g}", end, *(f"{row[name]:.0f}" for name in ("n", "features", "numbers"))]


PROBE = Probe(
    "What can be read off the state linearly?",
    measure,
    summary,
    version=5,
    columns=(
        "site",
        "lag",
        "chance",
        "shuffled",
        "features",
        "numbers",
        "half",
        "limit",
        "limit_low",
        "limit_high",
    ),
)
