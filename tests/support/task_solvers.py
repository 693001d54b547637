"""Brute-force solvers of the tasks: from the tokens of a rendered row, which label stands where."""

from __future__ import annotations

from synthetic import tasks
from synthetic.tasks import Batch, Task

POSITION_TASKS = ("position", "position-varlen")  # those of which test_tasks.py checks every detail

# Small options for every task of the registry, where the defaults are large.
SMALL = {
    "position": dict(seq_len=16, num_symbols=40),
    "position-varlen": dict(seq_len=16, num_symbols=40),
    "grid": dict(seq_len=16, num_symbols=40),
    "ngram": dict(seq_len=16),
    "ngram-duplicate": dict(seq_len=32, blocks=3),
    "mqar": dict(seq_len=20, num_symbols=64, num_pairs=3),
    "selective-copy": dict(seq_len=16, num_tokens=5),
    "induction": dict(seq_len=16),
}


def kinds() -> list[tuple[str, str | None]]:
    """(name, layout) of every task of the registry; tasks without layouts once, with None."""
    return [(name, layout) for name in tasks.names() for layout in (tasks.TASKS[name].layouts or (None,))]


def small(name: str, layout: str | None = None, **changes: object) -> Task:
    options = SMALL[name] | ({} if layout is None else dict(layout=layout)) | changes
    return tasks.build(name, **options)


def read(task: Task, batch: Batch, row: int) -> tuple[list[str], dict[int, str]]:
    """Tokens of a rendered row, and the labels by their place."""
    (head, *tokens), (label_head, *labels) = (s.split() for s in task.render(batch, row).splitlines())
    assert (head, label_head) == ("input", "label") and len(tokens) == len(labels)
    return tokens, {i: label for i, label in enumerate(labels) if label != "."}


def occurrences(context: list[str], query: list[str]) -> list[int]:
    m = len(query)
    return [i for i in range(len(context) - m + 1) if context[i : i + m] == query]


def read_once(tokens: list[str], task: Task, between: tuple[str, ...] = ()) -> list[str]:
    """The context; what layout two-pass repeats must be the same, behind the tokens between the two."""
    if task.layout != "two-pass":
        return tokens
    half = (len(tokens) - len(between)) // 2
    assert tokens == tokens[:half] + list(between) + tokens[:half]
    return tokens[:half]


def solve_position(tokens: list[str], task: Task) -> dict[int, str]:
    """One query, in any layout; image markers, if any, must frame rows of `side` patches."""
    begin = tokens.index("<bos>") + 1
    asked = tokens.index("<query>")
    context = read_once(tokens[begin:asked] if asked > begin else tokens[begin:], task, ("<bos>",))
    if "###" in context:
        assert context[0] == context[-1] == "###" and context.count("###") == 2
        rows = " ".join(context[1:-1]).split(" && ")
        patches = [row.split() for row in rows]
        assert all(len(row) == task.side for row in patches[:-1]) and 1 <= len(patches[-1]) <= task.side
        (row, column), *more = [
            (i, j) for i, row in enumerate(patches) for j, x in enumerate(row) if x == tokens[asked + 1]
        ]
        assert not more
        return {len(tokens) - 1: f"<p{row * task.side + column}>"}
    (place,) = occurrences(context, [tokens[asked + 1]])
    return {len(tokens) - 1: f"<p{place}>"}


def ngram_parts(tokens: list[str], task: Task) -> tuple[list[str], list[str], int]:
    """Context, query, place of the last <query>."""
    m = task.query_size
    begin, end = (f(i for i, token in enumerate(tokens) if token == "<bos>") for f in (min, max))
    context = read_once(tokens[begin + 1 : end], task, ("<bos>",))
    assert "<bos>" not in context and tokens[end + 1 :].count("<query>") == 2 - (task.layout == "prefix")
    first, last = (i for i, token in enumerate(tokens) if token == "<query>")
    assert tokens[end + 1] == "<query>"
    assert (tokens[0] == "<task>") == (task.layout == "instruction")
    return context, tokens[first + 1 : first + 1 + m], last


def solve_ngram(tokens: list[str], task: Task) -> dict[int, str]:
    context, query, last = ngram_parts(tokens, task)
    (place,) = occurrences(context, query)
    place += task.query_size
    answer = context[place : place + task.answer_size]
    assert tokens[last + 1 :] == answer[:-1]
    return {last + i: token for i, token in enumerate(answer)}


def answers_by_block(tokens: list[str], task: Task) -> list[list[list[str]]]:
    """For each block the answers behind the occurrences of the query in it."""
    context, query, _ = ngram_parts(tokens, task)
    size, m, r = len(context) // task.blocks, task.query_size, task.answer_size
    blocks = [context[i * size : (i + 1) * size] for i in range(task.blocks)]
    return [[b[i + m : i + m + r] for i in occurrences(b, query) if i + m + r <= size] for b in blocks]


def solve_duplicate(tokens: list[str], task: Task) -> dict[int, str]:
    """Continues the answer that the fed tokens begin: the earliest such one."""
    _, _, last = ngram_parts(tokens, task)
    fed = tokens[last + 1 :]
    answers = [answer for block in answers_by_block(tokens, task) for answer in block]
    chosen = next(answer for answer in answers if answer[: len(fed)] == fed)
    return {last + i: token for i, token in enumerate(chosen)}


def solve_mqar(tokens: list[str], task: Task) -> dict[int, str]:
    passes = 2 if task.layout == "two-pass" else 1
    d = max(d for d in range(1, task.num_pairs + 1) if 2 * d * (passes + 1) <= len(tokens))
    end = 2 * d * passes
    pairs = read_once(tokens[:end], task)
    value = dict(zip(pairs[::2], pairs[1::2], strict=True))
    assert len(value) == len(set(value.values())) == d
    return {i: value[token] for i, token in enumerate(tokens) if i >= end and token in value}


def solve_selective_copy(tokens: list[str], task: Task) -> dict[int, str]:
    end = tokens.index("<copy>")
    data = [token for token in read_once(tokens[:end], task) if token != "<white>"]
    assert tokens[end:] == ["<copy>"] * len(data)
    return {end + i: token for i, token in enumerate(data)}


def solve_induction(tokens: list[str], task: Task) -> dict[int, str]:
    (first,) = (i for i, token in enumerate(read_once(tokens[:-1], task)) if token == "<query>")
    assert tokens[-1] == "<query>"
    return {len(tokens) - 1: tokens[first + 1]}


SOLVERS = {
    "position": solve_position,
    "position-varlen": solve_position,
    "grid": solve_position,
    "ngram": solve_ngram,
    "ngram-duplicate": solve_duplicate,
    "mqar": solve_mqar,
    "selective-copy": solve_selective_copy,
    "induction": solve_induction,
}
