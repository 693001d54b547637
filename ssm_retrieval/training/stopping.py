"""Signals that stop a training without losing a step."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignals:
    """While active, Ctrl-C, SIGTERM and a closed terminal ask for a stop after the current step.

    A second signal is immediate: it raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested = False
        self.numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP"):  # not on Windows
            self.numbers.append(signal.SIGHUP)

    def asked(self) -> bool:
        """Whether a stop was asked for."""
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> None:
        self.before = {s: signal.signal(s, self._handle) for s in self.numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
