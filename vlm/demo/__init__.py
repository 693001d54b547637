"""`python -m vlm.demo [RUN_A RUN_B]`: ask two trained VLMs the same; see what each one read and wrote."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"


def given() -> list[Path]:
    """Return the folders of the two models that come with the toolkit, the Transformer first."""
    return sorted((path.parent for path in MODELS.glob("*/stage.json")), reverse=True)
