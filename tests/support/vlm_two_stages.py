"""A VLM's run of two stages, also for configuration files that the tests write."""

from __future__ import annotations

from pathlib import Path

from vlm.config import Run, Scenes, Stage

FIRST = Stage(
    {"locate": Scenes("locate", 40, turns=2), "vqa": Scenes("vqa", 40, turns=2)},
    steps=8, batch_size=4, lr=2e-3, weights={"locate": 1, "vqa": 1}, layouts=("agnostic", "query-first"),
)  # fmt: skip
SECOND = Stage({"grounding": Scenes("grounding", 40)}, steps=4, batch_size=4, lr=1e-3)
ASKED = {
    "grounding": Scenes("grounding", 12, "heldout"),
    "count": Scenes("count", 12, "heldout"),
    "caption": Scenes("caption", 4, "heldout"),
}
SMALL = {"n_layer": 1, "d_model": 32}


def run(family="transformer", **more) -> Run:
    """A run of both stages."""
    over = SMALL | ({"n_head": 2} if family == "transformer" else {})
    given = dict(model_overrides=over, precision="no", image_size=32, max_new_tokens=12) | more
    return Run(
        given.pop("name", family), f"{family}-tiny", given.pop("stages", (FIRST, SECOND)), ASKED, **given
    )


# The first lines of a configuration file: processes that a command starts do not know this folder.
IMPORT = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
from vlm_two_stages import SECOND, run
"""
