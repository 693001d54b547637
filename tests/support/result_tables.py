"""Tables of the results store made by hand, for tests of what is drawn from them."""

from __future__ import annotations

import io

import pandas as pd

from synthetic import results

FIXED = dict(
    purpose="report", task="position", task_options="{}", layout="suffix", num_symbols=64, preset="tiny",
    n_layer=2, d_model=128, parameters=1000, parameters_without_embeddings=500, queries=16, curriculum=2,
    lr=2e-3, steps=400, stop_at=0.98, batch_tokens=2048, weight_decay=0.0, warmup=50, schedule="constant",
    eval_every=100, device="cpu", precision="float32", commit="0",
)  # fmt: skip


def run_rows(
    model: str, seq_len: int, seed: int, accuracies: list[float], per_step: int = 10, **more: object
) -> tuple[list[dict], list[dict]]:
    """Evaluation and target rows of one run, evaluated every 100 steps of `per_step` sequences each.

    The last accuracy is the final one's, too. Targets: two halves of the context with half of the answers.
    """
    attention, state = model in ("transformer", "hybrid"), model != "transformer"
    extra = dict(position="learned" if attention else None, d_state=16 if state else None) | more
    name = f"{model}-L{seq_len}-s{seed}-" + "-".join(str(value) for value in extra.values())
    fixed = FIXED | extra | dict(model=model, seq_len=seq_len, seed=seed, run=name, length=seq_len, count=120)
    rows, targets = [], []
    kinds = [("during", 100 * (i + 1), a) for i, a in enumerate(accuracies)]
    for kind, step, accuracy in [*kinds, ("final", 100 * len(accuracies), accuracies[-1])]:
        row = fixed | dict(
            kind=kind, step=step, examples=per_step * step, tokens=step * 2048, seconds=float(step),
            train_length=seq_len, accuracy=accuracy, correct=round(120 * accuracy), loss=1.0,
            ci_low=accuracy, ci_high=accuracy, chance=1 / seq_len,
        )  # fmt: skip
        rows.append(row)
        half = seq_len // 2
        for low, high, right in ((0, half, (row["correct"] + 1) // 2), (half, seq_len, row["correct"] // 2)):
            targets.append(row | dict(target_low=low, target_high=high, correct=right, count=60))
    return rows, targets


def tables(runs: list[tuple[list[dict], list[dict]]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluations and targets of several runs, with the columns and types of the store."""
    rows = [row for one, _ in runs for row in one]
    targets = [row for _, other in runs for row in other]
    return frame(rows, results.EVALUATION), frame(targets, results.TARGET)


def frame(rows: list[dict], columns: dict) -> pd.DataFrame:
    return pd.read_parquet(io.BytesIO(results.to_parquet(rows, columns)))
