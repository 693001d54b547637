"""Record named tensors of forward passes, in memory or, above a budget, on disk.

    with probes.record(model, ["*.mixer.hook_ssm_state"], positions=[0, 511, -1]) as cache:
        model(ids)
    cache["blocks.3.mixer.hook_ssm_state"]          # (B, 3, E, N)

States at chosen positions come from the same fast scan that computes the output. The whole (B, L, E, N) is
made only if every position is asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from probes.hooks import Probe, absolute, at_work
from probes.names import resolve
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.models.hooks import Point, points

CHANNEL_AXES = ("D", "E", "H", "M", "J")  # at most one of them stands in a name's axes
GIB = 2**30


class Recording(Mapping[str, Tensor]):
    """Recorded tensors by name, in the order of the forward pass.

    After several forward passes `cache[name]` joins their tensors along the batch axis; `cache.calls(name)`
    lists them call by call. Tensors on disk are read when they are asked for.
    """

    def __init__(self, names: Iterable[str]):
        self._calls: dict[str, list[Tensor | Path]] = {name: [] for name in names}

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Recording:
        """Open what an earlier `record(folder=...)` has written to disk; calls that fitted the budget are not
        there.

        Args:
            folder: The folder given to `record`.

        Returns:
            The recording. Its tensors stay on disk until they are asked for.

        Raises:
            UserError: The folder holds no recordings.
        """
        files = sorted(Path(folder).glob("[0-9]*/*.safetensors"))
        if not files:
            raise UserError(f"folder={str(folder)!r} holds no recordings; give one that record() has written")
        recording = cls(dict.fromkeys(path.stem for path in files))
        for path in files:
            recording.add(path.stem, path)
        return recording

    def calls(self, name: str) -> list[Tensor]:
        """The tensors of one name, one per forward pass. A name that is not recorded is a KeyError."""
        return [load_file(x)["x"] if isinstance(x, Path) else x for x in self._calls[name]]

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of one name, of all forward passes along the batch axis.

        Raises:
            KeyError: The name is not recorded, or no forward pass has been made yet.
            UserError: Shapes of the passes differ in more than the batch.
        """
        found = self.calls(name)
        if not found:
            raise KeyError(f"{name}: no forward pass has been recorded yet")
        shapes = sorted({tuple(x.shape[1:]) for x in found})
        if len(shapes) > 1:
            raise UserError(f"{name} differs in shape between calls ({shapes}); use cache.calls(name)")
        return found[0] if len(found) == 1 else torch.cat(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def num_bytes(self) -> int:
        """Bytes held in memory, without what is on disk."""
        held = (x for calls in self._calls.values() for x in calls if isinstance(x, Tensor))
        return sum(x.numel() * x.element_size() for x in held)

    def add(self, name: str, x: Tensor | Path) -> None:
        """Append the tensor of one more forward pass, or the path of its file."""
        self._calls[name].append(x)


@contextmanager
def record(
    model: LanguageModel,
    names: str | Iterable[str],
    *,
    positions: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    grad: bool = False,
    budget: int | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Iterator[Recording]:
    """Record named tensors of every forward pass inside the `with` statement.

    The model's output does not change, bit for bit. The one exception is `mixer.hook_y` of Mamba: its use
    takes the gate out of the fused scan, which changes roundings. With `seq_ids` rows are single sequences,
    as `ssm_retrieval.models.packing` makes them. On CUDA, states need the token-by-token reference scan,
    because mamba-ssm's kernel returns none.

    Args:
        model: Any model of the library.
        names: Names of `model.hook_names()`, or patterns with `*`; `probes.NAMES` has shapes and meaning.
        positions: Indices along the length axis of each call, recorded in this order; negative ones count
            from the end. Of attention scores and patterns they choose queries. None: all.
        layers: Indices of the blocks to which patterns are restricted. None: all.
        channels: Indices along the axis D, E, H, M or J of each name; names without one (B, C) stay whole.
            None: all.
        grad: Keep the autograd graph, instead of detached tensors. A gradient with respect to a state needs
            an edit of it (`intervene`), because the fused scan does not compute its output from the recorded
            state.
        budget: Bytes that recordings may hold. None: half of the memory that is free now.
        folder: New or empty folder for the calls that exceed the budget, as `<call>/<name>.safetensors`.

    Yields:
        The recording, which fills with every forward pass.

    Raises:
        UserError: A name, layer, position or channel does not exist, options exclude each other, or, before
            anything is computed, a call needs more than the budget and has no folder.
    """
    found, known = resolve(model, names, layers), points(model)
    if grad and folder is not None:
        raise UserError("grad=True keeps tensors in memory; it cannot be combined with folder=")
    if positions is not None and len(positions) == 0:
        raise UserError("positions=[] records nothing; give positions, or None for all")
    path = None if folder is None else Path(folder)
    if path is not None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"folder={str(path)!r} is not an empty folder; name a new one")
    weight = next(model.parameters())
    recorder = Recorder(
        {name: known[name] for name in found},
        Recording(found),
        positions=None if positions is None else [int(p) for p in positions],
        channels=None if channels is None else [int(c) for c in channels],
        grad=grad,
        budget=available_memory(weight.device) // 2 if budget is None else budget,
        folder=path,
        itemsize=torch.promote_types(weight.dtype, torch.float32).itemsize,
    )
    with at_work(model, recorder):
        yield recorder.recording


def recorded(
    model: LanguageModel,
    input_ids: Tensor | None,
    names: str | Iterable[str],
    *,
    inputs_embeds: Tensor | None = None,
    **options: Any,
) -> Recording:
    """Record one forward pass, without gradients and without computing logits.

    Args:
        model: Any model of the library.
        input_ids: (B, L) int64. None: `inputs_embeds` is given.
        names: Names or patterns of `record`.
        inputs_embeds: (B, L, D), instead of token ids.
        **options: Of `record`.

    Returns:
        The recording.
    """
    given = inputs_embeds if input_ids is None else input_ids
    nothing = torch.zeros(0, dtype=torch.int64, device=None if given is None else given.device)
    with torch.no_grad(), record(model, names, **options) as cache:
        model.hidden(input_ids, at=nothing, inputs_embeds=inputs_embeds)
    return cache


class Recorder(Probe):
    """The probe of `record`, which settles the arguments. `itemsize`: bytes of a number."""

    def __init__(
        self,
        chosen: dict[str, Point],
        recording: Recording,
        positions: list[int] | None,
        channels: list[int] | None,
        grad: bool,
        budget: int,
        folder: Path | None,
        itemsize: int,
    ):
        self.names = frozenset(chosen)
        self.recording = recording
        self._chosen, self._positions, self._channels = chosen, positions, channels
        self._grad, self._budget, self._folder, self._itemsize = grad, budget, folder, itemsize
        self._call, self._streams = -1, False
        self._at: list[int] = []
        for name, point in chosen.items():
            axis = channel_axis(point)
            wrong = [c for c in channels or () if axis and not 0 <= c < point.sizes[point.axes[axis]]]
            if wrong and axis:
                size = point.sizes[point.axes[axis]]
                raise UserError(f"channels={channels}: {name} has channels 0 to {size - 1}, not {wrong[0]}")

    def begin(self, batch: int, length: int, keys: int) -> None:
        """Settle the positions of a call, and whether it goes to disk.

        Args:
            batch: Sequences, B.
            length: Tokens of this call, L.
            keys: Tokens that attention sees, S.

        Raises:
            UserError: The call needs more than the budget and has no folder, or one name alone exceeds the
                budget.
        """
        chosen = list(range(length)) if self._positions is None else self._positions
        self._at = absolute(chosen, length, "record")
        self._call += 1
        sizes = {"B": batch, "L": len(self._at), "S": keys}
        whole = {name: self._bytes(point, sizes, None) for name, point in self._chosen.items()}
        kept = {name: self._bytes(point, sizes, self._channels) for name, point in self._chosen.items()}
        # a tensor has all its channels when it is made, one at a time
        largest = max((whole[n] - kept[n] for n in kept), default=0)
        need, held = sum(kept.values()) + largest, self.recording.num_bytes()
        self._streams = need + held > self._budget
        if not self._streams:
            return
        shape = f"{len(self.names)} names, batch {batch}, {len(self._at)} of {length} positions"
        if self._folder is None:
            raise UserError(
                f"recording needs {gib(need)} for this call ({shape}) and holds {gib(held)}, more than the "
                f"budget of {gib(self._budget)}; choose positions=, layers= or channels=, "
                "give folder= to write to disk, or raise budget="
            )
        name = max(whole, key=lambda n: whole[n])
        if whole[name] > self._budget:
            raise UserError(
                f"{name} alone needs {gib(whole[name])} ({shape}), more than the budget of "
                f"{gib(self._budget)}; choose positions= or raise budget="
            )

    def _bytes(self, point: Point, sizes: dict[str, int], channels: list[int] | None) -> int:
        dims = [sizes[axis] if axis in sizes else point.sizes[axis] for axis in point.axes]
        axis = channel_axis(point)
        if channels is not None and axis is not None:
            dims[axis] = len(channels)
        return math.prod(dims) * self._itemsize

    def records(self, name: str) -> list[int]:
        return self._at

    def record(self, name: str, x: Tensor, positions: list[int]) -> None:
        point = self._chosen[name]
        if self._at != positions:
            where = {t: i for i, t in enumerate(positions)}
            index = torch.tensor([where[t] for t in self._at], dtype=torch.int64, device=x.device)
            x = x.index_select(point.axes.index("L"), index)
        axis = channel_axis(point)
        if self._channels is not None and axis is not None:
            x = x.index_select(axis, torch.tensor(self._channels, dtype=torch.int64, device=x.device))
        if not self._grad:
            x = x.detach()
            if x.untyped_storage().nbytes() > x.numel() * x.element_size():
                x = x.clone()  # a view would keep alive all of what it is cut from
        self.recording.add(name, self._written(name, x) if self._streams else x)

    def _written(self, name: str, x: Tensor) -> Path:
        assert self._folder is not None
        path = self._folder / f"{self._call:05d}" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        save_file({"x": x.contiguous()}, unfinished)
        unfinished.replace(path)
        return path


def channel_axis(point: Point) -> int | None:
    """The axis of a name's tensor that `channels=` chooses from; None if it has none."""
    return next((i for i, axis in enumerate(point.axes) if axis in CHANNEL_AXES), None)


def gib(size: int) -> str:
    """A size in bytes as text, such as `1.5 GiB`."""
    return f"{size / GIB:.3g} GiB"


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now; half of all memory on systems that do not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1024
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
