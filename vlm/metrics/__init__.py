"""Metrics of answers: the official ones, with the paper's own variants where they differ.

`Metric` and the metrics that data sets declare (`vlm.data.declaration.DataSet`) are in `catalogue`; the other
modules compute them. Names that end in "published" are what the released evaluators count (`released`).
"""

from vlm.metrics.catalogue import (
    AI2D,
    ANLS,
    ANNOTATORS,
    ANNOTATORS_M4C,
    BOX,
    CAPTIONS,
    EXACT,
    GQA,
    LETTER,
    OBJECTS,
    TRUE_FALSE,
    USUAL,
    VISUAL7W,
    YES_NO,
    Metric,
    Row,
)

__all__ = [
    "AI2D", "ANLS", "ANNOTATORS", "ANNOTATORS_M4C", "BOX", "CAPTIONS", "EXACT", "GQA", "LETTER", "OBJECTS",
    "TRUE_FALSE", "USUAL", "VISUAL7W", "YES_NO", "Metric", "Row",
]  # fmt: skip
