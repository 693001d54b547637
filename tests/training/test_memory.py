"""Training in less memory: the same gradients in parts and with checkpointing, other optimizers, adapters."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import pytest
import torch
from memory_options import FAMILIES, OPTIMIZERS, needs, small
from small_runs import SMALL, numbers

from ssm_retrieval import models
from ssm_retrieval.training import store
from ssm_retrieval.training.lora import TARGETS, add_adapters, merge_adapters
from ssm_retrieval.training.optimizers import make_optimizer, make_state, state_tensors
from synthetic import curricula, results, run, tasks, trainer
from synthetic.config import RunConfig, plan, run_id
from synthetic.evaluate import autocast


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_runs_of_before_keep_their_names():
    """Of TRAINING_VERSION 2; what is at its default is no part of a name."""
    fixed = dict(device="cpu", precision="float32")
    wish = RunConfig(**fixed, task="ngram", seq_len=50, steps=3000, schedule="constant")
    assert run_id(plan(wish, "hybrid")).endswith("17bd9416")
    names = {run_id(plan(dataclasses.replace(SMALL, **new), "mamba")) for new in (
        {}, dict(optimizer="adafactor"), dict(accumulate=2), dict(checkpointing=True), dict(lora=4),
        dict(plan=True),
    )}  # fmt: skip
    assert len(names) == 5  # --plan is no part of a run


@pytest.mark.parametrize("task, options", [("position", {}), ("mqar", {"num_pairs": 4})])
def test_parts_of_a_batch_give_its_gradient(task, options):
    """Also if the parts have unequal numbers of rows and labels."""
    p = plan(
        RunConfig(seq_len=24, task=task, precision="float32", curriculum=0, grad_clip=0, **options), "mamba"
    )
    batch = curricula.next_batch(tasks.build(p.task, **p.task_options), p, trainer.Progress(length=24))
    batch.labels[0, 1:] = -100
    found = {}
    for parts in (1, 3, 500):
        model = models.build(p.model, seed=0, **p.model_overrides)
        before = torch.cat([w.detach().flatten() for w in model.parameters()])
        optimizer = torch.optim.SGD(model.parameters(), lr=100.0)  # large, for the sake of the difference
        loss, accuracy = trainer.update(model, optimizer, batch, dataclasses.replace(p, accumulate=parts))
        after = torch.cat([w.detach().flatten() for w in model.parameters()])
        found[parts] = loss, accuracy, after - before
    for parts in (3, 500):
        assert found[parts][0] == pytest.approx(found[1][0], rel=1e-5)
        assert found[parts][1] == found[1][1]
        assert (found[parts][2] - found[1][2]).norm() < 1e-5 * found[1][2].norm()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_same_gradients(family, precision):
    model = small(family)
    ids = torch.randint(0, 60, (2, 80), generator=torch.Generator().manual_seed(0))
    kept: dict[bool, int] = {}
    found = {}
    for model.checkpointing in (False, True):
        storages: dict[int, int] = {}

        def pack(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast("cpu", precision):
            loss = model.loss(ids, labels=ids)[0]
        kept[model.checkpointing] = sum(storages.values())
        found[model.checkpointing] = gradients(model, loss)
    assert kept[True] < kept[False] / 2
    for name, grad in found[False].items():
        torch.testing.assert_close(found[True][name], grad, rtol=1e-6, atol=1e-7, msg=name)


def test_checkpointing_leaves_caches_and_recordings_alone():
    import probes

    model = small("mamba")
    ids = torch.arange(20)[None]
    plain = model(ids)
    model.checkpointing = True
    cache = model.init_cache()
    steps = torch.cat([model(part, cache=cache) for part in ids.split(10, dim=1)], dim=1)
    torch.testing.assert_close(steps, plain)
    calls = []
    block = model.backbone.layers[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    with probes.record(model, "blocks.0.hook_resid_post", grad=True):
        model(ids).sum().backward()
    assert len(calls) == 1  # not a second time for the gradients
    model(ids).sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_equals_uninterrupted_for_every_optimizer(tmp_path, optimizer):
    needs(optimizer)
    config = dataclasses.replace(SMALL, optimizer=optimizer, accumulate=2, checkpointing=True, steps=12)
    p = plan(config, "mamba")
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    trainer.train(p, whole)
    for after in (1, 4):
        ticks = itertools.count(1)
        with pytest.raises(trainer.Interrupted):
            trainer.train(p, pieces, should_stop=lambda a=after, t=ticks: next(t) >= a)
    trainer.train(p, pieces)
    assert numbers(pieces) == numbers(whole)


def test_the_checkpoint_of_adamw_has_the_names_it_always_had(tmp_path):
    p = plan(dataclasses.replace(SMALL, steps=1), "mamba")
    trainer.train(p, tmp_path)
    tensors, _ = store.load_tensors(tmp_path / "checkpoint.safetensors")
    names = [n for n, _ in models.build(p.model, **p.model_overrides).named_parameters()]
    assert set(tensors) == {f"{what}.{n}" for what in ("model", "exp_avg", "exp_avg_sq") for n in names}


@pytest.mark.parametrize(
    "optimizer, kept",
    [
        ("adamw", {"exp_avg", "exp_avg_sq"}),
        ("adamw-8bit", {"state1", "state2", "absmax1", "absmax2"}),
        ("adafactor", {"row_var", "col_var", "variance"}),
    ],
)
def test_the_plan_reaches_the_optimizer_and_its_state_has_moments_only(optimizer, kept):
    """The peak rate in every group; neither step numbers nor constants in what a checkpoint keeps."""
    needs(optimizer)
    p = plan(dataclasses.replace(SMALL, optimizer=optimizer, lr=0.0123, weight_decay=0.4), "mamba")
    model = models.build(p.model, **p.model_overrides)
    made = make_optimizer(model, p)
    assert [group["lr"] for group in made.param_groups] == [0.0123] * 2
    assert [group["weight_decay"] for group in made.param_groups] == [0.4, 0.0]
    if optimizer != "adafactor":
        assert [tuple(group["betas"]) for group in made.param_groups] == [tuple(p.betas)] * 2
    if optimizer == "adamw":
        assert all(group["fused"] for group in made.param_groups)
    make_state(model, made, step=7)
    assert any(w.numel() >= 4096 and w.dim() > 1 for w in model.parameters())  # large enough for 8 bits
    names = {what.partition(".")[0] for what in state_tensors(model, made)}
    assert names == kept
    steps = {int(made.state[w]["step"]) for w in model.parameters()}
    assert steps == {7} and all(w.grad is None for w in model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_learn(optimizer):
    """Four steps on one batch make its loss smaller, whichever optimizer."""
    needs(optimizer)
    rate = 0.05 if optimizer == "adafactor" else 2e-3
    p = plan(dataclasses.replace(SMALL, optimizer=optimizer, lr=rate), "transformer")
    model = models.build(p.model, **p.model_overrides)
    batch = curricula.next_batch(tasks.build(p.task, **p.task_options), p, trainer.Progress(length=16))
    optimizer_ = make_optimizer(model, p)
    losses = [trainer.update(model, optimizer_, batch, p)[0] for _ in range(5)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_take_part_and_only_they_train(family):
    """Each adapter gets a gradient and changes the output; merged, the model is itself again."""
    pytest.importorskip("peft")
    model = small(family)
    names, ids = [n for n, _ in model.named_parameters()], torch.arange(40).view(2, 20)
    add_adapters(model, rank=2, seed=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    whole = {n for n in trained if "lora_" not in n}
    assert whole == {
        n
        for n in whole
        if n.startswith(("gpt_neox.embed", "backbone.embed", "model.embed", "embed", "lm_head"))
    }
    adapted = [m for m in model.modules() if hasattr(m, "lora_B")]
    linear = (n for n, m in small(family).named_modules() if isinstance(m, torch.nn.Linear))
    layers = [n.rpartition(".")[2] for n in linear]
    assert len(adapted) == sum(map(layers.count, TARGETS))
    for module in adapted:  # B is zero at first, and so would be the gradient of A
        torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    model.loss(ids, labels=ids)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    with torch.no_grad():
        before = model(ids)
        for module in adapted:
            weight = module.lora_B["default"].weight
            weight.neg_()
            assert (model(ids) - before).abs().max() > 1e-5
            weight.neg_()
        merge_adapters(model)
        torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)
    assert [n for n, _ in model.named_parameters()] == names


def test_a_run_with_adapters_resumes_and_leaves_a_plain_model(tmp_path):
    pytest.importorskip("peft")
    config = dataclasses.replace(SMALL, lora=4, steps=10)
    p = plan(config, "mamba")
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    results.begin(whole, config, p)
    result = trainer.train(p, whole)
    ticks = itertools.count(1)
    with pytest.raises(trainer.Interrupted):
        trainer.train(p, pieces, should_stop=lambda: next(ticks) >= 4)
    trainer.train(p, pieces)
    assert numbers(pieces) == numbers(whole)
    model = store.load_model(whole)
    fresh = models.build(p.model, seed=p.seed, **p.model_overrides)
    moved = {
        n for (n, a), b in zip(fresh.named_parameters(), model.parameters(), strict=True) if not a.equal(b)
    }
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in moved} == {
        "embedding",
        "in_proj",
        "x_proj",
        "out_proj",
    }
    assert result["parameters"] == model.num_parameters()


@pytest.mark.parametrize(
    "words, package", [(["--optimizer", "adamw-8bit"], "bitsandbytes"), (["--lora", "4"], "peft")]
)
def test_a_missing_library_is_one_line(words, package, tmp_path, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert run.main(["--seq-len", "16", "--model", "mamba", *words, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"pip install {package}" in error
