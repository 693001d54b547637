"""Names of data sets and their readers, which are imported when first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ssm_retrieval.errors import UserError
from vlm.data.records import Record


@dataclass(frozen=True)
class DataSet:
    """Where a reader is (``reader`` is MODULE.FUNCTION in vlm.data), its splits, files and kind of record."""

    reader: str
    splits: tuple[str, ...]
    files: tuple[str, ...]
    record: str


THREE = ("train", "val", "test")
REFS = ("train", "val", "testA", "testB")
OCR = "TextVQA_Rosetta_OCR_v0.2_{split}.json"
GENOME = ("image_data.json", "dataset_coco.json")

DATASETS: dict[str, DataSet] = {
    "coco": DataSet("captions.coco", THREE, ("dataset_coco.json",), "Captioned"),
    "nocaps": DataSet(
        "captions.nocaps",
        ("val", "test"),
        ("nocaps_val_4500_captions.json", "nocaps_test_image_info.json"),
        "Captioned",
    ),
    "textcaps": DataSet("captions.textcaps", THREE, ("TextCaps_0.1_{split}.json", OCR), "Captioned"),
    "vqav2": DataSet(
        "vqa.vqav2",
        ("train", "val", "testdev", "test"),
        (
            "v2_OpenEnded_mscoco_{train2014,val2014,test-dev2015,test2015}_questions.json",
            "v2_mscoco_{train2014,val2014}_annotations.json",
        ),
        "Question",
    ),
    "gqa": DataSet(
        "vqa.gqa", ("train", "val", "testdev", "test"), ("{split}_balanced_questions.json",), "Question"
    ),
    "visual7w-telling": DataSet("vqa.visual7w_telling", THREE, ("dataset_v7w_telling.json",), "Choice"),
    "visual7w-pointing": DataSet(
        "grounding.visual7w_pointing",
        THREE,
        ("dataset_v7w_pointing.json", "v7w_pointing_answers.json"),
        "Choice",
    ),
    "vsr": DataSet("vqa.vsr", ("train", "dev", "test"), ("{split}.jsonl",), "Statement"),
    "pope": DataSet(
        "vqa.pope", ("random", "popular", "adversarial"), ("coco_pope_{split}.json",), "Question"
    ),
    "aokvqa": DataSet("vqa.aokvqa", THREE, ("aokvqa_v1p0_{split}.json",), "Choice"),
    "refcoco": DataSet("grounding.refcoco", REFS, ("refs(unc).p", "instances.json"), "Grounded"),
    "refcoco+": DataSet("grounding.refcoco_plus", REFS, ("refs(unc).p", "instances.json"), "Grounded"),
    "refcocog": DataSet("grounding.refcocog", THREE, ("refs(umd).p", "instances.json"), "Grounded"),
    "visual-genome-regions": DataSet(
        "grounding.genome_regions", ("train", "val"), ("region_descriptions.json", *GENOME), "Grounded"
    ),
    "visual-genome-qa": DataSet(
        "grounding.genome_questions", ("train", "val"), ("question_answers.json", *GENOME), "Question"
    ),
    "grit": DataSet("grounding.grit", ("train",), ("SHARD/KEY.json", "SHARD/KEY.jpg"), "GroundedCaption"),
    "textvqa": DataSet("documents.textvqa", THREE, ("TextVQA_0.5.1_{split}.json", OCR), "Question"),
    "ai2d": DataSet(
        "documents.ai2d",
        THREE,
        ("ai2d/questions/IMAGE.json", "ai2d/annotations/IMAGE.json", "ai2d_test_ids.csv"),
        "Choice",
    ),
    "docvqa": DataSet(
        "documents.docvqa",
        THREE,
        ("train_v1.0_withQT.json", "val_v1.0_withQT.json", "test_v1.0.json"),
        "Question",
    ),
    "infographicvqa": DataSet(
        "documents.infographicvqa",
        THREE,
        (
            "infographicsVQA_train_v1.0.json",
            "infographicsVQA_val_v1.0_withQT.json",
            "infographicsVQA_test_v1.0.json",
        ),
        "Question",
    ),
    "ocr-vqa": DataSet("documents.ocrvqa", THREE, ("dataset.json",), "Question"),
    "llava-pretrain": DataSet(
        "instructions.llava_pretrain", ("train",), ("blip_laion_cc_sbu_558k.json",), "Conversation"
    ),
    "llava-instruct": DataSet(
        "instructions.llava_instruct", ("train",), ("llava_instruct_150k.json",), "Conversation"
    ),
}


def check(name: str, split: str) -> DataSet:
    """The data set of a name that has this split. Raises UserError, with the valid ones, for others."""
    if name not in DATASETS:
        raise UserError(f"data set {name!r} is unknown; the names are {', '.join(sorted(DATASETS))}")
    known = DATASETS[name]
    if split not in known.splits:
        raise UserError(f"split {split!r} of {name} is unknown; the splits are {', '.join(known.splits)}")
    return known


def read(name: str, folder: str | Path, split: str, **options: str) -> Iterator[Record]:
    """Records of one split of a data set whose official files are in ``folder``, in the files' order.

    ``options`` are the reader's own, such as ``expressions="last"`` of RefCOCO. Raises UserError for unknown
    names and splits (listing the valid ones) and for malformed and
    missing files; those of files may come with the first record.
    """
    known = check(name, split)
    module, function = known.reader.split(".")
    return getattr(import_module(f"vlm.data.{module}"), function)(Path(folder), split, **options)


def table() -> str:
    """The data sets as a table in Markdown; docs/data.md holds it."""
    rows = [
        f"| `{name}` | {', '.join(d.splits)} | {', '.join(f'`{file}`' for file in d.files)} | `{d.record}` |"
        for name, d in DATASETS.items()
    ]
    return "\n".join(["| data set | splits | files | record |", "|---|---|---|---|", *rows])
