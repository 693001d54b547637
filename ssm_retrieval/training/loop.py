"""What every training loop does alike, whatever it trains: learning rates, checkpoints that are due, stops.

A loop's whole state is (weights, optimizer state, progress), so that one which was stopped after a checkpoint
(`training.store.checkpoint_tensors`, `restore`) ends with the numbers of an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ssm_retrieval.errors import UserError

SHARE = 0.05  # of the time, at most, goes into writing checkpoints


class Diverged(UserError):
    """The loss or a weight is not a finite number: nothing that follows would be."""


class Interrupted(Exception):
    """Raised after a checkpoint was written because `should_stop` said so."""


class CheckpointClock:
    """When a checkpoint is due: some seconds after the last one, and later where the disk is slow.

    Attributes:
        every: Seconds from the end of one checkpoint to the next. It grows until writing takes at most
            `SHARE` of the time.
    """

    def __init__(self, least: float, clock: Callable[[], float] = time.monotonic):
        """least: the interval to begin with, in seconds. clock: tells the time."""
        self.every, self.clock = least, clock
        self.last = clock()

    def due(self) -> bool:
        return self.clock() - self.last > self.every

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is done inside is a checkpoint; the next one is due as late as its duration asks for."""
        before = self.clock()
        yield
        self.last = self.clock()
        self.every = max(self.every, (self.last - before) / SHARE)


def warm_up(step: int, steps: int) -> float:
    """Factor on the peak rate at a step, from 0 on: (step + 1) / steps, and 1 after the warm-up."""
    return min(1.0, (step + 1) / max(1, steps))


def half_cosine(step: int, steps: int) -> float:
    """Factor on the peak rate at a step, from 0 on: (1 + cos(pi step / steps)) / 2, from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let all groups of parameters learn at one rate, times a group's own `lr_factor` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)
