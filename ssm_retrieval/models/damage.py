"""What is wrong with a checkpoint's file: downloads fail in a few ways, and each has its remedy."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from ssm_retrieval.errors import UserError

LOOKED_AT = 512  # bytes
AGAIN = "fetch it again"


def damaged(file: Path, what: str, remedy: str = AGAIN) -> UserError:
    """The error for a damaged file.

    Args:
        file: The file.
        what: What is wrong, as a verb phrase, with its remedy behind a semicolon if it has one of its own.
        remedy: The remedy otherwise.

    Returns:
        The error, to be raised.
    """
    return UserError(f"{file} {what}" if ";" in what else f"{file} {what}; {remedy}")


def what_it_is(file: Path) -> str | None:
    """What the file is, as a verb phrase with its remedy unless that is `AGAIN`; None if unknown."""
    if file.is_dir():
        return "is a folder; give the file in its place"
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(LOOKED_AT)
    if size == 0:
        return "is empty"
    if not any(start) and size >= 8:
        return "holds nothing but zeros at its beginning"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` there, or fetch it again"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, such as a server's answer to a failed download"
    if file.suffix == ".safetensors":
        return _of_safetensors(file, start, size)
    if _header_of_safetensors(file, start, size) is not None:
        return "is a safetensors file under another name; rename it to model.safetensors"
    if file.suffix == ".json":
        return None
    if start.startswith(b"PK\x03\x04"):
        return "is cut short"
    if start.startswith(b"\x1f\x8b"):
        return "is compressed by gzip; unpack it"
    if _is_tar(file):
        return "is of torch before 0.1.10, which no longer can be read safely; convert it to safetensors"
    return _text(start, size)


def _text(start: bytes, size: int) -> str | None:
    """For a file of text, such as a server's error message."""
    try:
        said = " ".join(start.decode("ascii").split())
    except UnicodeDecodeError:
        return None
    if not said.isprintable():
        return None
    return f"is text ({said[:60]!r}{', ...' if size > 60 else ''}), not weights"


def _is_tar(file: Path) -> bool:
    try:
        return tarfile.is_tarfile(file)
    except (tarfile.TarError, OSError, EOFError, ValueError):
        return False


def _of_safetensors(file: Path, start: bytes, size: int) -> str | None:
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a pickle of torch under another name; rename it to pytorch_model.bin"
    needed = _header_of_safetensors(file, start, size)
    if needed is None:
        if 8 < size < 8 + int.from_bytes(start[:8], "little") < 2**27:
            return f"is cut short within its header, after {size:,} bytes"
        return _text(start, size)
    if size < needed:
        return f"is cut short: it has {size:,} of {needed:,} bytes"
    if size > needed:
        return f"has {size - needed:,} bytes too many behind its last tensor"
    return None


def _header_of_safetensors(file: Path, start: bytes, size: int) -> int | None:
    """The bytes that a safetensors file needs by its header; None if it has no such header."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:9] not in (b"{", b" ") or not 2 <= length <= min(size - 8, 2**27):
        return None
    try:
        with open(file, "rb") as opened:
            opened.seek(8)
            header = json.loads(opened.read(length))
        ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
