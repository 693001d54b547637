"""Stopping VLM training: diverged runs, signals before and between steps, helpers whose parent is gone."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from vlm_tiny import tiny

pytest.importorskip("accelerate", reason="accelerate is not installed; .ci/run installs it")
pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

import vlm_runs

from ssm_retrieval.errors import UserError
from ssm_retrieval.terminal import plain_console
from ssm_retrieval.training import session, store
from ssm_retrieval.training.loop import CheckpointClock
from vlm import components, folders, stages, train
from vlm.scenes import encoder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path):
    vlm_runs.save_encoder(tmp_path)
    return tmp_path


def train_one(wanted, out, **more):
    stages.train_stage(wanted, 0, out, train.accelerate([wanted]), **more)


# --- diverged runs ------------------------------------------------------------------------------------------


def test_a_rate_that_is_too_high_ends_in_one_line_without_a_result(out):
    wanted = tiny(lr=100.0, steps=60, grad_clip=0.0, weight_decay=1e5)
    with pytest.raises(
        UserError, match=r"has diverged: the training loss is (nan|inf) at step .* of stage 1; lower lr=100"
    ):
        train_one(wanted, out)
    folder = out / wanted.stage_ids()[0]
    assert not (folder / folders.RESULT).exists() and not (folder / folders.WEIGHTS).exists()
    assert "NaN" not in (folder / folders.METRICS).read_text()


def test_weights_that_diverge_in_the_last_step_are_not_written(out, monkeypatch):
    def broken(loss_of, optimizer, batch, *_):
        with torch.no_grad():
            next(loss_of.model.lm.parameters()).fill_(float("nan"))
        return [1.0] * len(batch.samples)

    monkeypatch.setattr(stages, "update", broken)
    wanted = tiny(steps=1)
    with pytest.raises(UserError, match="has diverged: a weight is no finite number"):
        train_one(wanted, out)
    assert not (out / wanted.stage_ids()[0] / folders.RESULT).exists()


# --- checkpoints --------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("due", [(1, 3), ()])
def test_a_checkpoint_is_kept_of_the_last_step_at_which_it_was_due(out, monkeypatch, due):
    steps = []

    class Clock(CheckpointClock):
        def due(self):
            return len(steps) in due

    def killed_at_4(row):
        steps.append(row["step"])
        if row["step"] == 4:
            raise Killed

    monkeypatch.setattr(session, "CheckpointClock", Clock)
    wanted = tiny(steps=6)
    with pytest.raises(Killed):
        train_one(wanted, out, listener=killed_at_4)
    path = out / wanted.stage_ids()[0] / folders.CHECKPOINT
    assert path.exists() == bool(due)
    if due:
        assert store.load_tensors(path)[1]["step"] == 3
    steps.clear()
    train_one(wanted, out, listener=lambda row: steps.append(row["step"]))
    assert steps == list(range(4 if due else 1, 7))


# --- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_before_the_first_step_a_signal_stops_at_once_and_later_after_the_step(number):
    before = signal.getsignal(number)
    stop = train.Stop()
    with stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(1)
        stop.training = True
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.asked()
        with pytest.raises(KeyboardInterrupt):  # the second one is immediate
            os.kill(os.getpid(), number)
            time.sleep(1)
    assert signal.getsignal(number) == before


CONFIG = """
from vlm_tiny import tiny
def get_config():
    return [tiny()]
"""


def test_ctrl_c_while_the_encoder_trains_ends_with_130_and_the_same_command_goes_on(
    tmp_path, monkeypatch, capsys
):
    config, out = tmp_path / "one.py", tmp_path / "out"
    config.write_text(CONFIG)

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    components.eyes.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(encoder, "_train", interrupted)
        assert train.main([str(config), "--out", str(out), "--jobs", "1"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not list((out / components.ENCODERS).glob("*.safetensors"))
    monkeypatch.setattr(encoder, "_train", lambda *_: None)
    assert train.main([str(config), "--out", str(out), "--jobs", "1"]) == 0
    assert store.read_json(out / tiny().stage_ids()[0] / folders.RESULT)["steps"] == 4


# --- helpers ------------------------------------------------------------------------------------------------

WATCHED = """
import os
import subprocess
import sys
import time
from vlm import train
train.WATCHED_EVERY = 0.05
if len(sys.argv) > 1:
    train.watch_parent()
    print(os.getpid(), flush=True)
    time.sleep(600)
else:
    known = os.environ | {train.PARENT: str(os.getpid())}
    subprocess.Popen([sys.executable, __file__, "helper"], env=known)
    time.sleep(600)
"""


def test_a_helper_does_not_outlive_the_process_that_started_it(tmp_path):
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert parent.stdout is not None
    helper = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    try:  # the helper holds the other end of the pipe: it is closed when it is gone
        closed, _, _ = select.select([parent.stdout], [], [], 60)
        assert closed and parent.stdout.read() == ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(helper, signal.SIGKILL)


def test_only_helpers_watch(monkeypatch):
    monkeypatch.setattr(train.threading, "Thread", lambda **_: pytest.fail("nobody started this process"))
    monkeypatch.delenv(train.PARENT, raising=False)
    train.watch_parent()
    monkeypatch.setenv(train.PARENT, "no number")
    train.watch_parent()


def test_helpers_are_told_whom_they_help(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(train.subprocess, "Popen", lambda *_, env, **__: given.append(env) or Ended())
    with train.helpers(train.Options(tmp_path / "a.py"), 2, 1) as wait:
        wait()
    assert [env[train.PARENT] for env in given] == [str(os.getpid())] * 2


class Ended:
    def wait(self):
        return 0

    def terminate(self):
        pass


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--jobs", "100000"], "--jobs 100000 must lie in 0 .."), (["--jobs", "-1"], "--jobs -1 must"),
        (["--threads", "-1"], "--threads -1 must lie in"), (["--threads", "1000000"], "--threads 1000000"),
        (["--only", "[red]"], "--only [red]: no run of"),
    ],
)  # fmt: skip
def test_absurd_numbers_are_refused_before_anything_starts(argv, line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "accelerate", lambda runs: pytest.fail("it went on"))
    config = tmp_path / "one.py"
    config.write_text(CONFIG)
    assert train.main([str(config), "--out", str(tmp_path / "out"), *argv]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and line in said[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has half precision")
def test_half_precision_without_a_gpu_is_one_line():
    with pytest.raises(UserError, match=r"precision='fp16': .*; use 'bf16' or 'no'") as raised:
        train.accelerate([dataclasses.replace(tiny(), precision="fp16")])
    assert "\n" not in str(raised.value)


def test_brackets_in_names_are_printed_as_they_are(out, tmp_path, capsys):
    names = ["[bold]b", "b [red] c [red]", "a :smile: b", "[link=x]"]
    config = tmp_path / "one[" / "red] [bold].py"  # together a closing tag
    config.parent.mkdir()
    made = f"[__import__('dataclasses').replace(tiny(), name=name) for name in {names}]"
    config.write_text(CONFIG.replace("[tiny()]", made))
    assert train.main([str(config), "--out", str(out), "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    assert f"{names[0]}, stage 1 of 1: step" in said and "one[/red] [bold].py" in said
    assert all(f"\n{name}: {out}" in said for name in names)
    folder = out / tiny().stage_ids()[0]
    assert [run.name for run in folders.saved_runs(folder)] == names


def test_the_bar_prints_names_as_they_are():
    content = io.StringIO()
    wanted = dataclasses.replace(tiny(), name="b [red] c [bold]")
    console = plain_console(file=content, force_terminal=True, width=200)
    with train.Display(wanted, 0, console, train.Stop()) as display:
        display(dict(step=1, steps=4, loss=1.5, seconds=0.0))
    assert "b [red] c [bold], stage 1 of 1" in content.getvalue()
