"""Exit statuses and one-line errors that all commands share."""

import errno
import importlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import ssm_retrieval
from ssm_retrieval import cli
from ssm_retrieval.errors import MissingPackage, UserError
from ssm_retrieval.training import store
from ssm_retrieval.training.stopping import StopSignals


def raised(error, out="results"):
    def command():
        raise error

    return cli.guarded(command, out=out)


ROOT = Path(__file__).parents[2]
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("ssm_retrieval", "synthetic", "probes", "analysis", "vlm")
    for path in sorted((ROOT / package).rglob("*.py"))
    if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_says_its_version(module, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(["--version"])
    said = capsys.readouterr()
    assert ended.value.code == 0 and not said.err
    assert said.out == f"ssm-retrieval {ssm_retrieval.__version__}\n"


@pytest.mark.parametrize(
    "module", ["synthetic.run", "synthetic.sweep", "analysis.figures", "analysis.report"]
)
def test_the_version_is_said_before_torch_is_loaded(module):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{module!r}, '--version']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as ended: sys.exit(ended.code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_a_run_notes_the_version():
    assert store.environment(1)["version"] == ssm_retrieval.__version__


@pytest.mark.parametrize("kind", [UserError, MissingPackage])
def test_a_user_error_is_one_line_and_status_2(kind, capsys):
    assert raised(kind("--steps 0\n  must be positive")) == 2
    assert capsys.readouterr().err == "error: --steps 0 must be positive\n"


@pytest.mark.parametrize("error", [ValueError("shapes (2,) (3,)"), KeyError("plans"), OSError("truncated")])
def test_any_other_error_keeps_its_traceback_and_says_how_to_report_it(error, capsys):
    assert raised(error) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "in command" in said
    assert said.rstrip().endswith(cli.REPORT)


@pytest.mark.parametrize(
    "number, path, said",
    [
        (errno.ENOSPC, "results/a.json", "error: --out results: the disk is full"),
        (errno.ENOSPC, None, "error: --out results: the disk is full"),
        (errno.EACCES, "results/a.json", "error: --out results cannot be written (Permission denied)"),
        (errno.EACCES, "/data/x.png", "error: /data/x.png: Permission denied"),
        (errno.EISDIR, "elsewhere", "error: elsewhere: Is a directory; check the path"),
        (errno.ENAMETOOLONG, "results/long", "error: --out results: File name too long"),
    ],
)
def test_the_operating_systems_refusals_name_the_right_file(number, path, said, capsys):
    assert raised(OSError(number, os.strerror(number), path)) == 2
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


def test_a_failed_rename_names_the_file_that_the_user_knows(capsys):
    error = OSError(errno.EACCES, "Permission denied", "out/.a.json.tmp", None, "out/a.json")
    assert raised(error, out="") == 2
    assert "out/a.json: Permission denied" in capsys.readouterr().err


def test_ctrl_c_is_status_130_and_says_what_is_kept(capsys):
    assert raised(KeyboardInterrupt()) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_first_signal_asks_and_a_second_one_interrupts(number):
    before = signal.getsignal(number)
    stop = StopSignals()
    with stop:
        assert not stop.asked()
        signal.raise_signal(number)
        assert stop.asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_threads_out_of_range_are_refused():
    for threads in (-1, 10**6):
        with pytest.raises(UserError, match="--threads"):
            cli.use_threads(threads)


def test_only_a_regular_file_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match="not a regular file"):
            store.write_bytes(tmp_path / name, b"x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_link_stays_a_link_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real.json").write_bytes(b"old")
    (tmp_path / "link.json").symlink_to("real.json")
    store.write_bytes(tmp_path / "link.json", b"new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_bytes() == b"new"


@pytest.mark.parametrize("processes, cleaned", [("1", True), ("2", False)])
def test_one_of_several_processes_leaves_without_the_interpreters_clean_up(processes, cleaned):
    """What that clean-up does beside threads of gloo is a race; that there is none can be seen."""
    code = (
        "import atexit\nfrom ssm_retrieval import cli\n"
        "atexit.register(print, 'cleaned')\nprint('done')\ncli.leave(3)"
    )
    env = os.environ | {"WORLD_SIZE": processes}
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert left.returncode == 3 and left.stdout == "done\n" + "cleaned\n" * cleaned
