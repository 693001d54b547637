"""Options that published recipes need: what a session really does with each of them."""

from __future__ import annotations

import dataclasses
import json

import pandas as pd
import pytest
import torch
from sessions import SMALL, session, small, watch_inputs, watch_steps
from torch.nn import functional as F

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models import configuration, mamba, transformer
from ssm_retrieval.models.architecture import Architecture
from ssm_retrieval.models.configuration import derived
from ssm_retrieval.registry import ARCHITECTURES
from synthetic import results, tasks
from synthetic.config import RunConfig, plan, run_id

# Plain names of the parameters that --ssm-lr is for
RECURRENCE = {"mamba": ("A_log", "D", "dt_proj.weight", "dt_proj.bias"), "mamba2": ("A_log", "D", "dt_bias")}
RECURRENCE["hybrid"] = RECURRENCE["mamba"]


def built(family: str, **asked) -> models.LanguageModel:
    """The model that a run with these options begins with."""
    p = plan(dataclasses.replace(SMALL, model=(family,), **asked), family)
    return models.build(p.model, seed=p.seed, **p.model_overrides)


# --- the shape ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["transformer", "mamba", "mamba2", "hybrid"])
def test_the_weights_have_the_width_that_was_asked_for(family):
    model = built(family, d_model=64)
    assert model.embedding.weight.shape[1] == model.norm.weight.shape[0] == 64
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape[:2] == (1, 3)


def test_the_default_rate_follows_the_width():
    lr = {width: plan(dataclasses.replace(SMALL, d_model=width), "mamba").lr for width in (None, 32, 512)}
    assert lr[32] == pytest.approx(2 * lr[None]) and lr[512] == pytest.approx(lr[None] / 2)


@pytest.mark.parametrize("taps", [1, 2, 5])
@pytest.mark.parametrize("family", ["mamba", "mamba2", "hybrid"])
def test_a_token_sees_as_many_inputs_as_the_convolution_has_taps(family, taps):
    model = built(family, d_conv=taps, ssm_init="default")
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv1d))
    x = torch.randn(1, first.in_channels, 12, requires_grad=True)
    first(x)[0, 0, 9].backward()
    assert x.grad[0, 0].nonzero().flatten().tolist() == list(range(9 - taps + 1, 10))
    assert model(torch.arange(12).view(1, 12)).isfinite().all()


@pytest.mark.parametrize("heads, width", [(1, 128), (8, 128), (2, 64)])
def test_attention_is_cut_into_the_heads_that_were_asked_for(heads, width, monkeypatch):
    shapes, plain = [], transformer.attention

    def watched(q, *rest, **options):
        shapes.append(q.shape)
        return plain(q, *rest, **options)

    monkeypatch.setattr(transformer, "attention", watched)
    built("transformer", heads=heads, d_model=width)(torch.zeros(1, 3, dtype=torch.int64))
    assert shapes == [(1, heads, 3, width // heads)] * 2


@pytest.mark.parametrize("heads, width", [(1, 128), (16, 128), (2, 16)])
def test_mamba2_has_a_decay_for_every_head_that_was_asked_for(heads, width):
    model = built("mamba2", heads=heads, d_model=width)
    assert {p.shape for name, p in model.named_parameters() if name.endswith("A_log")} == {(heads,)}


def test_every_model_of_a_command_takes_what_it_has():
    """None of the options is refused, and none leaks into the run of a model that lacks it."""
    asked = dict(heads=2, d_conv=3, d_state=8, ssm_lr=0.5)
    config = dataclasses.replace(SMALL, model=("transformer", "mamba"), **asked)
    attending, recurrent = (plan(config, family) for family in config.model)
    assert attending.model_overrides["n_head"] == 2 and attending.ssm_lr == 1
    assert {"d_conv", "d_state"}.isdisjoint(attending.model_overrides)
    assert recurrent.model_overrides.items() >= {"d_conv": 3, "d_state": 8}.items()
    assert recurrent.ssm_lr == 0.5 and "n_head" not in recurrent.model_overrides
    for p in (attending, recurrent):
        assert run_id(plan(config.of(p.family), p.family)) == run_id(p)


def test_a_convolution_that_is_off_by_default_has_no_taps():
    """GLA's: --d-conv is for the other models of the command."""
    config = dataclasses.replace(SMALL, model=("gla", "mamba"), d_conv=3, d_state=8)
    linear, recurrent = (plan(config, family) for family in config.model)
    assert "d_conv" not in linear.model_overrides and linear.model_overrides["d_state"] == 8
    assert recurrent.model_overrides["d_conv"] == 3
    assert run_id(plan(config.of("gla"), "gla")) == run_id(linear)


@pytest.fixture
def theirs(monkeypatch):
    """A user's Mamba whose config has `ssm_init`."""
    monkeypatch.setattr(ARCHITECTURES, "_theirs", {})
    monkeypatch.setitem(configuration.CHOICES, "ssm_init", ("default", "recall"))
    config = derived("theirs", mamba.MambaConfig, [("ssm_init", "str", "default")])
    tiny = {"tiny": dict(d_model=16, n_layer=1)}
    models.register(Architecture("theirs", config, mamba.MambaForCausalLM, presets=tiny))


def test_first_weights_are_the_choice_of_whoever_has_one(theirs):
    def named(**asked) -> str:
        return run_id(plan(dataclasses.replace(SMALL, model=("theirs",), **asked), "theirs"))

    assert named() == named(ssm_init="default") != named(ssm_init="recall")
    assert built("theirs", ssm_init="recall").config.ssm_init == "recall"
    both = dataclasses.replace(SMALL, model=("theirs", "transformer"), ssm_init="recall")
    assert "ssm_init" not in plan(both, "transformer").model_overrides
    with pytest.raises(UserError, match=r"^--ssm-init lost: ssm_init='lost' is unknown; use 'default', 'rec"):
        named(ssm_init="lost")


# --- the loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, accumulate", [("transformer", 1), ("mamba", 3)])
def test_label_smoothing_is_torch_s_and_in_training_only(tmp_path, family, accumulate):
    """Loss and gradient of a step against F.cross_entropy in float64; evaluations have no smoothing."""
    p = small(family, label_smoothing=0.2, grad_clip=0.0, accumulate=accumulate)
    work = session(p, tmp_path)
    seen, read = watch_steps(work.model, work.optimizer), watch_inputs(work.model)
    copy = models.build(p.model, seed=p.seed, **p.model_overrides).double()
    batch = work.next_batch()
    numbers = work.update(batch)
    assert len(read) == accumulate
    logits = copy(batch.input_ids, **batch.places())[:, batch.answer_at].flatten(0, 1)
    want = F.cross_entropy(logits, batch.labels.flatten(), label_smoothing=0.2)
    assert numbers["loss"] == pytest.approx(want.item(), rel=1e-5)
    assert abs(want - F.cross_entropy(logits, batch.labels.flatten())) > 1e-3  # so that it would show
    want.backward()
    for name, got in seen[0].gradients.items():
        torch.testing.assert_close(got.double(), copy.get_parameter(name).grad, rtol=1e-3, atol=1e-6)
    task = tasks.build(p.task, **p.task_options)
    unseen = task.batch(8, seed=3, index=0, queries=1)
    plain, _ = work.model.loss(unseen.input_ids, labels=unseen.labels, logits_at=unseen.answer_at)
    logits = work.model(unseen.input_ids)[:, unseen.answer_at].flatten(0, 1)
    torch.testing.assert_close(plain, F.cross_entropy(logits, unseen.labels.flatten()))
    smooth = dataclasses.replace(p, label_smoothing=0.0)
    work.plan = smooth
    without = work._unseen("validation", 8, p.seq_len).loss
    work.plan = p
    assert work._unseen("validation", 8, p.seq_len).loss == without


# --- learning rates ----------------------------------------------------------------------------------


def rates(work) -> dict[str, float]:
    """The rate and the weight decay of every parameter in one step, by its name."""
    names = {id(w): name for name, w in work.model.named_parameters()}
    groups = [[names[id(w)] for w in group["params"]] for group in work.optimizer.param_groups]
    seen = watch_steps(work.model, work.optimizer)
    work.step()
    return {
        name: (handed["lr"], handed["weight_decay"])
        for held, handed in zip(groups, seen[0].groups, strict=True)
        for name in held
    }


@pytest.mark.parametrize("family", ["mamba", "mamba2", "hybrid"])
def test_the_recurrence_has_a_rate_of_its_own(tmp_path, family):
    """In every step, warm-up included; weight decay stays where it was."""
    common = dict(lr=0.02, warmup=4, weight_decay=0.3)
    plain = rates(session(small(family, **common), tmp_path / "plain"))
    found = rates(session(small(family, **common, ssm_lr=0.1), tmp_path / "own"))
    assert found.keys() == plain.keys()
    assert {rate for rate, _ in plain.values()} == {0.005}
    slow = {name for name in found if name.endswith(RECURRENCE[family])}
    blocks = {name.rpartition(".mixer.")[0] for name in found if name.endswith("A_log")}
    assert len(slow) == len(RECURRENCE[family]) * len(blocks)
    for name, (rate, decay) in found.items():
        assert rate == pytest.approx(0.0005 if name in slow else 0.005), name
        assert decay == plain[name][1], name


def test_a_recurrence_of_rate_0_keeps_its_first_values(tmp_path):
    work = session(small("mamba", ssm_lr=0.0, weight_decay=0.5), tmp_path)
    before = {name: w.detach().clone() for name, w in work.model.named_parameters()}
    work.step()
    still = {name for name, w in work.model.named_parameters() if torch.equal(w, before[name])}
    assert still == {name for name in before if name.endswith(RECURRENCE["mamba"])}


def test_a_resumed_run_with_two_rates_has_the_weights_of_an_uninterrupted_one(tmp_path):
    p = small("mamba", ssm_lr=0.1, label_smoothing=0.1, schedule="cosine", flat=2)
    whole, begun = session(p, tmp_path / "whole"), session(p, tmp_path / "parts")
    for _ in range(3):
        begun.step()
    begun.checkpoint()
    again = session(p, tmp_path / "parts")
    assert again.progress.step == 3
    for _ in range(6):
        whole.step()
    for _ in range(3):
        again.step()
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_betas_that_were_asked_for_reach_the_optimizer(tmp_path):
    for family in ("transformer", "mamba"):
        work = session(small(family, betas=(0.8, 0.7), ssm_lr=0.5), tmp_path / family)
        seen = watch_steps(work.model, work.optimizer)
        work.step()
        assert {group["betas"] for group in seen[0].groups} == {(0.8, 0.7)}


@pytest.mark.parametrize("warmup, flat", [(2, 5), (0, 3), (4, 0)])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_flat_part_lies_between_warm_up_and_decay(tmp_path, schedule, warmup, flat):
    """As in the recipe of the recall laws (arXiv 2609.07681): 100 up, 400 flat, 1,500 of a cosine to 0."""
    p = small("mamba", schedule=schedule, lr=0.02, warmup=warmup, flat=flat, steps=16, stop_at=1.01)
    work = session(p, tmp_path)
    seen = watch_steps(work.model, work.optimizer)
    while not work.done():
        work.step()
    decay = 16 - warmup - flat
    falling = [k / decay for k in range(decay)]
    down = {"cosine": [(1 + torch.cos(torch.tensor(torch.pi * u)).item()) / 2 for u in falling],
            "linear": [1 - u for u in falling]}  # fmt: skip
    want = [(k + 1) / warmup for k in range(warmup)] + [1.0] * flat + down[schedule]
    assert [handed.groups[0]["lr"] / 0.02 for handed in seen] == pytest.approx(want, rel=1e-5)


# --- the batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 20])
def test_a_batch_has_as_many_sequences_as_were_asked_for_at_every_length(tmp_path, rows):
    p = small("mamba", batch_size=rows, batch_tokens=2048, curriculum=4)
    work = session(p, tmp_path)
    read = watch_inputs(work.model)
    for length in (4, 8, 16):
        work.progress.length = length
        work.step()
    trained = [r.input_ids for r in read if r.training]
    assert [len(ids) for ids in trained] == [rows] * 3
    assert len({ids.shape[1] for ids in trained}) == 3
    assert work.progress.examples == 3 * rows


def test_the_papers_protocol_takes_another_batch():
    config = RunConfig(seq_len=16, model=("mamba",), protocol="paper", device="cpu", batch_size=64)
    p = plan(config, "mamba")
    assert p.batch_size == 64 and p.warmup == 20_000_000 // 64 // 10  # a tenth of the steps there are


# --- what is written ---------------------------------------------------------------------------------


def columns(family: str, **asked) -> dict:
    """What a run's file of results says it was, read back from JSON as there."""
    settled = plan(dataclasses.replace(SMALL, model=(family,), **asked), family)
    return results.config_columns(json.loads(json.dumps(settled.to_dict())))


def test_the_results_say_which_recipe_a_run_had():
    recipe = dict(batch_size=9, label_smoothing=0.1, betas=(0.9, 0.95), schedule="cosine", flat=3)
    shape = dict(d_conv=2, d_model=64, heads=2)
    found = columns("mamba2", **recipe, **shape, ssm_lr=0.5, batch_tokens=2048)
    wanted = {**recipe, **shape, "ssm_lr": 0.5, "betas": "0.9 0.95"}
    assert found.items() >= wanted.items()
    usual = dict(d_conv=4, batch_size=None, label_smoothing=0, betas="0.9 0.98", ssm_lr=1, flat=None)
    assert columns("mamba").items() >= usual.items()
    assert columns("transformer")["heads"] == 4
    assert [columns(family)["d_conv"] for family in ("transformer", "gla", "mamba3")] == [None] * 3


def test_runs_of_two_recipes_are_not_pooled():
    """And tables from before these columns still tell runs apart by those that they have."""
    rows = [
        columns("mamba", **asked) | dict(run=str(n), seed=0)
        for n, asked in enumerate([{}, dict(label_smoothing=0.1), dict(schedule="linear")])
    ]
    table = pd.DataFrame(rows).assign(
        purpose="report", parameters=1, parameters_without_embeddings=1, commit=""
    )
    cell = ["task", "model", "seq_len", "seed"]
    assert results.apart(table, cell) == ["schedule", "label_smoothing"]
    assert results.apart(table.drop(columns=list(results.RECIPE)), cell) == ["schedule"]


def test_runs_of_other_task_options_are_not_pooled():
    """Options with a flag but no column of their own, and those without a flag; columns tell the others."""
    mqar = dict(task="mqar", seq_len=32, num_symbols=64)
    asked = [dict(num_pairs=4), dict(num_pairs=8), dict(num_pairs=4, task_options={"power": 0.5})]
    rows = [columns("mamba", **mqar, **one) | dict(seed=0) for one in asked]
    assert len({row["options"] for row in rows}) == 3 and "num_pairs=4" in rows[0]["options"]
    table = pd.DataFrame(rows).assign(parameters=1, parameters_without_embeddings=1, purpose="", commit="")
    cell = ["task", "model", "seq_len", "seed"]
    assert results.apart(table.assign(run=list("abc")), cell) == ["options"]
    assert columns("mamba", num_symbols=50)["options"] == columns("mamba")["options"]


def test_runs_that_grow_otherwise_are_not_pooled():
    rows = [columns("mamba", growth=growth) for growth in ("prefix", "gap", None)]
    assert [row["growth"] for row in rows] == ["prefix", "gap", "gap"]
    more = dict(parameters=1, parameters_without_embeddings=1, purpose="", commit="", seed=0)
    table = pd.DataFrame(rows[:2]).assign(run=list("ab"), **more)
    assert results.apart(table, ["task", "model", "seq_len", "seed"]) == ["growth"]


@pytest.mark.parametrize(
    "family, layout, growth, lr, shape",
    [
        ("transformer", "suffix", "gap", 1e-3, {}),
        ("transformer", "suffix", "prefix", 2e-3, {}),
        ("mamba", "suffix", "gap", 4e-3, dict(ssm_init="recall", n_layer=1, d_state=128)),
        ("mamba", "prefix", "gap", 4e-3, dict(ssm_init="recall", n_layer=2, d_state=64)),
        ("mamba2", "suffix", "prefix", 4e-3, dict(ssm_init="recall")),
        ("hybrid", "suffix", "gap", 2e-3, {}),
    ],
)
def test_what_a_family_begins_with_by_default(family, layout, growth, lr, shape):
    """docs/learnability.md says what was measured for each."""
    found = plan(RunConfig(model=family, layout=layout, growth=growth, device="cpu"), family)
    assert found.lr == lr
    names = ("ssm_init", "n_layer", "d_state")
    assert {name: found.model_overrides[name] for name in names if name in found.model_overrides} == shape
    assert found.model_overrides["position"] == "learned"


@pytest.mark.parametrize(
    "layout, queries", [("suffix", 32), ("instruction", 32), ("two-pass", 32), ("prefix", 1)]
)
def test_a_sequence_that_begins_with_its_query_has_one(layout, queries):
    """Evaluations ask one query; behind several, contexts would stand at other positions."""
    run = RunConfig(seq_len=32, layout=layout, model="mamba", device="cpu")
    assert plan(run, "mamba").queries == queries
    assert plan(dataclasses.replace(run, queries=3), "mamba").queries == 3
