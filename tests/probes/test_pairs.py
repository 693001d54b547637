"""Roles of tokens, pairs of clean and corrupted sequences, and the cells in which they are patched."""

from __future__ import annotations

import pytest
import torch
from patching_task import POSITION_TYPE, TASK
from task_solvers import SMALL, read, small, solve_position

from probes.contrast_pairs import KINDS, contrast_pairs
from probes.patch_cells import chunks, everything, patch_cells, target_and_partner
from probes.token_roles import ROLES, role, target_at, targets_at, token_roles
from synthetic import tasks
from synthetic.tasks import sampling

# --- roles and pairs ----------------------------------------------------------------------------------------


def role_of(token: str, place: int, tokens: list[str]) -> str:
    """Independent of the ids: what a rendered token is."""
    if place and tokens[place - 1] == "<query>":
        return "query"
    if token.startswith("<s"):
        return "target" if token == tokens[tokens.index("<query>") + 1] else "distractor"
    known = {
        "<bos>": "bos",
        "<query>": "query_marker",
        "<task>": "task",
        "###": "separator",
        "&&": "separator",
    }
    return known.get(token, "answer")


@pytest.mark.parametrize("layout", tasks.LAYOUTS)
@pytest.mark.parametrize("name", POSITION_TYPE)
def test_roles_of_rendered_tokens(name, layout):
    for options in ({}, dict(supervise_bos=True)):
        task = small(name, layout, **options)
        batch = task.batch(6, seed=0, index=0, length=11)
        found = token_roles(task, batch)
        for row in range(6):
            tokens, _ = read(task, batch, row)
            names = [role_of(token, i, tokens) for i, token in enumerate(tokens)]
            assert [ROLES[i] for i in found[row].tolist()] == names
            assert names.count("target") == 1 + (layout == "two-pass")
            assert targets_at(found)[row].tolist() == [i for i, name in enumerate(names) if name == "target"]
            assert target_at(found)[row] == names.index("target")


def test_roles_are_refused_where_there_is_no_single_target():
    other = small("mqar")
    with pytest.raises(ValueError, match="not defined for task mqar"):
        token_roles(other, other.batch(2, seed=0, index=0))
    with pytest.raises(ValueError, match="3 queries"):
        token_roles(TASK, TASK.batch(2, seed=0, index=0, queries=3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", tasks.LAYOUTS)
@pytest.mark.parametrize("name", POSITION_TYPE)
def test_pairs_are_examples_that_differ_where_they_say(name, layout, kind):
    task = small(name, layout, supervise_bos=True)
    made = contrast_pairs(task, 40, 13, kind, seed=3)
    clean, corrupted = made.clean, made.corrupted
    for row in range(40):
        for batch, answer in ((clean, made.answer), (corrupted, made.corrupted_answer)):
            tokens, labels = read(task, batch, row)
            assert labels == solve_position(tokens, task)
            assert labels == {made.answer_at: task.vocabulary.tokens[answer[row]]}
        differs = (clean.input_ids[row] != corrupted.input_ids[row]).nonzero().flatten()
        assert differs.tolist() == made.changed[row].tolist()
        changed = sorted(ROLES[i] for i in made.roles[row, differs].tolist())
        twice = 1 + (layout == "two-pass")
        assert changed == (["query"] if kind == "query" else ["distractor"] * twice + ["target"] * twice)
    assert (made.answer != made.corrupted_answer).all()
    asked, other = (batch.input_ids[made.roles == role("query")] for batch in (clean, corrupted))
    if kind == "target":  # the partner's place is where the queried symbol went
        assert (corrupted.input_ids.gather(1, made.partner) == asked[:, None]).all()
        assert (other == asked).all()
    else:
        assert (clean.input_ids.gather(1, made.partner) == other[:, None]).all()
    assert made.partner.shape == (40, twice) and (made.partner[:, 1:] > made.partner[:, :-1]).all()
    for batch in (clean, corrupted):
        ids = batch.input_ids - task.vocabulary.first_symbol
        context = (made.roles == role("target")) | (made.roles == role("distractor"))
        assert sampling.is_heldout(ids[context].view(40, -1)[:, :13].numpy()).all()
    assert len({tuple(ids) for ids in clean.input_ids.tolist()}) > 35
    again = contrast_pairs(task, 40, 13, kind, seed=3)
    assert torch.equal(again.corrupted.input_ids, corrupted.input_ids)
    assert not torch.equal(contrast_pairs(task, 40, 13, kind, seed=4).clean.input_ids, clean.input_ids)


def test_one_pair_of_the_longest_contexts_unless_told_otherwise():
    made, told = contrast_pairs(TASK, 1), contrast_pairs(TASK, 1, 8, "query", seed=0)
    assert len(made) == 1 and made.clean.input_ids.shape == (1, 11)
    for name in ("clean", "corrupted"):
        assert torch.equal(getattr(made, name).input_ids, getattr(told, name).input_ids)


def test_pairs_refuse_what_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match="unknown kind 'both'"):
        contrast_pairs(TASK, 2, kind="both")
    with pytest.raises(ValueError, match="not defined for task ngram"):
        contrast_pairs(small("ngram"), 2)
    with pytest.raises(ValueError, match=r"queries 2 must be in 1 \.\. 1"):
        contrast_pairs(tasks.build("position-varlen", seq_len=100, num_symbols=2), 2)
    monkeypatch.setattr(sampling, "split_of", lambda contexts: 1 * (contexts[:, 0] < contexts[:, 1]))
    with pytest.raises(ValueError, match="hardly any context of length 2"):
        contrast_pairs(TASK, 3, 2, "target")
    with pytest.raises(ValueError, match="examples 0"):
        contrast_pairs(TASK, 0)


# --- cells --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", tasks.LAYOUTS)
@pytest.mark.parametrize("name", POSITION_TYPE)
@pytest.mark.parametrize("max_positions", [12, 64])
def test_cells_hold_every_token_once(name, layout, max_positions):
    made = contrast_pairs(
        tasks.build(name, **SMALL[name] | dict(seq_len=25, layout=layout)), 30, 24, "target"
    )
    found = patch_cells(made, max_positions)
    assert len(found) <= max_positions
    covered = sum(cell.where.int() for cell in found)
    shared = torch.arange(made.answer_at + 1) == made.answer_at  # in layout prefix also target or partner
    assert (covered[:, ~shared[0] if shared.dim() == 2 else ~shared] == 1).all()
    assert ((covered[:, -1] == 1) | (covered[:, -1] == 2)).all()
    sizes = {cell.high - cell.low for cell in found if cell.role == "distractor"}
    assert sizes == {1} if max_positions == 64 else len(sizes) <= 2
    target = next(cell for cell in found if cell.role == "target")
    assert torch.equal(target.where, made.roles[:, : made.answer_at + 1] == role("target"))
    assert (target.low, target.high) == (None, None)
    with pytest.raises(ValueError, match="max_positions 0"):
        patch_cells(made, 0)


@pytest.mark.parametrize("layout", tasks.LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_joint_cell_and_the_spans_of_cells(layout, kind):
    made = contrast_pairs(tasks.build("position", seq_len=8, num_symbols=24, layout=layout), 20, 8, kind)
    length = made.answer_at + 1
    joint, whole = target_and_partner(made), everything(made)
    for row in range(20):
        target = (made.roles[row] == role("target")).nonzero().flatten().tolist()
        wanted = sorted({*target, *made.partner[row].tolist()})
        assert joint.where[row].nonzero().flatten().tolist() == wanted
    assert (joint.role, joint.low, joint.high) == ("target+partner", None, None)
    assert (whole.role, whole.low, whole.high) == ("everything", 0, length)
    assert whole.where.shape == (20, length) and whole.where.all()
    windows = [cell for cell in patch_cells(made, 1) if cell.role == "distractor"]
    assert len(windows) == 1
    context = (made.roles == role("target")) | (made.roles == role("distractor"))
    last = int(context.any(0).nonzero()[-1])
    for most in range(6, 10):  # the last window may be shorter
        assert max(cell.high for cell in patch_cells(made, most) if cell.role == "distractor") <= last + 1
    single = [cell.high - cell.low for cell in patch_cells(made, length) if cell.role == "distractor"]
    assert set(single) == {1}
    for cell in patch_cells(made):
        columns = [tuple(row.nonzero().flatten().tolist()) for row in cell.where]
        if cell.role != "distractor":  # those name their window, others the span all sequences share
            same = len(set(columns)) == 1
            assert (cell.low, cell.high) == ((columns[0][0], columns[0][-1] + 1) if same else (None, None))
        else:
            assert not cell.where[:, -1].any()  # the last token is the query, or a cell of its own
            assert all(cell.low <= place < cell.high for places in columns for place in places)


def test_cells_are_made_where_the_pairs_are():
    """What a function makes without naming a device would be on another one here, and not fit."""
    made = contrast_pairs(TASK, 3, 8)

    def results():
        found = [*patch_cells(made, 6), everything(made), target_and_partner(made)]
        return found, list(chunks(torch.stack([cell.where for cell in found]), 20))

    wanted, order = results()
    with torch.device("meta"):
        found, again = results()
    assert again == order and len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.role, ours.low, ours.high) == (theirs.role, theirs.low, theirs.high)
        assert torch.equal(ours.where, theirs.where)


def test_chunks_keep_to_the_budget():
    where = torch.zeros(7, 2, 10, dtype=torch.bool)
    for cell, place in enumerate([9, 0, 4, 4, 2, 8]):  # the last one is empty
        where[cell, 0, place] = where[cell, 1, 9] = True
    parts = list(chunks(where, budget=20))
    assert [i for part, _ in parts for i in part] == [1, 4, 2, 3, 5, 0]
    assert parts == [([1, 4], 0), ([2, 3, 5], 4), ([0], 9)]
    assert [part for part, _ in chunks(where, budget=1)] == [[1], [4], [2], [3], [5], [0]]
