"""COCO captions (Karpathy's split), NoCaps and TextCaps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlm.data.files import entry, load_json, require, structure
from vlm.data.records import Captioned


def coco(folder: Path, split: str) -> Iterator[Captioned]:
    """Yield one record per image with all (about five) captions; train is Karpathy's train and restval."""
    path = require(folder, "dataset_coco.json", "Karpathy's caption_datasets.zip")
    wanted = {"train": ("train", "restval")}.get(split, (split,))
    with structure(path):
        for row in load_json(path)["images"]:
            if row["split"] in wanted:
                yield Captioned(
                    id=str(row["cocoid"]),
                    source="coco",
                    split=split,
                    image=f"{row['filepath']}/{row['filename']}",
                    captions=tuple(sentence["raw"] for sentence in row["sentences"]),
                )


NOCAPS_FILES = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}


def nocaps(folder: Path, split: str) -> Iterator[Captioned]:
    """Yield one record per image with its ten captions; test has none. Older files have no domains."""
    path = require(folder, NOCAPS_FILES[split], f"the {split} annotations of nocaps.org")
    with structure(path):
        content = load_json(path)
        captions: dict[int, list[str]] = {}
        for row in content["annotations"] if split == "val" else ():
            captions.setdefault(row["image_id"], []).append(row["caption"])
        for row in content["images"]:
            yield Captioned(
                id=str(row["id"]),
                source="nocaps",
                split=split,
                image=row["file_name"],
                width=row.get("width"),
                height=row.get("height"),
                captions=tuple(entry(captions, row["id"], path, "captions of image"))
                if split == "val"
                else (),
                domain=row.get("domain"),
            )


def ocr_tokens(folder: Path, split: str) -> dict[str, tuple[str, ...]]:
    """Return OCR tokens by image id from the Rosetta file that TextVQA and TextCaps share."""
    name = f"TextVQA_Rosetta_OCR_v0.2_{split}.json"
    path = require(folder, name, "the Rosetta OCR tokens of TextVQA")
    with structure(path):
        return {row["image_id"]: tuple(row["ocr_tokens"]) for row in load_json(path)["data"]}


def text_image(image_id: str, split: str) -> str:
    """Return the path of an image of TextVQA and TextCaps; validation images are in train's archive."""
    return f"{'test' if split == 'test' else 'train'}_images/{image_id}.jpg"


def textcaps(folder: Path, split: str) -> Iterator[Captioned]:
    """Yield one record per image with all its captions and OCR tokens; test has no captions."""
    path = require(folder, f"TextCaps_0.1_{split}.json", f"the {split} annotations of TextCaps 0.1")
    ocr = ocr_tokens(folder, split)
    with structure(path):
        rows: dict[str, dict] = {}
        captions: dict[str, list[str]] = {}
        for row in load_json(path)["data"]:
            rows.setdefault(row["image_id"], row)
            known = captions.setdefault(row["image_id"], [])
            if split != "test":
                known.append(row["caption_str"])
        for image_id, row in rows.items():
            yield Captioned(
                id=image_id,
                source="textcaps",
                split=split,
                image=text_image(image_id, split),
                width=row.get("image_width"),
                height=row.get("image_height"),
                captions=tuple(captions[image_id]),
                ocr=ocr.get(image_id, ()),
            )
