"""Sides of a comparison in processes of their own that take turns, and the ratio of their times.

No allocator, thread pool or compiled kernel of one side touches the other, and a process that waits for its
turn reads from a pipe and needs no core. Sides go in the order A B, B A, A B, ..., so that neither is always
the first, and a slow spell of the machine hits both of a pair.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from benchmarks.common import Ratio, paired, peak

Calls = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: Who it is, such as "ours" or "llama.cpp".
        make: A module's function that prepares the calls to time, by name. It runs in the side's process.
        options: Arguments of `make`.
    """

    name: str
    make: Callable[..., Calls]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Raced:
    """What a race measured.

    Attributes:
        seconds: Side -> call -> seconds of each pair.
        answers: Side -> call -> what it returned last, as NumPy or plain values.
        peak_mib: Side -> the most memory its process held.
    """

    seconds: dict[str, dict[str, list[float]]]
    answers: dict[str, dict[str, Any]]
    peak_mib: dict[str, float]

    def ratio(self, call: str, ours: str, theirs: str) -> Ratio:
        """Return how many times as fast `ours` is in a call."""
        return paired(self.seconds[theirs][call], self.seconds[ours][call])


class Failed(RuntimeError):
    """A side could not be made or called.

    Args:
        side: Its name.
        text: What happened, such as its traceback.
    """

    def __init__(self, side: str, text: str):
        super().__init__(text)
        self.side = side

    def reason(self) -> str:
        """Return why a peer is left out, in one line.

        Raises:
            Failed: If the side is ours: that is a bug, which keeps its traceback.
        """
        if self.side.startswith("ours"):
            raise self
        return str(self).strip().splitlines()[-1]


class Process:
    """A side in a process of its own, to be used in a `with` statement.

    Args:
        side: The side.
        threads: Threads that it computes with.
        kept: Keep freed memory (`ops.memory.keep_freed_memory`) instead of glibc's default.

    Raises:
        Failed: If it could not be made.
    """

    def __init__(self, side: Side, threads: int, kept: bool):
        self.side = side
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, side, threads, kept), daemon=True)
        self._process.start()
        there.close()
        self._receive()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.join()

    def call(self, name: str) -> tuple[float, Any]:
        """Return the seconds of one call, and what it returned.

        Raises:
            Failed: If it raised an exception, or its process died.
        """
        self._pipe.send(name)
        seconds, answer = self._receive()
        return seconds, answer

    def peak(self) -> float:
        """Return the most memory that the process has held so far, in MiB."""
        self._pipe.send(None)
        found: float = self._receive()
        return found

    def _receive(self) -> Any:
        try:
            good, found = self._pipe.recv()
        except EOFError:
            raise Failed(self.side.name, f"the process of {self.side.name} died") from None
        if not good:
            raise Failed(self.side.name, f"{self.side.name}:\n{found}")
        return found


def _serve(pipe: Any, side: Side, threads: int, kept: bool) -> None:
    try:
        torch.set_num_threads(threads)
        if kept:
            from ssm_retrieval.ops.memory import keep_freed_memory

            keep_freed_memory()
        calls = side.make(**side.options)
        pipe.send((True, None))
        while True:
            name = pipe.recv()
            if name is None:
                pipe.send((True, peak()))
                continue
            started = time.perf_counter()
            answer = calls[name]()
            took = time.perf_counter() - started
            if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], float):
                took, answer = answer  # the call has timed a part of itself
            pipe.send((True, (took, answer)))
    except EOFError:
        return
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def race(
    sides: Sequence[Side],
    calls: Sequence[str],
    pairs: int,
    *,
    threads: int,
    kept: bool = True,
    warmup: int = 1,
    checked: Sequence[str] = (),
) -> Raced:
    """Time calls of several sides that take turns.

    Args:
        sides: The sides; all must fit into memory at once.
        calls: Names of calls that every side has.
        pairs: Rounds that count.
        threads: Threads of a side.
        kept: As for `Process`.
        warmup: Rounds before those.
        checked: Names of calls whose answers alone are wanted; they come first and are not timed.

    Returns:
        Their times.

    Raises:
        Failed: If a side could not be made or called.
    """
    seconds: dict[str, dict[str, list[float]]] = {side.name: {name: [] for name in calls} for side in sides}
    answers: dict[str, dict[str, Any]] = {side.name: {} for side in sides}
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(side, threads, kept)) for side in sides]
        for name in checked:
            for process in processes:
                answers[process.side.name][name] = process.call(name)[1]
        for turn in range(-warmup, pairs):
            for name in calls:
                for process in processes if turn % 2 == 0 else reversed(processes):
                    took, answers[process.side.name][name] = process.call(name)
                    if turn >= 0:
                        seconds[process.side.name][name].append(took)
        peaks = {process.side.name: process.peak() for process in processes}
    return Raced(seconds, answers, peaks)
