"""Whole models against independent implementations with the same weights: transformers and mamba-ssm."""

from __future__ import annotations

import pytest
import torch
from conftest import import_without_kernels
from peer_models import IDS, LAYERS, PAIRS, VOCAB, WIDTH, transformers
from torch.nn import functional as F

from ssm_retrieval import models


@pytest.fixture(params=PAIRS)
def pair(request):
    """(theirs, ours) with the same random weights, float32."""
    name, make = PAIRS[request.param]
    torch.manual_seed(0)
    theirs, options = make()
    with torch.no_grad():
        for p in theirs.parameters():  # away from special values: biases of 0, norms of 1
            p.add_(0.1 * torch.randn_like(p))
    ours = models.build(name, vocab_size=VOCAB, d_model=WIDTH, n_layer=LAYERS, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def canonical(name):
    """One name for a parameter that the two spell differently."""
    return name.replace("embeddings.", "embedding.").replace("lm_head", "head").replace("embed_out", "head")


@pytest.mark.parametrize("dtype, near", [(torch.float32, 2e-5), (torch.float64, 1e-6)])
def test_logits_and_gradients_equal_transformers(pair, dtype, near):
    """In float64 what remains is what the library itself rounds to float32 on the way."""
    theirs, ours = (m.to(dtype) for m in pair)
    want, got = theirs(IDS).logits, ours(IDS)
    torch.testing.assert_close(got, want.to(dtype), rtol=near, atol=near * float(want.detach().abs().max()))
    losses = (F.cross_entropy(logits.flatten(0, 1), IDS.flatten()) for logits in (want, got))
    for loss in losses:
        loss.backward()
    expected = {canonical(n): p.grad for n, p in theirs.named_parameters()}
    found = {canonical(n): p.grad for n, p in ours.named_parameters()}
    assert expected.keys() == found.keys()
    for name, grad in found.items():
        scale = float(expected[name].abs().max()) + 1e-8
        torch.testing.assert_close(
            grad, expected[name], rtol=10 * near, atol=10 * near * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_keys_and_shapes_are_the_hubs(pair):
    """What we save opens in transformers: the same names, up to its own spelling of the embedding."""
    theirs, ours = pair
    shapes = {canonical(k): v.shape for k, v in theirs.state_dict().items()}
    assert {canonical(k): v.shape for k, v in ours.state_dict().items()} == shapes


def test_mamba_mixer_equals_mamba_ssm(monkeypatch):
    """state-spaces/mamba's own layer, slow path, with its own reference scan."""
    simple = import_without_kernels("mamba_ssm.modules.mamba_simple")
    interface = import_without_kernels("mamba_ssm.ops.selective_scan_interface")
    monkeypatch.setattr(simple, "selective_scan_fn", interface.selective_scan_ref)
    monkeypatch.setattr(simple, "causal_conv1d_fn", None)
    torch.manual_seed(0)
    theirs = simple.Mamba(d_model=WIDTH, d_state=7, use_fast_path=False)
    from ssm_retrieval.models.mamba import MambaMixer

    ours = MambaMixer(models.config("mamba-130m", d_model=WIDTH, d_state=7))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 50, WIDTH)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    got, want = (torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_mamba_initialisation_is_the_published_one():
    """The same distributions as mamba-ssm's layer (initialisation itself is random)."""
    simple = import_without_kernels("mamba_ssm.modules.mamba_simple")
    from ssm_retrieval.models.mamba import MambaMixer

    torch.manual_seed(0)
    theirs = dict(simple.Mamba(d_model=512).named_parameters())
    ours = dict(MambaMixer(models.config("mamba-130m", d_model=512)).named_parameters())
    assert theirs.keys() == ours.keys()
    for name in ("A_log", "D"):
        torch.testing.assert_close(ours[name], theirs[name])
    for name, p in ours.items():
        q = theirs[name]
        spread = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])
        a, b = (t.detach().flatten().quantile(spread) for t in (p, q))
        width = float(b[-1] - b[0]) or 1.0
        torch.testing.assert_close(a / width, b / width, rtol=0, atol=0.1, msg=lambda m, n=name: f"{n}: {m}")
    step = F.softplus(ours["dt_proj.bias"])
    assert step.min() >= 1e-3 * 0.999 and step.max() <= 0.1 * 1.001


@pytest.mark.parametrize(
    "name, published",
    [
        # state-spaces/mamba-*: counted below from transformers' implementation as well
        ("mamba-130m", 129_135_360),
        ("mamba-370m", 371_516_416),
        ("mamba-790m", 793_204_224),
        ("mamba-1.4b", 1_372_178_432),
        ("mamba-2.8b", 2_768_345_600),
        # EleutherAI/pythia-*: the table of the Pythia repository, total parameters
        ("pythia-14m", 14_067_712),
        ("pythia-31m", 30_494_720),
        ("pythia-70m", 70_426_624),
        ("pythia-160m", 162_322_944),
        ("pythia-410m", 405_334_016),
        ("pythia-1b", 1_011_781_632),
        ("pythia-1.4b", 1_414_647_808),
        ("pythia-2.8b", 2_775_208_960),
    ],
)
def test_published_parameter_counts(name, published):
    assert models.build(name, device="meta").num_parameters() == published


HUB_SHAPES = {  # config.json of the hub's repositories: width, layers, (heads, MLP width)
    "mamba-130m": (768, 24), "mamba-370m": (1024, 48), "mamba-790m": (1536, 48), "mamba-1.4b": (2048, 48),
    "mamba-2.8b": (2560, 64), "mamba2-130m": (768, 24), "mamba2-370m": (1024, 48), "mamba2-780m": (1536, 48),
    "mamba2-1.3b": (2048, 48), "mamba2-2.7b": (2560, 64), "pythia-160m": (768, 12, 12, 3072),
    "pythia-410m": (1024, 24, 16, 4096), "pythia-1b": (2048, 16, 8, 8192),
    "pythia-1.4b": (2048, 24, 16, 8192), "pythia-2.8b": (2560, 32, 32, 10240),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_SHAPES)
def test_every_tensor_of_the_large_presets(name):
    """Names and shapes of transformers' model for the hub's configuration, on the meta device."""
    width, layers, *rest = HUB_SHAPES[name]
    common = dict(hidden_size=width, num_hidden_layers=layers)
    with torch.device("meta"):
        if name.startswith("mamba-"):
            theirs = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=50280, **common))
        elif name.startswith("mamba2-"):
            heads = 2 * width // 64
            config = transformers.Mamba2Config(
                vocab_size=50288, num_heads=heads, n_groups=1, tie_word_embeddings=True, **common
            )
            theirs = transformers.Mamba2ForCausalLM(config)
        else:
            heads, mlp = rest
            config = transformers.GPTNeoXConfig(
                vocab_size=50304, num_attention_heads=heads, intermediate_size=mlp, **common
            )
            theirs = transformers.GPTNeoXForCausalLM(config)
    shapes = {canonical(n): p.shape for n, p in theirs.named_parameters()}
    assert {canonical(n): p.shape for n, p in models.build(name, device="meta").named_parameters()} == shapes
