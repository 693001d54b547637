"""The sections of the report, in the order of the page: each a function from the runs to a `Section`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from analysis.report.parts import Section
from analysis.report.runs import Run
from analysis.report.sections import (
    attention,
    capacity,
    config,
    learning,
    lens,
    linear,
    patch,
    position,
    retention,
    updates,
)

SECTIONS: tuple[Callable[[Sequence[Run]], Section], ...] = (
    config.section,
    learning.section,
    position.section,
    updates.section,
    retention.section,
    capacity.section,
    attention.section,
    patch.section,
    linear.section,
    lens.section,
)
