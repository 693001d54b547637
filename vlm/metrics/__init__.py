"""Metrics of answers: the official ones, with the paper's own variants where they differ.

`Metric` and the metrics that data sets declare (`vlm.data.declaration.DataSet`) are in `catalogue`; the other
modules compute them.
"""

from vlm.metrics.catalogue import (
    ANNOTATORS,
    BOX,
    CAPTIONS,
    EXACT,
    LETTER,
    TRUE_FALSE,
    USUAL,
    YES_NO,
    Metric,
    Row,
)

__all__ = [
    "ANNOTATORS", "BOX", "CAPTIONS", "EXACT", "LETTER", "TRUE_FALSE", "USUAL", "YES_NO", "Metric", "Row",
]  # fmt: skip
