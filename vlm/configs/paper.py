"""The paper's six VLMs on its data, agnostic and instruction-first: for GPUs and the official files.

    VLM_DATA=/data accelerate launch -m vlm.train vlm/configs/paper.py --only mamba-790m-agnostic

`/data/<data set>` holds the official files, and its folder `DataSet.images` the pictures (docs/data.md).
Prompts, rates, schedule and mixture are those of the released code. Its scripts disagree on epochs (one for
Mamba, more for Pythia); here both families get one. Where nothing is published, such as the number of
devices, the value is our choice: batches of 64 x 4 and 32 x 4. We have not run this config: we had no such
data, weights or GPUs.
"""

from __future__ import annotations

import os
from typing import Any

from vlm.config import Data, Files, Run, Stage
from vlm.data.registry import DATASETS
from vlm.encoder import DEFAULT as ENCODER
from vlm.released import TOKENIZER

DATA = os.environ.get("VLM_DATA", "data")
IMAGE_SIZE = 336
MODELS = {
    "pythia-1b": "EleutherAI/pythia-1b",
    "mamba-790m": "state-spaces/mamba-790m",
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "mamba-1.4b": "state-spaces/mamba-1.4b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "mamba-2.8b": "state-spaces/mamba-2.8b",
}
MIXTURE = (
    "ai2d", "aokvqa", "coco", "docvqa", "gqa", "grit", "infographicvqa", "llava-instruct", "ocr-vqa",
    "refcoco", "refcoco+", "refcocog", "textcaps", "visual7w-telling", "visual7w-pointing",
    "visual-genome-regions", "visual-genome-qa", "vqav2", "vsr",
)  # fmt: skip
REFERRING = ("refcoco", "refcoco+", "refcocog")  # the released reader keeps an object's last expression
ASKED = (
    "coco", "nocaps", "vqav2", "gqa", "visual7w-telling", "vsr", "pope", "refcoco", "refcoco+", "refcocog",
    "visual7w-pointing", "textcaps", "textvqa", "ai2d",
)  # fmt: skip
LONGEST = max(DATASETS[name].max_new_tokens for name in ASKED)  # tokens of an answer


def files(name: str, split: str, **more: object) -> Files:
    """Return a split of a data set in its folder below DATA.

    Args:
        name: Name of the data set.
        split: Split of the data set.
        **more: Other fields of `vlm.config.Files`.

    Returns:
        The samples' declaration.
    """
    folder = f"{DATA}/{name}"
    images = f"{folder}/{DATASETS[name].images}"
    options = {"expressions": "last"} if name in REFERRING else {}
    settled: dict[str, Any] = dict(published=True, index=f"{DATA}/index", options=options)
    return Files(name, split, folder, images, **settled | more)


def evaluation() -> dict[str, Data]:
    """Return every data set's main split by its name, then the other splits as name-split."""
    main: dict[str, Data] = {name: files(name, DATASETS[name].asked[0]) for name in ASKED}
    more = [(name, split) for name in ASKED for split in DATASETS[name].asked[1:]]
    return main | {f"{name}-{split}": files(name, split) for name, split in more}


def training() -> dict[str, Data]:
    """Return the published mixture, one source per data set and region captions."""
    found: dict[str, Data] = {name: files(name, "train", filtered=True) for name in MIXTURE}
    # regions are also to be described
    found["visual-genome-captions"] = files(
        "visual-genome-regions", "train", regions="dense captioning", filtered=True
    )
    return found


def get_config() -> list[Run]:
    """Return one run per model and layout."""
    betas = (0.9, 0.999)  # the default of the released scripts' trainer
    align = Stage(
        {"llava": files("llava-pretrain", "train")},
        batch_size=256, lr=1e-3, epochs=1, train="connector", betas=betas, max_length=1024,
        workers=4,
    )  # fmt: skip
    instruct = Stage(
        training(), batch_size=128, lr=2e-5, epochs=1, betas=betas, max_length=1024, group=16, accumulate=2,
        workers=4,
    )  # fmt: skip
    return [
        Run(
            name=f"{name}-{layout}",
            model=name,
            init=init,
            encoder=ENCODER,
            image_size=IMAGE_SIZE,
            tokenizer=TOKENIZER,
            layout=layout,
            stages=(align, instruct),
            evaluation=evaluation(),
            seed=12345,
            precision="bf16",
            max_new_tokens=LONGEST,
            cache=False,  # 1.2 MB per image
        )
        for name, init in MODELS.items()
        for layout in ("agnostic", "instruction-first")
    ]
