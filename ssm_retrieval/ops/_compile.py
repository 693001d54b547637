"""Numba's `njit` with a cache that is found, fresh and whole wherever this package is installed.

Numba's own cache has three faults that users meet: importing a kernel fails where no folder is writable, as
in containers; a file that was cut off when it was written ends every later run; and changes of functions that
a kernel imports go unnoticed. So the cache's folder is named after a hash of all sources, a damaged file is
compiled again, and without a writable folder nothing is cached.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
from numba import njit
from numba.core import config
from numba.core.caching import FunctionCache

HERE = Path(__file__).parent


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `njit(nogil=True, **options)`, cached on disk where that is possible."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = njit(nogil=True, **options)(function)
        folder = None if config.DISABLE_JIT else cache_folder()
        if folder is not None:
            compiled._cache = _in_folder(function, folder)
        return compiled

    return decorate


class _Cache(FunctionCache):
    """A cache that counts as empty where it cannot be read, and stays as it is where it cannot be written."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # pickle raises nearly anything for a damaged file
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # the disk is full, or the folder gone
            super().save_overload(sig, data)


def _in_folder(function: Callable[..., Any], folder: Path) -> _Cache:
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        return _Cache(function)
    finally:
        config.CACHE_DIR = before


@lru_cache(maxsize=1)
def cache_folder() -> Path | None:
    """The first folder of `_places` that can be written to. Warns, in one line, if there is none."""
    for place in _places():
        folder = place / f"kernels-{_sources()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    warnings.warn(
        "kernels are compiled anew in every process, because no folder for them is writable; set "
        "NUMBA_CACHE_DIR to one that is",
        stacklevel=2,
    )
    return None


def _places() -> Iterator[Path]:
    """Where numba's variable says, beside the sources, or in the user's cache."""
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR)
    yield HERE / "__pycache__"
    try:
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssm-retrieval"
    except RuntimeError:  # no home
        return


def _sources() -> str:
    """A hash of all that a compiled kernel depends on and numba does not look at."""
    digest = hashlib.sha256(f"{numba.__version__} {config.BOUNDSCHECK}".encode())
    for path in sorted([HERE / "__init__.py", *HERE.glob("_simd*.py"), *HERE.glob("_*_kernels.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
