"""What README.md says was found, from committed results: `python -m studies.story`.

Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->`. docs/claims.md has the evidence in full.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis.capacity_law import CONSTANTS, fit_constants
from analysis.tables import between, fill
from ssm_retrieval.training import store
from studies.capacity import report as capacity
from studies.retrieval_cpu import default_run
from studies.vlm_retrieval import summary as retrieval
from studies.what_mamba_lacks import report as lacks
from studies.what_mamba_lacks.config import LENGTH
from studies.what_mamba_lacks.effects import each

DOCUMENT = Path(__file__).resolve().parents[1] / "README.md"
LONGEST, HELD = 1024, 256  # symbols: of the default run, and up to which its Mamba answers


def findings() -> str:
    """Return the findings as a list in Markdown."""
    return "\n".join(f"* {found}" for found in (retrieval_in_context(), learning_and_room(), pictures()))


def retrieval_in_context() -> str:
    """Return what the default run shows."""
    measured = pd.read_csv(default_run.MEASURED)
    measured["right"] = 100 * measured["correct"] / measured["count"]

    def seeds(model: str, length: int) -> str:
        found = measured[(measured["model"] == model) & (measured["length"] == length)]["right"]
        return f"{found.min():.1f} to {found.max():.1f} %"

    return (
        f"**Transformers retrieve from long contexts, Mamba from short ones.** Of {LONGEST:,} symbols the "
        f"Transformer finds {seeds('transformer', LONGEST)}, Mamba {seeds('mamba', LONGEST)} "
        f"({measured['seed'].nunique()} seeds; chance {100 / LONGEST:.1f} %). Of {HELD} symbols Mamba finds "
        f"{seeds('mamba', HELD)} "
        "([claim 1](docs/claims.md#1-transformers-beat-mamba-at-retrieval-in-context))."
    )


def learning_and_room() -> str:
    """Return what Mamba needs to learn 64 symbols at all, and what then sets how many it holds."""
    cells = lacks.named("mamba")
    found = {(model, length): parts for model, length, parts in each(lacks.finished())}
    parts = found["mamba", LENGTH]

    def learned(name: str) -> str:
        return lacks.results_of(parts[cells[name]])[0]

    held = pd.read_csv(capacity.MEASURED)
    mamba = capacity.learned(held[held["model"].eq("mamba") & held["task"].eq("position")])
    (fit,) = fit_constants(mamba, by=("task", "model")).itertuples()
    constant = between(fit.a, fit.low, fit.high, 2)
    return (
        f"**What stands in Mamba's way is first learning, then room.** As published it learns {LENGTH} "
        f"symbols in {learned('with none')} seeds; with positions at its input and first weights made for "
        f"recall, in {learned('with all four ingredients')} ([study](studies/what_mamba_lacks/README.md)). "
        f"How many it then finds follows a law of the size of its state, with a constant of {constant}; "
        f"{CONSTANTS['mamba', 'ar']:.1f} was published for another task "
        "([study](studies/capacity/README.md))."
    )


def pictures() -> str:
    """Return what VLMs find, among known and new combinations."""
    found = retrieval.scores(pd.read_parquet(retrieval.RESULTS))

    def points(task: str, sign: int) -> str:
        return retrieval.difference(sign * retrieval.gap(found, "base", task))

    seeds = found.loc[found["cell"] == "base", "seed"].nunique()
    return (
        "**In pictures Mamba finds less, and generalises better.** Tiny Mamba-VLs find "
        f"{points('grounding', 1)} points fewer objects than Pythia-VLs, and "
        f"{points('grounding-combination', -1)} points more of those whose colour and shape they never saw "
        f"together ({seeds} seeds, one pretrained language model of each; intervals for all "
        f"{retrieval.COMPARISONS} comparisons at once; "
        "[claim 6](docs/claims.md#6-mamba-vlms-lose-grounding))."
    )


def filled(text: str) -> str:
    """Return README with its findings made anew."""
    measured = pd.read_csv(default_run.MEASURED)
    return fill(text, {"findings": findings(), "default-run": default_run.table(measured, shortest=HELD)})


def main() -> None:
    """Write README's findings."""
    store.write_bytes(DOCUMENT, filled(DOCUMENT.read_text(encoding="utf-8")).encode())


if __name__ == "__main__":
    main()
