"""The position tasks against a brute-force solver that reads rendered text; layouts, streams, bad options."""

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
from scipy import stats
from task_solvers import POSITION_TASKS
from torch.utils.data import DataLoader, Dataset

from synthetic import tasks
from synthetic.tasks import sampling

ALL = [(name, layout) for name in POSITION_TASKS for layout in tasks.LAYOUTS]
MIN_P = 1e-3  # seeds are fixed, so these are not flaky
unhurried = settings(deadline=None)  # a busy machine is no failure


# --- an independent reader of rendered rows ----------------------------------------------------------


def read(text):
    """Context, queries and scored labels of a rendered row, from its token strings alone."""
    (head, *tokens), (label_head, *labels) = (line.split() for line in text.splitlines())
    assert (head, label_head) == ("input", "label") and len(tokens) == len(labels)
    after = tokens[tokens.index("<bos>") + 1 :]
    context = list(itertools.takewhile(lambda token: token.startswith("<s"), after))
    asked = tokens[tokens.index("<query>") + 1 :]
    queries = list(itertools.takewhile(lambda token: token.startswith("<s"), asked))
    return context, queries, [label for label in labels if label != "."]


def solve(context, queries):
    """Answers by search; a query that does not stand exactly once in the context has none."""
    for query in queries:
        assert context.count(query) == 1
    return [f"<p{context.index(query)}>" for query in queries]


@st.composite
def jobs(draw):
    """A task with its options, and arguments of `batch` it can meet."""
    name = draw(st.sampled_from(POSITION_TASKS))
    seq_len = draw(st.integers(1, 12))
    fewest = seq_len if name == "position" else 2
    options = dict(seq_len=seq_len, num_symbols=draw(st.integers(fewest, 80)))
    options["layout"] = draw(st.sampled_from(list(tasks.LAYOUTS)))
    options["supervise_bos"] = draw(st.booleans())
    try:
        task = tasks.build(name, **options)
        length = draw(st.none() | st.integers(1, seq_len))
        queries = 1 if task.supervise_bos else draw(st.integers(1, task.max_queries(length)))
        task.check(length or seq_len, queries)
    except ValueError as error:
        assume("too few" not in str(error))
        raise
    split = draw(st.sampled_from(sampling.SPLITS))
    numbers = st.integers(0, 2**64 - 1)
    arguments = dict(seed=draw(numbers), index=draw(numbers), split=split, queries=queries, length=length)
    return task, draw(st.integers(1, 5)), arguments


@unhurried
@given(jobs())
def test_solver_answers_every_label(job):
    task, rows, arguments = job
    batch = task.batch(rows, **arguments)
    assert batch.input_ids.shape[0] == batch.labels.shape[0] == batch.target_index.shape[0] == rows
    for row in range(rows):
        context, queries, labels = read(task.render(batch, row))
        assert len(context) == batch.length == (arguments["length"] or task.seq_len)
        assert len(set(queries)) == len(queries) == arguments["queries"]
        assert labels == solve(context, queries) + ["<bos>"] * task.supervise_bos
        assert [f"<p{k}>" for k in batch.target_index[row].tolist()] == solve(context, queries)
        if task.name == "position":
            assert len(set(context)) == len(context)
    assert batch.chance == 1 / batch.length
    assert batch.input_ids.max() < task.vocab_size and batch.input_ids.min() >= 1


@unhurried
@given(jobs())
def test_pure_function_of_its_arguments(job):
    """Same arguments, same tensors, whatever was drawn before; no global random state is read or moved."""
    task, rows, arguments = job
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    first = task.batch(rows, **arguments)
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    assert before[0] == after[0]
    assert all(np.array_equal(x, y) for x, y in zip(before[1], after[1], strict=True))
    assert torch.equal(before[2], after[2])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    task.batch(3, seed=9, index=9)
    again = task.batch(rows, **arguments)
    for name in ("input_ids", "labels", "answer_at", "target_index"):
        tensor = getattr(first, name)
        assert tensor.dtype == torch.int64 and torch.equal(tensor, getattr(again, name))


@unhurried
@given(st.integers(0, 2**64 - 2), st.integers(0, 2**64 - 2), st.sampled_from(ALL))
def test_streams_differ(seed, index, kind):
    task = tasks.build(kind[0], seq_len=32, layout=kind[1])
    same = dict(seed=seed, index=index)
    variants = [same, same | dict(seed=seed + 1), same | dict(index=index + 1), same | dict(split="heldout")]
    batches = [task.batch(2, **v).input_ids for v in variants]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(batches, 2))


class Stream(Dataset):
    """A batch an index, as a trainer with data workers would read it."""

    def __init__(self, task):
        self.task = task

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.task.batch(4, seed=3, index=index, queries=2)


@pytest.mark.parametrize("name", POSITION_TASKS)
def test_independent_of_worker_count(name):
    stream = Stream(tasks.build(name, seq_len=16))
    direct = [stream[i] for i in range(12)]
    for workers in (0, 2):
        loaded = list(DataLoader(stream, batch_size=None, num_workers=workers))
        for a, b in zip(direct, loaded, strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
            assert (a.length, a.chance) == (b.length, b.chance)


# Values of NumPy 1.26 to 2.4. If a change here is meant, raise `version` of the task.
STREAMS = {"position": "95623bd505bc095b", "position-varlen": "4b2e42554f9efad6"}


@pytest.mark.parametrize("name", POSITION_TASKS)
def test_streams_stay_the_same_between_versions(name):
    """Results of two versions of the project are comparable only if they train on the same data."""
    digest = hashlib.sha256()
    for options in (dict(seq_len=8, num_symbols=64), dict(seq_len=24, num_symbols=24)):
        batch = tasks.build(name, **options).batch(16, seed=12345, index=7, queries=3)
        digest.update(batch.input_ids.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == STREAMS[name]


# --- layouts, token by token -------------------------------------------------------------------------

EXPECTED = {
    ("suffix", 1): (
        "<bos> <s4> <s0> <s2> <query> <s2>",
        "  .     .    .    .     .    <p2>",
    ),
    ("suffix", 3): (
        "<bos> <s4> <s0> <s2> <query> <s2> <s4> <s0>",
        "  .     .    .    .     .    <p2> <p0> <p1>",
    ),
    ("instruction", 1): (
        "<task> <bos> <s4> <s0> <s2> <query> <s2>",
        "  .      .     .    .    .     .    <p2>",
    ),
    ("instruction", 3): (
        "<task> <bos> <s4> <s0> <s2> <query> <s2> <s4> <s0>",
        "  .      .     .    .    .     .    <p2> <p0> <p1>",
    ),
    ("prefix", 1): (
        "<query> <s2> <bos> <s4> <s0> <s2>",
        "  .       .    .     .    .  <p2>",
    ),
    ("prefix", 3): (
        "<query> <s2> <s4> <s0> <bos> <s4> <s0> <s2> <p2> <p0>",
        "   .      .    .    .    .     .    .  <p2> <p0> <p1>",
    ),
    ("two-pass", 1): (
        "<bos> <s4> <s0> <s2> <bos> <s4> <s0> <s2> <query> <s2>",
        "  .     .    .    .    .     .    .    .     .    <p2>",
    ),
    ("two-pass", 3): (
        "<bos> <s4> <s0> <s2> <bos> <s4> <s0> <s2> <query> <s2> <s4> <s0>",
        "  .     .    .    .    .     .    .    .     .    <p2> <p0> <p1>",
    ),
}
EXPECTED_BOS = {  # facts: `<bos> x1 .. xN <query> q | <p_k> <bos>`; the last <bos> is only predicted
    "suffix": ("<bos> <s4> <s0> <s2> <query> <s2> <p2>", ". . . . . <p2> <bos>"),
    "instruction": ("<task> <bos> <s4> <s0> <s2> <query> <s2> <p2>", ". . . . . . <p2> <bos>"),
    "prefix": ("<query> <s2> <bos> <s4> <s0> <s2> <p2>", ". . . . . <p2> <bos>"),
    "two-pass": (
        "<bos> <s4> <s0> <s2> <bos> <s4> <s0> <s2> <query> <s2> <p2>",
        ". . . . . . . . . <p2> <bos>",
    ),
}


def lines(task, context, target):
    batch = task.assemble(np.array([context]), np.array([target]))
    return [line.split()[1:] for line in task.render(batch).splitlines()]


@pytest.mark.parametrize("name", POSITION_TASKS)
@pytest.mark.parametrize("layout", tasks.LAYOUTS)
@pytest.mark.parametrize("queries", [1, 3])
def test_layout_token_by_token(name, layout, queries):
    task = tasks.build(name, seq_len=3, num_symbols=5 + 60, layout=layout)
    rendered = lines(task, [4, 0, 2], [2, 0, 1][:queries])
    assert rendered == [line.split() for line in EXPECTED[layout, queries]]
    assert len(rendered[0]) == task.max_length(queries)


@pytest.mark.parametrize("layout", tasks.LAYOUTS)
def test_supervised_bos_token_by_token(layout):
    task = tasks.build("position", seq_len=3, num_symbols=65, layout=layout, supervise_bos=True)
    rendered = lines(task, [4, 0, 2], [2])
    assert rendered == [line.split() for line in EXPECTED_BOS[layout]]
    assert len(rendered[0]) == task.max_length()


@pytest.mark.parametrize(
    "name, options, context, target",
    [
        ("position", dict(seq_len=4, num_symbols=6), [5, 1, 2, 4], [1]),
        ("position-varlen", dict(seq_len=5, num_symbols=4), [2, 2, 1, 2, 3], [4]),
    ],
)
def test_docstring_example(name, options, context, target):
    task = tasks.build(name, **options)
    drawn = task.render(task.assemble(np.array([context]), np.array([target])))
    assert textwrap.indent(drawn, "    ") in inspect.getdoc(type(task))


def test_every_task_draws_an_example():
    for task in tasks.TASKS.values():
        assert "input  " in inspect.getdoc(task) and "label  " in inspect.getdoc(task)


@unhurried
@given(jobs())
def test_max_length_is_the_longest_batch(job):
    task, rows, arguments = job
    t = task.batch(rows, **arguments).input_ids.shape[1]
    assert t <= task.max_length(arguments["queries"])
    if arguments["length"] in (None, task.seq_len):
        assert t == task.max_length(arguments["queries"])
    assert task.max_length(10**6) == task.max_length(task.max_queries(task.seq_len))


def test_original_lengths_and_vocabulary():
    """N + 5 tokens with the final <bos>, which is a label but no input here; 403 ids before <task>."""
    task = tasks.build("position", seq_len=200, supervise_bos=True)
    batch = task.batch(2, seed=0, index=0)
    assert batch.input_ids.shape[1] + 1 == 205 and task.vocab_size == 404
    assert batch.answer_at.tolist() == [205 - 3, 205 - 2]  # predicts the second-last and the last token
    assert batch.labels[:, 1].tolist() == [1, 1]


def test_first_of_many_queries_is_what_evaluation_sees():
    """In the suffix layout: the same tokens up to the first answer, and the same distribution of it."""
    task = tasks.build("position", seq_len=8, num_symbols=64)
    single, many = (task.batch(20_000, seed=5, index=0, queries=k) for k in (1, 6))
    assert many.answer_at[0] == single.answer_at[0] == single.input_ids.shape[1] - 1
    for row in range(100):
        start = many.input_ids[row, : single.input_ids.shape[1]].tolist()
        context, queries, labels = read(task.render(many, row))
        tokens = ["<bos>", *context, "<query>", queries[0]]
        assert task.vocabulary.decode(start) == tokens and labels[:1] == solve(context, queries[:1])
    counts = [np.bincount(b.target_index[:, 0].numpy(), minlength=8) for b in (single, many)]
    assert stats.chi2_contingency(counts).pvalue > MIN_P
    for column in range(6):
        assert stats.chisquare(np.bincount(many.target_index[:, column].numpy())).pvalue > MIN_P


def test_varlen_repeats_symbols_and_may_have_fewer_than_places():
    task = tasks.build("position-varlen", seq_len=50, num_symbols=7)
    context, queries, labels = read(task.render(task.batch(1, seed=0, index=0)))
    assert len(set(context)) <= 7 < len(context) == 50
    assert labels == solve(context, queries)


# --- options and errors ------------------------------------------------------------------------------

BAD_OPTIONS = [
    ("nothing", dict(seq_len=8), "unknown task 'nothing'; valid: position, position-varlen"),
    (
        "position",
        dict(seq_len=8, layout="infix"),
        "unknown layout 'infix' of task position; valid: suffix, prefix, ins",
    ),
    (
        "position",
        dict(seq_len=8, seqlen=8),
        "no option 'seqlen'; valid: seq_len, first_id, num_symbols, layout",
    ),
    ("position", dict(seq_len=8, min_seq_len=8), "task position has no option 'min_seq_len'"),
    ("position", dict(num_symbols=8), "task position needs the option seq_len"),
    ("position", dict(seq_len=0), "seq_len 0 must be at least 1"),
    ("position-varlen", dict(seq_len=0), "seq_len 0 must be at least 1"),
    ("position", dict(seq_len=16, num_symbols=8), "num_symbols 8 is less than seq_len 16.* >= 16"),
    ("position", dict(seq_len=16, num_symbols=0), "num_symbols 0 must be at least 1"),
    ("position", dict(seq_len=4), "num_symbols 4 .*24 contexts of length 4, too few"),
    ("position-varlen", dict(seq_len=16, num_symbols=1), "num_symbols 1 .* at least 2"),
    ("position-varlen", dict(seq_len=16, min_seq_len=16), r"min_seq_len 16 .* 1 \.\. seq_len - 1 = 15"),
    ("position-varlen", dict(seq_len=16, min_seq_len=0), "min_seq_len 0"),
]


@pytest.mark.parametrize("name, options, message", BAD_OPTIONS)
def test_bad_options_give_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        tasks.build(name, **options)
    assert "\n" not in str(error.value)


BAD_ARGUMENTS = [
    (dict(batch_size=0), "batch_size 0"),
    (dict(length=0), r"length 0 must be in 1 \.\. seq_len 16"),
    (dict(length=17), r"length 17 must be in 1 \.\. seq_len 16"),
    (dict(queries=0), "queries 0"),
    (dict(queries=17), r"queries 17 must be in 1 \.\. 16"),
    (dict(queries=5, length=4), r"queries 5 must be in 1 \.\. 4 for task position, length 4"),
    (dict(length=1), "too few"),
    (dict(split="test"), "unknown split 'test'; valid: train, heldout, validation"),
    (dict(seed=-1), "seed -1"),
    (dict(index=2**64), "index 18446744073709551616"),
]


@pytest.mark.parametrize("change, message", BAD_ARGUMENTS)
def test_bad_arguments_give_one_line(change, message):
    task = tasks.build("position", seq_len=16)
    arguments = dict(batch_size=2, seed=0, index=0) | change
    with pytest.raises(ValueError, match=message) as error:
        task.batch(**arguments)
    assert "\n" not in str(error.value)


def test_one_query_limit_of_supervised_bos_and_of_few_symbols():
    with pytest.raises(ValueError, match="supervise_bos"):
        tasks.build("position", seq_len=16, supervise_bos=True).batch(1, seed=0, index=0, queries=2)
    with pytest.raises(ValueError, match=r"queries 3 must be in 1 \.\. 2"):
        tasks.build("position-varlen", seq_len=16, num_symbols=3).batch(1, seed=0, index=0, queries=3)


def test_registry_and_default_symbols():
    assert tasks.names()[:2] == list(POSITION_TASKS)
    assert tasks.options("position") == ["seq_len", "first_id", "num_symbols", "layout", "supervise_bos"]
    task = tasks.build("position", seq_len=12)
    assert task.num_symbols == 12 and task == tasks.build("position", seq_len=12, num_symbols=12)
    context, _, _ = read(task.render(task.batch(1, seed=0, index=0)))
    assert sorted(context) == sorted(f"<s{i}>" for i in range(12))


def test_batch_moves_between_devices():
    batch = tasks.build("position", seq_len=8).batch(2, seed=0, index=0)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.labels.device.type == "meta"
    assert moved.answer_at.device.type == moved.target_index.device.type == "meta"
    assert (moved.length, moved.chance) == (8, 1 / 8) and batch.input_ids.device.type == "cpu"
