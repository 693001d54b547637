"""A run's name: the same for every way to ask for the same numbers, another for everything else."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from synthetic.config import Plan, RunConfig, plan, run_id

BASE = RunConfig(seq_len=16, model=("mamba",), device="cpu", precision="float32")


def name(family: str | None = None, **changed) -> str:
    config = dataclasses.replace(BASE, **changed)
    return run_id(plan(config, family or config.model[0]))


ROPE = dict(model=("transformer",), position="rope")
SAME = {
    "weight decay, integer": (dict(weight_decay=0), dict(weight_decay=0.0)),
    "clipping, integer": (dict(grad_clip=1), dict(grad_clip=1.0)),
    "stop_at, integer": (dict(stop_at=1), dict(stop_at=1.0)),
    "NumPy's numbers": (
        dict(lr=0.5, steps=9, seed=1),
        dict(lr=np.float32(0.5), steps=np.int64(9), seed=np.int8(1)),
    ),
    "symbols of positions": (dict(num_symbols=None), dict(num_symbols=16)),
    "symbols of n-grams": (dict(task="ngram"), dict(task="ngram", num_symbols=30)),
    "sizes of n-grams": (dict(task="ngram"), dict(task="ngram", query_size=2, answer_size=3)),
    "blocks": (dict(task="ngram-duplicate", seq_len=64), dict(task="ngram-duplicate", seq_len=64, blocks=4)),
    "pairs": (dict(task="mqar", seq_len=64), dict(task="mqar", seq_len=64, num_pairs=8)),
    "tokens": (
        dict(task="selective-copy", seq_len=64),
        dict(task="selective-copy", seq_len=64, num_tokens=16),
    ),
    "shortest n-gram context": (dict(task="ngram"), dict(task="ngram", min_seq_len=16)),
    "shortest varlen context": (dict(task="position-varlen"), dict(task="position-varlen", min_seq_len=15)),
    "names of a size": (dict(preset="130m"), dict(preset="160m")),
    "names of a large size": (dict(preset="790m"), dict(preset="1b")),
    "capitals": (dict(preset="tiny"), dict(preset="TINY")),
    "depth of the preset": (dict(position="none"), dict(position="none", layers=4)),
    "depth that retrieves": (dict(), dict(layers=1)),
    "state of the preset": (dict(position="none"), dict(position="none", d_state=16)),
    "state that retrieves": (dict(), dict(d_state=128)),
    "first weights": (dict(), dict(ssm_init="recall")),
    "published first weights": (dict(position="none"), dict(position="none", ssm_init="default")),
    "growth": (dict(), dict(growth="gap")),
    "schedule": (dict(), dict(schedule="cosine")),
    "width of the preset": (dict(), dict(d_model=128)),
    "convolution of the preset": (dict(), dict(d_conv=4)),
    "heads of attention": (dict(model=("transformer",)), dict(model=("transformer",), heads=4)),
    "heads of Mamba-2": (dict(model=("mamba2",)), dict(model=("mamba2",), heads=4)),
    "heads of a narrow Mamba-2": (
        dict(model=("mamba2",), d_model=64),
        dict(model=("mamba2",), d_model=64, heads=2),
    ),
    "betas": (dict(), dict(betas=(0.9, 0.98))),
    "betas of a file": (dict(betas=(0, 0.5)), dict(betas=[0.0, 0.5])),
    "no smoothing": (dict(), dict(label_smoothing=0)),
    "one rate": (dict(), dict(ssm_lr=1)),
    "batch of the papers": (dict(protocol="paper"), dict(protocol="paper", batch_size=128)),
    "a flat part after one step of warm-up": (
        dict(schedule="cosine", warmup=1, flat=3),
        dict(schedule="cosine", warmup=0, flat=4),
    ),
    "no flat part and no warm-up": (
        dict(schedule="linear", warmup=0, flat=0),
        dict(schedule="linear", warmup=0),
    ),
    "positions": (dict(model=("transformer",)), dict(model=("transformer",), position="learned")),
    "positions of a state space model": (dict(), dict(position="learned")),
    "an SSM beside attention that rotates": (
        dict(position="none"),
        dict(model=("mamba", "transformer"), position="rope"),
    ),
    "the same dimensions rotated": (dict(**ROPE, rotary_pct=0.25), dict(**ROPE, rotary_pct=0.26)),
    "curriculum at full length": (dict(curriculum=0), dict(curriculum=16)),
    "warm-up of a step": (dict(warmup=0), dict(warmup=1)),
    "never stopping": (dict(stop_at=1.01), dict(stop_at=7.0)),
    "steps": (dict(), dict(steps=4000)),
    "rate": (dict(), dict(lr=4e-3)),
    "rows of the papers' batches": (dict(protocol="paper"), dict(protocol="paper", batch_tokens=4096)),
    "precision": (dict(), dict(precision="float32", device="cpu")),
    "threads and place": (dict(), dict(threads=2, out="elsewhere", parallel="fsdp")),
}


@pytest.mark.parametrize("one, other", SAME.values(), ids=list(SAME))
def test_equal_numbers_have_one_name(one, other):
    assert name(**one) == name(**other)


DIFFERENT = [
    dict(), dict(seed=1), dict(lr=1e-3), dict(steps=25), dict(layout="prefix"), dict(model=("mamba2",)),
    dict(weight_decay=0.1), dict(grad_clip=0.5), dict(stop_at=0.9), dict(stop_at=1.01), dict(num_symbols=40),
    dict(queries=3), dict(curriculum=4), dict(curriculum=0), dict(warmup=0), dict(warmup=2), dict(d_state=4),
    dict(layers=2), dict(eval_every=7), dict(eval_examples=64), dict(final_eval_examples=64),
    dict(batch_tokens=512), dict(budget=1000), dict(optimizer="adafactor"), dict(accumulate=2),
    dict(checkpointing=True), dict(precision="bfloat16"), dict(schedule="linear"), dict(task="induction"),
    dict(model=("transformer",)), dict(**ROPE), dict(**ROPE, rotary_pct=1.0), dict(**ROPE, rotary_pct=0.5),
    dict(d_model=64), dict(d_conv=2), dict(model=("mamba2",), heads=2), dict(model=("transformer",), heads=2),
    dict(betas=(0.9, 0.95)), dict(batch_size=16), dict(label_smoothing=0.1), dict(ssm_lr=0.1),
    dict(schedule="linear", flat=0), dict(schedule="linear", flat=5),
    dict(task="ngram"), dict(task="ngram", answer_size=2), dict(task="ngram", min_seq_len=12),
    dict(position="none"), dict(position="none", model=("mamba2",)), dict(ssm_init="default"),
    dict(growth="prefix"), dict(growth="window"), dict(growth="filled"), dict(growth="mixed"),
    dict(schedule="constant"),
]  # fmt: skip


def test_other_numbers_have_other_names():
    names = [name(**changed) for changed in DIFFERENT]
    assert len(set(names)) == len(DIFFERENT)


def test_what_was_not_asked_for_is_no_part_of_a_name():
    """Options that came after the first runs, which keep their names."""
    settled = plan(dataclasses.replace(BASE, position="none"), "mamba").identity()
    assert {"label_smoothing", "ssm_lr", "flat", "d_model", "ssm_init", "growth"}.isdisjoint(settled)
    assert set(settled["model_overrides"]) == {"vocab_size", "embedding_std"}


def spelled(draw: st.DrawFn, value: float) -> object:
    """A number in one of the types in which Python programs have it."""
    kinds = [float, np.float64] + ([int, np.int64] if float(value).is_integer() else [])
    return draw(st.sampled_from(kinds))(value)


@st.composite
def wishes(draw: st.DrawFn) -> RunConfig:
    """Configs that often come to the same plan by different ways."""
    family = draw(st.sampled_from(["transformer", "mamba", "mamba2", "hybrid"]))
    changed = dict(
        seq_len=16,
        model=(family,),
        num_symbols=draw(st.sampled_from([None, 16, 17])),
        weight_decay=spelled(draw, draw(st.sampled_from([0.0, 1.0]))),
        grad_clip=spelled(draw, draw(st.sampled_from([0.0, 1.0]))),
        stop_at=draw(st.sampled_from([None, 0.98, 1.01, 2.0])),
        steps=draw(st.sampled_from([None, 4000])),
        warmup=draw(st.sampled_from([None, 0, 1, 50])),
        curriculum=draw(st.sampled_from([None, 0, 2, 16, 20])),
        layers=draw(st.sampled_from([None, 3, {"transformer": 2, "hybrid": 6}.get(family, 4)])),
    )
    if family != "transformer":
        changed["d_state"] = draw(st.sampled_from([None, 16, 32]))
    schemes = {"transformer": ["rope"], "hybrid": ["rope"]}.get(family, ["none"])
    changed["position"] = draw(st.sampled_from([None, "learned", *schemes]))
    if changed["position"] == "rope":
        changed["rotary_pct"] = draw(st.sampled_from([0.25, 0.26, 0.5, 1.0]))
    return dataclasses.replace(BASE, **changed)


def built(p: Plan) -> object:
    """What training does with a plan, said without `Plan.identity`: the model, the options that it reads."""
    return (
        models.config(p.model, **p.model_overrides),
        getattr(models.config(p.model, **p.model_overrides), "rotary_dims", None),
        sorted(p.task_options.items(), key=str),
        p.curriculum or p.seq_len,
        [min(1.0, (step + 1) / max(1, p.warmup)) for step in range(60)],
        min(p.stop_at, 1.01),
        (p.steps, p.budget, p.weight_decay, p.grad_clip, p.lr, p.queries),
    )


@settings(deadline=None, max_examples=150)
@given(wishes(), wishes())
def test_names_are_equal_exactly_where_training_is(one, other):
    (p, q) = (plan(wish, wish.model[0]) for wish in (one, other))
    same = p.family == q.family and built(p) == built(q)
    assert (run_id(p) == run_id(q)) == same
    assert (p == q) == same


def test_a_plan_of_a_file_is_the_plan_that_was_written():
    """JSON keeps no tuples; the name of a run can be made from its folder's plan."""
    settled = plan(dataclasses.replace(BASE, model=("hybrid",), position="rope"), "hybrid")
    again = Plan(**json.loads(json.dumps(settled.to_dict())))
    assert run_id(again) == run_id(settled)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.03])
def test_a_share_that_rotates_nothing_is_refused(share):
    with pytest.raises(UserError, match=r"rotates none of the 32 dimensions of a head; use at least 0.0625"):
        plan(dataclasses.replace(BASE, **ROPE, rotary_pct=share), "transformer")
