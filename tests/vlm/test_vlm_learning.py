"""A small VLM really learns to read digits and words in scenes of 3 x 3 patches (pytest -m slow)."""

from __future__ import annotations

import types

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("accelerate", reason="accelerate is not installed; .ci/run installs it")
pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

from vlm import components, evaluate, stages, train
from vlm.config import Run, Scenes, Stage
from vlm.scenes import encoder as scenes
from vlm.scenes.scene import sample_scene

pytestmark = pytest.mark.slow
SIDE, WIDTH = 3, sum(scenes.QUESTIONS.values())


class PerfectFeatures:
    """What each patch shows, as the annotation has it: one-hot answers to every question of the encoder."""

    def fill(self, source, progress=True):
        """Nothing to do."""

    def get(self, source, images):
        return torch.stack([self.of(source, int(image)) for image in images])

    def of(self, source, index):
        annotated, _ = scenes.annotation(sample_scene(source.seed, source.split, index), SIDE)
        hot = []
        for name, n in scenes.QUESTIONS.items():
            labels = torch.from_numpy(annotated[name])  # -1 = does not apply: all zeros
            hot.append(F.one_hot(labels.clamp(min=0), n) * (labels >= 0)[:, None])
        return 4.0 * torch.cat(hot, dim=1).float()  # about as long as a normed vector


def test_digits_and_words_are_read(tmp_path, monkeypatch):
    """Held-out scenes; guessing is right for a tenth of the digits. Half a minute on one core."""
    monkeypatch.setattr(components, "eyes", lambda *_: types.SimpleNamespace(width=WIDTH, side=SIDE))
    monkeypatch.setattr(components, "features", lambda *_: PerfectFeatures())
    tasks = ("reading-digit", "reading-word")
    stage = Stage({task: Scenes(task, 4000) for task in tasks}, steps=350, batch_size=16, lr=3e-3)
    run = Run(
        "reader", "transformer-tiny", (stage,), {task: Scenes(task, 100, "heldout") for task in tasks},
        model_overrides={"n_head": 4, "init_std": 0.06, "embedding_std": 0.1},
        precision="no", image_size=8 * SIDE, max_new_tokens=4, cache=False,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stages.train_stage(run, 0, tmp_path, train.accelerate([run]))
        rows, _ = evaluate.evaluate(run, tmp_path, device="cpu")
    finally:
        torch.set_num_threads(threads)
    accuracy = {row["task"]: row["value"] for row in rows if row["metric"] == "accuracy"}
    assert accuracy.keys() == set(tasks)
    assert min(accuracy.values()) > 0.9, accuracy
