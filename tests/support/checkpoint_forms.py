"""Small checkpoints in every form that is published, with weights away from special values.

`transformers` writes its own forms; the originals of state-spaces are written from their documented names.
"""

from __future__ import annotations

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

VOCAB, WIDTH, LAYERS = 61, 32, 2
IDS = torch.randint(0, VOCAB, (2, 37), generator=torch.Generator().manual_seed(0))
ROPE = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
SHAPE = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS)
MAMBA2 = dict(SHAPE, state_size=6, head_dim=8, num_heads=8, chunk_size=16)
NEOX = dict(SHAPE, num_attention_heads=2, intermediate_size=3 * WIDTH)

PEERS = {
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SHAPE, state_size=5)),
    "mamba-untied": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(**SHAPE, time_step_rank=3, tie_word_embeddings=False)
    ),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**MAMBA2, n_groups=1, tie_word_embeddings=True)
    ),
    "mamba2-groups": lambda: transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**MAMBA2, n_groups=2)),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**NEOX)),
    "neox-sequential": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            **NEOX, rope_parameters=dict(ROPE), use_parallel_residual=False, tie_word_embeddings=True
        )
    ),
}


def peer(family):
    """A model of `transformers`, float32, whose biases are not 0, nor its norms 1."""
    torch.manual_seed(0)
    model = PEERS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pickled(model, folder, sharded):
    """As releases of `transformers` before 5 wrote it: pytorch_model.bin, or two of it and their index."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = dict(model.state_dict())
    if not sharded:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        torch.save({key: state[key] for key in state if where[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def original(model, folder, **changed):
    """The form of state-spaces/mamba-* and mamba2-*: their config.json and the names of mamba_ssm.

    Vocabulary and padding are such that the table has VOCAB rows, as 50,277 tokens have 50,280.
    """
    folder.mkdir()
    theirs = model.config
    ssm = {"d_state": theirs.state_size}
    more = {}
    if theirs.model_type == "mamba2":
        ssm |= {"layer": "Mamba2", "headdim": theirs.head_dim, "ngroups": theirs.n_groups}
        more = dict(
            d_intermediate=0, attn_layer_idx=[], attn_cfg={}, tie_embeddings=theirs.tie_word_embeddings
        )
    config = dict(
        d_model=WIDTH, n_layer=LAYERS, vocab_size=VOCAB - 1, ssm_cfg=ssm, rms_norm=True,
        residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=VOCAB, **more,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    state = {k.replace("embeddings", "embedding"): v for k, v in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")


FORMS = {
    "safetensors": lambda model, folder: model.save_pretrained(folder),
    "safetensors-sharded": lambda model, folder: model.save_pretrained(folder, max_shard_size="20KB"),
    "bin": lambda model, folder: pickled(model, folder, sharded=False),
    "bin-sharded": lambda model, folder: pickled(model, folder, sharded=True),
}


def write(family, form, folder):
    """The checkpoint, and the model of `transformers` that is in it."""
    model = peer(family)
    FORMS[form](model, folder)
    return model


def relative_error(model, theirs, ids=IDS):
    """max |difference| of the logits / max |logit|."""
    with torch.no_grad():
        got, want = model(ids), theirs(ids).logits
    return float((got - want).abs().max() / want.abs().max())


def checkpoint(folder, family="mamba", form="safetensors"):
    """The folder of a new checkpoint in `folder`."""
    write(family, form, folder / "checkpoint")
    return folder / "checkpoint"


def edit(folder, **fields):
    """Change fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change(folder, changed):
    """Rewrite model.safetensors by a function of its tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed(tensors)
    save_file(tensors, file)
