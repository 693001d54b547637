"""The examples of docs/tasks.md, drawn by the tasks themselves: `python docs/tasks.py`.

Replaces what stands between `<!-- example NAME [LAYOUT] [K=QUERIES] -->` and `<!-- /example -->`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from synthetic import tasks

DOCUMENT = Path(__file__).with_suffix(".md")
WIDTH = 110

# Options so small that a sequence fits in a line.
OPTIONS: dict[str, dict[str, Any]] = {
    "position": dict(seq_len=8),
    "position-varlen": dict(seq_len=10, num_symbols=6),
    "grid": dict(seq_len=9),
    "ngram": dict(seq_len=9, num_symbols=10),
    "ngram-duplicate": dict(seq_len=10, num_symbols=10, answer_size=2, blocks=2),
    "mqar": dict(seq_len=16, num_symbols=10, num_pairs=3),
    "selective-copy": dict(seq_len=9, num_symbols=10, num_tokens=3),
    "induction": dict(seq_len=12, num_symbols=10),
}
# The same for contexts that come twice.
TWICE: dict[str, dict[str, Any]] = OPTIONS | {
    "position": dict(seq_len=7),
    "position-varlen": dict(seq_len=7, num_symbols=6),
    "grid": dict(seq_len=4, num_symbols=6),
    "ngram": dict(seq_len=6, num_symbols=10, query_size=1, answer_size=2),
    "ngram-duplicate": dict(seq_len=6, num_symbols=10, query_size=1, answer_size=1, blocks=2),
    "mqar": dict(seq_len=14, num_symbols=10, num_pairs=3),
    "selective-copy": dict(seq_len=5, num_symbols=10, num_tokens=3),
    "induction": dict(seq_len=9, num_symbols=10),
}
EXAMPLE = re.compile(
    r"<!-- example (?P<name>\S+)(?: (?P<layout>[a-z][a-z-]*))?(?: K=(?P<queries>\d+))? -->\n"
    r".*?<!-- /example -->",
    flags=re.DOTALL,
)


def example(name: str, layout: str | None = None, queries: int | None = None) -> str:
    """One training sequence, as Markdown: how it is made, its chance level, tokens and labels.

    Args:
        name: Name of the task.
        layout: None for the task's own.
        queries: K; None for as many as in evaluation.

    Returns:
        The Markdown.

    Raises:
        ValueError: For what the task cannot do, and if a line is too wide for the page.
    """
    small = TWICE[name] if layout == "two-pass" else OPTIONS[name]
    task = tasks.build(name, **small, **({} if layout is None else dict(layout=layout)))
    batch = task.batch(1, seed=0, index=1, queries=queries)
    drawn = task.render(batch)
    widest = max(map(len, drawn.splitlines()))
    if widest > WIDTH:
        raise ValueError(f"example {name} {layout} is {widest} columns wide; make its options smaller")
    made = ", ".join([f'"{name}"', *(f"{k}={v}" for k, v in small.items())])
    made += "" if layout is None else f', layout="{layout}"'
    asked = batch.target_index.shape[1]
    title = f"{asked} {'query' if asked == 1 else 'queries'}, chance {batch.chance:.3f}"
    return f"`tasks.build({made})`,\n{title}:\n\n```\n{drawn}\n```"


def rewritten(page: str) -> str:
    """The page with its examples drawn anew.

    Raises:
        ValueError: For markers that do not come in pairs.
    """
    made, found = EXAMPLE.subn(_replace, page)
    for marker in ("<!-- example", "<!-- /example"):
        if page.count(marker) != found:
            raise ValueError(f"{page.count(marker)} of '{marker}', but {found} pairs with an end and a name")
    return made


def _replace(match: re.Match[str]) -> str:
    opening = match.group().partition("\n")[0]
    queries = int(match["queries"]) if match["queries"] else None
    return f"{opening}\n{example(match['name'], match['layout'], queries)}\n<!-- /example -->"


def main() -> None:
    """Rewrite the examples in docs/tasks.md."""
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
