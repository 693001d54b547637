"""Readers of official files, on miniature files in the official structure."""

import os
from pathlib import Path

import pytest
from vlm_files import CASES, INSTANCES, write

from vlm.data.registry import DATASETS, asked_table, read, table


def test_every_data_set_has_a_case():
    assert CASES.keys() == DATASETS.keys()


@pytest.mark.parametrize("name", CASES)
def test_reader(name, tmp_path):
    split, files, expected = CASES[name]
    write(tmp_path, files)
    records = list(read(name, tmp_path, split))
    assert len(records) == (2 if name.startswith("refcoco") else 1)
    assert {key: getattr(records[0], key) for key in expected} == expected
    assert type(records[0]) is DATASETS[name].task.record and records[0].source == name


@pytest.mark.parametrize("name", CASES)
def test_missing_and_malformed_files_are_named(name, tmp_path):
    split, files, _ = CASES[name]
    with pytest.raises(FileNotFoundError, match="download"):
        list(read(name, tmp_path, split))
    write(tmp_path, files)
    first = next(file for file in files if not file.endswith((".csv", ".jpg")))
    (tmp_path / first).write_bytes(b'{"wrong": ')
    with pytest.raises(ValueError, match="download") as error:
        list(read(name, tmp_path, split))
    assert first in str(error.value) and "\n" not in str(error.value)
    if not first.endswith(".p"):
        (tmp_path / first).write_text('[{"wrong": 1}]')
        with pytest.raises(ValueError, match="official"):
            list(read(name, tmp_path, split))


def test_published_refcoco_keeps_the_last_expression(tmp_path):
    write(tmp_path, CASES["refcoco"][1])
    assert [r.phrase for r in read("refcoco", tmp_path, "val", expressions="last")] == ["the dog"]


def test_pickles_that_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    write(tmp_path, {"refs(unc).p": [Evil()], "instances.json": INSTANCES})
    with pytest.raises(ValueError, match="mkdir"):
        list(read("refcoco", tmp_path, "val"))
    assert not (tmp_path / "made").exists()


def test_shuffled_choices_keep_the_right_one(tmp_path):
    write(tmp_path, CASES["visual7w-telling"][1] | CASES["visual7w-pointing"][1])
    (told,) = read("visual7w-telling", tmp_path, "val")
    assert told.choices[told.answer] == "a" and sorted(told.choices) == list("abcd")
    (shown,) = read("visual7w-pointing", tmp_path, "val")
    assert shown.boxes[shown.answer] == (0.0, 1.0, 3.0, 6.0)


def test_grit_boxes_stay_with_their_chunk(tmp_path):
    write(tmp_path, CASES["grit"][1])
    (record,) = read("grit", tmp_path, "train")
    assert [(s.start, s.boxes[0]) for s in record.spans] == [(0, (50, 0, 100, 50)), (10, (0, 0, 50, 25))]


def test_unknown_names_list_the_valid_ones(tmp_path):
    with pytest.raises(ValueError, match="refcocog"):
        read("cocoo", tmp_path, "val")
    with pytest.raises(ValueError, match="testA"):
        read("refcoco", tmp_path, "test")


def test_documentation_has_the_tables():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert table() in page and asked_table() in page
