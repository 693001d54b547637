"""Values that no run can have: one line that names option, value and remedy, before anything is made."""

from __future__ import annotations

import typing

import pytest

from ssm_retrieval.errors import UserError
from synthetic import memory, run
from synthetic.checks import BOUNDS
from synthetic.config import RunConfig, plan

ABSURD = str(10**20)
IGNORED = [
    (
        ["--position", "rope", "--model", "mamba"],
        "--position rope is for attention, which --model mamba lacks; use learned or none",
    ),
    (["--position", "rope", "--model", "mamba", "mamba2"], "--position rope is for attention"),
    (["--model", "transformer", "--d-state", "64"], "--d-state 64 is for state space models"),
    (["--model", "transformer", "--d-state", "16"], "--d-state 16 is for state space models"),
    (["--rotary-pct", "0.5"], "--rotary-pct 0.5 has no effect with --position learned; give --position rope"),
    (["--rotary-pct", "1", "--position", "none"], "--rotary-pct 1.0 has no effect with --position none"),
    (["--rotary-pct", "0.5", "--model", "mamba"], "--rotary-pct 0.5 is for attention"),
    (["--position", "rope", "--rotary-pct", "0.01"], "--rotary-pct 0.01 rotates none of the 32 dimensions"),
    (["--position", "rope", "--rotary-pct", "0"], "--rotary-pct 0.0 rotates none"),
    (["--position", "rope", "--rotary-pct", "0.03", "--model", "hybrid"], "rotates none"),
]
RECIPES = [
    (["--model", "gla", "--d-conv", "2"], "--d-conv 2 is for models with a short convolution"),
    (["--model", "mamba3", "--d-conv", "2"], "--d-conv 2 is for models with a short convolution"),
    (["--model", "transformer", "--d-conv", "2"], "--d-conv 2 is for models with a short convolution"),
    (["--model", "mamba", "--heads", "2"], "--heads 2 is for models with heads, which --model mamba lacks"),
    (["--model", "transformer", "--ssm-init", "recall"], "--ssm-init recall is for state space models"),
    (["--model", "transformer", "--ssm-lr", "0.1"], "--ssm-lr 0.1 is for state space models"),
    (["--model", "mamba", "--ssm-lr", "0.1", "--lora", "2"], "--ssm-lr 0.1 has no effect with --lora 2"),
    (
        ["--d-model", "130"],
        "--d-model 130: --model transformer has 130 channels, which 4 heads do not",
    ),
    (["--heads", "3", "--model", "hybrid"], "--heads 3: --model hybrid has 128 channels, which 3 heads"),
    (["--heads", "3", "--model", "mamba2"], "--heads 3: --model mamba2 has 256 channels, which 3 heads"),
    (
        ["--d-model", "48", "--model", "mamba2"],
        "heads of 64 do not divide; give --heads, as in --heads 3",
    ),
    (["--heads", "64", "--position", "rope"], "--rotary-pct 0.25 rotates none of the 2 dimensions of a head"),
    (["--label-smoothing", "1"], "--label-smoothing 1.0 must be at least 0 and below 1"),
    (["--label-smoothing", "-0.1"], "--label-smoothing -0.1 must be at least 0 and below 1"),
    (["--label-smoothing", "nan"], "--label-smoothing nan must be at least 0 and below 1"),
    (["--betas", "0.9", "1"], "--betas 0.9 1.0 must be two numbers, each at least 0 and below 1"),
    (["--betas", "nan", "0.9"], "--betas nan 0.9 must be two numbers"),
    (["--betas", "0.9", "0.9", "--optimizer", "adafactor"], "no effect with --optimizer adafactor"),
    (
        ["--batch-size", "9", "--batch-tokens", "99"],
        "--batch-size 9 and --batch-tokens 99 exclude",
    ),
    (
        ["--flat", "9", "--schedule", "constant"],
        "--flat 9 has no effect with --schedule constant; give --schedule cosine or linear",
    ),
    (
        ["--flat", "9", "--schedule", "cosine", "--budget", "99"],
        "--flat 9 needs a number of steps",
    ),
    (
        ["--flat", "9", "--schedule", "linear", "--steps", "59"],
        "--flat 9 and --warmup 50 leave nothing of --steps 59 to the decay",
    ),
]
NOT_A_NUMBER = [
    ([option, "nan"], f"{option} nan is not a number")
    for option in ("--weight-decay", "--grad-clip", "--rotary-pct", "--ssm-lr")
] + [([option, "nan"], f"{option} nan must") for option in ("--lr", "--stop-at")]
INFINITE = [
    ([option, "inf"], f"{option} inf is too large; use at most")
    for option in ("--weight-decay", "--grad-clip", "--rotary-pct")
] + [(["--lr", "inf"], "--lr inf must lie between"), (["--stop-at", "inf"], "--stop-at inf must be positive")]
TOO_LARGE = [
    (
        ["--" + name.replace("_", "-"), ABSURD],
        f"--{name.replace('_', '-')} {ABSURD} is too large; use at most",
    )
    for name, (_, most) in BOUNDS.items()
    if isinstance(most, int)
]
NEGATIVE = [
    (["--" + name.replace("_", "-"), "-1"], f"--{name.replace('_', '-')} -1")
    for name, (_, most) in BOUNDS.items()
    if isinstance(most, int)
]
TOO_MUCH_MEMORY = [
    (["--num-symbols", str(2**22), "--layers", "4"], "Transformer needs about"),
    (["--layers", "60", "--preset", "790m", "--model", "mamba", "--seq-len", "16"], "Mamba needs about"),
    (["--batch-tokens", str(2**24), "--model", "mamba2"], "Mamba-2 needs about"),
    (["--preset", "2.8b", "--seq-len", "16"], "Transformer needs about"),
]
PLACES = [(["--out", ""], "--out is empty; give a folder")]


WRONG = IGNORED + RECIPES + NOT_A_NUMBER + INFINITE + TOO_LARGE + NEGATIVE + TOO_MUCH_MEMORY + PLACES


@pytest.mark.parametrize("words, said", WRONG)
def test_one_line_and_nothing_is_made(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "available", lambda device: 2 * 2**30)
    assert run.main(["--device", "cpu", "--precision", "float32", *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and said in line, line
    assert not list(tmp_path.iterdir())


def test_every_number_has_bounds():
    """A new numeric option must say what it can be; open intervals are checked one by one."""
    kinds = typing.get_type_hints(RunConfig).items()
    numeric = {name for name, kind in kinds if {int, float} & {kind, *typing.get_args(kind)}}
    assert numeric == set(BOUNDS) | {"lr", "stop_at", "label_smoothing", "threads"}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_themselves_are_allowed(name):
    from synthetic.checks import within

    least, most = BOUNDS[name]
    within(name, least)
    within(name, most)
    for wrong in (least - 1, most + 1, float("nan"), float("-inf")):
        with pytest.raises(UserError):
            within(name, wrong)


def test_memory_is_refused_where_the_plan_says_so(monkeypatch):
    """The limit lies at the peak that `--plan` prints: one byte less is too little."""
    from ssm_retrieval.models.planning import evaluation_memory, step_memory

    settled = plan(RunConfig(seq_len=64, device="cpu", precision="float32"), "mamba")
    model, evaluation = memory.meta_model(settled), memory.evaluation_step(settled)
    step = memory.training_steps(settled)[-1]
    needed = step_memory(model, step)
    peak = max(needed.peak, needed.weights + needed.optimizer + evaluation_memory(model, evaluation))
    monkeypatch.setattr(memory, "available", lambda device: peak)
    memory.require(settled)
    monkeypatch.setattr(memory, "available", lambda device: peak - 1)
    with pytest.raises(UserError, match="Mamba needs about"):
        memory.require(settled)
    monkeypatch.setattr(memory, "available", lambda device: None)
    memory.require(settled)
