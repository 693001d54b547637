"""Initial weights have the distributions of the papers and of state-spaces/mamba (seeds are fixed)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from ssm_retrieval import models
from ssm_retrieval.models.mamba import MambaMixer
from ssm_retrieval.models.mamba2 import Mamba2Mixer

MIN_P = 1e-5  # of some hundred comparisons; seeds are fixed
SSM = {
    "mamba": ("mamba-tiny", dict(n_layer=6)),
    "mamba2": ("mamba2-tiny", dict(n_layer=6, headdim=1)),  # as many heads as channels: many draws
    "hybrid-mamba": ("hybrid-tiny", dict(n_layer=6)),
    "hybrid-mamba2": ("hybrid-tiny", dict(n_layer=6, pattern="M2 M2 A", headdim=1)),
}


@pytest.fixture(params=SSM)
def ssm(request):
    name, options = SSM[request.param]
    return name, dict(vocab_size=64, d_model=128, **options)


def mixers(model):
    found = [m for m in model.modules() if isinstance(m, MambaMixer | Mamba2Mixer)]
    assert len(found) == (
        4 if hasattr(model.config, "pattern") else 6
    )  # two of the hybrid's six are attention
    return found


def values(tensors):
    return torch.cat([t.detach().flatten() for t in tensors]).double().numpy()


def drawn_from(sample, distribution):
    return stats.kstest(sample[:20_000], distribution.cdf).pvalue > MIN_P


def uniform(low, high):
    return stats.uniform(low, high - low)


def test_output_projections_are_divided_by_the_root_of_the_number_of_layers(ssm):
    """torch's default, uniform within 1 / sqrt(inputs), over sqrt(6); other projections stay as they are."""
    name, options = ssm
    model = models.build(name, **options)
    for mixer in mixers(model):
        bound = mixer.out_proj.in_features**-0.5 / 6**0.5
        assert drawn_from(values([mixer.out_proj.weight]), uniform(-bound, bound))
        bound = mixer.in_proj.in_features**-0.5
        assert drawn_from(values([mixer.in_proj.weight]), uniform(-bound, bound))


def test_decay_rates(ssm):
    """Mamba: A = -(1, 2, .., d_state) in every channel. Mamba-2: -A uniform on 1 .. 16, one a head."""
    name, options = ssm
    found = mixers(models.build(name, **options))
    if isinstance(found[0], MambaMixer):
        for mixer in found:
            N = mixer.config.d_state
            assert N == 16 and mixer.A_log.shape == (256, N)
            torch.testing.assert_close(mixer.A_log.detach().exp(), torch.arange(1.0, N + 1).repeat(256, 1))
    else:
        rates = np.exp(values(m.A_log for m in found))
        assert rates.min() > 1 - 1e-5 and rates.max() < 16 + 1e-5
        assert rates.min() < 1.1 and rates.max() > 15.9 and drawn_from(rates, uniform(1, 16))
    assert all((m.D == 1).all() for m in found)


def test_step_sizes_are_log_uniform(ssm):
    """softplus(bias) between dt_min and dt_max: 0.001 and 0.1 by default, and always in a hybrid."""
    name, options = ssm
    for low, high in [(0.001, 0.1)] + [(0.02, 0.5)] * (name != "hybrid-tiny"):
        bounds = {} if low == 0.001 else dict(dt_min=low, dt_max=high)
        found = mixers(models.build(name, **options, **bounds))
        bias = values(m.dt_proj.bias if isinstance(m, MambaMixer) else m.dt_bias for m in found)
        dt = F.softplus(torch.from_numpy(bias)).numpy()
        assert low * 0.999 < dt.min() < low * 1.05 and high / 1.05 < dt.max() < high * 1.001
        assert drawn_from(np.log(dt), uniform(np.log(low), np.log(high)))
        for mixer in found:
            if isinstance(mixer, MambaMixer):
                bound = mixer.config.rank**-0.5
                assert drawn_from(values([mixer.dt_proj.weight]), uniform(-bound, bound))


@pytest.mark.parametrize("stds", [{}, dict(init_std=0.05), dict(embedding_std=0.1)])
@pytest.mark.parametrize("name", ["transformer-70m", "transformer-tiny", "hybrid-tiny"])
def test_attention_blocks_and_embeddings_are_normal(name, stds):
    """GPT-NeoX: every weight normal(0, 0.02), biases 0; both standard deviations are options."""
    options = dict(vocab_size=500, d_model=64, n_head=4, position="learned", max_position_embeddings=300)
    model = models.build(name, **options, **stds)
    init, embedding = (
        stats.norm(0, stds.get("init_std", 0.02)),
        stats.norm(0, stds.get("embedding_std", 0.02)),
    )
    blocks = [b for b in model.blocks if hasattr(b, "attention")]
    linear = [m for b in blocks for m in b.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 4 * len(blocks) > 0
    assert all(drawn_from(values([m.weight]), init) for m in linear)
    assert all((m.bias == 0).all() for m in linear)
    head = model.head.weight
    assert (head is model.embedding.weight) == (
        name != "transformer-70m"
    )  # tied or a linear layer like others
    if name == "transformer-70m":
        assert drawn_from(values([head]), init)
    assert drawn_from(values([model.embedding.weight]), embedding)
    (positions,) = (p for key, p in model.named_parameters() if "embed_pos" in key)
    assert drawn_from(values([positions]), embedding)


def test_embeddings_of_mamba_are_normal(ssm):
    name, options = ssm
    for std in (0.02, 0.1):
        weight = models.build(name, **options, embedding_std=std).embedding.weight
        assert drawn_from(values([weight]), stats.norm(0, std))
