"""The probes that `python -m probes.run` knows, by name: one file each, one line each in `PROBES`."""

from __future__ import annotations

from probes.suite import attention, capacity, erasure, knockout, lens, linear, patch, retention, updates
from probes.suite.common import NotApplicable, Options, Probe

__all__ = ["PROBES", "NotApplicable", "Options", "Probe"]

PROBES: dict[str, Probe] = {
    "updates": updates.PROBE,
    "retention": retention.PROBE,
    "erasure": erasure.PROBE,
    "capacity": capacity.PROBE,
    "linear": linear.PROBE,
    "patch": patch.PROBE,
    "attention": attention.PROBE,
    "lens": lens.PROBE,
    "knockout": knockout.PROBE,
}
