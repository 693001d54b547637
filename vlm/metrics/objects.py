"""Which objects a caption names: precision and recall of the phrases of rendered scenes."""

from __future__ import annotations

import re
from collections import Counter


def phrases(caption: str) -> Counter[str]:
    """Return the phrases that a caption lists, in lower case: "A red star, the blue digit 7 and ..."."""
    text = caption.strip().removesuffix(".").lower()
    listed = (" ".join(part.split()) for part in re.split(r",|\band\b", text))
    return Counter(part for part in listed if part)


def named(caption: str, reference: str) -> tuple[float, float]:
    """Compare the phrases of a caption with those of a reference, each as often as it occurs.

    Args:
        caption: The answer.
        reference: The scene's caption.

    Returns:
        Precision and recall; 0 where there are no phrases.
    """
    said, right = phrases(caption), phrases(reference)
    hits = (said & right).total()
    return hits / max(1, said.total()), hits / max(1, right.total())
