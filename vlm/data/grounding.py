"""Phrases and boxes: RefCOCO/+/g, Visual7W pointing, Visual Genome and GRIT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ssm_retrieval.errors import UserError
from vlm.data.files import MissingFile, entry, load_json, load_plain_pickle, require, structure
from vlm.data.records import Box, Choice, Grounded, GroundedCaption, Question, Span, xywh_box
from vlm.data.vqa import shuffled


def _refer(source: str, refs_name: str, folder: Path, split: str, expressions: str) -> Iterator[Grounded]:
    if expressions not in ("all", "last"):
        raise UserError(f"expressions={expressions!r} must be 'all' or 'last'")
    what = f"the annotations of {source} (refer)"
    refs_path, boxes_path = require(folder, refs_name, what), require(folder, "instances.json", what)
    with structure(boxes_path):
        instances = load_json(boxes_path)
        images = {row["id"]: row for row in instances["images"]}
        boxes = {row["id"]: row["bbox"] for row in instances["annotations"]}
    with structure(refs_path):
        refs = [ref for ref in load_plain_pickle(refs_path) if ref["split"] == split]
        if expressions == "last":
            refs = list({ref["ann_id"]: ref for ref in refs}.values())
        for ref in refs:
            image = entry(images, ref["image_id"], boxes_path, "image")
            with structure(boxes_path):  # others may be empty
                box = xywh_box(*entry(boxes, ref["ann_id"], boxes_path, "annotation"))
            for sentence in ref["sentences"][-1 if expressions == "last" else 0 :]:
                yield Grounded(
                    id=str(sentence["sent_id"]),
                    source=source,
                    split=split,
                    image=image["file_name"],
                    width=image["width"],
                    height=image["height"],
                    phrase=sentence["raw"],
                    box=box,
                )


def refcoco(folder: Path, split: str, expressions: str = "all") -> Iterator[Grounded]:
    """Read RefCOCO, one record per expression.

    Args:
        folder: Folder with the official files.
        split: Split of the data set.
        expressions: "all", or "last" for one expression per object, as in the paper.

    Returns:
        Records.
    """
    return _refer("refcoco", "refs(unc).p", folder, split, expressions)


def refcoco_plus(folder: Path, split: str, expressions: str = "all") -> Iterator[Grounded]:
    """Read RefCOCO+, whose expressions have no words of place.

    Args:
        folder: Folder with the official files.
        split: Split of the data set.
        expressions: "all", or "last" for one expression per object, as in the paper.

    Returns:
        Records.
    """
    return _refer("refcoco+", "refs(unc).p", folder, split, expressions)


def refcocog(folder: Path, split: str, expressions: str = "all") -> Iterator[Grounded]:
    """Read RefCOCOg, whose expressions are long (the split of UMD).

    Args:
        folder: Folder with the official files.
        split: Split of the data set.
        expressions: "all", or "last" for one expression per object, as in the paper.

    Returns:
        Records.
    """
    return _refer("refcocog", "refs(umd).p", folder, split, expressions)


def visual7w_pointing(folder: Path, split: str) -> Iterator[Choice]:
    """Yield one record per question whose four choices are boxes, in an order set by the question's id.

    The boxes are in the file of the questions; where they are left out, in v7w_pointing_answers.json.
    """
    path = boxes_path = require(folder, "dataset_v7w_pointing.json", "the pointing questions of Visual7W")
    with structure(path):
        content = found = load_json(path)
        if "boxes" not in content:
            what = "Visual7W's dataset_v7w_grounding_annotations.zip"
            boxes_path = require(folder, "v7w_pointing_answers.json", what)
            found = load_json(boxes_path)
    with structure(boxes_path):
        rows = {row["box_id"]: row for row in found["boxes"]}
    with structure(path):
        for image in content["images"]:
            for qa in image["qa_pairs"] if image["split"] == split else ():
                ids, answer = shuffled(qa["answer"], qa["multiple_choices"], f"visual7w {qa['qa_id']}")
                shown = [entry(rows, i, boxes_path, "box") for i in ids]
                yield Choice(
                    id=str(qa["qa_id"]),
                    source="visual7w-pointing",
                    split=split,
                    image=image["filename"],
                    question=qa["question"],
                    choices=tuple(row.get("name", "") for row in shown),
                    answer=answer,
                    boxes=tuple(map(_sized, shown)),
                    kind=qa["type"],
                )


def _sized(row: dict[str, Any]) -> Box:
    return xywh_box(row["x"], row["y"], row["width"], row["height"])


def _genome_images(folder: Path, split: str) -> dict[int, dict[str, Any]]:
    """Images of a split by id: val are those in Karpathy's validation images of COCO, train all others."""
    what = "Visual Genome 1.2's image data, and Karpathy's dataset_coco.json"
    path, karpathy = require(folder, "image_data.json", what), require(folder, "dataset_coco.json", what)
    with structure(karpathy):
        held_out = {row["cocoid"] for row in load_json(karpathy)["images"] if row["split"] == "val"}
    with structure(path):
        rows = {row["image_id"]: row for row in load_json(path)}
        return {i: row for i, row in rows.items() if (row["coco_id"] in held_out) == (split == "val")}


def _genome_common(image: dict[str, Any], split: str) -> dict[str, Any]:
    name = "/".join(PurePosixPath(image["url"]).parts[-2:])
    return {"split": split, "image": name, "width": image["width"], "height": image["height"]}


def genome_regions(folder: Path, split: str) -> Iterator[Grounded]:
    """Yield one record per described region; regions wholly outside the image are left out."""
    images = _genome_images(folder, split)
    path = require(folder, "region_descriptions.json", "Visual Genome 1.2's region descriptions")
    with structure(path):
        for row in load_json(path):
            image = images.get(row["id"])
            if image is None:
                continue
            for region in row["regions"]:
                if _outside(region, image):
                    continue
                yield Grounded(
                    id=str(region["region_id"]),
                    source="visual-genome-regions",
                    phrase=region["phrase"],
                    box=_sized(region),
                    **_genome_common(image, split),
                )


def _outside(row: dict[str, Any], image: dict[str, Any]) -> bool:
    """Whether nothing of a region lies in its image."""
    x, y, width, height = row["x"], row["y"], row["width"], row["height"]
    empty = width <= 0 or height <= 0
    return empty or min(x + width, y + height) <= 0 or x >= image["width"] or y >= image["height"]


def genome_questions(folder: Path, split: str) -> Iterator[Question]:
    """Yield one record per question with its one answer."""
    images = _genome_images(folder, split)
    path = require(folder, "question_answers.json", "Visual Genome 1.2's question answers")
    with structure(path):
        for row in load_json(path):
            image = images.get(row["id"])
            if image is None:
                continue
            for qa in row["qas"]:
                yield Question(
                    id=str(qa["qa_id"]),
                    source="visual-genome-qa",
                    question=qa["question"],
                    answers=(qa["answer"],),
                    **_genome_common(image, split),
                )


def grit(folder: Path, split: str) -> Iterator[GroundedCaption]:
    """Yield one record per image of the img2dataset shards; chunks with the same characters become one span.

    Raises:
        MissingFile: If there is no image with its description.
    """
    empty = True
    for path in _grit_files(folder):
        empty = False
        with structure(path):
            row = load_json(path)
            width, height = int(row["width"]), int(row["height"])
            original = None
            if row.get("original_width"):  # img2dataset's; the data set's own descriptions lack it
                original = int(row["original_width"]), int(row["original_height"])
            found: dict[tuple[int, int], list[tuple[Box, float]]] = {}
            for start, end, x1, y1, x2, y2, score in row["noun_chunks"]:
                box = (x1 * width, y1 * height, x2 * width, y2 * height)
                found.setdefault((int(start), int(end)), []).append((box, score))
            yield GroundedCaption(
                id=path.stem,
                source="grit",
                split=split,
                image=path.with_suffix(".jpg").relative_to(folder).as_posix(),
                width=width,
                height=height,
                caption=row["caption"],
                spans=tuple(
                    Span(
                        start=start,
                        end=end,
                        boxes=tuple(box for box, _ in chunk),
                        score=max(score for _, score in chunk),
                    )
                    for (start, end), chunk in sorted(found.items())
                ),
                original=original,
            )
    if empty:
        raise MissingFile(
            f"{folder} has no SHARD/KEY.json next to its KEY.jpg: download GRIT's images with img2dataset"
        )


def _grit_files(folder: Path) -> Iterator[Path]:
    """Descriptions that have an image, a shard's names in memory at a time."""
    for shard in sorted(path for path in folder.glob("*/") if path.is_dir()):
        yield from sorted(path for path in shard.glob("*.json") if path.with_suffix(".jpg").exists())
