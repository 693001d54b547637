"""What all commands share: exit statuses, one-line errors, threads.

A command is three lines:

    def main(argv=None) -> int:
        options = parse(Options, argv, "python -m package.module")
        return guarded(lambda: run(options), out=options.out)
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import tyro

from ssm_retrieval import __version__
from ssm_retrieval.errors import UserError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
REPORT = (
    "this is a bug in ssm-retrieval, not a mistake of yours: please report the command and all lines above "
    "(CONTRIBUTING.md says where)"
)
STOPPED = "stopped; what was written is kept, the same command goes on from there"

Options = TypeVar("Options")
# The option --import of a command, a field `imports`: what `registry.use` takes.
Imports = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="import", metavar="MODULE")
]


def parse(options: type[Options], argv: Sequence[str] | None, prog: str) -> Options:
    """Command-line arguments as an instance of a dataclass.

    Unknown options and values print an error and exit with status 2. `--version` alone prints the version and
    exits with status 0.

    Args:
        options: The dataclass.
        argv: Arguments; None: the program's own.
        prog: Name of the command in its help.

    Returns:
        The instance.
    """
    write_anything()
    try:
        try:
            if list(sys.argv[1:] if argv is None else argv) == ["--version"]:
                print(f"ssm-retrieval {__version__}")
                sys.exit(0)
            return tyro.cli(options, args=argv, prog=prog)
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be told, and not when Python ends
    except BrokenPipeError:
        sys.exit(_nobody_reads())


def guarded(command: Callable[[], int], out: str | os.PathLike[str] = "", stopped: str = STOPPED) -> int:
    """Run a command and give its exit status.

    A `UserError`, or a refusal by the operating system, becomes one line and status 2. Any other exception
    prints its traceback and how to report it, and gives status 1.

    Args:
        command: Returns its own exit status.
        out: The command's output folder or file; errors of files in it name the option `--out`.
        stopped: What Ctrl-C prints.

    Returns:
        The exit status.
    """
    try:
        status = command()
        sys.stdout.flush()  # as in `parse`
        return status
    except UserError as error:
        return fail(str(error))
    except BrokenPipeError:
        return _nobody_reads()
    except OSError as error:
        if error.errno is None:  # a library's own, such as Pillow's
            return _bug()
        return fail(explain(error, out))
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return INTERRUPTED
    except Exception:
        return _bug()


def _nobody_reads() -> int:
    """`| head` has read enough: what is still to be printed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def _bug() -> int:
    traceback.print_exc()
    print(REPORT, file=sys.stderr)
    return FAILED


def fail(message: str) -> int:
    """Print one line that begins with "error:" and return the exit status of bad input."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return BAD_INPUT


def explain(error: OSError, out: str | os.PathLike[str]) -> str:
    """One line on what the operating system refused, which file, and what to do.

    It names `--out` only if the file lies there.
    """
    reason, out = error.strerror or str(error), os.fspath(out)
    # a rename names the temporary file first; the user knows the second
    named = error.filename if error.filename2 is None else error.filename2
    name = os.fsdecode(named) if isinstance(named, str | bytes | os.PathLike) else None
    ours = bool(out) and (name is None or _inside(name, out))
    where = f"--out {out}" if ours else name or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}: the disk is full; free some space and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        if ours:
            return f"{where} cannot be written ({reason}); choose another folder"
        return f"{where}: {reason}; give yourself access to it, or choose another file"
    if ours:
        return f"{where}: {reason}; choose another folder or remove the cause"
    return f"{where}: {reason}; check the path"


def _inside(name: str, folder: str) -> bool:
    try:
        return Path(name).absolute().is_relative_to(Path(folder).absolute())
    except OSError:
        return False


def write_anything() -> None:
    """Print what the terminal's encoding lacks, such as bars and curves, as question marks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def leave(status: int) -> NoReturn:
    """End the program; at once, without Python's own clean-up, if it is one process of several.

    Threads of gloo may hold tensors when a process group is destroyed already; letting go of them while the
    interpreter shuts down aborts the process, and torchrun then calls a finished run failed
    (github.com/pytorch/pytorch/pull/179291).

    Args:
        status: Exit status, what the command's `main` returned.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        with contextlib.suppress(OSError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def use_threads(threads: int) -> None:
    """Apply `--threads`; 0 leaves the number to PyTorch.

    Raises:
        UserError: For a number out of range.
    """
    import torch

    most = 4 * (os.cpu_count() or 1)
    if not 0 <= threads <= max(most, 64):
        raise UserError(
            f"--threads {threads} must lie in 0 .. {max(most, 64)}; give a number of cores, or 0 for "
            "PyTorch's choice"
        )
    if threads:
        torch.set_num_threads(threads)
