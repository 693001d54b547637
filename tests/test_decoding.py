"""`models.generate` against the greedy generation of `transformers`, on checkpoints that it has written."""

from __future__ import annotations

import pytest
import torch
from checkpoint_forms import IDS, PEERS, peer

from ssm_retrieval import models

FAMILIES = [name for name in PEERS if name in ("mamba", "mamba2", "neox")]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    theirs = peer(name)
    theirs.save_pretrained(tmp_path / "checkpoint")
    ours = models.load(tmp_path / "checkpoint")
    mask = torch.ones_like(IDS)
    options = dict(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = theirs.generate(IDS, attention_mask=mask, **options)[:, IDS.shape[1] :]
    assert torch.equal(models.generate(ours, IDS, 9), expected)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "transformer", "hybrid"])
def test_left_padding_changes_nothing(family):
    model = models.build(f"{family}-tiny", vocab_size=40, n_layer=3, seed=1).double().eval()
    ids = torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(3))
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), ids], dim=1)
    mask = (padded != 0).long()
    assert torch.equal(models.generate(model, padded, 6, attention_mask=mask), models.generate(model, ids, 6))


class Scripted:
    """Says what it is told to, whatever it reads: tokens (B, n)."""

    def __init__(self, tokens):
        self.logits = torch.nn.functional.one_hot(torch.tensor(tokens)).float()

    def init_cache(self):
        return iter(self.logits.unbind(1))

    def __call__(self, input_ids, cache, **options):
        return next(cache)[:, None]

    def step(self, token, cache):
        return next(cache)


def test_sequences_end_with_their_end_token():
    model, ids = Scripted([[4, 9, 5, 6, 7], [3, 3, 3, 9, 2]]), torch.zeros(2, 3, dtype=torch.int64)
    assert models.generate(model, ids, 5).tolist() == [[4, 9, 5, 6, 7], [3, 3, 3, 9, 2]]
    assert models.generate(model, ids, 5, eos_token_id=9).tolist() == [[4, 9, 9, 9], [3, 3, 3, 9]]
    assert models.generate(model, ids, 2, eos_token_id=9).tolist() == [[4, 9], [3, 3]]
    for several in ([9], (6, 9), torch.tensor([9, 6])):  # each goes on with the one it has generated
        got = models.generate(model, ids, 5, eos_token_id=several).tolist()
        assert got == [[4, 9, 9, 9], [3, 3, 3, 9]], several
    assert models.generate(model, ids, 5, eos_token_id=[5, 3]).tolist() == [[4, 9, 5], [3, 3, 3]]
    assert models.generate(model, ids, 5, eos_token_id=[]).tolist() == models.generate(model, ids, 5).tolist()
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        models.generate(model, ids, 0)
