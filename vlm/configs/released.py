"""The paper's six released checkpoints on its data: evaluated, not trained (docs/harnesses.md).

    export VLM_DATA=/data VLM_CHECKPOINTS=/checkpoints
    python -m vlm.evaluate vlm/configs/released.py --only mambavl-790m

`/checkpoints` has a folder per checkpoint, such as `finetuned_mambavl_790m`. Without VLM_CHECKPOINTS they are
downloaded from the hub. `/data` is that of `paper.py`. We have not run this config: we had neither data nor
weights.
"""

from __future__ import annotations

import os

from vlm.config import Run
from vlm.configs import paper
from vlm.released import TOKENIZER

CHECKPOINTS = os.environ.get("VLM_CHECKPOINTS", "gpantaz")  # a folder, or who has them on the hub
MODELS = {name.replace("-", "vl-", 1): name for name in paper.MODELS}


def get_config() -> list[Run]:
    """Return one run per checkpoint."""
    evaluation = paper.evaluation()
    return [
        Run(
            name=name,
            model=model,
            checkpoint=f"{CHECKPOINTS}/finetuned_{name.replace('-', '_')}",
            encoder=paper.ENCODER,
            image_size=paper.IMAGE_SIZE,
            tokenizer=TOKENIZER,
            stages=(),
            evaluation=evaluation,
            max_new_tokens=paper.LONGEST,
            cache=False,
        )
        for name, model in MODELS.items()
    ]
