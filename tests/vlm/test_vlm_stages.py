"""What a stage of VLM training does with its settings, seen by torch's hooks and beside plain PyTorch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed; .ci/run installs it")
pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")

import vlm_runs
from accelerate.state import AcceleratorState
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ssm_retrieval.ops.linear import Linear
from ssm_retrieval.training import store
from vlm import answering, components, stages, train
from vlm.config import Run, Scenes, Stage
from vlm.scenes import encoder as scenes

STAGE = Stage({"vqa": Scenes("vqa", 24, turns=2)}, steps=3, batch_size=4, lr=0.02)
CONNECTOR = "vision_embed_tokens"


@dataclasses.dataclass
class Handed:
    """What the optimizer had in its hands as it was asked for a step."""

    groups: list[dict[str, Any]]
    gradients: dict[str, torch.Tensor | None]

    def norm(self) -> float:
        flat = [g.double().flatten() for g in self.gradients.values() if g is not None]
        return float(torch.cat(flat).norm())


@dataclasses.dataclass
class Seen:
    """What could be seen of training: models as built, batches, optimizer steps, dtypes of products."""

    models: list[Any] = dataclasses.field(default_factory=list)
    first: list[dict[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    batches: list[Any] = dataclasses.field(default_factory=list)
    steps: list[Handed] = dataclasses.field(default_factory=list)
    trained: list[set[str]] = dataclasses.field(default_factory=list)
    products: set[torch.dtype] = dataclasses.field(default_factory=set)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """watch(run): trains its stages and gives what was seen. Folders of other names are other trainings."""
    vlm_runs.save_encoder(tmp_path / "0")

    def train_watched(wanted: Run, name: str = "0") -> Seen:
        seen, out = Seen(), tmp_path / name
        if not out.exists():
            vlm_runs.save_encoder(out)
        build, batches = components.model, stages.batches

        def watched_model(*args):
            model = build(*args)
            for module in model.lm.modules():
                if isinstance(module, Linear):
                    module.register_forward_hook(lambda module, args, out: seen.products.add(out.dtype))
            seen.models.append(model)
            return model

        def watched_batches(*args, **options):
            seen.first.append({n: w.detach().clone() for n, w in seen.models[-1].named_parameters()})
            for batch in batches(*args, **options):
                seen.batches.append(batch)
                yield batch

        def note(optimizer, *_):
            held = {id(w) for group in optimizer.param_groups for w in group["params"]}
            named = dict(seen.models[-1].named_parameters())
            seen.trained.append({n for n, w in named.items() if id(w) in held})
            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            gradients = {n: None if w.grad is None else w.grad.clone() for n, w in named.items()}
            seen.steps.append(Handed(groups, gradients))

        with monkeypatch.context() as patch:
            patch.setattr(components, "model", watched_model)
            patch.setattr(stages, "batches", watched_batches)
            hook = register_optimizer_step_pre_hook(note)
            try:
                AcceleratorState._reset_state(True)  # one precision a process, says accelerate
                accelerator = train.accelerate([wanted])
                for number in range(len(wanted.stages)):
                    stages.train_stage(wanted, number, out, accelerator, seen.rows.append)
            finally:
                hook.remove()
        return seen

    train_watched.out = tmp_path
    yield train_watched
    AcceleratorState._reset_state(True)


def small(model: str = "transformer-tiny", *chain: Stage, **more: Any) -> Run:
    over = {"n_layer": 1, "d_model": 32} | ({"n_head": 2} if model.startswith("transformer") else {})
    over |= {"headdim": 16} if model.startswith("mamba2") else {}
    given = dict(model_overrides=over, precision="no", image_size=32, cache=False) | more
    return Run("small", model, chain or (STAGE,), {}, **given)


def of(**changed: Any) -> Stage:
    return dataclasses.replace(STAGE, **changed)


def loss_by_hand(model, batch) -> torch.Tensor:
    """Mean over examples of each one's mean cross-entropy; patches go where ids are negative, in order."""
    dtype = model.lm.embedding.weight.dtype
    patches = model.vision_embed_tokens(batch.features.to(dtype))
    losses = []
    for ids, labels, image in zip(batch.input_ids, batch.labels, patches, strict=True):
        vectors = list(model.lm.embedding.weight[ids.clamp(min=0)])
        for place, patch in zip((ids < 0).nonzero().flatten().tolist(), image, strict=True):
            vectors[place] = patch
        logits = model.lm(inputs_embeds=torch.stack(vectors)[None])[0]
        losses.append(F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100))
    return torch.stack(losses).mean()


def fresh(wanted: Run):
    return components.model(wanted, scenes.WIDTH).double()


# --- the optimizer -----------------------------------------------------------------------------------


def test_rates_rise_over_the_warm_up_and_fall_as_a_cosine_in_every_stage(watch):
    seen = watch(small("mamba-tiny", of(steps=10, warmup=0.3), of(steps=4, warmup=0.0, lr=0.01)))
    rise = [1 / 3, 2 / 3, 1.0]
    first = [0.02 * r for r in rise] + [0.02 * (1 + math.cos(math.pi * k / 7)) / 2 for k in range(7)]
    second = [0.01] + [0.01 * (1 + math.cos(math.pi * k / 3)) / 2 for k in range(3)]
    assert [group["lr"] for handed in seen.steps for group in handed.groups] == pytest.approx(first + second)


def test_betas_and_weight_decay_reach_the_optimizer(watch):
    seen = watch(small("mamba-tiny", of(weight_decay=0.25)))
    assert all(group["betas"] == (0.9, 0.95) for handed in seen.steps for group in handed.groups)
    assert all(group["weight_decay"] == 0.25 for handed in seen.steps for group in handed.groups)
    assert seen.trained == [{name for name, _ in seen.models[0].named_parameters()}] * 3


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("model", ["transformer-tiny", "mamba-tiny", "mamba2-tiny"])
def test_the_gradient_is_that_of_the_mean_over_examples_clipped(watch, model, accumulate):
    wanted = small(model, of(grad_clip=0.25, accumulate=accumulate, steps=1))
    seen = watch(wanted)
    by_hand = fresh(wanted)
    loss = loss_by_hand(by_hand, seen.batches[0])
    loss.backward()
    assert seen.rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    want = {name: w.grad for name, w in by_hand.named_parameters() if w.grad is not None}
    norm = float(torch.cat([g.flatten() for g in want.values()]).norm())
    assert norm > 0.5 and seen.steps[0].norm() == pytest.approx(0.25, rel=1e-4)
    for name, gradient in want.items():
        got = seen.steps[0].gradients[name]
        torch.testing.assert_close(got.double(), gradient * 0.25 / norm, rtol=1e-3, atol=1e-6)


def test_grad_clip_0_leaves_gradients_as_they_are(watch):
    norms = [watch(small("mamba-tiny", of(grad_clip=c, steps=1)), str(c)).steps[0].norm() for c in (0.0, 1e3)]
    assert norms[0] == norms[1] > 0.1


def test_three_steps_are_adamw_of_the_paper(watch):
    """Loshchilov & Hutter 2019, algorithm 2, with warm-up, clipping and decay, in plain PyTorch."""
    wanted = small("transformer-tiny", of(grad_clip=0.5, weight_decay=0.5, warmup=0.7))
    seen = watch(wanted)
    mine = fresh(wanted)
    moments = {n: [torch.zeros_like(w), torch.zeros_like(w)] for n, w in mine.named_parameters()}
    for k, batch in enumerate(seen.batches):
        rate = 0.02 * (0.5, 1.0, 1.0)[k]  # round(0.7 * 3) = 2 steps of warm-up, then a cosine from its top
        mine.zero_grad()
        loss_by_hand(mine, batch).backward()
        norm = torch.cat([w.grad.flatten() for w in mine.parameters() if w.grad is not None]).norm()
        with torch.no_grad():
            for name, w in mine.named_parameters():
                if w.grad is None:
                    continue
                m, v = moments[name]
                g = w.grad * min(1.0, 0.5 / norm)
                m += (1 - 0.9) * (g - m)
                v += (1 - 0.95) * (g * g - v)
                step = m / (1 - 0.9 ** (k + 1)) / ((v / (1 - 0.95 ** (k + 1))).sqrt() + 1e-8)
                w -= rate * (step + 0.5 * w)
    assert len(seen.batches) == 3
    for name, w in seen.models[0].named_parameters():
        before = seen.first[0][name].double()
        moved, want = w.detach().double() - before, mine.get_parameter(name).detach() - before
        assert float((moved - want).norm()) < 2e-3 * float(want.norm()), name


# --- what trains, from where, with which seed --------------------------------------------------------


def test_each_stage_trains_what_it_says_and_begins_with_the_weights_before_it(watch):
    wanted = small("mamba-tiny", of(train="connector"), of(train="all", lr=0.01))
    seen = watch(wanted)
    everything = set(seen.first[0])
    connector = {name for name in everything if name.startswith(CONNECTOR)}
    assert seen.trained == [connector] * 3 + [everything] * 3
    for handed in seen.steps[:3]:  # nor is anything computed for the others
        assert {name for name, g in handed.gradients.items() if g is not None} == connector
    after = [store.load_tensors(watch.out / "0" / name / stages.WEIGHTS)[0] for name in wanted.stage_ids()]
    start = dict(components.model(wanted, scenes.WIDTH).named_parameters())
    assert all(torch.equal(seen.first[0][name], start[name]) for name in everything)
    assert all(torch.equal(seen.first[1][name], after[0][name]) for name in everything)
    for name in everything:
        assert torch.equal(after[0][name], start[name]) == (name not in connector), name
        assert not torch.equal(after[1][name], after[0][name]), name


def test_the_vision_encoder_never_trains(watch):
    seen = watch(small())
    eyes = components.eyes("scenes", 32, watch.out / "0")
    assert not any(w.requires_grad for w in eyes.module.parameters())
    assert not any(name.startswith("vision_encoder") for name in seen.first[0])
    saved = store.load_tensors(watch.out / "0" / components.ENCODERS / f"{scenes.key()}.safetensors")[0]
    assert all(torch.equal(w, saved[name]) for name, w in eyes.module.state_dict().items())


@pytest.mark.parametrize("model", ["transformer-tiny", "mamba-tiny"])
def test_a_seed_decides_first_weights_and_first_batch(watch, model):
    a, b, again = (watch(small(model, of(steps=2), seed=s), f"{n}") for n, s in enumerate((0, 1, 0)))
    drawn = [name for name, w in a.first[0].items() if w.unique().numel() > 20 and "A_log" not in name]
    assert any(name.startswith(CONNECTOR) for name in drawn) and len(drawn) > 5
    assert all(torch.equal(a.first[0][name], again.first[0][name]) for name in a.first[0])
    assert not any(torch.equal(a.first[0][name], b.first[0][name]) for name in drawn)
    orders = [[tuple(s.id for s in batch.samples) for batch in seen.batches] for seen in (a, b, again)]
    assert orders[0] == orders[2] and not set(orders[0]) & set(orders[1])
    assert len(set(orders[0])) == 2  # and every step has a batch of its own


# --- precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("model", ["transformer-tiny", "mamba-tiny"])
def test_products_have_the_precision_of_the_run(watch, model, precision, dtype):
    """In training and in evaluation; weights and gradients stay float32."""
    wanted = small(model, of(steps=1), precision=precision)
    seen = watch(wanted)
    assert seen.products == {dtype}
    assert {g.dtype for g in seen.steps[0].gradients.values() if g is not None} == {torch.float32}
    assert {w.dtype for w in seen.models[0].parameters()} == {torch.float32}
    seen.products.clear()
    batch = seen.batches[0]
    answering.say(seen.models[0].eval(), wanted, batch.input_ids, batch.features)
    assert seen.products == {dtype}
