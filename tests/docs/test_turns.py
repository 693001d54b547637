"""Sides that take turns, what their ratios are, GGUF files, and floors."""

from __future__ import annotations

import argparse
import json
import os
import sys

import numpy as np
import pytest
import torch

from benchmarks import common, gguf_file, inference, limits, turns
from ssm_retrieval import models


def counting(path, value=1.0):
    """A side whose calls note who was called, in a file."""

    def call():
        with open(path, "a") as file:
            file.write(f"{os.getpid()} ")
        return value

    def timed():
        return 0.25, "answer"

    return {"call": call, "timed": timed, "fail": lambda: 1 // 0, "die": lambda: os._exit(3)}


def unmade():
    raise ImportError("no such peer")


def test_sides_have_processes_of_their_own_and_go_back_and_forth(tmp_path):
    sides = [turns.Side(name, counting, {"path": str(tmp_path / "log")}) for name in "ab"]
    raced = turns.race(sides, ("call", "timed"), 3, threads=1, kept=False, checked=("call",))
    who = (tmp_path / "log").read_text().split()
    a, b = who[:2]  # the check
    assert a != b and str(os.getpid()) not in who
    assert who[2:] == [b, a, a, b, b, a, a, b]  # a warm-up and three pairs
    assert raced.seconds["a"]["timed"] == [0.25] * 3 and raced.answers["a"]["timed"] == "answer"
    assert len(raced.seconds["b"]["call"]) == 3 and raced.peak_mib["a"] > 10


def test_a_side_that_fails_says_why(tmp_path):
    with pytest.raises(turns.Failed, match="no such peer"):
        turns.race([turns.Side("peer", unmade)], ("call",), 1, threads=1)
    side = turns.Side("peer", counting, {"path": str(tmp_path / "log")})
    with pytest.raises(turns.Failed, match=r"(?s)peer:.*ZeroDivisionError"):
        turns.race([side], ("fail",), 1, threads=1)
    with pytest.raises(turns.Failed, match="the process of peer died"):
        turns.race([side], ("die",), 1, threads=1)


def test_a_peer_that_fails_is_left_out_and_our_own_failure_is_a_bug():
    assert turns.Failed("compiled", "compiled:\nTraceback\nValueError: x\n").reason() == "ValueError: x"
    with pytest.raises(turns.Failed, match="no kernel"):
        turns.Failed("ours, 16 bits", "no kernel").reason()


def test_inference_goes_on_without_a_peer_that_fails(tmp_path, monkeypatch, capsys):
    def compare(title, sides, sizes):
        if "vs transformers" in title:
            raise turns.Failed("transformers", "Traceback\nImportError: gone")
        return {"decode": common.Ratio(2.0, 1.5, 2.5)}, {"kl": 0.0}

    monkeypatch.setattr(inference, "compare", compare)
    path = tmp_path / "a.json"
    command = f"inference --quick --peers transformers compiled --models mamba-tiny --json {path}"
    monkeypatch.setattr(sys, "argv", command.split())
    inference.main()
    found = json.loads(path.read_text())
    assert found["left_out"] == {"mamba-tiny_vs_transformers": "ImportError: gone"}
    assert found["ratios"] == {f"decode_mamba-tiny_{end}": [2.0, 1.5, 2.5]
                               for end in ("vs_compiled", "8bit_vs_bfloat16")}  # fmt: skip
    assert found["given"] == {"models": "mamba-tiny", "peers": "transformers compiled"}
    assert "mamba-tiny vs transformers: left out, ImportError: gone" in capsys.readouterr().out


def test_distance_is_what_ours_loses_of_the_peers_distribution(monkeypatch, capsys):
    """KL(peer, ours), which is by how much the logarithm of the perplexity of its tokens grows."""
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.2, 0.6])
    logits = {"peer": np.log(p), "ours": np.log(q)}
    raced = turns.Raced(
        {name: {"prefill": [1.0], "decode": [1.0]} for name in logits},
        {name: {"logits": value} for name, value in logits.items()},
        dict.fromkeys(logits, 1.0),
    )
    monkeypatch.setattr(inference, "race", lambda *arguments, **options: raced)
    sizes = argparse.Namespace(pairs=1, length=8, tokens=2)
    _, facts = inference.compare("x", [turns.Side("ours", counting), turns.Side("peer", counting)], sizes)
    assert facts["kl"] == pytest.approx(float((p * np.log(p / q)).sum()))


def test_ratios_are_of_pairs():
    """A slow spell that doubles both sides of a pair changes nothing."""
    ours, theirs = [1.0, 2.0, 1.0, 1.0], [3.0, 6.0, 2.0, 4.0]
    assert common.paired(theirs, ours) == (3.0, 2.0, 4.0)
    assert common.paired([3.0, 5.0], [1.0, 1.0]).median == 4.0


def test_calls_in_one_process_go_back_and_forth_too():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    found = common.take_turns(calls, repeats=2, warmup=1)
    assert "".join(called) == "cbaabccba" and {len(times) for times in found.values()} == {2}


def test_a_benchmark_writes_what_it_prints(tmp_path, capsys):
    options = common.parse(common.command("x"), {}, {}, ["--json", str(tmp_path / "a.json")])
    common.finish(options, {"a": 2.0, "b": common.Ratio(3.0, 2.5, 4.0)}, facts={"x": 1})
    assert capsys.readouterr().out == "ratio a 2\nratio b 3 [2.5, 4]\n"
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["ratios"] == {"a": 2.0, "b": [3.0, 2.5, 4.0]} and found["facts"] == {"x": 1}
    assert found["machine"]["packages"]["torch"] == torch.__version__ and not found["quick"]
    assert found["given"] == {}


SHAPES = {
    "mamba-tiny": dict(n_layer=2, d_model=64),
    "mamba2-tiny": dict(n_layer=2, d_model=64, headdim=32, d_state=16),
    "pythia-160m": dict(n_layer=2, d_model=64, n_head=2, vocab_size=96),
    "transformer-tiny": dict(n_layer=1, d_model=64, n_head=2),  # tied
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_gguf_file_has_every_number_of_a_model(name):
    """Each tensor is one of the model's, moved at most; all of them are there once."""
    model = models.build(name, seed=0, **SHAPES[name])
    found = dict(gguf_file.tensors(model))
    twice = model.embedding.weight.numel() if name == "transformer-tiny" else 0  # llama.cpp wants a head
    assert sum(value.numel() for value in found.values()) == model.num_parameters() + twice
    for key, value in found.items():
        if key.endswith("ssm_a"):
            continue
        sums = [float(p.detach().double().sum()) for p in model.parameters() if p.numel() == value.numel()]
        assert min(abs(float(value.detach().double().sum()) - s) for s in sums) < 1e-9, key
    rates = [value for key, value in found.items() if key.endswith("ssm_a")]
    assert all((value < 0).all() for value in rates) and len(rates) == (2 if "mamba" in name else 0)


@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny", "transformer-tiny"])
def test_models_that_are_raced_are_whole(name):
    """As large as any of their kind, in bfloat16, with finite numbers: what is tied stays tied."""
    model, usual = inference.build(name), models.build(name)
    assert model.num_parameters() == usual.num_parameters()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.isfinite().all() for p in model.parameters())
    if usual.config.tie_word_embeddings:
        assert len(list(model.parameters())) == len(list(usual.parameters()))


def test_queries_keys_and_values_of_all_heads_stand_together():
    rows = torch.arange(2 * 3 * 4)[:, None] + torch.zeros(1, 5)  # 2 heads of 4 channels
    found = gguf_file._by_kind(rows, 2)[:, 0].reshape(3, 2, 4)
    for kind in range(3):
        for head in range(2):
            assert found[kind, head].tolist() == [(head * 3 + kind) * 4 + i for i in range(4)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind, tolerance", [("F32", 2e-3), ("Q8_0", 0.1)])
def test_llama_cpp_computes_the_same_logits(name, kind, tolerance, tmp_path):
    """In one piece and token by token. Its GPT-NeoX has a table for gelu and keeps keys in float16."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it is built from source")
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = models.build(name, seed=0, **SHAPES[name]).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids)[0].numpy()
    peer = gguf_file.LlamaCpp(gguf_file.write(model, tmp_path / "m.gguf", kind), 1, 32)
    peer.start()
    for at, given in ((16, ids[0, :17]), (17, ids[0, 17:18]), (18, ids[0, 18:19])):
        apart = np.abs(peer.step(given.tolist()) - wanted[at]).max()
        assert apart < tolerance * np.abs(wanted[at]).max(), at


def test_what_llama_cpp_has_not_is_refused(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    with pytest.raises(ValueError, match=r"llama\.cpp has no"):
        gguf_file.write(models.build("hybrid-tiny"), tmp_path / "m.gguf", "F32")
    with pytest.raises(ValueError, match="type 'Q1' is none of F32"):
        gguf_file.write(models.build("mamba-tiny"), tmp_path / "m.gguf", "Q1")


def test_floors_are_the_longest_of_what_must_be_done():
    rate = {"float32": 100.0, "bfloat16": 200.0, "copy": 10.0, "read": 20.0, "exp": 5.0}
    row = limits.Row("x", lambda: None, flops=1000.0, bytes=50.0, exps=20.0)
    assert limits.floor(row, rate) == (10.0, "products in float32")
    row = limits.Row("x", lambda: None, flops=1000.0, read=120.0, exps=20.0, dtype=torch.bfloat16)
    assert limits.floor(row, rate) == (6.0, "reading")
    assert limits.floor(limits.Row("x", lambda: None, exps=20.0), rate) == (4.0, "exponentials")
