"""Replace files as a whole or not at all, and remove what killed processes leave behind."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from ssm_retrieval.errors import UserError

ABANDONED = 24 * 3600.0  # seconds after which no process can still be writing a temporary file
TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole or not at all.

    Raises:
        OSError: If that fails; the old file is still there.
        UserError: As `replacing`.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; at the end its file, flushed to the disk, takes the place of `path`.

    Several processes may write the same file: each has its own temporary file, and the last one stays. A link
    stays a link, and what it points to is replaced. Permissions are those of any new file, by the umask.

    Raises:
        UserError: If `path` is a folder, a device or anything else that is not a regular file.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file and is not replaced; choose another name")
    mine = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = path.with_name(f".{path.name}.{mine}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield temporary
        os.chmod(temporary, mode)  # a library may have made the file anew, for its owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@lru_cache(maxsize=1)
def _machine() -> str:
    """Eight characters for this machine and process table; each container has a table of its own."""
    name = socket.gethostname()
    with suppress(OSError):
        name += str(os.stat("/proc/self/ns/pid").st_ino)
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def collect(*folders: Path) -> None:
    """Remove temporary files of killed processes from these folders, but not from folders in them.

    Files of live processes stay, whoever owns them. Only this machine's processes are known to live or not; a
    file of another machine, or of unknown origin, goes when it is a day old.
    """
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            with suppress(OSError):  # somebody else was faster, or it is not ours to remove
                if _left(path):
                    path.unlink()


def _left(path: Path) -> bool:
    known = TEMPORARY.fullmatch(path.name)
    if known and known[1] == _machine() and not _alive(int(known[2])):
        return True
    return time.time() - path.stat().st_mtime > ABANDONED


def _alive(process: int) -> bool:
    if os.name == "nt":  # where this would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
