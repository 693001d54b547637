"""A folder with a released Mamba-VL or Pythia-VL, as a run that can be asked without a config file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssm_retrieval import models
from ssm_retrieval.models import hub
from vlm import encoder as timm_encoder
from vlm.config import Run
from vlm.model import language_config

CONFIG = "config.json"
TOKENIZER = "EleutherAI/gpt-neox-20b"
LONGEST = 1024  # tokens of an answer, where neither harness nor user limits it further


def is_one(folder: Path) -> bool:
    """Return whether a folder's config.json is that of a released VLM: it names a vision encoder."""
    try:
        raw = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # who reads the file says what is wrong
    return isinstance(raw, dict) and "vision_encoder_name" in raw


def run(folder: Path, **more: Any) -> Run:
    """Describe a released checkpoint as a run without evaluation.

    Args:
        folder: The checkpoint. A tokenizer.json in it is used; else the tokenizer is that of Pythia.
        **more: Fields of `Run` that are known better, such as `layout`.

    Returns:
        The run.

    Raises:
        UserError: If the folder is no such checkpoint, or a field is wrong.
    """
    raw = hub.read_json(folder / CONFIG)
    given: dict[str, Any] = dict(
        name=folder.name,
        model=_preset(language_config(folder)),
        stages=(),
        evaluation={},
        checkpoint=str(folder),
        encoder=_encoder(raw.get("vision_encoder_name")),
        image_size=raw.get("image_size", 336),
        tokenizer=str(folder) if (folder / "tokenizer.json").exists() else TOKENIZER,
        max_new_tokens=LONGEST,
        cache=False,
    )
    return Run(**(given | more))


def _preset(config: Any) -> str:
    """The preset with the sizes of a config, or its family's name if there is none."""
    family = models.architecture_of(config).name
    for name in models.presets():
        if name.startswith(f"{family}-"):
            known = models.config(name)
            if (known.d_model, known.n_layer) == (config.d_model, config.n_layer):
                return name
    return family


def _encoder(named: Any) -> str:
    """The architecture in a name such as "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"."""
    return named.removeprefix("timm/").partition(".")[0] if isinstance(named, str) else timm_encoder.DEFAULT
