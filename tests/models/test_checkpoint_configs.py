"""config.json in odd but real forms is read as `transformers` reads it; what cannot be is one line."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
import transformers
from checkpoint_forms import IDS, LAYERS, VOCAB, WIDTH, checkpoint, edit, original, peer, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models import hub_mamba, hub_neox
from ssm_retrieval.models.hub_configs import read_config

NEAR = 1e-5  # of the largest logit, float32
# mamba_ssm's names, which published -hf configs carry along; untrue where a case changes their subject
CARRIED = dict(d_model=WIDTH, n_layer=LAYERS, ssm_cfg={}, pad_vocab_size_multiple=8, rms_norm=True,
               fused_add_norm=True, d_inner=2 * WIDTH, residual_in_fp32=True)  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {},
        dict(vocab_size=VOCAB + 3),
        dict(tie_word_embeddings=False),
        dict(state_size=8),
        dict(conv_kernel=3),
        dict(time_step_rank=4),
        dict(layer_norm_epsilon=1e-3),
        dict(expand=1),
        dict(residual_in_fp32=False),
        dict(tie_word_embeddings=False, state_size=7, expand=3, layer_norm_epsilon=0.1, num_hidden_layers=1),
    ],
    ids=str,
)
def test_names_of_mamba_ssm_beside_those_of_transformers_change_nothing(changed, tmp_path):
    torch.manual_seed(0)
    options = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS) | changed
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "in")
    edit(tmp_path / "in", **{k: v for k, v in CARRIED.items() if k not in changed})
    again = transformers.MambaForCausalLM.from_pretrained(tmp_path / "in").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = models.load(tmp_path / "in")
    assert relative_error(model, again) < NEAR
    assert model.config.norm_eps == changed.get("layer_norm_epsilon", 1e-5)
    assert model.config.residual_in_fp32 == changed.get("residual_in_fp32", True)


CLASSES = {
    "mamba": (hub_mamba.TransformersMamba, transformers.MambaConfig),
    "mamba2": (hub_mamba.TransformersMamba2, transformers.Mamba2Config),
    "gpt_neox": (hub_neox.GPTNeoX, transformers.GPTNeoXConfig),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_absent_fields_have_the_defaults_of_transformers(kind):
    ours, theirs = CLASSES[kind]
    fields = ours.model_validate({}).model_dump()
    theirs = theirs()
    apart = ["quantization_config", "intermediate_size", "time_step_rank", "time_step_limit", "rope_theta"]
    apart += ["rope_parameters", "rope_scaling", "rotary_pct", "rotary_emb_base", "partial_rotary_factor"]
    compared = {name: value for name, value in fields.items() if name not in apart}
    assert compared == {name: getattr(theirs, name) for name in compared} and len(compared) > 10


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_that_transformers_writes_is_known(kind, tmp_path):
    CLASSES[kind][1]().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_config(json.loads((tmp_path / "config.json").read_text()), [], "here")


@pytest.mark.parametrize("family", ["mamba", "mamba2", "neox"])
def test_unknown_fields_are_named_and_without_effect(family, tmp_path):
    """As in `transformers`, whose classes do not read them either."""
    folder = checkpoint(tmp_path, family)
    want = models.load(folder)(IDS)
    edit(folder, sliding_window=4, notes="mine", nothing=None)
    with pytest.warns(UserWarning) as caught:
        got = models.load(folder)(IDS)
    assert torch.equal(got, want) and len(caught) == 1
    said = str(caught[0].message)
    assert "config.json" in said and "sliding_window, notes;" in said and "\n" not in said
    edit(folder, sliding_window=None, notes=None, task_specific_params={}, _name_or_path="x", temperature=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.load(folder)


def test_unknown_fields_of_the_original_form_are_refused(tmp_path):
    """As by mamba_ssm, whose config would not take them."""
    original(peer("mamba"), tmp_path / "in", bidirectional=True)
    with pytest.raises(UserError, match=r"config\.json: bidirectional is not a field"):
        models.load(tmp_path / "in")


def test_an_original_config_that_asks_for_another_norm_than_the_weights_have(tmp_path):
    original(peer("mamba"), tmp_path / "in", rms_norm=False)
    with pytest.raises(UserError, match="rms_norm=False asks for LayerNorm, but the weights have no biases"):
        models.load(tmp_path / "in")


ROTARY = [
    dict(rotary_pct=0.5),
    dict(rotary_pct=0.01),  # of 16 dimensions: rotates nothing
    dict(rotary_emb_base=500),
    dict(rotary_pct=0.5, rotary_emb_base=500, rope_theta=500.0, partial_rotary_factor=0.5),
    dict(rope_scaling={"rope_type": "default", "rope_theta": 70.0, "partial_rotary_factor": 0.5}),
    dict(rope_parameters={"rope_type": "default", "rope_theta": 70.0}, rotary_pct=0.5),
    dict(rope_parameters={"rope_theta": 70.0, "partial_rotary_factor": 0.5}, rotary_emb_base=500),
    dict(
        rope_parameters={"rope_theta": 9.0, "partial_rotary_factor": 0.25},
        rope_scaling={"rope_type": "default", "rope_theta": 70.0, "partial_rotary_factor": 0.5},
    ),
    dict(rope_parameters=None, rope_scaling=None),
]


@pytest.mark.parametrize("fields", ROTARY, ids=str)
def test_every_place_of_the_rotary_settings(fields, tmp_path):
    folder = checkpoint(tmp_path, "neox")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | fields))
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(folder).eval()
    assert relative_error(models.load(folder), theirs) < NEAR


@pytest.mark.parametrize("field, value", [("rope_theta", 500.0), ("partial_rotary_factor", 0.5)])
def test_rotary_settings_that_transformers_does_not_read_are_named(field, value, tmp_path):
    folder = checkpoint(tmp_path, "neox")
    edit(folder, rope_parameters=None, **{field: value})
    with pytest.raises(UserError, match=f"{field}={value} contradicts"):
        models.load(folder)


# --- types and ranges --------------------------------------------------------------------------------

SIZES = {
    "mamba": "hidden_size num_hidden_layers conv_kernel expand state_size vocab_size intermediate_size "
    "time_step_rank",
    "mamba2": "hidden_size num_hidden_layers conv_kernel expand state_size vocab_size num_heads head_dim "
    "n_groups",
    "neox": "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size",
}
NUMBERS = {
    "mamba": "layer_norm_epsilon initializer_range",
    "mamba2": "layer_norm_epsilon initializer_range",
    "neox": "layer_norm_eps initializer_range rotary_emb_base rotary_pct",
}
NO_SIZE = (0, -1, 10**9, 10**30, 10**400, [1], "x", 1.5, True, {"a": 1})
NO_NUMBER = (-1, math.nan, math.inf, -math.inf, 10**400, [1], "x", True)
CASES = [
    (family, field, value)
    for table, values in ((SIZES, NO_SIZE), (NUMBERS, NO_NUMBER))
    for family, fields in table.items()
    for field in fields.split()
    for value in values
]
CASES += [
    ("mamba", "layer_norm_epsilon", None),
    ("neox", "rope_parameters", [1]),
    ("neox", "rope_scaling", "x"),
]
CASES += [("neox", "rope_parameters", {"rope_theta": value}) for value in (-1, 0, math.nan)]
CASES += [(family, "num_hidden_layers", 50_000) for family in SIZES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: checkpoint(tmp_path_factory.mktemp(family), family) for family in SIZES}


def test_impossible_values_are_one_line_before_anything_is_made(folders, monkeypatch):
    """Every wrong size and number of every field: named with file and value, and no model is begun."""

    def made(*_, **__):
        raise AssertionError("a model was made")

    monkeypatch.setattr("ssm_retrieval.models.checkpoints.from_config", made)
    for family, field, value in CASES:
        path = folders[family] / "config.json"
        kept = path.read_text()
        edit(folders[family], **{field: value})
        with pytest.raises(UserError) as error:
            models.load(folders[family])
        path.write_text(kept)
        said = str(error.value)
        assert field in said and str(path) in said, (family, field, value, said)
        assert "\n" not in said and len(said) < len(str(path)) + 250


ANY_FIELD = sorted({field for fields in SIZES.values() for field in fields.split()})
ANY_FIELD += ["tie_word_embeddings", "hidden_act", "rope_parameters", "time_step_limit", "ssm_retrieval"]
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@pytest.mark.filterwarnings("ignore:.*without effect here")
@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(["mamba", "mamba2", "neox"]),
    changes=st.dictionaries(st.sampled_from(ANY_FIELD), ANY_JSON, min_size=1, max_size=3),
)
def test_any_json_in_any_field_loads_or_is_one_line(folders, family, changes):
    path = folders[family] / "config.json"
    kept = path.read_text()
    try:
        edit(folders[family], **changes)
        models.load(folders[family])
    except UserError as error:
        assert str(path.parent) in str(error) and "\n" not in str(error)
    finally:
        path.write_text(kept)


def test_a_config_of_many_layers_is_refused_at_once_even_if_it_is_ours(tmp_path):
    folder = models.save(models.build("hybrid-tiny", vocab_size=16, d_model=32), tmp_path / "in")
    edit(folder, n_layer=90_000)
    with pytest.raises(
        UserError, match=r"n_layer=90000 does not fit the weights beside it: there are only \d+"
    ):
        models.load(folder)


def test_json_in_other_encodings(tmp_path):
    folder = checkpoint(tmp_path)
    path, want = folder / "config.json", models.load(folder)(IDS)
    text = path.read_text()
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32"):
        path.write_bytes(text.encode(encoding))
        assert torch.equal(models.load(folder)(IDS), want), encoding


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>Too many requests</html>", "is a web page"),
        (b"[" * 200_000, "nests lists or objects too deep"),
        (b'{"a":' * 200_000, "nests lists or objects too deep"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1]", "is no JSON object"),
        (b'{"model_type": "mamba"', "is not JSON"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_what_is_no_config_is_named(content, said, tmp_path):
    folder = checkpoint(tmp_path)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        models.load(folder)
    assert f"{folder / 'config.json'} {said}" in str(error.value) and "\n" not in str(error.value)
