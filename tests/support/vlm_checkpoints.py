"""Released checkpoints at tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ssm_retrieval import models
from vlm import components
from vlm.model import VLM
from vlm.scenes import encoder as scenes

RELEASED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba-130m", dict(d_model=32, n_layer=2, norm="layer", residual_in_fp32=False)),
    "transformer": ("pythia-14m", dict(d_model=32, n_layer=2, n_head=4)),
}


def released(folder: Path, family: str, seed: int = 1) -> VLM:
    """Write a random checkpoint with the released names, and the encoder of scenes in place of EVA-02.

    Args:
        folder: Folder to write.
        family: "mamba" or "transformer".
        seed: Of the weights.

    Returns:
        The model with its encoder.
    """
    preset, options = RELEASED[family]
    torch.manual_seed(seed)
    lm = models.build(preset, seed=seed, vocab_size=len(components.text("scenes")), **options)
    model = VLM(lm, scenes.WIDTH, scenes.SceneEncoder()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    state = {key.removeprefix("lm."): value.detach().clone() for key, value in model.state_dict().items()}
    vision = dict(
        hidden_size=32, vision_encoder_name="scenes", select_layer=-2, select_feature="patch", image_size=64
    )
    if family == "mamba":
        state.pop("lm_head.weight")
        fields = vision | dict(
            architectures=["VLMambaCLIPLMHeadModel"], d_model=32, n_layer=2,
            vocab_size=lm.config.vocab_size, ssm_cfg={}, rms_norm=True, residual_in_fp32=True,
            fused_add_norm=True, pad_vocab_size_multiple=1,
        )  # fmt: skip
    else:
        fields = models.hub_configs.write_config(lm.config, None) | vision
        fields["architectures"] = ["VLCLIPGPTNeoXForCausalLM"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    components.text("scenes").tokenizer.save(str(folder / "tokenizer.json"))
    return model
