"""The official data sets, one declaration each. A new one is a reader and an entry here.

`vlm.data.registry` finds them by name. The evaluator (`vlm.results`), vlm/configs/paper.py and the tables of
docs/data.md read them.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm import metrics, prompts
from vlm.data import captions, documents, easy_vqa, filters, grounding, instructions, tasks, vqa
from vlm.data.declaration import DataSet
from vlm.data.records import Choice, Question, Record
from vlm.guesses import most_frequent_answer
from vlm.prompts import INSTRUCTIONS, Chunk

THREE = ("train", "val", "test")
REFS = ("train", "val", "testA", "testB")
OCR = "TextVQA_Rosetta_OCR_v0.2_{split}.json"
GENOME = ("image_data.json", "dataset_coco.json")


# --- the released evaluators' wording -----------------------------------------------------------------------


def heading_without_words(record: Record, chunks: Sequence[Chunk]) -> list[Chunk]:
    """Return the prompt of TextVQA, which has the heading of the words even if the image has none."""
    assert isinstance(record, Question)
    return list(chunks) if record.ocr else [Chunk(chunks[0].text + "\nOCR text:\n"), *chunks[1:]]


def no_question_mark_up(record: Record, chunks: Sequence[Chunk]) -> list[Chunk]:
    """Return the prompt of POPE: the question alone, without "Question:" and "Answer:"."""
    assert isinstance(record, Question)
    return [Chunk(INSTRUCTIONS["vqa"] + "\n"), Chunk(prompts.sentence(record.question) + "\n")]


def question_as_written(record: Record, chunks: Sequence[Chunk]) -> list[Chunk]:
    """Return the prompt of Visual7W pointing: one newline fewer, and the question's own case."""
    assert isinstance(record, Choice)
    asked = Chunk(f"\nQuestion: {prompts.sentence(record.question, keep_case=True)}\n")
    return [Chunk(INSTRUCTIONS["multiple choice"]), asked, *chunks[2:]]


# --- captions -----------------------------------------------------------------------------------------------

COCO = DataSet(
    name="coco",
    reader=captions.coco,
    splits=THREE,
    files=("dataset_coco.json",),
    task=tasks.CAPTIONING,
    metric=metrics.CAPTIONS,
    asked=("test",),
)
NOCAPS = DataSet(
    name="nocaps",
    reader=captions.nocaps,
    splits=("val", "test"),
    files=("nocaps_val_4500_captions.json", "nocaps_test_image_info.json"),
    task=tasks.CAPTIONING,
    metric=metrics.CAPTIONS,
    asked=("val",),
)
TEXTCAPS = DataSet(
    name="textcaps",
    reader=captions.textcaps,
    splits=THREE,
    files=("TextCaps_0.1_{split}.json", OCR),
    task=tasks.CAPTIONING,
    metric=metrics.CAPTIONS,
    asked=("val",),
)

# --- questions on photographs -------------------------------------------------------------------------------

VQAV2 = DataSet(
    name="vqav2",
    reader=vqa.vqav2,
    splits=("train", "val", "testdev", "test"),
    files=(
        "v2_OpenEnded_mscoco_{train2014,val2014,test-dev2015,test2015}_questions.json",
        "v2_mscoco_{train2014,val2014}_annotations.json",
    ),
    task=tasks.questions(),
    turns=20,
    metric=metrics.ANNOTATORS,
    asked=("val",),
)
GQA = DataSet(
    name="gqa",
    reader=vqa.gqa,
    splits=("train", "val", "testdev", "test"),
    files=("{split}_balanced_questions.json",),
    task=tasks.questions(),
    turns=20,
    scattered=True,
    metric=metrics.GQA,
    asked=("testdev",),
)
VISUAL7W_TELLING = DataSet(
    name="visual7w-telling",
    reader=vqa.visual7w_telling,
    splits=THREE,
    files=("dataset_v7w_telling.json",),
    task=tasks.choices(moved=True),
    turns=3,
    metric=metrics.VISUAL7W,
    asked=("test",),
)
VISUAL7W_POINTING = DataSet(
    name="visual7w-pointing",
    reader=grounding.visual7w_pointing,
    splits=THREE,
    files=("dataset_v7w_pointing.json", "v7w_pointing_answers.json"),
    opens_pictures=True,
    task=tasks.POINTING,
    turns=3,
    metric=metrics.VISUAL7W,
    reword=question_as_written,
    asked=("test",),
)
VSR = DataSet(
    name="vsr",
    reader=vqa.vsr,
    splits=("train", "dev", "test"),
    files=("{split}.jsonl",),
    task=tasks.MATCH,
    metric=metrics.TRUE_FALSE,
    asked=("test",),
)
POPE = DataSet(
    name="pope",
    reader=vqa.pope,
    splits=("random", "popular", "adversarial"),
    files=("coco_pope_{split}.json",),
    task=tasks.questions(yes_no=True),
    metric=metrics.YES_NO,
    reword=no_question_mark_up,
    asked=("adversarial", "random", "popular"),
)
AOKVQA = DataSet(
    name="aokvqa",
    reader=vqa.aokvqa,
    splits=THREE,
    files=("aokvqa_v1p0_{split}.json",),
    task=tasks.choices(),
    metric=metrics.LETTER,
)

# --- phrases and boxes --------------------------------------------------------------------------------------

REFCOCO = DataSet(
    name="refcoco",
    reader=grounding.refcoco,
    splits=REFS,
    files=("refs(unc).p", "instances.json"),
    task=tasks.GROUNDING,
    turns=0,
    scattered=True,
    metric=metrics.BOX,
    asked=("testA", "testB"),
)
REFCOCO_PLUS = DataSet(
    name="refcoco+",
    reader=grounding.refcoco_plus,
    splits=REFS,
    files=("refs(unc).p", "instances.json"),
    task=tasks.GROUNDING,
    turns=0,
    scattered=True,
    metric=metrics.BOX,
    asked=("testA", "testB"),
)
REFCOCOG = DataSet(
    name="refcocog",
    reader=grounding.refcocog,
    splits=THREE,
    files=("refs(umd).p", "instances.json"),
    task=tasks.GROUNDING,
    turns=0,
    scattered=True,
    metric=metrics.BOX,
    asked=("test",),
)
GENOME_REGIONS = DataSet(
    name="visual-genome-regions",
    reader=grounding.genome_regions,
    splits=("train", "val"),
    files=("region_descriptions.json", *GENOME),
    task=tasks.GROUNDING,
    turns=10,
    metric=metrics.BOX,
    keep=filters.small_regions,
)
GENOME_QUESTIONS = DataSet(
    name="visual-genome-qa",
    reader=grounding.genome_questions,
    splits=("train", "val"),
    files=("question_answers.json", *GENOME),
    task=tasks.questions(),
    turns=10,
    metric=metrics.USUAL,
)
GRIT = DataSet(
    name="grit",
    reader=grounding.grit,
    splits=("train",),
    files=("SHARD/KEY.json", "SHARD/KEY.jpg"),
    images=".",
    task=tasks.GROUNDED_CAPTIONING,
    metric=None,
    keep=filters.balanced,
)

# --- reading ------------------------------------------------------------------------------------------------

TEXTVQA = DataSet(
    name="textvqa",
    reader=documents.textvqa,
    splits=THREE,
    files=("TextVQA_0.5.1_{split}.json", OCR),
    task=tasks.questions(),
    turns=0,
    metric=metrics.ANNOTATORS_M4C,
    reword=heading_without_words,
    asked=("val",),
)
AI2D = DataSet(
    name="ai2d",
    reader=documents.ai2d,
    splits=THREE,
    files=("ai2d/questions/IMAGE.json", "ai2d/annotations/IMAGE.json", "ai2d_test_ids.csv"),
    images=".",
    task=tasks.choices(keep_case=True),
    metric=metrics.AI2D,
    asked=("test",),
)
DOCVQA = DataSet(
    name="docvqa",
    reader=documents.docvqa,
    splits=THREE,
    files=("train_v1.0_withQT.json", "val_v1.0_withQT.json", "test_v1.0.json"),
    task=tasks.questions(keep_case=True),
    turns=0,
    metric=metrics.ANLS,
)
INFOGRAPHICVQA = DataSet(
    name="infographicvqa",
    reader=documents.infographicvqa,
    splits=THREE,
    files=(
        "infographicsVQA_train_v1.0.json",
        "infographicsVQA_val_v1.0_withQT.json",
        "infographicsVQA_test_v1.0.json",
    ),
    task=tasks.questions(keep_case=True),
    turns=0,
    metric=metrics.ANLS,
)
OCR_VQA = DataSet(
    name="ocr-vqa",
    reader=documents.ocrvqa,
    splits=THREE,
    files=("dataset.json",),
    images=".",
    opens_pictures=True,
    task=tasks.questions(),
    turns=0,
    metric=metrics.USUAL,
    keep=filters.legible,
)

# --- drawn pictures -----------------------------------------------------------------------------------------

EASY_VQA = DataSet(
    name="easy-vqa",
    reader=easy_vqa.easy_vqa,
    splits=("train", "test"),
    files=("{split}/questions.json",),
    task=tasks.questions(),
    images=".",
    installed=easy_vqa.installed,
    metric=metrics.USUAL,
    blind=most_frequent_answer,
    max_new_tokens=8,
)

# --- conversations ------------------------------------------------------------------------------------------

LLAVA_PRETRAIN = DataSet(
    name="llava-pretrain",
    reader=instructions.llava_pretrain,
    splits=("train",),
    files=("blip_laion_cc_sbu_558k.json",),
    task=tasks.REQUESTED_CAPTION,
    metric=None,
)
LLAVA_INSTRUCT = DataSet(
    name="llava-instruct",
    reader=instructions.llava_instruct,
    splits=("train",),
    files=("llava_instruct_150k.json",),
    task=tasks.CHAT,
    metric=None,
)

OFFICIAL = (
    COCO, NOCAPS, TEXTCAPS, VQAV2, GQA, VISUAL7W_TELLING, VISUAL7W_POINTING, VSR, POPE, AOKVQA, REFCOCO,
    REFCOCO_PLUS, REFCOCOG, GENOME_REGIONS, GENOME_QUESTIONS, GRIT, TEXTVQA, AI2D, DOCVQA, INFOGRAPHICVQA,
    OCR_VQA, EASY_VQA, LLAVA_PRETRAIN, LLAVA_INSTRUCT,
)  # fmt: skip
