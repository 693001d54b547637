"""Padding, caches and packing: real tokens have the logits of their sequence alone, for every family."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from hook_models import VOCAB, build
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.packing import batches
from ssm_retrieval.models.padding import real_first

VARIANTS = {
    "transformer-rope": ("transformer", dict(position="rope")),
    "transformer-learned": ("transformer-sequential", dict(max_position_embeddings=64)),
    "transformer-none": ("transformer", dict(position="none")),
    "transformer-window": ("transformer", dict(position="rope", window=3)),
    "mamba": ("mamba", dict()),
    "mamba-no-window": ("mamba", dict(d_conv=1, n_layer=2)),
    "mamba-learned": ("mamba", dict(n_layer=2, position="learned", max_position_embeddings=64)),
    "mamba2": ("mamba2", dict(d_conv=3)),
    "mamba3": ("mamba3", dict()),
    "hybrid-mamba": ("hybrid-mamba", dict(position="learned")),
    "hybrid-mamba2": ("hybrid-mamba2", dict(position="rope", d_conv=5)),
    "deltanet": ("deltanet", dict(short_conv=False)),
    "kda": ("kda", dict()),
    "gla": ("gla", dict()),
    "gla-conv": ("gla", dict(short_conv=True)),
    "gated-deltanet": ("gated-deltanet", dict(position="learned", max_position_embeddings=64, d_conv=3)),
}


@pytest.fixture(params=VARIANTS, scope="module")
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def lm(variant):
    family, options = VARIANTS[variant]
    return build(family, **options)


def tokens(*shape, seed=0):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def turns(draw, rows=3):
    """Masks (rows, L) of one to three turns; a row may be silent, padding may stand anywhere."""
    masks = []
    for _ in range(draw(st.integers(1, 3))):
        L = draw(st.integers(1, 6))
        shape = draw(st.sampled_from(["left", "right", "anywhere"]))
        if shape == "anywhere":
            mask = [draw(st.lists(st.booleans(), min_size=L, max_size=L)) for _ in range(rows)]
        else:
            mask = [
                [t < n for t in range(L)]
                for n in draw(st.lists(st.integers(0, L), min_size=rows, max_size=rows))
            ]
            mask = [row[::-1] for row in mask] if shape == "left" else mask
        masks.append(torch.tensor(mask))
    return masks


@settings(deadline=None, max_examples=15)
@given(masks=turns(), seed=st.integers(0, 99))
@torch.no_grad()
def test_padded_turns_continue_a_cache_like_unpadded_sequences(lm, masks, seed):
    """Also a token after the last turn, and the states that the cache then holds."""
    ids = [tokens(*mask.shape, seed=seed + i) for i, mask in enumerate(masks)]
    after, cache = tokens(3, 1, seed=seed + 50), lm.init_cache()
    logits = [
        lm(part, attention_mask=mask.long(), cache=cache) for part, mask in zip(ids, masks, strict=True)
    ]
    logits.append(lm(after, cache=cache))
    whole, real = torch.cat([*ids, after], dim=1), torch.cat([*masks, torch.ones_like(after).bool()], dim=1)
    for row in range(3):
        own = lm.init_cache()
        alone = lm(whole[row, real[row]][None], cache=own)
        torch.testing.assert_close(torch.cat(logits, dim=1)[row, real[row]], alone[0])
        for layer, wanted in zip(cache.layers, own.layers, strict=True):
            for name in {"conv", "ssm", "last_k", "last_v", "phase"} & set(layer):
                torch.testing.assert_close(
                    layer[name][row], wanted[name][0], msg=lambda m, n=name: f"{n}: {m}"
                )


@settings(deadline=None, max_examples=10)
@given(masks=turns(), seed=st.integers(0, 99))
@torch.no_grad()
def test_padding_anywhere_without_a_cache(lm, masks, seed):
    real = torch.cat(masks, dim=1)
    ids = tokens(*real.shape, seed=seed)
    logits = lm(ids, attention_mask=real)
    for row in range(3):
        torch.testing.assert_close(logits[row, real[row]], lm(ids[row, real[row]][None])[0])


@torch.no_grad()
def test_a_turn_of_padding_alone_changes_no_state(lm):
    cache = lm.init_cache()
    lm(tokens(2, 5), cache=cache)
    before = [{name: t.clone() for name, t in layer.items()} for layer in cache.layers]
    lm(tokens(2, 4, seed=1), attention_mask=torch.zeros(2, 4, dtype=torch.int64), cache=cache)
    for layer, was in zip(cache.layers, before, strict=True):
        for name in {"conv", "ssm"} & set(layer):
            assert torch.equal(layer[name], was[name]), name


def test_gradients_through_padded_turns(lm):
    """Of the parameters and of the vectors, which are zero at padding."""
    x = torch.randn(
        2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    real = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 1, 1, 1, 1]]).bool()
    weight = torch.randn(2, 9, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [x, *(p for p in lm.parameters() if p.requires_grad)]

    def gradients(total):
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    cache = lm.init_cache()
    parts = [
        lm(inputs_embeds=x[:, part], attention_mask=real[:, part], cache=cache)
        for part in (slice(0, 5), slice(5, 9))
    ]
    got = gradients((torch.cat(parts, dim=1) * weight)[real].sum())
    alone = [
        (lm(inputs_embeds=x[row, real[row]][None])[0] * weight[row, real[row]]).sum() for row in range(2)
    ]
    torch.testing.assert_close(got, gradients(sum(alone)))
    assert (got[0][~real] == 0).all()


@torch.no_grad()
def test_low_precision_turns_are_as_near_as_unpadded_ones(variant):
    """Float32, so that the gathered windows keep the dtype of the others."""
    family, options = VARIANTS[variant]
    lm, ids = build(family, **options).float(), tokens(2, 9)
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    cache = lm.init_cache()
    lm(ids[:, :5], cache=cache)
    got = lm(ids[:, 5:], attention_mask=real, cache=cache)
    alone = lm(torch.cat([ids[:1, :5], ids[:1, 7:]], dim=1))
    torch.testing.assert_close(got[0, 2:], alone[0, 5:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], lm(ids)[1, 5:], rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3),
    cached=st.booleans(),
    kept=st.booleans(),
)
def test_rows_are_reordered_only_if_padding_stands_between_real_tokens(rows, cached, kept):
    lines = ["".join("01"[x] for x in (cached, *row, kept)) for row in rows]
    order = real_first(torch.tensor(rows), cached, kept)
    assert (order is None) == (not any(re.search("10+1", line) for line in lines))
    if order is not None:
        for row, at in zip(rows, order.tolist(), strict=True):
            assert at == [t for t in range(5) if row[t]] + [t for t in range(5) if not row[t]]


# --- generation ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=5)
@given(masks=turns(), seed=st.integers(0, 99))
def test_generation_behind_padding_on_any_side(lm, masks, seed):
    real = torch.cat([*masks, torch.zeros_like(masks[0])], dim=1)
    real[:, 0] |= ~real.any(dim=1)
    ids = tokens(*real.shape, seed=seed)
    got = models.generate(lm, ids, 3, attention_mask=real.long())
    alone = [models.generate(lm, ids[row, real[row]][None], 3) for row in range(3)]
    assert torch.equal(got, torch.cat(alone))


def test_prompts_and_end_tokens_that_are_refused():
    lm, ids = build("mamba"), tokens(2, 4)
    for prompt, options, said in (
        (ids[:, :0], {}, "the prompt is empty; begin with one token at least"),
        (ids, dict(attention_mask=torch.tensor([[1] * 4, [0] * 4])), "rows of padding alone; leave them out"),
        (ids, dict(eos_token_id="</s>"), "eos_token_id='</s>' must be a token's id or a list of them"),
        (ids, dict(eos_token_id=[1, 2.5]), r"eos_token_id=\[1, 2.5\] must be"),
        ([[1, 2]], {}, r"give input_ids \(B, L\) or inputs_embeds"),
    ):
        with pytest.raises(UserError, match=said):
            models.generate(lm, prompt, 2, **options)


# --- packing ------------------------------------------------------------------------------------------


def computed_tokens(model, run):
    """What `run()` returns, and the number of tokens that the first block was given meanwhile."""
    sizes = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[:2]))
    try:
        return run(), sum(rows * length for rows, length in sizes)
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("family", ["transformer", "mamba", "mamba2", "hybrid-mamba"])
def test_packing_one_long_and_many_short_sequences_is_no_waste(family):
    model = build(family, n_layer=3 if family == "hybrid-mamba" else 1)
    lengths = [4] * 300 + [2048] + [4] * 212
    seq_ids = torch.repeat_interleave(torch.arange(513), torch.tensor(lengths))[None]
    ids = tokens(1, sum(lengths))
    at = torch.tensor([3, 1199, 1200 + 2047, 4095])
    got, spent = computed_tokens(model, lambda: model(ids, seq_ids=seq_ids, logits_at=at))
    assert sum(lengths) <= spent <= 1.5 * sum(lengths)
    ends = [(0, 4), (1196, 1200), (1200, 3248), (4092, 4096)]
    alone = [model(ids[:, start:stop])[0, -1] for start, stop in ends]
    torch.testing.assert_close(got[0], torch.stack(alone))


@settings(deadline=None, max_examples=15)
@given(
    rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3), data=st.data()
)
def test_packed_sequences_equal_each_alone(lm, rows, data):
    """Loss and gradients too, ids or vectors, names of sequences that return in another place."""
    L = max(map(sum, rows))
    rows = [[*row, L - sum(row)] if sum(row) < L else row for row in rows]
    seq_ids = torch.tensor([[i % 2 for i, n in enumerate(row) for _ in range(n)] for row in rows])
    ids = tokens(len(rows), L, seed=data.draw(st.integers(0, 99)))
    labels = ids.roll(-1, dims=1)
    vectors = data.draw(st.booleans()) and not any("embed_pos" in name for name, _ in lm.named_parameters())
    inputs = dict(inputs_embeds=lm.embed(ids, torch.arange(L))) if vectors else dict(input_ids=ids)
    cuts = [torch.tensor(row).cumsum(0)[:-1].tolist() for row in rows]
    pieces = [part for row, at in zip(ids, cuts, strict=True) for part in row.tensor_split(at)]
    logits, spent = computed_tokens(lm, lambda: lm(**inputs, seq_ids=seq_ids))
    assert spent <= 1.5 * ids.numel()
    alone = torch.cat([lm(piece[None])[0] for piece in pieces])
    torch.testing.assert_close(logits.flatten(0, 1), alone)
    loss, _ = lm.loss(**inputs, labels=labels, seq_ids=seq_ids)
    want = torch.nn.functional.cross_entropy(alone, labels.flatten())
    leaves = list(lm.parameters())
    torch.testing.assert_close(loss, want)
    got, expected = (
        torch.autograd.grad(x, leaves, allow_unused=True, materialize_grads=True) for x in (loss, want)
    )
    torch.testing.assert_close(got, expected)


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.one_of(st.integers(1, 9), st.integers(1, 3000)), min_size=1, max_size=60))
def test_batches_of_a_pack(lengths):
    batch, row = batches(lengths)
    held = Counter(batch)
    for b, rows in held.items():
        own = [n for n, i in zip(lengths, batch, strict=True) if i == b]
        assert rows * max(own) <= 1.5 * sum(own)
        assert [r for r, i in zip(row, batch, strict=True) if i == b] == list(range(rows))
    assert max(lengths) > 1.5 * min(lengths) or len(held) == 1


# --- arguments that do not fit ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["transformer", "mamba"])
def test_arguments_that_do_not_fit_each_other_give_one_line(family):
    lm, ids, x = build(family), tokens(2, 5), torch.zeros(2, 5, 16)
    used, other = lm.init_cache(), build(family, n_layer=1).init_cache()
    lm(ids, cache=used)
    for options, said in (
        (
            dict(input_ids=ids[0]),
            r"input_ids must be an integer tensor \(batch, length\); got \(5,\) of torch.int64",
        ),
        (dict(input_ids=ids.float()), "input_ids must be .* of torch.float32"),
        (dict(input_ids=ids.tolist()), "input_ids must be .* got list"),
        (dict(inputs_embeds=x[..., :8]), r"inputs_embeds must be a floating \(batch, length, d_model=16\)"),
        (dict(inputs_embeds=x.long()), "inputs_embeds must be .* of torch.int64"),
        (
            dict(input_ids=ids, attention_mask=torch.ones(2, 10)),
            r"attention_mask must be \(2, 5\), for the tokens",
        ),
        (dict(input_ids=ids, attention_mask=[[1] * 5] * 2), "attention_mask must be .* got list"),
        (dict(input_ids=ids, seq_ids=torch.zeros(5)), r"seq_ids must be \(2, 5\)"),
        (
            dict(input_ids=ids, logits_at=[4]),
            r"logits_at must be an integer tensor \(A,\) or \(batch=2, A\); got list",
        ),
        (dict(input_ids=ids, logits_at=torch.tensor(4)), r"logits_at must be .* got \(\) of torch.int64"),
        (dict(input_ids=ids, logits_at=torch.zeros(3, 1).long()), r"logits_at must be .* got \(3, 1\)"),
        (dict(input_ids=ids, logits_at=torch.tensor([1.0])), "logits_at must be .* of torch.float32"),
        (
            dict(input_ids=ids[:1], cache=used),
            "2 sequences, this call of .* and 1; begin each batch with a new",
        ),
        (dict(input_ids=ids, cache=other), "the cache is of 1 layers"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            lm(**options)
        assert "\n" not in str(caught.value)
    assert used.length == 5


@torch.no_grad()
def test_a_mask_or_vectors_of_another_dtype_are_as_if_cast(lm):
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)).bfloat16()  # exact in all of these
    want = lm(inputs_embeds=x.double())
    for dtype in (torch.bfloat16, torch.float32):
        torch.testing.assert_close(
            lm(inputs_embeds=x.to(dtype), attention_mask=torch.ones(2, 6)).float(),
            want.float(),
            rtol=1e-2,
            atol=1e-2,
        )
        cache = lm.init_cache()
        pieces = [
            lm(inputs_embeds=x[:, :4].to(dtype), cache=cache),
            lm(inputs_embeds=x[:, 4:].double(), cache=cache),
        ]
        torch.testing.assert_close(torch.cat(pieces, dim=1).float(), want.float(), rtol=1e-2, atol=1e-2)
