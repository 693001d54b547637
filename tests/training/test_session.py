"""What `Session.step` really does with its plan, seen through torch's hooks and against plain PyTorch."""

from __future__ import annotations

import math
import time

import pytest
import torch
from sessions import FAMILIES, session, small, watch_inputs, watch_steps
from torch.nn import functional as F

from ssm_retrieval import models
from ssm_retrieval.ops.linear import Linear
from ssm_retrieval.training import store
from ssm_retrieval.training.records import FORMAT
from synthetic import curricula, evaluate, tasks, trainer

DECAYED = {  # by the last two parts of their names: matrices that weight decay pulls, and no others
    "transformer": {
        "query_key_value.weight", "attention.dense.weight", "mlp.dense_h_to_4h.weight",
        "mlp.dense_4h_to_h.weight",
    },
    "mamba": {
        "mixer.in_proj.weight", "mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.out_proj.weight",
    },
    "mamba2": {"mixer.in_proj.weight", "mixer.out_proj.weight"},
}  # fmt: skip
DECAYED["hybrid"] = DECAYED["transformer"] | DECAYED["mamba"]


# --- the optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, course",
    [
        ("constant", lambda part: 1.0),
        ("linear", lambda part: 1.0 - part),
        ("cosine", lambda part: (1.0 + math.cos(math.pi * part)) / 2),
    ],
)
@pytest.mark.parametrize("counted", ["steps", "budget"])
def test_every_group_gets_the_rate_of_its_step(tmp_path, schedule, course, counted):
    """Warm-up, plateau and end, as the schedule's formula says; in steps or in sequences."""
    steps, rows = 10, 8  # 8 rows is the fewest that a batch has
    budget = {"steps": dict(steps=steps), "budget": dict(steps=None, budget=steps * rows)}[counted]
    p = small("mamba", schedule=schedule, lr=0.02, warmup=4, batch_tokens=1, **budget)
    work = session(p, tmp_path)
    seen = watch_steps(work.model, work.optimizer)
    while not work.done():
        work.step()
    want = [0.02 * min(1.0, (k + 1) / 4) * course(k / steps) for k in range(steps)]
    assert len(seen) == steps and len(seen[0].groups) == 2
    for handed, rate in zip(seen, want, strict=True):
        assert [group["lr"] for group in handed.groups] == pytest.approx([rate, rate], rel=1e-6)


def test_without_warm_up_the_first_step_has_the_whole_rate(tmp_path):
    work = session(small("mamba", warmup=0, lr=0.02), tmp_path)
    seen = watch_steps(work.model, work.optimizer)
    work.step()
    assert [group["lr"] for group in seen[0].groups] == [0.02, 0.02]


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.8, 0.7)])
@pytest.mark.parametrize("family", FAMILIES)
def test_betas_and_weight_decay_reach_the_optimizer(tmp_path, family, betas):
    p = small(family, weight_decay=0.3, betas=betas)
    work = session(p, tmp_path)
    seen = watch_steps(work.model, work.optimizer)
    work.step()
    assert [group["betas"] for group in seen[0].groups] == [betas, betas]
    names = {id(w): n for n, w in work.model.named_parameters()}
    pulled = {
        names[id(w)]: group["weight_decay"] for group in work.optimizer.param_groups for w in group["params"]
    }
    assert pulled.keys() == set(names.values())
    for name, strength in pulled.items():
        assert strength == (0.3 if name.endswith(tuple(DECAYED[family])) else 0.0), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_mean_cross_entropy_clipped(tmp_path, family):
    """Against F.cross_entropy of all logits, computed in float64 on a copy of the weights."""
    p = small(family, grad_clip=0.25)
    work = session(p, tmp_path)
    seen, read = watch_steps(work.model, work.optimizer), watch_inputs(work.model)
    copy = models.build(p.model, seed=p.seed, **p.model_overrides).double()
    work.step()
    batch = batch_of(p, 0, p.curriculum)
    assert torch.equal(read[0].input_ids, batch.input_ids)
    cross_entropy(copy, batch).backward()
    want = {name: w.grad for name, w in copy.named_parameters()}
    norm = float(torch.cat([g.flatten() for g in want.values()]).norm())
    assert norm > 0.5  # clipping has something to do
    assert seen[0].norm() == pytest.approx(0.25, rel=1e-4)
    for name, got in seen[0].gradients.items():
        torch.testing.assert_close(
            got.double(), want[name] * (0.25 / norm), rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_small_gradients_and_grad_clip_0_are_left_as_they_are(tmp_path):
    norms = {}
    for clip in (0.0, 1e-3, 1e3):
        work = session(small("mamba", grad_clip=clip), tmp_path / str(clip))
        seen = watch_steps(work.model, work.optimizer)
        work.step()
        norms[clip] = seen[0].norm()
    assert norms[0.0] == norms[1e3] > 0.1 and norms[1e-3] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_are_adamw_of_the_paper(tmp_path, family):
    """Loshchilov & Hutter 2019, algorithm 2, with warm-up, clipping, decay and betas, in plain PyTorch."""
    decay = dict(weight_decay=0.5, grad_clip=0.5, betas=(0.7, 0.8))
    p = small(family, lr=0.01, warmup=2, schedule="constant", **decay)
    work = session(p, tmp_path)
    mine = models.build(p.model, seed=p.seed, **p.model_overrides).double()
    first = {name: w.detach().clone() for name, w in mine.named_parameters()}
    moments = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in first.items()}
    losses = []
    for k in range(3):
        work.step()
        rate = 0.01 * min(1.0, (k + 1) / 2)
        mine.zero_grad()
        loss = cross_entropy(mine, batch_of(p, k, p.curriculum))
        loss.backward()
        losses.append(loss.item())
        norm = torch.cat([w.grad.flatten() for w in mine.parameters()]).norm()
        with torch.no_grad():
            for name, w in mine.named_parameters():
                g = w.grad * min(1.0, 0.5 / norm)
                m, v = moments[name]
                m += (1 - 0.7) * (g - m)
                v += (1 - 0.8) * (g * g - v)
                step = m / (1 - 0.7 ** (k + 1)) / ((v / (1 - 0.8 ** (k + 1))).sqrt() + 1e-8)
                decay = 0.5 if name.endswith(tuple(DECAYED[family])) else 0.0
                w -= rate * (step + decay * w)
    assert work.progress.step == 3
    for name, w in work.model.named_parameters():
        moved, want = w.detach().double() - first[name], mine.get_parameter(name).detach() - first[name]
        # what has next to no gradient moves by the sign of its rounding: hence norms, not numbers
        assert float((moved - want).norm()) < 2e-3 * float(want.norm()), name


# --- seeds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_decides_first_weights_and_first_batch(tmp_path, family):
    found = []
    for number, seed in enumerate((0, 1, 0)):
        work = session(small(family, seed=seed), tmp_path / str(number))
        weights = {name: w.detach().clone() for name, w in work.model.named_parameters()}
        read = watch_inputs(work.model)
        work.step()
        work.step()
        found.append((weights, [r.input_ids for r in read]))
    (weights, ids), (other_weights, other_ids), (same_weights, same_ids) = found
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert all(torch.equal(a, b) for a, b in zip(ids, same_ids, strict=True))
    drawn = [name for name, w in weights.items() if w.unique().numel() > 20 and "A_log" not in name]
    assert len(drawn) > 3 and not any(torch.equal(weights[name], other_weights[name]) for name in drawn)
    assert not any(torch.equal(a, b) for a, b in zip(ids, other_ids, strict=True))
    assert not torch.equal(ids[0], ids[1])  # and every step has a batch of its own


# --- the curriculum ----------------------------------------------------------------------------------


def test_the_curriculum_doubles_when_the_running_accuracy_passes(tmp_path, monkeypatch):
    """Right every time: 1 - 0.9^n passes 0.95 at n = 29, so the length doubles after steps 29 and 58."""
    batches, events = [], []
    monkeypatch.setattr(trainer, "update", lambda m, o, batch, *rest: batches.append(batch) or (0.5, 1.0))
    work = session(small("mamba", steps=100, seq_len=12, curriculum=4, batch_tokens=256), tmp_path, events)
    while not work.done():
        work.step()
    assert [batch.length for batch in batches] == [4] * 29 + [8] * 29 + [12] * 42
    # <bos>, the context and four pairs of <query> and symbol, answers between them: as the task lays it out
    tokens = [batch.input_ids.shape[1] for batch in batches]
    assert [batch.input_ids.shape[0] for batch in batches] == [256 // t for t in tokens]
    running = [row["accuracy"] for row in events]
    assert running[:29] == pytest.approx([1 - 0.9**n for n in range(1, 30)])
    assert running[29] == pytest.approx(0.1)  # it begins anew
    assert running[57] == pytest.approx(1 - 0.9**29)
    assert running[-1] == pytest.approx(1 - 0.9**42)  # but not at full length
    assert curricula.longest_passed(work.plan, work.progress) == 12
    assert [events[i]["length"] for i in (0, 28, 29, 58)] == [4, 4, 8, 12]
    assert {(row["model"], row["loss"]) for row in events} == {("mamba", 0.5)}
    assert events[-1]["examples"] == sum(b.input_ids.shape[0] for b in batches)
    assert events[-1]["tokens"] == sum(b.input_ids.numel() for b in batches)


def test_the_running_accuracy_is_an_average_with_weights_0_9_and_0_1(tmp_path, monkeypatch):
    scripted = [0.0, 1.0, 0.25, 0.5, 1.0]
    events, rest = [], iter(scripted)
    monkeypatch.setattr(trainer, "update", lambda *_: (0.5, next(rest)))
    work = session(small("mamba"), tmp_path, events)
    for _ in scripted:
        work.step()
    by_hand = [0.0, 0.1, 0.115, 0.1535, 0.23815]
    assert [row["accuracy"] for row in events] == pytest.approx(by_hand, abs=1e-12)


# --- precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_have_the_precision_of_the_plan(tmp_path, family, precision, dtype):
    """In training and in evaluation; weights, gradients and moments stay float32."""
    work = session(small(family, precision=precision, eval_every=1), tmp_path)
    products: dict[bool, set[tuple[torch.dtype, torch.dtype]]] = {True: set(), False: set()}

    def note(module, args, out):
        products[torch.is_grad_enabled()].add((args[0].dtype, out.dtype))

    inner = ("dense_4h_to_h", "attention.dense", "x_proj")  # their inputs are products of others
    for name, module in work.model.named_modules():
        if isinstance(module, Linear) and name.endswith((*inner, "in_proj", "query_key_value")):
            module.register_forward_hook(note)
    seen = watch_steps(work.model, work.optimizer)
    work.step()
    for found in products.values():
        assert {out for _, out in found} == {dtype}
        if family != "mamba2":  # whose only inner projection follows a norm
            assert dtype in {given for given, _ in found}
    assert {g.dtype for g in seen[0].gradients.values()} == {torch.float32}
    assert {w.dtype for w in work.model.parameters()} == {torch.float32}
    moments = [v for state in work.optimizer.state.values() for v in state.values() if v.dim()]
    assert moments and {v.dtype for v in moments} == {torch.float32}


# --- evaluation --------------------------------------------------------------------------------------


def test_evaluation_never_sees_a_context_that_training_may_see(tmp_path):
    """Of 1,680 contexts of 4 symbols, 60 large training batches show nearly all that they may."""
    p = small("mamba", seq_len=4, num_symbols=8, curriculum=4, queries=1, batch_tokens=800, eval_every=1,
              eval_examples=64, steps=2)  # fmt: skip
    work = session(p, tmp_path)
    read = watch_inputs(work.model)
    work.step()
    evaluated = torch.cat([r.input_ids for r in read if not r.training])
    trained = torch.cat([batch_of(p, k, None).input_ids for k in range(60)])
    assert torch.equal(read[0].input_ids, batch_of(p, 0, None).input_ids) and read[0].training
    asked, learned = ({tuple(row[1:5]) for row in ids.tolist()} for ids in (evaluated, trained))
    assert len(evaluated) == 64 and len(asked) > 40 and len(learned) > 1400
    assert not asked & learned


def test_evaluation_has_another_batch_every_time_and_the_same_at_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "EVAL_TOKENS", 100)
    work = session(small("mamba", eval_every=1, eval_examples=24, curriculum=16), tmp_path)
    read = watch_inputs(work.model)
    work.step()
    first = [r.input_ids for r in read if not r.training]
    read.clear()
    work.step()
    second = [r.input_ids for r in read if not r.training]
    assert len(first) > 3 and torch.equal(torch.cat(first), torch.cat(second))
    assert len({tuple(row) for row in torch.cat(first).tolist()}) == 24


# --- what is written ---------------------------------------------------------------------------------


def test_a_finished_session_writes_down_what_it_did(tmp_path):
    p = small("mamba", eval_every=6, final_eval_examples=40, curriculum=16, seed=3)
    before = time.monotonic()
    tmp_path = tmp_path / "not" / "there yet"
    result = trainer.train(p, tmp_path)
    taken = time.monotonic() - before
    rows = store.read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [6, 12]
    assert all(row["train_loss"] > 0 and 0 <= row["train_accuracy"] <= 1 for row in rows)
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"] <= result["seconds"] <= round(taken, 3)
    for row, count in ((rows[0], 8), (rows[1], 8), (result, 40)):
        assert (row["model"], row["seed"], row["length"], row["train_length"]) == ("mamba", 3, 16, 16)
        assert row["count"] == count and row["correct"] == row["accuracy"] * count
        assert row["chance"] == 1 / 16 and row["ci_low"] <= row["accuracy"] <= row["ci_high"]
    assert result["reached"] is False and result["longest_length"] == 0
    written = store.read_json(tmp_path / "result.json")
    assert written == result and written["format"] == FORMAT
    places = store.read_rows(tmp_path / "by_position.jsonl")
    assert sum(row["count"] for row in places) == 40
    for row in places:
        fixed = {"model": "mamba", "seed": 3, "step": 12, "length": 16, "chance": 1 / 16}
        assert row | fixed == row
    _, header = store.load_tensors(tmp_path / "model.safetensors")
    assert header == {"step": 12}


def test_a_checkpoint_is_written_when_it_is_due_and_only_then(tmp_path, monkeypatch):
    for seconds, due in ((0.0, True), (1e9, False)):
        monkeypatch.setattr(trainer.Session, "checkpoint_seconds", seconds)
        work = session(small("mamba"), tmp_path / str(due))
        work.step()
        path = work.folder / store.CHECKPOINT
        assert path.exists() == due
        if due:
            tensors, header = store.load_tensors(path)
            assert header["step"] == 1 and header["tokens"] == work.progress.tokens
            for name, w in work.model.named_parameters():
                assert torch.equal(tensors[f"model.{name}"], w)


# --- independent of the trainer ----------------------------------------------------------------------


def batch_of(p, index: int, length: int | None) -> tasks.Batch:
    """Training batch number `index` of a plan, asked of the task by hand."""
    task = tasks.build(p.task, **p.task_options)
    rows = max(8, p.batch_tokens // (task.max_length(p.queries) - p.seq_len + (length or p.seq_len)))
    place = "first" if length is None else p.growth
    return task.batch(rows, seed=p.seed, index=index, queries=p.queries, length=length, place=place)


def cross_entropy(model, batch: tasks.Batch) -> torch.Tensor:
    """Mean over all answers, from the logits of every token."""
    logits = model(batch.input_ids, **batch.places())
    assert batch.answer_at.dim() == 1
    return F.cross_entropy(logits[:, batch.answer_at].flatten(0, 1), batch.labels.flatten())
