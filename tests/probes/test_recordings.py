"""What a recording holds: chosen parts, several calls, a budget of memory, files, the model's device."""

from __future__ import annotations

import io
import os

import pytest
import torch
from hook_models import (
    IDS,
    OTHER,
    L,
    build,
    halve,
    recorded,
)

import probes
from probes import cache as recording
from ssm_retrieval.models.hooks import points


@torch.no_grad()
def test_layers_channels_positions_and_calls(model):
    whole, _ = recorded(model)
    with probes.record(model, "*", layers=[0, -1], positions=[3, -2], channels=[1, 0]) as cache:
        model(IDS[:1])
        model(IDS[1:])
    last = model.config.n_layer - 1
    assert {
        n for n in model.hook_names() if not n.startswith("blocks.") or int(n.split(".")[1]) in (0, last)
    } == set(cache)
    for name, point in points(model).items():
        if name not in cache:
            continue
        want = whole[name].index_select(point.axes.index("L"), torch.tensor([3, L - 2]))
        for axis, letter in enumerate(point.axes):
            if letter in "DEHMJ":
                want = want.index_select(axis, torch.tensor([1, 0]))
        torch.testing.assert_close(cache[name], want)
        assert [len(x) for x in cache.calls(name)] == [1, 1]
    assert cache.num_bytes() == sum(cache[n].numel() * 8 for n in cache)


@torch.no_grad()
def test_calls_of_different_lengths():
    model = build("mamba")
    with probes.record(model, "hook_embed") as cache:
        with pytest.raises(KeyError, match="no forward pass"):
            cache["hook_embed"]
        model(IDS)
        model(IDS[:, :4])
    assert [x.shape[1] for x in cache.calls("hook_embed")] == [L, 4]
    with pytest.raises(ValueError, match=r"differs in shape between calls .*use cache.calls\(name\)"):
        cache["hook_embed"]


@torch.no_grad()
def test_budget_refuses_before_computing_or_streams(model, tmp_path):
    whole, _ = recorded(model)
    again = torch.cat([IDS, OTHER])
    with probes.record(model, "*", budget=whole.num_bytes()) as cache:
        model(IDS)  # just fits
        with pytest.raises(ValueError, match=r"recording needs .* GiB for this call .*positions=.*budget="):
            model(IDS)
    assert cache.num_bytes() == whole.num_bytes()
    largest = max(whole[n].numel() * 8 for n in whole)
    with probes.record(model, "*", budget=largest, folder=tmp_path / "states") as cache:
        assert torch.equal(model(IDS), model(IDS)) and cache.num_bytes() == 0
    for name in whole:
        assert torch.equal(cache[name], torch.cat([whole[name]] * 2))
    assert len(list((tmp_path / "states" / "00001").glob("*.safetensors"))) == len(whole)
    assert not list((tmp_path / "states").rglob("*.part"))
    again_read = probes.Recording.read(tmp_path / "states")  # as a later session does
    assert set(again_read) == set(whole) and all(torch.equal(again_read[n], cache[n]) for n in whole)
    with pytest.raises(ValueError, match=r"folder='.*none' holds no recordings"):
        probes.Recording.read(tmp_path / "none")
    with pytest.raises(ValueError, match=r"alone needs .*choose positions= or raise budget="):
        recorded(model, ids=again, budget=largest, folder=tmp_path / "more")


@torch.no_grad()
def test_recordings_may_fill_half_of_the_memory(monkeypatch):
    model = build("mamba")
    size = IDS.numel() * 16 * 8
    for spare, fits in ((0, True), (-2, False)):
        monkeypatch.setattr(recording, "available_memory", lambda device, spare=spare: 2 * size + spare)
        with probes.record(model, "hook_embed") as cache:
            if fits:
                model(IDS)
                assert cache.num_bytes() == size
            else:
                with pytest.raises(ValueError, match="more than the budget"):
                    model(IDS)


def test_available_memory_is_what_the_system_says(monkeypatch):
    told = "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:   1234 kB\nMemAvailableToo: 5 kB\n"
    files = {"/proc/meminfo": told}
    monkeypatch.setattr(recording, "open", lambda path: io.StringIO(files[path]), raising=False)
    assert recording.available_memory(torch.device("cpu")) == 1234 * 1024

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(recording, "open", missing, raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1001}.__getitem__)
    assert recording.available_memory(torch.device("cpu")) == 4096 * 1001 // 2
    assert recording.gib(3 * 2**29) == "1.5 GiB"


@torch.no_grad()
def test_recordings_and_edits_stay_where_the_model_is(model):
    """What is made without naming a device would be on another one here, and not fit."""
    edits = {"blocks.*.hook_resid_post": probes.at([2, 5], halve), "hook_embed": lambda x: x + 1}

    def results():
        with probes.intervene(model, edits):
            return recorded(model, "*", positions=[7, 1, -1], channels=[1, 0])

    cache, logits = results()
    with torch.device("meta"):
        found, again = results()
    assert torch.equal(again, logits) and list(found) == list(cache)
    assert all(torch.equal(found[name], x) for name, x in cache.items())


@torch.no_grad()
def test_recordings_keep_no_larger_tensor_alive():
    for options in ({}, dict(positions=[1]), dict(channels=[1])):
        cache, _ = recorded(build("mamba"), "*.mixer.*", **options)
        assert all(x.untyped_storage().nbytes() == x.numel() * 8 for x in cache.values())
