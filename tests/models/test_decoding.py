"""`models.generate` against the greedy generation of `transformers`, on checkpoints that it has written."""

from __future__ import annotations

import pytest
import torch
from checkpoint_forms import IDS, PEERS, peer

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.decoding import pick

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


# --- sampling ----------------------------------------------------------------------------------------------


def rows(n):
    """n times the same prompt for a model of five words."""
    return torch.tensor([[1, 4, 0, 2]]).expand(n, -1)


@pytest.fixture(scope="module")
def speaker():
    """Five words, none of which it strongly prefers."""
    model = models.build("mamba-tiny", vocab_size=5, n_layer=1, d_model=8, seed=2).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(9)
    return model


@torch.no_grad()
def joint(model, temperature):
    """The exact probabilities (5, 5) of the next two words."""
    first = (model(rows(1))[0, -1] / temperature).softmax(-1)
    longer = torch.cat([rows(5), torch.arange(5)[:, None]], dim=1)
    return first[:, None] * (model(longer)[:, -1] / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_two_sampled_tokens_have_their_exact_probabilities(speaker, temperature):
    """Chi-square of 20,000 pairs against the product of the two softmaxes, 24 degrees of freedom."""
    n, expected = 20_000, joint(speaker, temperature)
    generator = torch.Generator().manual_seed(1)
    got = speaker.generate(rows(n), 2, temperature=temperature, generator=generator)
    counts = torch.bincount(5 * got[:, 0] + got[:, 1], minlength=25).view(5, 5)
    assert (expected * n).min() > 5
    chi_square = ((counts - n * expected) ** 2 / (n * expected)).sum()
    assert chi_square < 51.18  # its 99.9th percentile


def nucleus(probabilities, top_k, top_p):
    """Which words may be drawn, by their definitions, word after word."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    if top_k is not None:
        order = order[:top_k]
    total, kept, mass = sum(probabilities[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        mass += probabilities[i] / total
        if top_p is not None and mass >= top_p:
            break
    return set(kept)


@pytest.mark.parametrize(
    "top_k, top_p",
    [(1, None), (3, None), (99, None), (None, 0.01), (None, 0.5), (None, 0.9), (None, 1.0), (4, 0.6)],
)
def test_top_k_and_top_p_draw_from_their_sets_alone(top_k, top_p):
    """Support and probabilities of rows of nine random logits against the definitions."""
    generator = torch.Generator().manual_seed(0)
    for row in torch.randn(4, 9, generator=generator, dtype=torch.float64):
        given = (row / 0.7).softmax(-1)
        kept = nucleus(given.tolist(), top_k, top_p)
        drawn = pick(row.expand(4000, 9), 0.7, top_k, top_p, generator)
        counts = torch.bincount(drawn, minlength=9).double()
        assert {i for i in range(9) if counts[i] > 0} <= kept
        expected = torch.tensor([float(given[i]) if i in kept else 0.0 for i in range(9)])
        expected = 4000 * expected / expected.sum()
        assert ((counts - expected).abs() <= 4.5 * expected.sqrt() + 1e-9).all()


def test_a_generator_decides_what_is_drawn_and_a_small_temperature_is_greedy(speaker):
    def drawn(seed, **options):
        return speaker.generate(rows(50), 6, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(drawn(3, temperature=1.0), drawn(3, temperature=1.0))
    assert not torch.equal(drawn(3, temperature=1.0), drawn(4, temperature=1.0))
    greedy = speaker.generate(rows(50), 6)
    assert torch.equal(drawn(3, temperature=1e-4), greedy)
    assert torch.equal(drawn(3, temperature=5.0, top_k=1), greedy)
    before = torch.get_rng_state()
    drawn(3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_tokens_stream_one_by_one(speaker):
    """Each is there before the next one is computed, and none keeps a graph."""
    steps = []
    handle = speaker.register_forward_hook(lambda *_: steps.append(torch.is_grad_enabled()))
    try:
        found = []
        for token in speaker.stream(rows(3), 4):
            found.append(token)
            assert len(steps) == len(found) and torch.is_grad_enabled()
    finally:
        handle.remove()
    assert not any(steps)
    assert torch.equal(torch.stack(found, 1), models.generate(speaker, rows(3), 4))


def test_a_sampled_sequence_ends_with_its_end_token(speaker):
    options = dict(temperature=1.0, eos_token_id=2)
    got = speaker.generate(rows(400), 7, generator=torch.Generator().manual_seed(0), **options)
    ended = (got == 2).cumsum(1) > 0
    assert 0.3 < ended[:, -1].double().mean() < 1 and ended[:, 0].any()
    assert (got[ended] == 2).all() and (got[~ended] != 2).all()


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(temperature=-1.0), r"temperature=-1.0 must be a number, 0 \(greedy\) or more"),
        (dict(temperature=float("nan")), "temperature=nan must be"),
        (dict(temperature=True), "temperature=True must be"),
        (dict(top_k=3), "top_k=3 has no effect on greedy decoding; give a temperature above 0"),
        (dict(top_p=0.9), "top_p=0.9 has no effect on greedy decoding"),
        (dict(temperature=1, top_k=0), "top_k=0 must be a whole number, 1 or more"),
        (dict(temperature=1, top_k=2.0), "top_k=2.0 must be a whole number"),
        (dict(temperature=1, top_p=0.0), "top_p=0.0 must be above 0 and at most 1"),
        (dict(temperature=1, top_p=1.5), "top_p=1.5 must be above 0 and at most 1"),
    ],
)
def test_impossible_sampling_gives_one_line_before_anything_runs(speaker, options, said):
    with pytest.raises(UserError, match=said):
        speaker.stream(rows(1), 2, **options)
