"""A user's mixer in a hybrid: the examples of docs/extending.md, run from a folder outside this project."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import synthetic
from ssm_retrieval import models, registry
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import Context
from ssm_retrieval.models.planning import Step, block_memory
from ssm_retrieval.registry import ARCHITECTURES
from ssm_retrieval.style import NAMES
from synthetic.config import RunConfig

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'```python title="(my_(?:mixer|hybrid)\.py)"\n(.*?)```', PAGE, flags=re.DOTALL))
SHAPE = dict(vocab_size=30, d_model=16, n_head=2, headdim=8, rotary_pct=0.5)


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """The working directory, with the files of the page; what they register is forgotten afterwards."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(ARCHITECTURES, "_theirs", {})
    yield tmp_path
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 30, shape, generator=torch.Generator().manual_seed(0))


def run_block(model, i: int, x: torch.Tensor) -> torch.Tensor:
    return model.blocks[i](x, Context(positions=torch.arange(x.shape[1])))


@torch.no_grad()
@pytest.mark.parametrize("pattern, share", [("U", 1.0), ("U+A", 1.0), ("A+U", 0.5)])
def test_what_a_users_mixer_adds_is_what_the_page_says(theirs, pattern, share):
    """mixer(norm(x)); in parallel fully where it stands first, else by tanh(beta), here 1/2."""
    registry.use(["my_mixer"])
    pattern = pattern.replace("U", "linear-attention")
    model = models.build("hybrid-tiny", **SHAPE, n_layer=1, pattern=pattern, norm="layer").double()
    block = model.blocks[0]
    inside = getattr(block, "ssm", block)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).double()
    added = inside.mixer.inner(F.layer_norm(x, (16,), inside.norm.weight, inside.norm.bias))
    if pattern.startswith("A"):
        block.beta.fill_(math.atanh(0.5))
    before = run_block(model, 0, x)
    inside.mixer.inner.out.weight.zero_()
    inside.mixer.inner.out.bias.zero_()
    torch.testing.assert_close(before - run_block(model, 0, x), share * added)
    assert added.abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["M linear-attention A", "linear-attention+A M2", "A+linear-attention"])
def test_padding_and_decoding_work_as_in_every_model(theirs, pattern):
    registry.use(["my_mixer"])
    model = models.build("hybrid-tiny", **SHAPE, n_layer=len(pattern.split()), pattern=pattern).eval()
    for parameter in model.parameters():  # beta is 0 at first
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    ids, cache = tokens(2, 9), model.init_cache()
    wanted = model(ids)
    pieces = [model(part, cache=cache) for part in ids.tensor_split((3, 4), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, atol=1e-4, rtol=1e-4)
    assert cache.num_elements() == 2 * models.state_size(model.config, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]]).bool()
    padded = torch.full((2, 11), 29).masked_scatter(mask, ids)
    torch.testing.assert_close(
        model(padded, attention_mask=mask)[mask], wanted.flatten(0, 1), atol=1e-4, rtol=1e-4
    )


@pytest.mark.slow
def test_the_example_is_trained_by_name_saved_and_loaded(theirs):
    """As with `--import my_hybrid --model linear-hybrid`: every weight moves, also those beside attention."""
    config = RunConfig(
        model="linear-hybrid", imports=("my_hybrid",), seq_len=8, steps=3, eval_every=3, eval_examples=4,
        final_eval_examples=4, batch_tokens=64,
    )  # fmt: skip
    run = synthetic.train(config)
    assert len(run.metrics) and "Linear hybrid" in NAMES.values()
    model = run.model()
    kinds = [type(getattr(block, "mixer", block)).__name__ for block in model.blocks]
    assert kinds == ["MambaMixer", "CausalMixer", "TransformerBlock"]
    fresh = models.build("linear-hybrid-tiny", **run.plan.model_overrides, seed=run.plan.seed)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, fresh.get_parameter(name))}
    assert {name for name in dict(fresh.named_parameters()) if "layers.1." in name} <= moved
    loaded = models.load(models.save(model, theirs / "kept"))
    ids = tokens(1, 5) % model.config.vocab_size
    torch.testing.assert_close(loaded(ids), model(ids))


class Smooth(nn.Module):
    """Each token and a share of the one before."""

    def __init__(self, d_model, share: float = 0.5):
        super().__init__()
        self.share = share

    def forward(self, x):
        return x + self.share * F.pad(x, (0, 0, 1, 0))[:, :-1]


def test_other_options_of_a_mixer_are_options_of_the_hybrid(theirs):
    models.register(models.from_mixer("smooth", Smooth))
    record = models.register(models.from_pattern("smooth-hybrid", "smooth A"))
    model = models.build("smooth-hybrid-tiny", **SHAPE, share=0.25)
    assert (model.config.share, model.blocks[0].mixer.inner.share) == (0.25, 0.25)
    assert record.memory is None and models.from_pattern("plain", "M A").memory is not None
    assert (
        models.build("hybrid-tiny", **SHAPE, n_layer=2, pattern="Smooth A").blocks[0].mixer.inner.share == 0.5
    )
    with pytest.raises(UserError, match="pattern='smooth A': model smooth has no formula of its memory"):
        block_memory(models.config("hybrid-tiny", n_layer=2, pattern="smooth A"), Step(1, 8, 1))


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("M gone A", "pattern='M gone A' has the unknown block 'gone'; blocks are .* a model of your own"),
        ("M hybrid", "pattern='M hybrid': model hybrid has no block for a pattern"),
        ("smooth-hybrid", "pattern='smooth-hybrid': model smooth-hybrid has no block for a pattern"),
        ("smooth+M", "pattern='smooth[+]M': 'smooth[+]M' must be one SSM and attention"),
    ],
)
def test_what_cannot_stand_in_a_pattern_is_one_line(theirs, pattern, said):
    models.register(models.from_mixer("smooth", Smooth))
    models.register(models.from_pattern("smooth-hybrid", "smooth A"))
    for make in (lambda: models.config("hybrid", pattern=pattern), lambda: models.from_pattern("x", pattern)):
        with pytest.raises(UserError, match=said) as caught:
            make()
        assert "\n" not in str(caught.value)
