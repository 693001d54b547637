"""The reader of the original experiment's JSON files (facts 1.2)."""

import json

import numpy as np
import pytest
import torch
from task_solvers import read as read_row
from task_solvers import solve_position

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from synthetic.evaluate import evaluate, score
from synthetic.tasks.original import OriginalFiles, file_name, read


def write(folder, split="train", sequences=None, targets=None, length=8, rows=40, **more):
    rng = np.random.default_rng(len(split))
    if sequences is None:
        sequences = [rng.permutation(12)[:length].tolist() for _ in range(rows)]
    if targets is None:
        targets = rng.integers(0, length, len(sequences)).tolist()
    content = dict(target_sequences=sequences, target_tokens=targets) | more
    (folder / file_name(split, length)).write_text(json.dumps(content))
    return sequences, targets


@pytest.fixture
def task(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path, split)
    return OriginalFiles(seq_len=8, num_symbols=12, folder=tmp_path)


def test_file_names_are_the_originals():
    assert file_name("validation", 576) == "validation_synthetic_vg_seqlen576.json"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_one_pass_gives_every_row_once_and_in_order(task, split):
    sequences, targets = write(task.folder, split)
    batches = list(task.batches(split, 16))
    assert [len(b.input_ids) for b in batches] == [16, 16, 8]
    ids = torch.cat([b.input_ids for b in batches])
    assert (ids[:, 1:9] - task.vocabulary.first_symbol).tolist() == sequences
    assert torch.cat([b.target_index for b in batches])[:, 0].tolist() == targets
    for batch in batches:
        for row in range(len(batch.input_ids)):
            tokens, labels = read_row(task, batch, row)
            assert labels == solve_position(tokens, task)


def test_batches_come_from_the_file_of_their_split_and_repeat_nothing(task):
    rows = {}
    for split, file in (("train", "train"), ("validation", "validation"), ("heldout", "test")):
        batch = task.batch(40, seed=1, index=2, split=split)
        again = task.batch(40, seed=1, index=2, split=split)
        assert torch.equal(batch.input_ids, again.input_ids)
        rows[file] = sorted((batch.input_ids[:, 1:9] - 3).tolist())
        assert rows[file] == sorted(task.rows(file)[0].tolist())
    assert rows["train"] != rows["validation"] != rows["test"]
    other = OriginalFiles(seq_len=8, num_symbols=12, folder=task.folder, layout="prefix")
    batch = other.batch(5, seed=0, index=0, split="heldout")
    assert batch.input_ids[0, 0] == other.vocabulary.query and batch.chance == 1 / 8


def test_models_are_evaluated_on_files(task):
    model = models.build("mamba-tiny", vocab_size=task.vocab_size, n_layer=1)
    result = score(model, task.batches("test", 16), device="cpu", precision="float32")
    assert len(result.correct) == 40 and result.length == 8
    assert result.target.tolist() == task.rows("test")[1][:, 0].tolist()
    drawn = evaluate(model, task, examples=30, length=8, device="cpu", precision="float32")
    assert drawn.target.tolist() == task.rows("test")[1][:30, 0].tolist()
    with pytest.raises(ValueError, match="no batch"):
        score(model, [], device="cpu", precision="float32")


GOOD = [[3, 1, 2], [0, 5, 4]]
BAD = [
    (dict(sequences=[[3, 1, 2], [0, 5]]), r"target_sequences\[1\] has 2 symbols instead of 3"),
    (dict(sequences=[[3, 1, 3], [0, 5, 4]]), r"target_sequences\[0\] repeats a symbol"),
    (dict(sequences=[[3, 1, "2"], [0, 5, 4]]), r"target_sequences\[0\] is no list of integers"),
    (dict(sequences=[[3, 1, -2], [0, 5, 4]]), r"target_sequences\[0\] is no list of integers"),
    (dict(sequences=[[3, 1, True], [0, 5, 4]]), r"target_sequences\[0\] is no list of integers"),
    (dict(sequences=["abc", [0, 5, 4]]), r"target_sequences\[0\] is no list"),
    (dict(sequences=7), "target_sequences must be a list of lists"),
    (dict(targets=[0, 3]), r"target_tokens\[1\] is 3, no place of 0 \.\. 2"),
    (dict(targets=[0, 1.5]), "target_tokens one of integers"),
    (dict(targets=[0]), "2 target_sequences but 1 target_tokens"),
    (dict(sequences=[], targets=[]), "0 target_sequences"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_data_gives_one_line_with_file_and_defect(tmp_path, change, message):
    write(tmp_path, **(dict(sequences=GOOD, targets=[0, 1], length=3) | change))
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / file_name("train", 3), 3)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_bad_files_give_one_line(tmp_path):
    path = tmp_path / file_name("train", 3)
    with pytest.raises(ValueError, match="no such file; expected"):
        read(path, 3)
    for text, message in (("{", "not JSON"), ("[1]", "needs the lists"), ('{"target_tokens": []}', "needs")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read(path, 3)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not JSON"):
        read(path, 3)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        read(path, 3)


def test_bad_wishes_give_one_line(task):
    same = dict(seed=0, index=0)
    for arguments, message in (
        (dict(batch_size=41), r"batch_size 41 must be in 1 \.\. 40"),
        (dict(batch_size=0), "batch_size 0"),
        (dict(batch_size=2, length=4), "length 4 is not that of the files, 8"),
        (dict(batch_size=2, queries=2), "queries 2"),
        (dict(batch_size=2, split="test"), "unknown split 'test'"),
    ):
        with pytest.raises(ValueError, match=message):
            task.batch(**(same | arguments))
    with pytest.raises(ValueError, match="unknown split 'heldout'"):
        task.rows("heldout")
    with pytest.raises(UserError, match="the file of test has 40 rows"):
        list(task.examples(50, seed=0, split="heldout", length=8))
    with pytest.raises(
        ValueError, match=r"seqlen8\.json: symbol 11 is not below num_symbols 9: give num_symbols >= 12"
    ):
        OriginalFiles(seq_len=8, num_symbols=9, folder=task.folder).batch(2, **same)
    assert task.max_length(64) == 8 + 3
