"""Every task of the registry against its brute-force solver; purity, split, options, docstrings."""

import hashlib
import inspect
import itertools
import random
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from task_solvers import SMALL, SOLVERS, answers_by_block, kinds, read, small

from synthetic import tasks
from synthetic.tasks import sampling
from synthetic.vocab import Vocabulary

unhurried = settings(deadline=None, max_examples=200)
NEW = [name for name in tasks.names() if not name.startswith("position")]
FIELDS = ("input_ids", "labels", "answer_at", "target_index", "alternatives")


def options_of(name, draw):
    """Random valid options: everything a user can set."""
    integers = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    if name == "grid":
        g = integers(2, 5)
        return dict(seq_len=g * g, num_symbols=integers(g * g, 80), supervise_bos=False)
    if name.startswith("ngram"):
        m, r, blocks = integers(1, 3), integers(1, 4), integers(1, 4)
        blocks = blocks if name == "ngram-duplicate" else 1
        options = dict(query_size=m, answer_size=r, seq_len=blocks * (m + r + 1) + integers(0, 30))
        options["num_symbols"] = integers(max(16, -(-options["seq_len"] // 3)), 40)  # else no query is unique
        if name == "ngram-duplicate":
            options["blocks"] = blocks
        elif draw(st.booleans()):
            options["min_seq_len"] = integers(m + r, options["seq_len"])
        return options
    if name == "mqar":
        d = integers(1, 6)
        size = dict(seq_len=4 * d + integers(0, 30), num_symbols=2 * d + integers(14, 40))
        return size | dict(
            num_pairs=d, power=draw(st.sampled_from([0.01, 0.5, 1.0])), random_fillers=draw(st.booleans())
        )
    if name == "selective-copy":
        seq_len = integers(2, 40)
        return dict(seq_len=seq_len, num_tokens=integers(1, seq_len), num_symbols=integers(8, 30))
    return dict(seq_len=integers(3, 40), num_symbols=integers(8, 30))


@st.composite
def jobs(draw):
    """A new task with its options, a number of rows, and arguments of `batch` that it can meet."""
    name = draw(st.sampled_from(NEW))
    options = options_of(name, draw)
    if "layout" in tasks.options(name):
        options["layout"] = draw(st.sampled_from(tasks.TASKS[name].layouts))
    try:
        task = tasks.build(name, **options)
        length = draw(st.none() | st.integers(task.shortest, task.seq_len))
        queries = draw(st.none() | st.integers(1, task.max_queries(length)))
        queries = None if name == "selective-copy" else queries
        task.check(length or task.lengths()[0], queries or task.usual_queries(length))
        numbers = st.integers(0, 2**64 - 1)
        split = draw(st.sampled_from(sampling.SPLITS))
        arguments = dict(seed=draw(numbers), index=draw(numbers), split=split, queries=queries, length=length)
        task.batch(1, **arguments)  # of some 100 contexts, a split may have none
    except ValueError as error:
        assume("too few to hold" not in str(error) and "too few different ones" not in str(error))
        raise
    return task, draw(st.integers(1, 5)), arguments


@unhurried
@given(jobs())
def test_solver_answers_every_label(job):
    task, rows, arguments = job
    if task.name == "grid":
        arguments["queries"] = 1  # several: as in `position`, which test_tasks.py covers
    batch = task.batch(rows, **arguments)
    queries = arguments["queries"] or task.usual_queries(arguments["length"])
    assert batch.target_index.shape == (rows, queries)
    assert batch.labels.shape == (rows, queries * batch.answer_tokens) == (rows, batch.retrieved)
    assert batch.right(batch.labels).all() and batch.right(batch.labels).shape == (rows, queries)
    assert batch.input_ids.min() >= 1 and batch.input_ids.max() < task.vocab_size
    assert batch.input_ids.shape[1] <= task.max_length(queries)
    assert 0 < batch.chance <= 1 and batch.target_index.max() < batch.length
    for row in range(rows):
        tokens, labels = read(task, batch, row)
        if task.name == "ngram-duplicate":
            blocks = answers_by_block(tokens, task)
            answers = [task.vocabulary.decode(a) for a in batch.alternatives[row].tolist()]
            assert len({tuple(a) for a in answers}) == task.blocks
            assert all(block.count(answer) == 1 for block, answer in zip(blocks, answers, strict=True))
            assert list(labels.values()) in answers
        else:
            assert labels == SOLVERS[task.name](tokens, task)


@unhurried
@given(jobs())
def test_pure_function_of_its_arguments(job):
    task, rows, arguments = job
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    first = task.batch(rows, **arguments)
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    assert before[0] == after[0] and torch.equal(before[2], after[2])
    assert all(np.array_equal(x, y) for x, y in zip(before[1], after[1], strict=True))
    task.batch(3, seed=9, index=9)
    again = task.batch(rows, **arguments)
    for name in FIELDS:
        tensor, other = getattr(first, name), getattr(again, name)
        assert (tensor is None) == (other is None)
        assert tensor is None or (tensor.dtype == torch.int64 and torch.equal(tensor, other))


@pytest.mark.parametrize("name, layout", kinds())
def test_solver_at_small_options(name, layout):
    """A hundred rows of every task and layout, evaluation's number of queries."""
    task = small(name, layout)
    batch = task.batch(100, seed=1, index=2, split="heldout")
    for row in range(100):
        tokens, labels = read(task, batch, row)
        solved = SOLVERS[name](tokens, task)
        assert labels == solved and len(labels) == batch.retrieved
    assert batch.input_ids.shape[1] <= task.max_length(task.usual_queries())


@pytest.mark.parametrize("name, layout", kinds())
def test_streams_and_splits_differ(name, layout):
    task = small(name, layout)
    same = dict(seed=4, index=5)
    variants = [same, same | dict(seed=5), same | dict(index=6), same | dict(split="heldout")]
    batches = [task.batch(4, **v).input_ids for v in variants]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(batches, 2))


# Where a row holds what `draw` made, in the suffix layout: (first place, length).
CONTEXTS = {
    "grid": (2, 19),
    "ngram": (1, 16),
    "ngram-duplicate": (1, 30),
    "mqar": (0, 20),
    "selective-copy": (0, 16),
    "induction": (0, 16),
}


@pytest.mark.parametrize("name", NEW)
def test_splits_are_disjoint_and_of_their_size(name):
    task, (start, size) = small(name), CONTEXTS[name]
    sides = []
    for split in sampling.SPLITS:
        ids = torch.cat([task.batch(1500, seed=s, index=0, split=split).input_ids for s in range(2)])
        sides.append({tuple(row) for row in ids[:, start : start + size].tolist()})
    assert len(set().union(*sides)) == sum(map(len, sides)) and all(len(side) > 2000 for side in sides)
    context, _ = task.draw(np.random.default_rng(0), 8000, task.seq_len, task.usual_queries())
    assert abs(sampling.is_heldout(context).mean() - 1 / 16) < 0.02


def test_split_is_disjoint_in_small_spaces():
    """So few contexts that all sides are seen in full."""
    for name, options in (
        ("induction", dict(seq_len=4, num_symbols=4)),
        ("selective-copy", dict(seq_len=6, num_tokens=2, num_symbols=3)),
        ("ngram", dict(seq_len=4, num_symbols=4, query_size=1, answer_size=1)),
    ):
        task = tasks.build(name, **options)
        start = 1 if name == "ngram" else 0
        train, heldout, validation = (
            {
                tuple(r)
                for r in task.batch(4000, seed=0, index=0, split=s)
                .input_ids[:, start:][:, : task.seq_len]
                .tolist()
            }
            for s in sampling.SPLITS
        )
        assert not train & heldout and not train & validation and not heldout & validation
        assert train and heldout and validation


# Values of NumPy 1.26 to 2.4. If a change here is meant, raise `version` of the task.
STREAMS = {
    "grid": "39012a59a85a4c94",
    "ngram": "abac68a114ededf4",
    "ngram-duplicate": "1ec96c4506a44002",
    "mqar": "8b667a7ba32aa619",
    "selective-copy": "fd24a08ceb36806c",
    "induction": "4dc9e115aab128aa",
}


@pytest.mark.parametrize("name", NEW)
def test_streams_stay_the_same_between_versions(name):
    batch = small(name).batch(16, seed=12345, index=7)
    digest = hashlib.sha256()
    for tensor in (batch.input_ids, batch.labels):
        digest.update(tensor.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == STREAMS[name]


# --- docstrings and layouts, token by token ----------------------------------------------------------

DRAWN = {
    "grid": (dict(seq_len=4, num_symbols=6), [5, 1, 2, 4], [2]),
    "ngram": (dict(seq_len=6, num_symbols=8), [4, 1, 7, 2, 5, 1], [1]),
    "ngram-duplicate": (
        dict(seq_len=10, num_symbols=8, blocks=2, query_size=1),
        [3, 1, 0, 2, 5, 1, 4, 6, 0, 7],
        [5, 1],
    ),
    "mqar": (
        dict(seq_len=12, num_symbols=8, num_pairs=2, random_fillers=False),
        [1, 4, 3, 7, 3, 8, 8, 8, 1, 8, 8, 8],
        [0, 2],
    ),
    "selective-copy": (dict(seq_len=6, num_tokens=3), [14, 5, 14, 14, 2, 9], [1, 4, 5]),
    "induction": (dict(seq_len=6, num_symbols=8), [3, 1, 8, 5, 1, 7], [2]),
}


def assembled(name, **more):
    options, context, target = DRAWN[name]
    task = tasks.build(name, **options, **more)
    return task, task.assemble(np.array([context]), np.array([target]))


@pytest.mark.parametrize("name", NEW)
def test_docstring_example(name):
    task, batch = assembled(name)
    assert textwrap.indent(task.render(batch), "    ") in inspect.getdoc(type(task))


EXPECTED = {  # facts 1.4, and 2.5 for the image
    ("ngram", "suffix"): (
        "<bos> <s4> <s1> <s7> <s2> <s5> <s1> <bos> <query> <s1> <s7> <query> <s2> <s5>",
        ". . . . . . . . . . . <s2> <s5> <s1>",
    ),
    ("ngram", "prefix"): (
        "<query> <s1> <s7> <bos> <s4> <s1> <s7> <s2> <s5> <s1> <bos> <query> <s2> <s5>",
        ". . . . . . . . . . . <s2> <s5> <s1>",
    ),
    ("ngram", "instruction"): (
        "<task> <bos> <s4> <s1> <s7> <s2> <s5> <s1> <bos> <query> <s1> <s7> <query> <s2> <s5>",
        ". . . . . . . . . . . . <s2> <s5> <s1>",
    ),
    ("ngram", "two-pass"): (
        "<bos> <s4> <s1> <s7> <s2> <s5> <s1> <bos> <s4> <s1> <s7> <s2> <s5> <s1> <bos> "
        "<query> <s1> <s7> <query> <s2> <s5>",
        ". . . . . . . . . . . . . . . . . . <s2> <s5> <s1>",
    ),
    ("mqar", "two-pass"): (
        "<s1> <s4> <s3> <s7> <s1> <s4> <s3> <s7> <s3> <white> <white> <white> <s1> <white> <white> <white>",
        ". . . . . . . . <s7> . . . <s4> . . .",
    ),
    ("selective-copy", "two-pass"): (
        "<white> <s5> <white> <white> <s2> <s9> <white> <s5> <white> <white> <s2> <s9> <copy> <copy> <copy>",
        ". . . . . . . . . . . . <s5> <s2> <s9>",
    ),
    ("induction", "two-pass"): (
        "<s3> <s1> <query> <s5> <s1> <s7> <s3> <s1> <query> <s5> <s1> <s7> <query>",
        ". . . . . . . . . . . . <s5>",
    ),
    ("grid", "two-pass"): (
        "<bos> ### <s5> <s1> && <s2> <s4> ### <bos> ### <s5> <s1> && <s2> <s4> ### <query> <s2>",
        ". . . . . . . . . . . . . . . . . <p2>",
    ),
    ("grid", "suffix"): (
        "<bos> ### <s5> <s1> && <s2> <s4> ### <query> <s2>",
        ". . . . . . . . . <p2>",
    ),
    ("grid", "prefix"): (
        "<query> <s2> <bos> ### <s5> <s1> && <s2> <s4> ###",
        ". . . . . . . . . <p2>",
    ),
    ("grid", "instruction"): (
        "<task> <bos> ### <s5> <s1> && <s2> <s4> ### <query> <s2>",
        ". . . . . . . . . . <p2>",
    ),
}


@pytest.mark.parametrize("name, layout", EXPECTED)
def test_layout_token_by_token(name, layout):
    task, batch = assembled(name, layout=layout)
    rendered = [" ".join(line.split()[1:]) for line in task.render(batch).splitlines()]
    assert rendered == list(EXPECTED[name, layout])
    assert batch.input_ids.shape[1] == task.max_length()


def test_original_lengths_and_vocabularies():
    """Facts: N + m + r + 4 tokens with the answer, whose last is no input here; an image of 601 tokens."""
    task = tasks.build("ngram", seq_len=100)
    assert task.max_length() + 1 == 100 + 2 + 3 + 4 and task.vocab_size == 33 + 1
    for side, tokens in ((16, 273), (24, 601), (34, 1191)):
        task = tasks.build("grid", seq_len=side * side)
        ids = task.batch(1, seed=0, index=0).input_ids[0]
        assert len(ids) == tokens + 3 and (ids == task.vocabulary.marker("&&")).sum() == side - 1
    # markers come last, so that symbols and positions have the ids of the position task
    assert tasks.build("grid", seq_len=16).vocabulary.tokens[:-2] == Vocabulary(16, 16).tokens
    # the Mamba paper's 16 tokens: 14 symbols, noise, marker; Zoology's vocabulary
    assert tasks.build("selective-copy", seq_len=4096).vocabulary.num_symbols + 2 == 16
    assert tasks.build("mqar", seq_len=64).vocabulary.num_symbols == 8192


@pytest.mark.parametrize("name, layout", [kind for kind in kinds() if kind[0] in NEW])
def test_max_length_is_that_of_the_longest_batch(name, layout):
    """No token too many in a table of positions."""
    task = small(name, layout, **(dict(seq_len=30) if name == "ngram-duplicate" else {}))  # whole blocks
    for queries in {task.usual_queries(), task.max_queries()}:
        batch = task.batch(2, seed=0, index=0, queries=queries, length=task.seq_len)
        assert batch.input_ids.shape[1] == task.max_length(queries)


@pytest.mark.parametrize("name", tasks.names())
def test_the_second_pass_changes_nothing_else(name):
    """Contexts, questions and answers are those of the suffix layout, at every length of a curriculum."""
    once, twice = small(name, "suffix"), small(name, "two-pass")
    for length in (once.seq_len * 3 // 4, once.seq_len):
        a, b = (task.batch(5, seed=2, index=3, length=length) for task in (once, twice))
        for field in ("labels", "target_index", "alternatives"):
            mine, other = getattr(a, field), getattr(b, field)
            assert (mine is None and other is None) or torch.equal(mine, other)
        added = b.input_ids.shape[1] - a.input_ids.shape[1]
        assert torch.equal(b.answer_at, a.answer_at + added) and (a.length, a.chance) == (b.length, b.chance)


@pytest.mark.parametrize("name", ["induction", "selective-copy"])
def test_chance_is_one_of_the_symbols_that_are_answers(name):
    task = small(name)
    batch = task.batch(2000, seed=0, index=0)
    assert batch.chance == 1 / len(batch.labels.unique())


@pytest.mark.parametrize("name", ["ngram", "ngram-duplicate"])
def test_chance_of_an_ngram_is_that_of_guessing_its_place(name):
    task = tasks.build(name, seq_len=100, query_size=2, answer_size=3)
    assert task.batch(2, seed=0, index=0).chance == 1 / 96


def test_grid_of_a_shorter_context_is_the_top_of_the_image():
    task = small("grid")
    tokens, labels = read(task, task.batch(1, seed=0, index=0, length=6), 0)
    image = tokens[1 : tokens.index("<query>")]
    assert [i for i, token in enumerate(image) if token == "&&"] == [5] and len(image) == 6 + 1 + 2
    assert labels == SOLVERS["grid"](tokens, task)


def test_grid_with_several_queries_is_position_in_an_image():
    """The same draws: only markers are added, and shift the places of the answers."""
    one, other = small("position"), small("grid")
    a, b = (task.batch(50, seed=3, index=1, queries=5) for task in (one, other))
    marker = torch.isin(b.input_ids, torch.tensor([other.vocabulary.marker(t) for t in ("###", "&&")]))
    assert torch.equal(b.input_ids[~marker].view(50, -1), a.input_ids)
    assert torch.equal(a.labels, b.labels) and torch.equal(a.answer_at + 5, b.answer_at)


# --- options and errors ------------------------------------------------------------------------------

BAD_OPTIONS = [
    ("ngram", dict(seq_len=4), "seq_len 4 must be at least 5"),
    ("ngram", dict(seq_len=16, num_symbols=1), "num_symbols 1 must be at least 2"),
    ("ngram", dict(seq_len=16, query_size=0), "query_size 0 must be at least 1"),
    ("ngram", dict(seq_len=16, answer_size=0), "answer_size 0 must be at least 1"),
    (
        "ngram",
        dict(seq_len=16, layout="infix"),
        "unknown layout 'infix' of task ngram; valid: suffix, prefix, ins",
    ),
    ("ngram", dict(seq_len=16, min_seq_len=17), r"min_seq_len 17 must be in 5 \.\. seq_len 16"),
    ("ngram", dict(seq_len=16, min_seq_len=4), r"min_seq_len 4 must be in 5 \.\. seq_len 16"),
    ("ngram", dict(seq_len=400, num_symbols=5), "num_symbols 5 .* length 400: give num_symbols >= 12"),
    ("ngram", dict(seq_len=5, num_symbols=2), "too few to hold some out"),
    ("ngram-duplicate", dict(seq_len=23), "seq_len 23 must be at least 24"),
    ("ngram-duplicate", dict(seq_len=30, blocks=0), "blocks 0 must be at least 1"),
    ("ngram-duplicate", dict(seq_len=99, blocks=9, num_symbols=2), "blocks 9 need as many different"),
    ("ngram-duplicate", dict(seq_len=99, num_symbols=2, query_size=3), "num_symbols 2 is less than query"),
    ("grid", dict(seq_len=1000), "seq_len 1000 is no square of patches: give 961 or 1024"),
    ("grid", dict(seq_len=16, num_symbols=15), "num_symbols 15 is less than seq_len 16"),
    ("mqar", dict(seq_len=3), "seq_len 3 must be at least 4"),
    ("mqar", dict(seq_len=16), "num_pairs 8 .* seq_len 16: give num_pairs <= 4 or seq_len >= 32"),
    ("mqar", dict(seq_len=64, num_symbols=15), "num_symbols 15 .* give num_symbols >= 16"),
    ("mqar", dict(seq_len=64, power=0.0), "power 0.0 must be positive"),
    ("mqar", dict(seq_len=64, num_pairs=0), "num_pairs 0 must be at least 1"),
    ("mqar", dict(seq_len=64, layout="prefix"), "layout 'prefix' of task mqar; valid: suffix, two-pass"),
    ("selective-copy", dict(seq_len=64, layout="prefix"), "'prefix' of task selective-copy; valid: suffix,"),
    ("selective-copy", dict(seq_len=8), r"num_tokens 16 must be in 1 \.\. seq_len 8"),
    ("induction", dict(seq_len=64, layout="prefix"), "'prefix' of task induction; valid: suffix, two"),
    ("induction", dict(seq_len=1), "seq_len 1 must be at least 2"),
    ("induction", dict(seq_len=8, num_symbols=0), "num_symbols 0 must be at least 1"),
    ("induction", dict(seq_len=3, num_symbols=4), "num_symbols 4 gives only about 32 contexts"),
]


@pytest.mark.parametrize("name, options, message", BAD_OPTIONS)
def test_bad_options_give_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        tasks.build(name, **options).batch(1, seed=0, index=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NEW)
def test_bad_arguments_give_one_line(name):
    task = small(name)
    for change, message in (
        (dict(batch_size=0), "batch_size 0"),
        (dict(length=task.seq_len + 1), f"length {task.seq_len + 1} must be in"),
        (dict(length=task.shortest - 1), "must be in"),
        (dict(queries=0), "queries 0"),
        (dict(queries=99), "queries 99 must be in"),
        (dict(split="test"), "unknown split 'test'"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            task.batch(**(dict(batch_size=2, seed=0, index=0) | change))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="queries 2: task selective-copy asks for all 5 tokens"):
        small("selective-copy").batch(1, seed=0, index=0, queries=2)


def test_every_task_has_small_options_and_a_solver():
    assert set(tasks.names()) == set(SMALL) == set(SOLVERS)
    assert all(
        task.version >= 1 and "Source:" in inspect.getmodule(task).__doc__ for task in tasks.TASKS.values()
    )


def test_batch_moves_between_devices_with_its_alternatives():
    moved = small("ngram-duplicate").batch(2, seed=0, index=0).to("meta")
    assert moved.alternatives.device.type == "meta" and moved.answer_tokens == 3
    assert small("ngram").batch(2, seed=0, index=0).to("meta").alternatives is None
