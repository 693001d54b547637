"""`--plan`: its arithmetic against real models, real optimizers and what autograd really saves."""

from __future__ import annotations

import dataclasses
import re
import types

import pytest
import torch
from memory_options import FAMILIES, OPTIMIZERS, needs, small
from small_runs import SMALL, command

from ssm_retrieval import models, ops
from ssm_retrieval.models import block_memory, mamba, planning
from ssm_retrieval.models.planning import Machine, Step, head_memory, step_memory
from ssm_retrieval.ops import _scan_triton
from ssm_retrieval.training.optimizers import make_optimizer
from synthetic import curricula, run, tasks, trainer
from synthetic.config import RunConfig, plan
from synthetic.evaluate import autocast
from synthetic.memory import meta_model, training_steps


def saved_bytes(model, ids, at, precision: str) -> int:
    """Bytes of all storages that autograd keeps for a backward pass, parameters and the batch left out."""
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), ids, at)}
    storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in ours:
            storages[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast("cpu", precision):
        model.loss(ids, labels=ids[:, at].clone(), logits_at=at)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family, options",
    [(f, {}) for f in FAMILIES]
    + [
        ("transformer", dict(position="learned", norm="rms", parallel_residual=False)),
        ("transformer", dict(window=20)),
        ("mamba", dict(position="learned", max_position_embeddings=700)),
        ("hybrid", dict(pattern="M2 M2 A", headdim=32, d_state=24)),
        ("hybrid", dict(pattern="M+A A+M2 M", headdim=32)),
    ],
)
def test_activations_are_what_autograd_saves(family, options, precision):
    """Within 2 per cent, for lengths below, at and beside whole chunks."""
    for rows, length, answers in ((3, 50, 50), (2, 128, 5), (1, 300, 17)):
        model = small(family, **options)
        ids = torch.randint(0, 60, (rows, length))
        at = torch.arange(length - answers, length)
        step = Step(rows, length, answers, bfloat16=precision == "bfloat16")
        memory = step_memory(model, step)
        predicted = memory.activations + head_memory(model.config, step)[0]
        assert predicted == pytest.approx(saved_bytes(model, ids, at, precision), rel=0.02)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family, options", [("mamba", {}), ("hybrid", dict(pattern="M A M+A", headdim=32))])
def test_activations_of_mamba_on_a_gpu_are_what_autograd_saves(family, options, precision, monkeypatch):
    """No kernel's own tensors are among them, so those of the CPU show it."""
    monkeypatch.setattr(mamba, "runs_twice", lambda x: True)
    model = small(family, **options)
    ids, at = torch.randint(0, 60, (2, 130)), torch.arange(100, 130)
    step = Step(2, 130, 30, bfloat16=precision == "bfloat16", device="cuda")
    predicted = step_memory(model, step).activations + head_memory(model.config, step)[0]
    assert predicted == pytest.approx(saved_bytes(model, ids, at, precision), rel=0.02)


@pytest.mark.parametrize("checkpointing, scans", [(False, 4), (True, 4)])
def test_what_runs_twice_has_the_same_gradients(checkpointing, scans, monkeypatch):
    """Each of two layers scans once, and once more for its gradients: never three times."""
    ids = torch.randint(0, 60, (2, 70))
    model = small("mamba")
    model.loss(ids, labels=ids)[0].backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    calls, scan = [], mamba.selective_scan
    monkeypatch.setattr(mamba, "runs_twice", lambda x: True)
    monkeypatch.setattr(mamba, "selective_scan", lambda *a, **k: calls.append(1) or scan(*a, **k))
    model.checkpointing = checkpointing
    model.loss(ids, labels=ids)[0].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-6, atol=1e-7)
    assert len(calls) == scans


def test_nothing_runs_twice_without_gradients_or_off_a_gpu():
    on_gpu = types.SimpleNamespace(is_cuda=True)
    assert mamba.runs_twice(on_gpu) and not mamba.runs_twice(torch.zeros(1))
    with torch.no_grad():
        assert not mamba.runs_twice(on_gpu)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_keeps_the_inputs_of_blocks(family):
    model = small(family)
    model.checkpointing = True
    ids, at = torch.randint(0, 60, (2, 128)), torch.arange(100, 128)
    step = Step(2, 128, 28, checkpointing=True)
    predicted = step_memory(model, step).activations + head_memory(model.config, step)[0]
    assert predicted == pytest.approx(saved_bytes(model, ids, at, "float32"), rel=0.02)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_exact(family, optimizer):
    needs(optimizer)
    p = plan(dataclasses.replace(SMALL, optimizer=optimizer), family)
    model = models.build(p.model, **p.model_overrides)
    real = make_optimizer(model, p)
    batch = curricula.next_batch(tasks.build(p.task, **p.task_options), p, trainer.Progress(length=16))
    trainer.update(model, real, batch, p)
    memory = step_memory(meta_model(p), training_steps(p)[-1])
    state = {
        (id(owner), name): value
        for owner, values in real.state.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and name != "step" and not name.startswith("qmap")
    }
    assert memory.parameters == model.num_parameters()
    assert memory.weights == memory.gradients == sum(w.nbytes for w in model.parameters())
    assert memory.optimizer == sum(value.nbytes for value in state.values())


def test_steps_are_those_of_training():
    config = RunConfig(seq_len=100, curriculum=8, task="position", precision="float32", accumulate=3)
    p = plan(config, "mamba")
    task = tasks.build(p.task, **p.task_options)
    for length, step in zip((8, 16, 32, 64, 100), training_steps(p), strict=True):
        batch = curricula.next_batch(task, p, trainer.Progress(length=length))
        assert (step.rows, step.length) == tuple(batch.input_ids.shape)
        assert step.answers == batch.answer_at.shape[-1]
        assert step.at_once == max(len(part.labels) for part in batch.split(3))


def test_adapters_have_the_only_moments():
    pytest.importorskip("peft")
    p = plan(RunConfig(preset="130m", lora=8, device="cpu", precision="bfloat16"), "mamba")
    memory = step_memory(meta_model(p), training_steps(p)[-1])
    table = p.model_overrides["vocab_size"] * 768
    adapters = 24 * 8 * ((768 + 2 * 1536) + (1536 + 48 + 32) + (1536 + 768))
    assert memory.gradients == 4 * (table + adapters) and memory.optimizer == 2 * memory.gradients


def test_tiles_are_those_of_the_kernels_in_triton(monkeypatch):
    monkeypatch.setattr(_scan_triton._triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    assert _scan_triton._tile() == block_memory.TILE


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_kernels_in_triton_keep_nothing_but_their_arguments(precision):
    """In Triton's interpreter: what autograd saves between a Mamba block's projections."""
    pytest.importorskip("triton")
    config = models.config("mamba", d_model=4, n_layer=1, vocab_size=8, d_state=2)
    mixer, found = mamba.MambaMixer(config), {}
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    both = torch.randn(2, 9, 16, dtype=dtype, requires_grad=True) * 1  # as in_proj makes it
    ours = {t.untyped_storage().data_ptr() for t in (*mixer.parameters(), both)}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        found[storage.data_ptr()] = storage
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, autocast("cpu", precision), ops.backend("triton"):
        mixer.mix(*both.chunk(2, dim=-1), mamba.WHOLE)
    bytes_ = sum(storage.nbytes() for at, storage in found.items() if at not in ours)
    casts = 2 * (8 * 5 + 8) if precision == "bfloat16" else 0  # of the weights of x_proj and dt_proj
    step = Step(2, 9, 1, bfloat16=precision == "bfloat16", device="cuda")
    assert bytes_ - casts == block_memory.recomputed(config, step)


def test_less_memory_by_every_option():
    peak = {}
    for name, options in {
        "plain": {},
        "checkpointing": dict(checkpointing=True),
        "accumulate": dict(accumulate=8),
        "bfloat16": dict(bfloat16=True),
        "8-bit": dict(optimizer="adamw-8bit"),
        "adafactor": dict(optimizer="adafactor"),
    }.items():
        model = models.build("transformer-410m", device="meta")
        peak[name] = step_memory(model, Step(8, 2048, 2048, **options)).peak
    assert all(peak[name] < peak["plain"] for name in peak if name != "plain")


def test_the_smallest_machine_grows_with_the_model():
    def machine(name: str, **options) -> Machine | None:
        model = models.build(name, device="meta")
        step = Step(8, 2048, 2048, bfloat16=True, checkpointing=True, accumulate=8, **options)
        return planning.smallest_machine(model, step, Step(1, 2048, 1, bfloat16=True))

    names = ["mamba-tiny", "mamba-790m", "mamba-1.4b", "mamba-2.8b"]
    order = [planning.MACHINES.index(found) for found in map(machine, names) if found]
    assert len(order) == 4 and order == sorted(order) and order[0] == 0 < order[-1]
    model = models.build("mamba-2.8b", device="meta")
    huge = Step(8, 2**24, 1)
    assert planning.smallest_machine(model, huge, huge) is None
    # 16 bytes a parameter are shared by 8 GPUs
    step = Step(64, 2048, 2048, bfloat16=True, checkpointing=True)
    one, eight = (planning.device_peak(model, step, step, n) for n in (1, 8))
    assert eight < one / 4


def test_plan_prints_and_trains_nothing(tmp_path, capsys):
    config = dataclasses.replace(SMALL, model=FAMILIES, out=str(tmp_path / "runs"))
    assert run.main([*command(config), "--plan"]) == 0
    said = capsys.readouterr().out
    p = plan(SMALL, "mamba")
    assert f"{meta_model(p).num_parameters():,}" in said and "smallest machine" in said
    assert not (tmp_path / "runs").exists()


def test_the_papers_protocol_fits_one_gpu(tmp_path, capsys):
    """Mamba's 24 layers of 131,584 tokens, without an option that saves memory."""
    words = ["--plan", "--protocol", "paper", "--preset", "150m", "--device", "cuda"]
    assert run.main([*words, "--out", str(tmp_path / "runs")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "128 x 1,028 128 x 1,028" in said and "smallest machine GPU, 80 GiB GPU, 80 GiB" in said


def test_plan_of_a_model_that_fits_nowhere_here(tmp_path, capsys):
    words = ["--preset", "2.8b", "--seq-len", "4096", "--device", "cuda", "--protocol", "paper", "--plan"]
    assert run.main([*words, "--out", str(tmp_path / "runs")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"weights, float32 +\d\d?\.\d GiB", said) and not (tmp_path / "runs").exists()
