"""DeltaNet and its kin against flash-linear-attention: checkpoints both ways, logits, gradients."""

from __future__ import annotations

import json

import pytest
import torch
from fla_models import CONFIGS, KINDS, UNFUSED, make, without_kernels

from ssm_retrieval import models
from ssm_retrieval.errors import UserError

IDS = torch.randint(0, 53, (2, 41), generator=torch.Generator().manual_seed(0))
CASES = [
    ("deltanet", {}),
    ("deltanet", dict(expand_k=0.5, expand_v=2.0, use_gate=True, allow_neg_eigval=True, conv_size=3)),
    ("deltanet", dict(use_short_conv=False, intermediate_size=40, tie_word_embeddings=True)),
    ("gated-deltanet", {}),
    ("gated-deltanet", dict(expand_v=1.0, use_gate=False, allow_neg_eigval=True, norm_eps=1e-4)),
    ("gated-deltanet", dict(use_short_conv=False, intermediate_size=40, tie_word_embeddings=True)),
    ("kda", {}),
    ("kda", dict(expand_v=2.0, allow_neg_eigval=True, use_short_conv=False)),
    ("gla", {}),
    ("gla", dict(expand_k=1.0, use_output_gate=False, norm_eps=1e-4)),
    ("mamba3", {}),
    ("mamba3", dict(n_groups=2, rope_fraction=1.0, norm_eps=1e-4, tie_word_embeddings=True)),
    ("gla", dict(use_short_conv=True, conv_size=3, intermediate_size=40, tie_word_embeddings=True)),
]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:fla")


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{len(case[1])}")
def theirs(request, monkeypatch):
    without_kernels(monkeypatch)
    family, options = request.param
    return make(family, **options)


def spelt(name):
    """fla's name of GLA's norm depends on whether its kernel is fused with the gate; Mamba's embedding."""
    return name.replace("g_norm_swish_gate", "g_norm").replace("embeddings.", "embedding.")


def test_their_checkpoint_gives_their_logits_and_gradients(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    want, got = theirs(IDS, use_cache=False).logits, ours(IDS)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for logits in (want, got):
        logits.sin().sum().backward()
    expected = {spelt(name): p.grad for name, p in theirs.named_parameters()}
    found = {spelt(name): p.grad for name, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_our_checkpoint_opens_there(theirs, tmp_path):
    """And says nothing that their config does not know, but for our own options."""
    theirs.save_pretrained(tmp_path / "theirs")
    ours = models.load(tmp_path / "theirs")
    folder = models.save(ours, tmp_path / "ours")
    fused = "GLA" in type(ours).__name__ and ours.config.gate
    options = {name: on for name, on in UNFUSED.items() if name in theirs.config.to_dict()}
    options |= {"fuse_norm": True} if fused else {}
    again, report = type(theirs).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written, known = json.loads((folder / "config.json").read_text()), again.config.to_dict()
    original = theirs.config.to_dict()
    for name in written.keys() & original.keys() - {
        "dtype",
        "torch_dtype",
        "architectures",
        "intermediate_size",
    }:
        if name not in ("bos_token_id", "eos_token_id", "transformers_version"):
            assert known[name] == original[name], name
    with torch.no_grad():
        want = theirs(IDS, use_cache=False).logits
        torch.testing.assert_close(again.eval()(IDS, use_cache=False).logits, want)


@pytest.mark.parametrize(
    "family, options, said",
    [
        ("deltanet", dict(qk_norm="sum"), "qk_norm='sum' is not supported; only 'l2'"),
        ("deltanet", dict(use_beta=False), "use_beta=False is not supported; only True"),
        ("deltanet", dict(expand_v=0.53125), "expand_v makes 8.5 channels of a head"),
        ("gated-deltanet", dict(num_v_heads=6), "num_v_heads=6 is not supported; only num_heads=3"),
        ("kda", dict(safe_gate=True, lower_bound=-5.0), "lower_bound=-5.0 is not supported; only None"),
        ("gla", dict(feature_map="relu"), "feature_map='relu' is not supported; only None"),
        ("mamba3", dict(is_mimo=True), "is_mimo=True is not supported; only False"),
        ("mamba3", dict(is_outproj_norm=True), "is_outproj_norm=True is not supported; only False"),
        ("gla", dict(num_kv_heads=1), "num_kv_heads=1 is not supported; only num_heads=2"),
        ("gated-deltanet", dict(output_gate_activation="sigmoid"), "output_gate_activation='sigmoid' is not"),
    ],
)
def test_what_ours_cannot_be_is_one_line(family, options, said, tmp_path):
    config = CONFIGS[family](**options).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    models.save(models.build(f"{family}-tiny"), tmp_path / "weights")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "weights/model.safetensors").read_bytes())
    with pytest.raises(UserError) as caught:
        models.load(tmp_path)
    assert said in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "name", ["deltanet-1.3b", "gated-deltanet-1.3b", "kda-1.3b", "gla-1.3b", "mamba3-1.3b"]
)
def test_published_shapes_have_their_number_of_parameters(name):
    """Against fla's classes with their defaults, which are the published models."""
    family = name.removesuffix("-1.3b")
    with torch.device("meta"):
        theirs = KINDS[family](type(CONFIGS[family]())())
    ours = models.build(name, device="meta")
    assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())
    assert 1.3e9 < ours.num_parameters() < 1.4e9


@pytest.mark.parametrize("share, form", [(0.25, "ssm-retrieval"), (0.5, "mamba3"), (1.0, "mamba3")])
def test_what_fla_refuses_is_saved_in_our_form(share, form, tmp_path):
    """It knows two shares of channels that turn."""
    model = models.build("mamba3-tiny", vocab_size=53, d_model=16, headdim=8, d_state=16, rope_fraction=share)
    folder = models.save(model, tmp_path)
    assert json.loads((folder / "config.json").read_text())["model_type"] == form
    assert models.load(folder).config == model.config
    if form == "mamba3":
        KINDS[form].from_pretrained(folder)
