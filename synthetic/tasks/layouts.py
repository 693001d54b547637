"""How context, queries and answers are put in a row: one function per layout, all with the same signature.

    layout(vocabulary, context, queries, answers) -> input_ids, answer_at

All arrays are int64 token ids; the logits at answer_at[j] are to predict answers[:, j]. N-grams have layouts
of their own, for one query of m tokens and its answer of r tokens. Tasks whose question is part of the
sequence lay it out themselves, in one of `OWN_LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from ssm_retrieval.errors import UserError
from synthetic.tasks.sampling import IntArray
from synthetic.vocab import Vocabulary

Layout = Callable[[Vocabulary, IntArray, IntArray, IntArray], tuple[IntArray, IntArray]]


def suffix(
    vocabulary: Vocabulary, context: IntArray, queries: IntArray, answers: IntArray
) -> tuple[IntArray, IntArray]:
    """Task-agnostic, query last: `<bos> x1 .. xN <query> q1 .. qK`.

    Answers are not fed back. Under causal processing the model therefore sees the first query exactly as in
    evaluation, and before a later one only other queries. One `<query>` stands before all of them, because
    models learn faster this way than with one before each (docs/learnability.md).

    Args:
        vocabulary: Vocabulary of the markers.
        context: [B, N].
        queries: [B, K].
        answers: [B, K]; not used.

    Returns:
        input_ids [B, T] and answer_at [K].
    """
    (rows, n), k = context.shape, queries.shape[1]
    ids = np.empty((rows, 2 + n + k), dtype=np.int64)
    ids[:, 0] = vocabulary.bos
    ids[:, 1 : n + 1] = context
    ids[:, n + 1] = vocabulary.query
    ids[:, n + 2 :] = queries
    return ids, n + 2 + np.arange(k, dtype=np.int64)


def prefix(
    vocabulary: Vocabulary, context: IntArray, queries: IntArray, answers: IntArray
) -> tuple[IntArray, IntArray]:
    """Task-aware, query first: `<query> q1 .. qK <bos> x1 .. xN p1 .. p{K-1}`.

    p1 is predicted at xN, p2 at p1, and so on (teacher forcing, in the order of the queries).

    Args:
        vocabulary: Vocabulary of the markers.
        context: [B, N].
        queries: [B, K].
        answers: [B, K].

    Returns:
        input_ids [B, T] and answer_at [K].
    """
    (rows, n), k = context.shape, queries.shape[1]
    ids = np.empty((rows, 1 + k + 1 + n + k - 1), dtype=np.int64)
    ids[:, 0] = vocabulary.query
    ids[:, 1 : k + 1] = queries
    ids[:, k + 1] = vocabulary.bos
    ids[:, k + 2 : k + 2 + n] = context
    ids[:, k + 2 + n :] = answers[:, :-1]
    return ids, k + 1 + n + np.arange(k, dtype=np.int64)


def instruction(
    vocabulary: Vocabulary, context: IntArray, queries: IntArray, answers: IntArray
) -> tuple[IntArray, IntArray]:
    """`<task>` followed by the suffix layout.

    The model is told which kind of question will come, but not the question, as in the paper's
    vision-language experiment.

    Args:
        vocabulary: Vocabulary of the markers.
        context: [B, N].
        queries: [B, K].
        answers: [B, K]; not used.

    Returns:
        input_ids [B, T] and answer_at [K].
    """
    ids, answer_at = suffix(vocabulary, context, queries, answers)
    first = np.full((len(ids), 1), vocabulary.task, dtype=np.int64)
    return np.concatenate([first, ids], axis=1), answer_at + 1


def two_pass(
    vocabulary: Vocabulary, context: IntArray, queries: IntArray, answers: IntArray
) -> tuple[IntArray, IntArray]:
    """Task-agnostic, the context twice: `<bos> x1 .. xN <bos> x1 .. xN <query> q1 .. qK`.

    When a recurrent model reads a context again, it knows what else is in it, and can choose better what to
    keep (Just Read Twice, arXiv 2407.05483).

    Args:
        vocabulary: Vocabulary of the markers.
        context: [B, N].
        queries: [B, K].
        answers: [B, K]; not used.

    Returns:
        input_ids [B, T] and answer_at [K].
    """
    return suffix(vocabulary, _join(context, vocabulary.bos, context), queries, answers)


def _join(*parts: int | IntArray) -> IntArray:
    """Arrays of rows side by side; an int is a column of that token."""
    rows = next(len(part) for part in parts if not isinstance(part, int))
    columns = [np.full((rows, 1), part) if isinstance(part, int) else part for part in parts]
    return np.concatenate(columns, axis=1, dtype=np.int64)


def _answer_at(ids: IntArray, answers: IntArray) -> IntArray:
    """Places that predict `answers` if all of them but the last end the rows `ids`."""
    return np.arange(ids.shape[1] - answers.shape[1], ids.shape[1], dtype=np.int64)


def ngram_suffix(
    vocabulary: Vocabulary, context: IntArray, queries: IntArray, answers: IntArray
) -> tuple[IntArray, IntArray]:
    """`<bos> x1 .. xN <bos> <query> q1 .. qm <query> t1 .. t{r-1}` (teacher forcing).

    Args:
        vocabulary: Vocabulary of the markers.
        context: [B, N].
        queries: [B, m].
        answers: [B, r].

    Returns:
        input_ids [B, T] and answer_at [r].
    """
    v = vocabulary
    ids = _join(v.bos, context, v.bos, v.query, queries, v.query, answers)[:, :-1]
    return ids, _answer_at(ids, answers)


def ngram_prefix(
    vocabulary: Vocabulary, context: IntArray, queries: IntArray, answers: IntArray
) -> tuple[IntArray, IntArray]:
    """`<query> q1 .. qm <bos> x1 .. xN <bos> <query> t1 .. t{r-1}` (teacher forcing).

    Args:
        vocabulary: Vocabulary of the markers.
        context: [B, N].
        queries: [B, m].
        answers: [B, r].

    Returns:
        input_ids [B, T] and answer_at [r].
    """
    v = vocabulary
    ids = _join(v.query, queries, v.bos, context, v.bos, v.query, answers)[:, :-1]
    return ids, _answer_at(ids, answers)


def ngram_instruction(
    vocabulary: Vocabulary, context: IntArray, queries: IntArray, answers: IntArray
) -> tuple[IntArray, IntArray]:
    """`<task>` followed by the suffix layout.

    Args:
        vocabulary: Vocabulary of the markers.
        context: [B, N].
        queries: [B, m].
        answers: [B, r].

    Returns:
        input_ids [B, T] and answer_at [r].
    """
    ids, answer_at = ngram_suffix(vocabulary, context, queries, answers)
    return _join(vocabulary.task, ids), answer_at + 1


def ngram_two_pass(
    vocabulary: Vocabulary, context: IntArray, queries: IntArray, answers: IntArray
) -> tuple[IntArray, IntArray]:
    """`<bos> x1 .. xN <bos> x1 .. xN <bos> <query> q1 .. qm <query> t1 .. t{r-1}`, see `two_pass`.

    Args:
        vocabulary: Vocabulary of the markers.
        context: [B, N].
        queries: [B, m].
        answers: [B, r].

    Returns:
        input_ids [B, T] and answer_at [r].
    """
    return ngram_suffix(vocabulary, _join(context, vocabulary.bos, context), queries, answers)


LAYOUTS: dict[str, Layout] = {
    "suffix": suffix,
    "prefix": prefix,
    "instruction": instruction,
    "two-pass": two_pass,
}
NGRAM_LAYOUTS: dict[str, Layout] = {
    "suffix": ngram_suffix,
    "prefix": ngram_prefix,
    "instruction": ngram_instruction,
    "two-pass": ngram_two_pass,
}
OWN_LAYOUTS = ("suffix", "two-pass")  # of tasks whose question is part of the sequence


def check_layout(name: str, layout: str, layouts: Collection[str]) -> None:
    """Check that a task has a layout.

    Args:
        name: Of the task, for the message.
        layout: Name of the layout.
        layouts: Those that the task has.

    Raises:
        UserError: If it is none of these.
    """
    if layout not in layouts:
        raise UserError(f"unknown layout {layout!r} of task {name}; valid: {', '.join(layouts)}")
