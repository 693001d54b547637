"""VLM runs that are saved as trained ones are, but untrained: made in a second."""

from __future__ import annotations

from pathlib import Path

import torch

from ssm_retrieval.training import store
from vlm import components, stages
from vlm.config import Run, Scenes, Stage
from vlm.scenes import encoder as scenes

SMALL = {"n_layer": 2, "d_model": 32}


def run(model: str, **more) -> Run:
    """A small run of a preset, never to be trained."""
    stage = Stage({"grounding": Scenes("grounding", 8)}, steps=1, batch_size=4, lr=1e-3)
    over = SMALL | ({"n_head": 2} if model.startswith("transformer") else {})
    over |= {"headdim": 16} if model.startswith("mamba2") else {}
    given = dict(model_overrides=over, precision="no", image_size=32, max_new_tokens=12, cache=False) | more
    return Run(given.pop("name", model), model, (stage,), {}, **given)


def save_encoder(out: Path) -> None:
    """An untrained vision encoder in `out`, so that none is trained."""
    torch.manual_seed(0)
    path = out / components.ENCODERS / f"{scenes.key()}.safetensors"
    path.parent.mkdir(parents=True)
    store.save_tensors(path, scenes.SceneEncoder().state_dict(), {})
    components.eyes.cache_clear()


def save(wanted: Run, out: Path) -> Path:
    """The folder of a run, with the weights that it begins with."""
    folder = out / wanted.stage_ids()[-1]
    folder.mkdir(parents=True)
    store.prepare(folder, {"plans": [wanted.to_dict()]}, 1)
    store.save_tensors(
        folder / stages.WEIGHTS, dict(components.model(wanted, scenes.WIDTH).named_parameters()), {}
    )
    store.write_json(folder / stages.RESULT, {"steps": 0, "seconds": 0.0})
    return folder


def stage(**more) -> Stage:
    """A stage that is valid as it is."""
    return Stage(**dict(data={"locate": Scenes("locate", 40)}, batch_size=4, lr=1e-3, steps=3) | more)


def planned(**more) -> Run:
    """A run that is valid as it is, of no small model: never to be built."""
    given = dict(name="a", model="mamba-tiny", stages=(stage(),), evaluation={}) | more
    return Run(**given)


def one_line(raised) -> str:
    """What `pytest.raises` caught, which must be one line of a bearable length."""
    text = str(raised.value)
    assert text and "\n" not in text and len(text) < 1000
    return text
