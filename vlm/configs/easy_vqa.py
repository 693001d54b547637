"""Both VLMs, tiny, on easy-VQA: `pip install easy-vqa && python -m vlm.train vlm/configs/easy_vqa.py`.

Both families see the same data in the same order, through the same frozen encoder.
"""

from __future__ import annotations

from typing import Any

from vlm.config import Files, Run, Stage

# As in vlm/configs/cpu_tiny.py: about half a million weights each.
MODELS: dict[str, dict[str, Any]] = {
    "transformer-tiny": dict(n_head=2, init_std=0.06),
    "mamba-tiny": {},
}
RATES = {"transformer-tiny": 2e-3, "mamba-tiny": 2e-3}
STEPS, BATCH = 1200, 32


def run(model: str, lr: float, seed: int = 0, part: str = "all") -> Run:
    """Return a run.

    Args:
        model: One of MODELS.
        lr: Peak learning rate.
        seed: Seed of weights and order of data.
        part: "all" trains on all training pictures and asks the test split; "fit" trains on seven in eight
            and asks the others, to choose a rate.

    Returns:
        The run.
    """
    train = Files("easy-vqa", "train", options={"part": part})
    held_out = Files("easy-vqa", "train", options={"part": "val"})
    return Run(
        name=f"{model.partition('-')[0]}-easy-{part}-lr{lr:g}-seed{seed}",
        model=model,
        model_overrides=MODELS[model],
        stages=(Stage({"easy": train}, steps=STEPS, batch_size=BATCH, lr=lr),),
        evaluation={"easy-vqa": Files("easy-vqa", "test") if part == "all" else held_out},
        tokenizer="words",
        seed=seed,
        max_new_tokens=4,
    )


def get_config() -> list[Run]:
    """Return one run per family."""
    return [run(model, RATES[model]) for model in MODELS]
