"""Small files of every data set, in the published form."""

import json
import pickle
from pathlib import Path

IMG = {"id": 7, "file_name": "COCO_7.jpg", "width": 100, "height": 80}
REF = {"image_id": 7, "ann_id": 3, "split": "val"}
REFS = [REF | {"sentences": [{"sent_id": 1, "raw": "left dog"}, {"sent_id": 2, "raw": "the dog"}]}]
INSTANCES = {"images": [IMG], "annotations": [{"id": 3, "image_id": 7, "bbox": [10, 20, 30, 40]}]}
KARPATHY = {
    "images": [
        {
            "split": "val",
            "cocoid": 7,
            "filepath": "val2014",
            "filename": "a.jpg",
            "sentences": [{"raw": "A dog."}],
        }
    ]
}
OCR = {"data": [{"image_id": "x", "ocr_tokens": ["STOP"]}]}
TURNS = [{"from": "human", "value": "<image>\nSay."}, {"from": "gpt", "value": "A dog."}]
CHAT = [{"id": "1", "image": "0/1.jpg", "conversations": TURNS}]
V7W = {"question": "Q?", "qa_id": 5, "type": "what"}
PAGE = {"questionId": 1, "question": "Q?", "answers": ["12"]}
GENOME = {
    "image_data.json": [
        {"image_id": 1, "coco_id": 7, "width": 50, "height": 50, "url": "https://h/VG_100K/1.jpg"},
        {"image_id": 2, "coco_id": None, "width": 50, "height": 50, "url": "https://h/VG_100K_2/2.jpg"},
    ],
    "dataset_coco.json": KARPATHY,
}


def v7w(answer, others):
    """A question of Visual7W with its right answer and the other choices."""
    qa = V7W | {"answer": answer, "multiple_choices": others}
    return {"images": [{"split": "val", "filename": "v7w_1.jpg", "image_id": 1, "qa_pairs": [qa]}]}


NOT_OF_THE_PAPER = {"easy-vqa"}  # data sets that it neither trains on nor asks
# name: (split, files, what to check of the only or first record)
CASES = {
    "coco": ("val", {"dataset_coco.json": KARPATHY}, {"captions": ("A dog.",), "image": "val2014/a.jpg"}),
    "nocaps": (
        "val",
        {
            "nocaps_val_4500_captions.json": {
                "images": [IMG | {"domain": "near-domain"}],
                "annotations": [{"image_id": 7, "caption": c} for c in ("A.", "B.")],
            }
        },
        {"captions": ("A.", "B."), "domain": "near-domain", "width": 100},
    ),
    "textcaps": (
        "val",
        {
            "TextCaps_0.1_val.json": {"data": [{"image_id": "x", "caption_str": c} for c in ("A.", "B.")]},
            "TextVQA_Rosetta_OCR_v0.2_val.json": OCR,
        },
        {"captions": ("A.", "B."), "ocr": ("STOP",), "image": "train_images/x.jpg"},
    ),
    "vqav2": (
        "val",
        {
            "v2_OpenEnded_mscoco_val2014_questions.json": {
                "questions": [{"question_id": 9, "image_id": 7, "question": "Q?"}]
            },
            "v2_mscoco_val2014_annotations.json": {
                "annotations": [
                    {"question_id": 9, "answer_type": "other", "answers": [{"answer": "red"}] * 10}
                ]
            },
        },
        {"answers": ("red",) * 10, "image": "val2014/COCO_val2014_000000000007.jpg"},
    ),
    "gqa": (
        "val",
        {"val_balanced_questions.json": {"1": {"imageId": "n5", "question": "Q?", "answer": "yes"}}},
        {"answers": ("yes",), "image": "n5.jpg"},
    ),
    "visual7w-telling": ("val", {"dataset_v7w_telling.json": v7w("a", ["b", "c", "d"])}, {"question": "Q?"}),
    "visual7w-pointing": (
        "val",
        {
            "dataset_v7w_pointing.json": v7w(1, [2, 3, 4]),
            "v7w_pointing_answers.json": {
                "boxes": [{"box_id": i, "x": -2, "y": i, "width": 5, "height": 5} for i in range(1, 5)]
            },
        },
        {"id": "5"},
    ),
    "vsr": (
        "dev",
        {"dev.jsonl": {"image": "a.jpg", "caption": "C.", "label": 0, "relation": "under"}},
        {"label": False, "relation": "under"},
    ),
    "pope": (
        "random",
        {"coco_pope_random.json": {"question_id": 1, "image": "a.jpg", "text": "Q?", "label": "no"}},
        {"answers": ("no",)},
    ),
    "aokvqa": (
        "val",
        {
            "aokvqa_v1p0_val.json": [
                {
                    "question_id": "q",
                    "image_id": 7,
                    "question": "Q?",
                    "choices": list("abcd"),
                    "correct_choice_idx": 2,
                }
            ]
        },
        {"answer": 2, "choices": tuple("abcd"), "image": "000000000007.jpg"},
    ),
    **{
        name: (
            "val",
            {f"refs({by}).p": REFS, "instances.json": INSTANCES},
            {"box": (10.0, 20.0, 40.0, 60.0), "phrase": "left dog", "height": 80},
        )
        for name, by in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd"))
    },
    "visual-genome-regions": (
        "train",
        GENOME
        | {
            "region_descriptions.json": [
                {
                    "id": i,
                    "regions": [{"region_id": i, "phrase": "p", "x": -1, "y": 2, "width": 5, "height": 6}],
                }
                for i in (1, 2)
            ]
        },
        {"box": (0.0, 2.0, 4.0, 8.0), "image": "VG_100K_2/2.jpg"},
    ),
    "visual-genome-qa": (
        "val",
        GENOME
        | {
            "question_answers.json": [
                {"id": i, "qas": [{"qa_id": i, "question": "Q?", "answer": "A."}]} for i in (1, 2)
            ]
        },
        {"image": "VG_100K/1.jpg", "answers": ("A.",)},
    ),
    "grit": (
        "train",
        {
            "00000/1.json": {
                "caption": "a dog and a cat",
                "width": 100,
                "height": 50,
                "noun_chunks": [[10, 15, 0, 0, 0.5, 0.5, 0.7], [0, 5, 0.5, 0, 1, 1, 0.9]],
            },
            "00000/1.jpg": "",
        },
        {"image": "00000/1.jpg", "caption": "a dog and a cat"},
    ),
    "textvqa": (
        "val",
        {
            "TextVQA_0.5.1_val.json": {
                "data": [{"question_id": 1, "image_id": "x", "question": "Q?", "answers": ["stop"] * 10}]
            },
            "TextVQA_Rosetta_OCR_v0.2_val.json": OCR,
        },
        {"answers": ("stop",) * 10, "ocr": ("STOP",)},
    ),
    "ai2d": (
        "test",
        {
            "ai2d_test_ids.csv": 12,
            "ai2d/questions/12.png.json": {
                "questions": {"Q?": {"questionId": "12-0", "answerTexts": list("abcd"), "correctAnswer": 3}}
            },
            "ai2d/annotations/12.png.json": {"text": {"T1": {"replacementText": "B", "value": "leaf"}}},
        },
        {"answer": 3, "ocr": ("B: leaf",), "image": "ai2d/images/12.png"},
    ),
    "docvqa": (
        "val",
        {"val_v1.0_withQT.json": {"data": [PAGE | {"image": "documents/a.png"}]}},
        {"answers": ("12",)},
    ),
    "infographicvqa": (
        "val",
        {"infographicsVQA_val_v1.0_withQT.json": {"data": [PAGE | {"image_local_name": "1.jpeg"}]}},
        {"image": "1.jpeg"},
    ),
    "ocr-vqa": (
        "val",
        {"dataset.json": {"k": {"imageURL": "h/a.jpg", "questions": ["Q?"], "answers": ["A"], "split": 2}}},
        {"image": "images/k.jpg", "answers": ("A",)},
    ),
    "easy-vqa": (
        "train",
        {"train/questions.json": [["is there a red shape?", "yes", 3]]},
        {"image": "train/images/3.png", "answers": ("yes",), "kind": "yes/no"},
    ),
    "llava-pretrain": ("train", {"blip_laion_cc_sbu_558k.json": CHAT}, {"image": "0/1.jpg"}),
    "llava-instruct": ("train", {"llava_instruct_150k.json": CHAT}, {"image": "0/1.jpg"}),
}


def write(folder: Path, files: dict) -> None:
    """Write files by name: a pickle if the name ends in .p, else JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content, 2) if name.endswith(".p") else json.dumps(content).encode())
