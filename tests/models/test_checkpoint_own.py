"""Every model that `models.build` makes comes back from its folder, and so does every model of a run."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from checkpoint_forms import change, checkpoint, edit, peer, pickled
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_runs import tiny_runs

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.training import store
from synthetic import run

IDS = torch.arange(12)[None] % 11
ATTENTION = dict(
    n_head=st.sampled_from([1, 2, 4]),
    d_mlp=st.sampled_from([0, 24]),
    position=st.sampled_from(["rope", "learned", "none"]),
    rotary_pct=st.sampled_from([0.5, 0.7, 1.0]),  # at least one pair of the narrowest heads (4) rotates
    rope_theta=st.sampled_from([10000.0, 77.5]),
    max_position_embeddings=st.sampled_from([16, 40]),
    init_std=st.sampled_from([0.02, 0.3]),
)
INITS = dict(ssm_init=st.sampled_from(["default", "identity", "long+tied", "recall"]))
TABLE = dict(position=st.sampled_from(["learned", "none"]), max_position_embeddings=st.sampled_from([16, 40]))
SSM = dict(INITS, d_state=st.sampled_from([1, 8]), d_conv=st.integers(1, 4), expand=st.integers(1, 2))
STEPS = dict(dt_min=st.sampled_from([0.001, 0.02]), dt_max=st.sampled_from([0.1, 0.5]))
SECOND = dict(headdim=st.sampled_from([4, 8]))
SHARED = dict(
    vocab_size=st.sampled_from([11, 40]),
    d_model=st.sampled_from([16, 32]),
    norm=st.sampled_from(["rms", "layer"]),
    norm_eps=st.sampled_from([1e-5, 1e-3]),
    residual_in_fp32=st.booleans(),
    tie_word_embeddings=st.booleans(),
    embedding_std=st.sampled_from([0.02, 0.3]),
)
DELTA = dict(
    n_layer=st.integers(1, 2), short_conv=st.booleans(), gate=st.booleans(),
    negative_eigenvalues=st.booleans(), d_mlp=st.sampled_from([0, 24]),
    position=st.sampled_from(["learned", "none"]),
)  # fmt: skip
FAMILIES = {
    "transformer": dict(ATTENTION, n_layer=st.integers(1, 2), parallel_residual=st.booleans()),
    "mamba": dict(SSM, **STEPS, **TABLE, n_layer=st.integers(1, 2), dt_rank=st.sampled_from([0, 3])),
    "mamba2": dict(SSM, **STEPS, **TABLE, **SECOND, n_layer=st.integers(1, 2),
                   ngroups=st.sampled_from([1, 2]), chunk_size=st.sampled_from([64, 8])),
    "hybrid": dict(ATTENTION, **SSM, **SECOND, **STEPS, n_layer=st.just(6),
                   pattern=st.sampled_from(["A", "M A", "M M A", "M2 A", "M2 M A", "M+A", "A+M2 A"]),
                   dt_rank=st.sampled_from([0, 3]), chunk_size=st.sampled_from([64, 8]),
                   ngroups=st.sampled_from([1, 2]), parallel_residual=st.booleans()),
    "linear": dict(SSM, n_layer=st.integers(1, 2), position=st.sampled_from(["learned", "none"]),
                   max_position_embeddings=st.sampled_from([16, 40])),
    "deltanet": dict(SSM, **DELTA), "gated-deltanet": dict(SSM, **STEPS, **DELTA),
    "kda": dict(SSM, **STEPS, **DELTA), "gla": dict(SSM, **DELTA),
    "mamba3": dict(INITS, **STEPS, **TABLE, **SECOND, expand=st.integers(1, 2),
                   d_state=st.sampled_from([6, 9]), n_layer=st.integers(1, 2),
                   ngroups=st.sampled_from([1, 2]), rope_fraction=st.sampled_from([0.5, 1.0]),
                   A_floor=st.sampled_from([1e-4, 1e-2])),
}  # fmt: skip
MODELS = st.sampled_from(sorted(FAMILIES)).flatmap(
    lambda family: st.fixed_dictionaries({}, optional={**SHARED, **FAMILIES[family]}).map(
        lambda options: (family, {"d_model": 16, "n_layer": 6 if family == "hybrid" else 1, "vocab_size": 11,
                                  "n_head": 2, "headdim": 8, "norm_eps": 1e-5, "rotary_pct": 0.5} | options)
    )
)  # fmt: skip


def same(a, b):
    """Configs, names, dtypes and bits of the weights, ties, logits."""
    assert type(a) is type(b) and a.config == b.config
    weights = dict(a.named_parameters(remove_duplicate=False))
    others = dict(b.named_parameters(remove_duplicate=False))
    assert weights.keys() == others.keys() and a.state_dict().keys() == b.state_dict().keys()
    for name, weight in weights.items():
        assert weight.dtype == others[name].dtype
        assert torch.equal(weight.view(torch.uint8), others[name].view(torch.uint8)), name
    assert (a.head.weight is a.embedding.weight) == (b.head.weight is b.embedding.weight)
    with torch.no_grad():
        assert torch.equal(a(IDS), b(IDS))


@settings(max_examples=40, deadline=None)
@given(made=MODELS, seed=st.integers(0, 99), half=st.booleans(), sharded=st.booleans())
def test_every_model_comes_back_bit_by_bit(made, seed, half, sharded, tmp_path_factory):
    family, options = made
    fields = models.ARCHITECTURES[family].config.__dataclass_fields__
    options = {name: value for name, value in options.items() if name in fields}
    model = models.build(family, seed=seed, dtype=torch.bfloat16 if half else None, **options)
    folder = tmp_path_factory.mktemp("own") / "model"
    models.save(model, folder, max_shard_size="9KB" if sharded else "5GB")
    same(models.load(folder), model.eval())


@pytest.mark.parametrize("name", ["transformer-tiny", "hybrid-tiny", "mamba-tiny"])
def test_what_transformers_lacks_says_whose_it_is(name, tmp_path):
    model = models.build(name, vocab_size=11, norm="layer" if name == "mamba-tiny" else "rms")
    written = json.loads((models.save(model, tmp_path / "out") / "config.json").read_text())
    assert written.pop("model_type") == "ssm-retrieval" and written.pop("format") == 1
    assert written.pop("family") == name.removesuffix("-tiny") and written == model.config.to_dict()
    other = models.build("mamba-tiny", vocab_size=11)
    plain = json.loads((models.save(other, tmp_path / "plain") / "config.json").read_text())
    assert plain["model_type"] == "mamba" and "ssm_retrieval" not in plain


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(format=2), "format=2 is not supported, only 1; update ssm-retrieval"),
        (dict(format=None), "format=None is not supported"),
        (dict(family="rwkv"), "family='rwkv' is unknown; only transformer, mamba, mamba2, mamba3, hybrid"),
        (dict(family=[1]), "family=[1] is unknown"),
        (
            dict(ssm="mamba", ssm_per_attention=1),  # before patterns
            "ssm, ssm_per_attention is no option of HybridConfig; another release may know it",
        ),
        (dict(scan_backend="auto"), "scan_backend is no option of HybridConfig; another release may know it"),
        (dict(n_head="4"), "n_head='4' must be a whole number"),
        (dict(d_model=None), "d_model=None must be a whole number"),
        (dict(norm_eps=-1), "norm_eps=-1 must be at least 0"),
        (dict(rope_theta=0), "rope_theta=0 must be above 0"),
        (dict(position="alibi"), "position='alibi' is unknown"),
        (dict(n_layer=4), "n_layer=4 is not a multiple of"),
        (dict(d_model=10**9), "d_model=1000000000 does not fit the weights beside it"),
        (
            dict(max_position_embeddings=2**30, position="learned"),
            "max_position_embeddings=1073741824 does not",
        ),
        (dict(d_model=64), "do not fit its config.json: wrongly shaped"),
    ],
)
def test_faults_in_our_own_form(fields, said, tmp_path):
    folder = models.save(models.build("hybrid-tiny", vocab_size=11, d_model=32), tmp_path / "in")
    edit(folder, **fields)
    with pytest.raises(UserError) as error:
        models.load(folder)
    assert said in str(error.value) and "config.json" in str(error.value) and "\n" not in str(error.value)


# --- runs --------------------------------------------------------------------------------------------


def of_run(model, overrides):
    """What of a run's config.json rebuilds its model."""
    return {"plan": {"model": model, "model_overrides": overrides}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    options = ("--seq-len", "8", "--model", "transformer", "hybrid", "mamba2")
    return tiny_runs(tmp_path_factory.mktemp("runs"), "position", *options)


@pytest.mark.parametrize("family", ["transformer", "hybrid", "mamba2"])
def test_load_opens_the_models_of_runs(family, finished, tmp_path):
    model = models.load(finished[family])
    same(model, store.load_model(str(finished[family])))
    stored, _ = store.load_tensors(finished[family] / "model.safetensors")
    named = dict(model.named_parameters())
    assert stored.keys() == named.keys() and all(torch.equal(stored[n], p) for n, p in named.items())
    same(models.load(models.save(model, tmp_path / "copy")), model)
    assert {p.dtype for p in models.load(finished[family], dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


def test_folders_of_runs_that_are_no_models(tmp_path):
    for load in (models.load, store.load_model):
        (tmp_path / "begun").mkdir(exist_ok=True)
        store.write_json(tmp_path / "begun" / "config.json", of_run("mamba-tiny", {"vocab_size": 11}))
        with pytest.raises(UserError, match="is of a run that has not finished; give its command again"):
            load(tmp_path / "begun")
    with pytest.raises(UserError, match="nowhere is no folder"):
        store.load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content, said",
    [
        (of_run("mamba-tiny", {"flux": 1}), "flux is no option of MambaConfig"),
        (of_run("mamba-tiny", [1]), "model_overrides=[1] must be an object"),
        (of_run(["mamba"], {}), "model=['mamba'] must be a preset or a family"),
        (of_run("rwkv-tiny", {}), "unknown model 'rwkv-tiny'"),
        (of_run("mamba-tiny", {"d_state": 4}), "do not fit its config.json"),
        ({"plans": [1]}, "is of an older version, which kept several models in a run; train them again"),
        ({"plan": 1}, "plan=1 must be an object"),
    ],
)
def test_damaged_models_of_runs(content, said, tmp_path):
    model = models.build("mamba-tiny", vocab_size=11)
    store.save_tensors(tmp_path / "model.safetensors", dict(model.named_parameters()), {})
    store.write_json(tmp_path / "config.json", of_run("mamba-tiny", {"vocab_size": 11}))
    assert torch.equal(store.load_model(tmp_path)(IDS), model(IDS))
    store.write_json(tmp_path / "config.json", content)
    with pytest.raises(UserError) as error:
        store.load_model(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_scalar_in_a_run_does_not_become_a_weight(tmp_path):
    tensors = {n: p.detach().clone() for n, p in models.build("mamba-tiny", vocab_size=11).named_parameters()}
    store.write_json(tmp_path / "config.json", of_run("mamba-tiny", {"vocab_size": 11}))
    save_file(tensors | {"backbone.norm_f.weight": torch.ones(())}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"backbone\.norm_f\.weight \[\] instead of \[128\]"):
        store.load_model(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_usual_mode(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        model = models.build("hybrid-tiny", vocab_size=11, d_model=32)
        folder = models.save(model, tmp_path / "out", max_shard_size="40KB")
        store.save_tensors(folder / "checkpoint.safetensors", {"w": torch.ones(2)}, {})
        store.write_json(folder / "result.json", {})
    finally:
        os.umask(before)
    files = list(folder.iterdir())
    assert len(files) > 5 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}


# --- the command -------------------------------------------------------------------------------------


def _pointer(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def _deep(folder):
    (folder / "config.json").write_text("[" * 100_000)


def _no_rank(folder):
    edit(folder, time_step_rank=0)


def _huge(folder):
    edit(folder, num_hidden_layers=10**9)


def _scalar(folder):
    change(folder, lambda t: t.update({"backbone.norm_f.weight": torch.ones(())}))


def _nested(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02})" + b"\x85" * 400_000 + b"K\x01s.")


SAID = {
    _pointer: "is a Git LFS pointer",
    _deep: "nests lists",
    _no_rank: "time_step_rank=0",
    _huge: "num_hidden_layers",
    _scalar: "norm_f.weight [] instead of",
    _nested: "pytorch_model.bin",
}


@pytest.mark.parametrize("damage", SAID, ids=lambda damage: damage.__name__)
def test_init_says_it_in_one_line(damage, tmp_path, capsys):
    folder = checkpoint(tmp_path)
    damage(folder)
    capsys.readouterr()
    out = tmp_path / "runs"
    assert run.main(["--model", "mamba", "--init", str(folder), "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: --init {folder}: ") and SAID[damage] in line and line.count("\n") == 1
    assert not out.exists()


def test_the_index_of_shards_is_part_of_what_names_a_run(tmp_path):
    """It decides which of two copies of a tensor is meant."""
    from synthetic.pretrained import examine, fingerprint

    pickled(peer("mamba"), tmp_path / "in", sharded=True)
    first = fingerprint(examine(tmp_path / "in"))
    index = tmp_path / "in" / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace('"metadata": {}', '"metadata": {"a": 1}'))
    assert fingerprint(examine(tmp_path / "in")) != first


def test_an_option_of_an_older_release_beside_those_of_transformers_is_one_line(tmp_path):
    place = models.save(models.build("mamba-tiny", vocab_size=11, d_model=16, n_layer=1), tmp_path / "kept")
    raw = json.loads((place / "config.json").read_text())
    raw["ssm_retrieval"] = {"scan_backend": "reference"}
    (place / "config.json").write_text(json.dumps(raw))
    said = r"ssm_retrieval=\{'scan_backend': 'reference'\} is not supported, .* ssm_init, .* remove it"
    with pytest.raises(UserError, match=said):
        models.load(place)
