"""The paper's config on a miniature of its data: each entry is read, and each picture opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

from PIL import Image
from vlm_files import CASES, NOT_OF_THE_PAPER, write

from vlm.configs import paper
from vlm.data.registry import DATASETS

# Where the official archives put a picture of CASES, below the data set's folder.
PICTURES = {
    "ai2d": "ai2d/images/12.png", "aokvqa": "images/000000000007.jpg", "coco": "images/val2014/a.jpg",
    "docvqa": "images/documents/a.png", "gqa": "images/n5.jpg", "grit": "00000/1.jpg",
    "infographicvqa": "images/1.jpeg", "llava-instruct": "images/0/1.jpg", "llava-pretrain": "images/0/1.jpg",
    "nocaps": "images/COCO_7.jpg", "ocr-vqa": "images/k.jpg", "pope": "images/a.jpg",
    "refcoco": "images/COCO_7.jpg", "refcoco+": "images/COCO_7.jpg", "refcocog": "images/COCO_7.jpg",
    "textcaps": "images/train_images/x.jpg", "textvqa": "images/train_images/x.jpg",
    "visual-genome-qa": "images/VG_100K_2/2.jpg", "visual-genome-regions": "images/VG_100K_2/2.jpg",
    "visual7w-pointing": "images/v7w_1.jpg", "visual7w-telling": "images/v7w_1.jpg",
    "vqav2": "images/{0}2014/COCO_{0}2014_000000000007.jpg", "vsr": "images/a.jpg",
}  # fmt: skip
NUMBERS = {"train": 1, "val": 2, "test": 3}  # of OCR-VQA's splits


def of_split(content: Any, was: str, split: str) -> Any:
    """The content of a file of one split, with another one's name in it."""
    if isinstance(content, dict):
        changed = {key: of_split(value, was, split) for key, value in content.items()}
        named = {was: split, NUMBERS.get(was): NUMBERS.get(split)}.get(changed.get("split"))
        return changed | ({"split": named} if named is not None else {})
    return [of_split(value, was, split) for value in content] if isinstance(content, list) else content


def lay_out(name: str, split: str, folder: Path) -> None:
    """Write the official files of a split and its picture, as far as the published filters keep them."""
    was, files, _ = CASES[name]
    for file, content in files.items():
        renamed = file if name in ("ai2d", "nocaps") else file.replace(was, split)
        if renamed == "infographicsVQA_train_v1.0_withQT.json":
            renamed = "infographicsVQA_train_v1.0.json"
        if renamed == "ai2d_test_ids.csv" and split != "test":
            content = 99
        genome = name.startswith(
            "visual-genome"
        )  # its splits are those of Karpathy's list, which has one image
        write(folder, {renamed: content if genome else of_split(content, was, split)})
    pixels = np.random.default_rng(0).integers(0, 256, (360, 360, 3), dtype=np.uint8)  # a cover worth keeping
    paths = [folder / PICTURES[name].format(split)]
    if name == "grit":  # a phrase needs three images of at least 100 x 100 pixels
        row = files["00000/1.json"] | {"height": 100}
        write(folder, {f"00000/{i}.json": row for i in (1, 2, 3)})
        paths = [folder / f"00000/{i}.jpg" for i in (1, 2, 3)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


STAGES = {
    f"{number}-{name}": (number, name)
    for number, one in enumerate(paper.get_config()[0].stages)
    for name in one.data
}


@pytest.mark.parametrize("entry", [*STAGES, *paper.evaluation()])
def test_every_entry_is_read_and_its_pictures_are_where_the_config_says(entry, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "DATA", str(tmp_path))
    run = paper.get_config()[0]
    number, name = STAGES.get(entry, (None, entry))
    data = run.evaluation[name] if number is None else run.stages[number].data[name]
    lay_out(data.dataset, data.split, tmp_path / data.dataset)
    source = data.build(answers=number is not None)
    assert len(source) and source.keys()
    for key in source.keys():  # noqa: SIM118 -- no dict
        assert source.picture(key).shape == (360, 360, 3)
    assert source[0].image in source.keys()  # noqa: SIM118


def test_every_data_set_of_the_paper_is_laid_out():
    assert PICTURES.keys() == DATASETS.keys() - NOT_OF_THE_PAPER and DATASETS.keys() == CASES.keys()


def test_the_paper_is_trained_and_asked_in_the_released_words():
    """README of the released code: an object has its last expression; prompts are the released ones."""
    run = paper.get_config()[0]
    every = [data for stage in run.stages for data in stage.data.values()] + list(run.evaluation.values())
    referring = {data.dataset for data in every if data.options == {"expressions": "last"}}
    assert referring == {"refcoco", "refcoco+", "refcocog"}
    assert all(data.published for data in every)
    assert all(data.options == {} for data in every if data.dataset not in referring)
