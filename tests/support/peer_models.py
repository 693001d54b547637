"""Models of transformers beside ours, with the same shapes."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
VOCAB, WIDTH, LAYERS = 61, 32, 3
IDS = torch.randint(0, VOCAB, (2, 37), generator=torch.Generator().manual_seed(0))


def mamba_pair():
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=5, use_cache=False
    )
    return transformers.MambaForCausalLM(config), dict(d_state=5)


def mamba2_pair(ngroups=2):
    config = transformers.Mamba2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=6, head_dim=8, num_heads=8,
        n_groups=ngroups, chunk_size=16, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config), dict(d_state=6, headdim=8, ngroups=ngroups, chunk_size=16)


def neox_pair(parallel=True, rotary_pct=0.25):
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=4 * WIDTH, use_parallel_residual=parallel, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary_pct},
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config), dict(
        n_head=2, parallel_residual=parallel, rotary_pct=rotary_pct
    )


PAIRS = {
    "mamba": ("mamba-130m", mamba_pair),
    "mamba2": ("mamba2-130m", mamba2_pair),
    "mamba2-one-group": ("mamba2-130m", lambda: mamba2_pair(1)),
    "neox": ("pythia-160m", neox_pair),
    "neox-sequential": ("pythia-160m", lambda: neox_pair(parallel=False)),
    "neox-full-rotary": ("pythia-160m", lambda: neox_pair(rotary_pct=1.0)),
}
