"""`pytorch_model.bin`: the tensors in it by name, and the tensors themselves.

Before torch opens a file, its pickle is read here without making any tensor. That gives names, shapes and
dtypes, and checks that every tensor lies within the bytes that the file has for it. So neither a small file
that claims a large tensor nor one that is built to do harm (`models.unpickle`) reaches torch, which reads
with `weights_only`.
"""

from __future__ import annotations

import collections
import io
import mmap
import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssm_retrieval.errors import UserError
from ssm_retrieval.models.damage import damaged, what_it_is
from ssm_retrieval.models.unpickle import NoPickle, Restricted, scan

MOST_OPCODES = 5_000_000  # of the names and shapes: some hundred thousand tensors
MOST_NAMES = 2**26  # bytes of them in an archive
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch before 1.6
FLOATING = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool")
DTYPES = (*FLOATING, *INTEGERS, "complex64", "complex128")
STORAGES = dict(
    DoubleStorage=torch.float64, FloatStorage=torch.float32, HalfStorage=torch.float16,
    BFloat16Storage=torch.bfloat16, LongStorage=torch.int64, IntStorage=torch.int32, ShortStorage=torch.int16,
    CharStorage=torch.int8, ByteStorage=torch.uint8, BoolStorage=torch.bool, UntypedStorage=torch.uint8,
    ComplexFloatStorage=torch.complex64, ComplexDoubleStorage=torch.complex128,
)  # fmt: skip
STORAGE_MODULES = ("torch", "torch.storage", "torch.cuda")


@dataclass(frozen=True)
class Entry:
    """A tensor that a file claims to have.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numbers: int


def entries(file: Path) -> dict[str, Entry]:
    """Every tensor in the file by name.

    Raises:
        UserError: If something is wrong with the file; the line says what.
    """
    with _refused(file), open(file, "rb") as opened:
        return _by_name(_archived(opened) if zipfile.is_zipfile(opened) else _legacy(file, opened))


def _by_name(found: Any) -> dict[str, Entry]:
    # a state_dict may be an OrderedDict with notes about modules as attributes, which do not matter
    if not isinstance(found, dict):
        raise pickle.UnpicklingError(f"it holds a {type(found).__name__}, not tensors by name")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Entry):
            raise pickle.UnpicklingError(f"its {str(key)[:60]!r} is a {type(value).__name__}, not a tensor")
    return dict(found)


def is_archive(file: Path) -> bool:
    """Whether the file has the form of torch 1.6 and later, which can be mapped instead of read."""
    return zipfile.is_zipfile(file)


def tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that `entries` has accepted, on the CPU; views of the file where it is mapped."""
    with _refused(file):
        return torch.load(file, map_location="cpu", mmap=is_archive(file), weights_only=True)


@contextmanager
def _refused(file: Path) -> Iterator[None]:
    """Turn errors into one line that says what is wrong, without torch's advice to switch its checks off."""
    try:
        yield
    except (NoPickle, EOFError, zipfile.BadZipFile) as error:
        raise damaged(file, what_it_is(file) or "is cut short or no file of weights") from error
    except pickle.UnpicklingError as error:
        said = "torch refuses it" if "weights_only" in str(error) else str(error)
        remedy = "save the model's state_dict alone in it, or fetch it again"
        raise UserError(f"{file} is not a file of weights alone: {said}; {remedy}") from error
    except Exception as error:  # a damaged pickle or archive can raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise damaged(file, what_it_is(file) or "cannot be read as a file of weights") from error


def _archived(opened: Any) -> Any:
    """The names in an archive, in which torch stores every record uncompressed."""
    with zipfile.ZipFile(opened) as archive:
        records = {info.filename: info for info in archive.infolist()}
    for info in records.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise pickle.UnpicklingError(
                f"its record {info.filename[:60]!r} is compressed, and no weights are"
            )
    pickles = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise pickle.UnpicklingError("it is a zip archive without weights of torch")
    info = records[pickles[0]]
    if info.file_size > MOST_NAMES:
        raise pickle.UnpicklingError(
            f"its names take {info.file_size:,} bytes; at most {MOST_NAMES:,} are read"
        )
    opened.seek(info.header_offset + 26)
    opened.seek(sum(struct.unpack("<HH", opened.read(4))), io.SEEK_CUR)  # the record's own name and extras
    content = opened.read(info.file_size)
    scan(content, most=MOST_OPCODES)
    folder = pickles[0].removesuffix("data.pkl")
    reader = _Names(io.BytesIO(content))
    found = reader.load()
    for storage in reader.storages.values():
        record = records.get(f"{folder}data/{storage.key}")
        if record is None or record.file_size < storage.numbers * storage.dtype.itemsize:
            raise pickle.UnpicklingError("a tensor in it is larger than its bytes")
    return found


def _legacy(file: Path, opened: Any) -> Any:
    """The names in a file of torch before 1.6.

    It holds a magic number, the version, the machine, the names, the storages' keys and the bytes.
    """
    if file.stat().st_size == 0:
        raise EOFError
    with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, parts = 0, []
        for part in range(5):
            start, at = at, scan(data, at, MOST_OPCODES)
            reader = _Names(io.BytesIO(data[start:at]))
            parts.append(reader.load())
            if parts[0] != LEGACY_MAGIC:
                raise pickle.UnpicklingError("it is a pickle, but none that torch.save has written")
            if part == 3:
                storages = reader.storages
        asked = sum(8 + s.numbers * s.dtype.itemsize for s in storages.values())
        if asked > len(data) - at or set(parts[4]) != set(storages):
            raise EOFError
    return parts[3]


def _entry(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Entry:
    whole = [offset, *size, *stride]
    if not (isinstance(storage, _Storage) and all(isinstance(n, int) and 0 <= n < 2**62 for n in whole)):
        raise pickle.UnpicklingError("a tensor in it has no shape")
    shape = tuple(size)
    numbers = storage.numbers
    if dtype is not None:  # of an untyped storage, which counts bytes
        numbers = numbers * storage.dtype.itemsize // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    total = 1
    for n in shape:
        total *= n
    # a number that stands for many (stride 0) would be many in the model
    if total and (last >= numbers or total > numbers):
        raise pickle.UnpicklingError("a tensor in it is larger than its bytes")
    return Entry(shape, dtype or storage.dtype)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Entry:
    return _entry(storage, offset, size, stride)


def _tensor_of(storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> Entry:
    _, _, dtype, *_ = others  # requires_grad, hooks, dtype, metadata
    return _entry(storage, offset, size, stride, dtype)


def _parameter(data: Any, *_: Any) -> Any:
    return data


class _Names(Restricted):
    """Makes an `Entry` for every tensor."""

    known: ClassVar[dict[tuple[str, str], Any]] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_of,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        **{(m, name): dtype for m in STORAGE_MODULES for name, dtype in STORAGES.items()},
        **{("torch", name): getattr(torch, name) for name in DTYPES if hasattr(torch, name)},
    }

    def __init__(self, file: Any):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("it has persistent ids that torch.save does not write")
        dtype, key, numbers = pid[1], pid[2], pid[4]
        right = isinstance(dtype, torch.dtype) and isinstance(key, str | int) and isinstance(numbers, int)
        if not right or numbers < 0:
            raise pickle.UnpicklingError("it has a storage without a size")
        storage = _Storage(str(key), dtype, numbers)
        if len(pid) > 5 and pid[5] is not None:  # a view of a storage
            return self._view(storage, pid[5])
        self._note(storage)
        return storage

    def _note(self, storage: _Storage) -> None:
        known = self.storages.setdefault(storage.key, storage)
        if known != storage:
            raise pickle.UnpicklingError("a storage in it has two sizes")

    def _view(self, base: _Storage, view: Any) -> _Storage:
        self._note(base)
        key, offset, numbers = view
        whole = isinstance(offset, int) and isinstance(numbers, int)
        if not whole or not 0 <= offset <= offset + numbers <= base.numbers:
            raise pickle.UnpicklingError("a tensor in it is larger than its bytes")
        return _Storage(str(key), base.dtype, numbers)
