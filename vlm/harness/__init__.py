"""Trained runs and released checkpoints as models of other evaluation harnesses: lmms-eval and VLMEvalKit."""

from __future__ import annotations

from typing import Any

NAME = "ssm_retrieval_vlm"


def lmms_manifest() -> Any:
    """Return the `ModelManifest` by which lmms-eval finds the model; pyproject.toml has the entry point.

    It is a function in a file of its own because lmms-eval calls it while its own modules are imported.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, simple_class_path=f"{__name__}.lmms_model.RetrievalVLM")
