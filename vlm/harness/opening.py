"""Load the model that the arguments of a harness name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssm_retrieval.errors import UserError
from vlm import released
from vlm.answering import Answerer, default_device

OPTIONS = ("encoder", "image_size", "layout", "tokenizer")  # of `Run`, for a released checkpoint


def opened(run: str | None, checkpoint: str | None, device: str | None, more: Mapping[str, Any]) -> Answerer:
    """Load the model that a harness's arguments name.

    Args:
        run: A trained run's folder.
        checkpoint: A released checkpoint's folder.
        device: Device of the model; None = a GPU if there is one.
        more: OPTIONS of the checkpoint.

    Returns:
        The model.

    Raises:
        UserError: If an argument is unknown, missing or no such folder.
    """
    odd = sorted(set(more) - set(OPTIONS))
    if odd:
        known = ", ".join(("run", "checkpoint", "batch_size", "device", *OPTIONS))
        raise UserError(f"argument {odd[0]!r} is unknown; use {known}")
    device = device or default_device()
    if run is not None and checkpoint is None and not more:
        return Answerer.open(Path(run), device)
    if checkpoint is not None and run is None:
        place = Path(checkpoint).resolve()
        return Answerer.of(released.run(place, **more), place.parent, device)
    raise UserError("give run=FOLDER, or checkpoint=FOLDER with or without " + ", ".join(OPTIONS))
