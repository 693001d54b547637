"""Vision encoders: shapes and names of the published one, and what the pixels are.

Those that need timm are skipped without it; .ci/run has an environment for them.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from vlm import encoder
from vlm.layout import grid_side

PIL = pytest.importorskip("PIL.Image", reason="pillow is not installed; .ci/run installs it")


def images(*sizes):
    rng = np.random.default_rng(0)
    return [PIL.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def test_pixels_are_resized_without_keeping_the_shape_and_normalised():
    grey = PIL.new("RGB", (40, 90), (128, 0, 255))
    x = encoder.pixels([grey, *images((70, 30))], image_size=480)
    assert x.shape == (2, 3, 476, 476) and x.dtype == torch.float32  # 34 patches; 4 pixels are not seen
    wanted = (torch.tensor([128, 0, 255]) / 255 - torch.tensor(encoder.MEAN)) / torch.tensor(encoder.STD)
    assert torch.allclose(x[0], wanted.view(3, 1, 1).expand(3, 476, 476), atol=1e-6)
    half = encoder.pixels([PIL.merge("RGB", [PIL.linear_gradient("L")] * 3)], image_size=28)
    assert (half[0, 0].diff(dim=0) > 0).all() and (half[0, 0].diff(dim=1).abs() < 1e-6).all()


def test_without_timm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'need timm: pip install -e "\.\[vlm\]" .*ModuleNotFoundError'):
        encoder.build()


def test_a_torchvision_of_another_torch_is_told_in_one_line(monkeypatch):
    real = __import__

    def imported(name, *rest, **options):
        if name == "timm":
            raise RuntimeError("operator torchvision::nms does not exist\nsecond line")
        return real(name, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.__import__", imported)
        with pytest.raises(ImportError) as caught:
            encoder.build()
    assert "RuntimeError: operator torchvision::nms" in str(caught.value) and "\n" not in str(caught.value)


# --- with timm ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="timm is not installed; .ci/run has an environment with it")


@pytest.mark.parametrize("size, tokens", [(336, 577), (480, 1157)])
def test_the_published_encoder(timm, size, tokens):
    model = encoder.build(image_size=size)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(303.65e6, rel=0.003)
    with torch.no_grad():
        features = model(encoder.pixels(images((50, 60)), size))
    assert features.shape == (1, tokens, 1024) and tokens == grid_side(size) ** 2 + 1
    assert torch.allclose(features.mean(-1), torch.zeros(1, tokens), atol=1e-4)  # after the last norm
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["pos_embed"] == (1, tokens, 1024) and shapes["cls_token"] == (1, 1, 1024)
    assert shapes["patch_embed.proj.weight"] == (1024, 3, 14, 14)
    for name, shape in {
        "norm1.weight": (1024,), "attn.q_proj.weight": (1024, 1024), "attn.v_proj.bias": (1024,),
        "attn.k_proj.weight": (1024, 1024), "attn.norm.weight": (1024,), "attn.proj.weight": (1024, 1024),
        "mlp.fc1_g.weight": (2730, 1024), "mlp.fc1_x.bias": (2730,), "mlp.norm.weight": (2730,),
        "mlp.fc2.weight": (1024, 2730),
    }.items():  # fmt: skip
        assert shapes[f"blocks.23.{name}"] == shape
    assert "blocks.0.attn.k_proj.bias" not in shapes and not any(name.startswith("head") for name in shapes)


def test_other_encoders_by_name(timm):
    model = encoder.build("vit_tiny_patch16_224", image_size=64)
    with torch.no_grad():
        assert model(encoder.pixels(images((20, 20)), 64, patch=16)).shape == (1, 17, 192)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"encoder 'eva02_huge' is unknown to timm .*; it has eva02_"):
        encoder.build("eva02_huge")
