"""Files of weights: damaged, foreign and hostile ones are named as what they are; an index decides."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
import transformers
from checkpoint_forms import IDS, change, checkpoint, edit, peer, relative_error, write
from safetensors.torch import load_file, save_file

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.pickled import entries

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 516567560\n"
NEAR = 1e-5
SAFE, PICKLED, INDEX = "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"


def refused(folder, said):
    """`models.load` says it in one line that names the folder and never advises to switch checks off."""
    with pytest.raises(UserError) as error:
        models.load(folder)
    line = str(error.value)
    assert said in line and str(folder) in line and "\n" not in line, line
    assert "weights_only=" not in line and "mmap" not in line and ";" in line


# --- what a file is ----------------------------------------------------------------------------------

WRONG = {
    "pointer": (lambda whole: POINTER, "is a Git LFS pointer"),
    "empty": (lambda whole: b"", "is empty"),
    "web page": (lambda whole: b"\n<!DOCTYPE html><html>Too many requests</html>", "is a web page"),
    "message": (lambda whole: b"Entry not found", "is text ('Entry not found'), not weights"),
    "zeros": (lambda whole: bytes(len(whole)), "holds nothing but zeros"),
    "cut": (lambda whole: whole[: len(whole) // 2], "is cut short"),
    "nearly whole": (lambda whole: whole[:-1], "is cut short"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", [SAFE, PICKLED, "legacy", "shard"])
def test_broken_downloads_are_named(name, what, tmp_path):
    make, said = WRONG[what]
    form = {SAFE: "safetensors", "shard": "safetensors-sharded"}.get(name, "bin")
    folder = checkpoint(tmp_path, "neox", form)
    if name == "legacy":
        legacy(folder)
    file = (
        sorted(folder.glob("*.safetensors"))[0]
        if name == "shard"
        else folder / name.replace("legacy", PICKLED)
    )
    file.write_bytes(make(file.read_bytes()))
    refused(folder, f"{file} {said}")


@pytest.mark.parametrize("extra, said", [(1, "has 1 bytes too many"), (160, "has 160 bytes too many")])
def test_bytes_behind_the_last_tensor(extra, said, tmp_path):
    folder = checkpoint(tmp_path)
    with open(folder / SAFE, "ab") as file:
        file.write(bytes(extra))
    refused(folder, said)


def test_forms_under_each_others_names(tmp_path):
    folder = checkpoint(tmp_path)
    (folder / SAFE).rename(folder / PICKLED)
    refused(folder, "is a safetensors file under another name; rename it to model.safetensors")
    torch.save({"w": torch.ones(2)}, folder / SAFE)
    refused(folder, "is a pickle of torch under another name; rename it to pytorch_model.bin")
    (folder / SAFE).unlink()
    (folder / SAFE).mkdir()
    refused(folder, "is not a regular file")


# --- .bin of torch before 1.6 ------------------------------------------------------------------------


def legacy(folder, state=None):
    """Rewrite pytorch_model.bin without zip."""
    file = folder / PICKLED
    state = torch.load(file, weights_only=True) if state is None else state
    torch.save(state, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("family", ["mamba", "neox-sequential"])
def test_pickles_of_torch_before_1_6(family, tmp_path):
    theirs = write(family, "bin", tmp_path / "in")
    want = models.load(tmp_path / "in")
    legacy(tmp_path / "in")
    model = models.load(tmp_path / "in")
    assert relative_error(model, theirs) < NEAR and torch.equal(model(IDS), want(IDS))


@pytest.mark.parametrize("zipped", [True, False])
def test_entries_are_those_of_torch(zipped, tmp_path):
    """Views, transposed and empty tensors, parameters, every dtype."""
    base = torch.arange(24.0)
    state = {"base": base, "view": base[4:10].view(2, 3), "turned": base.view(4, 6).T}
    state |= {"empty": torch.ones(0, 9), "scalar": torch.tensor(3.0), "p": torch.nn.Parameter(base.clone())}
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        state[str(dtype)] = torch.zeros(3, 1, dtype=dtype)
    if zipped:
        state["float8"] = torch.zeros(4).to(torch.float8_e4m3fn)
        state["uint32"] = torch.zeros(4, dtype=torch.uint32)
    state = torch.nn.Module().state_dict() | state
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    found = entries(tmp_path / "x.bin")
    assert {n: (e.shape, e.dtype) for n, e in found.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in state.items()
    }


# --- pickles that mean harm --------------------------------------------------------------------------


def archive(file, content, records=(), compression=zipfile.ZIP_STORED):
    """A file of torch's form with this pickle in it."""
    with zipfile.ZipFile(file, "w", compression) as made:
        made.writestr("archive/data.pkl", content)
        for name, data in {"version": b"3\n", **dict(records)}.items():
            made.writestr(f"archive/{name}", data)


def tensor(numbers, size, stride, key="0", offset=0, dtype=None):
    """The pickle of {"w": tensor} with this storage and shape."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            storage = torch.FloatStorage if dtype is None else torch.UntypedStorage
            return ("storage", storage, key, "cpu", numbers) if value is Pickler else None

        def reducer_override(self, value):
            if isinstance(value, Rebuilt):
                shape = (Pickler, offset, size, stride, False, {})
                if dtype is None:
                    return torch._utils._rebuild_tensor_v2, shape
                return torch._utils._rebuild_tensor_v3, (*shape, dtype)
            return NotImplemented

    class Rebuilt:
        pass

    out = io.BytesIO()
    Pickler(out, 2).dump({"w": Rebuilt()})
    return out.getvalue()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


FLOOR = b"\x80\x02"
HOSTILE = {
    "tuple nested in a key": FLOOR + b"})" + b"\x85" * 400_000 + b"K\x01s.",
    "tuple of pairs": FLOOR + b"})" + b"q\x000h\x00h\x00\x86q\x01"[3:] * 100 + b"K\x01s.",
    "huge memo": FLOOR + b"}r\xff\xff\xff\x7f.",
    "huge text": FLOOR + b"X\xff\xff\xff\xffabc.",
    "bytearray of a terabyte": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "many layers": tensor(4, (1, 4), (4, 1), key="7"),
    "larger than its record": tensor(10**9, (10**9,), (1,)),
    "beyond its storage": tensor(4, (2, 4), (4, 1)),
    "offset": tensor(4, (4,), (1,), offset=1),
    "one number for a million": tensor(1, (10**3, 10**3), (0, 0)),
    "more bytes than numbers": tensor(16, (16,), (1,), dtype=torch.float32),
    "negative": tensor(4, (-4,), (1,)),
    "not a dict": FLOOR + b"K\x01.",
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_are_refused_before_torch_reads_them(what, zipped, tmp_path, monkeypatch):
    folder = checkpoint(tmp_path, "neox", "bin")
    if zipped:
        archive(folder / PICKLED, HOSTILE[what], {"data/0": bytes(16)})
    else:
        head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
        tail = pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)
        (folder / PICKLED).write_bytes(head + HOSTILE[what] + tail)

    def never(*_, **__):
        raise AssertionError("torch has read it")

    monkeypatch.setattr(torch, "load", never)
    refused(folder, PICKLED)


def test_code_in_pickles_does_not_run(tmp_path):
    folder = checkpoint(tmp_path, "neox", "bin")
    for zipped in (True, False):
        torch.save({"w": Evil(tmp_path / "made")}, folder / PICKLED, _use_new_zipfile_serialization=zipped)
        refused(folder, "is not a file of weights alone: it asks for posix.mkdir")
    (folder / PICKLED).write_bytes(pickle.dumps({"w": [1.0]}))
    refused(folder, "is a pickle, but none that torch.save has written")
    torch.save({"w": torch.ones(1), "epoch": np.float64(3)}, folder / PICKLED)
    refused(folder, "it asks for numpy")
    torch.save({"w": torch.ones(1), "epoch": 3}, folder / PICKLED)
    refused(folder, "its 'epoch' is a int, not a tensor; save the model's state_dict alone")
    assert not (tmp_path / "made").exists()


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    folder = checkpoint(tmp_path, "neox", "bin")
    archive(folder / PICKLED, tensor(10**8, (10**8,), (1,)), {"data/0": bytes(10**6)}, zipfile.ZIP_DEFLATED)
    refused(folder, "is compressed, and no weights are")
    archive(folder / PICKLED, b"x", {"other/data.pkl": b"y"})
    refused(folder, "is a zip archive without weights of torch")


def test_a_number_does_not_stand_for_a_row(tmp_path):
    """Neither as a scalar nor as an expanded tensor."""
    folder = checkpoint(tmp_path, "mamba")
    change(folder, lambda t: t.update({"backbone.norm_f.weight": torch.ones(())}))
    refused(folder, "backbone.norm_f.weight [] instead of [32]")
    change(folder, lambda t: t.update({"backbone.norm_f.weight": torch.ones(1)}))
    refused(folder, "backbone.norm_f.weight [1] instead of [32]")


# --- shards and their index --------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    folder = checkpoint(tmp_path, "mamba", "safetensors-sharded")
    return folder, sorted(folder.glob("model-*")), json.loads((folder / INDEX).read_text())


def both(folder):
    """Our logits, checked against those of `transformers` on the same folder."""
    theirs = transformers.MambaForCausalLM.from_pretrained(folder).eval()
    model = models.load(folder)
    assert relative_error(model, theirs) < NEAR
    return model(IDS)


def test_the_index_decides_between_two_copies(sharded):
    folder, files, _ = sharded
    want = models.load(folder)(IDS)
    first, key = load_file(files[0]), next(iter(load_file(files[-1])))
    save_file(first | {key: torch.zeros_like(load_file(files[-1])[key])}, files[0], metadata={"format": "pt"})
    assert torch.equal(both(folder), want)


def test_a_stale_index_beside_a_whole_file_does_not_count(sharded, tmp_path):
    folder, files, _ = sharded
    whole = {key: tensor for file in files for key, tensor in load_file(file).items()}
    save_file({key: 2 * tensor for key, tensor in whole.items()}, folder / SAFE, metadata={"format": "pt"})
    want = both(folder)
    for file in files:
        file.unlink()
    (folder / INDEX).write_text("{")
    assert torch.equal(models.load(folder)(IDS), want)


def test_names_in_the_index_that_no_file_has(sharded):
    folder, files, index = sharded
    index["weight_map"]["ghost"] = files[0].name
    (folder / INDEX).write_text(json.dumps(index))
    both(folder)
    del index["weight_map"]["ghost"]
    key = next(iter(load_file(files[-1])))
    index["weight_map"][key] = files[0].name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, f"{INDEX} says that {key} is in {files[0].name}, but it is in {files[-1].name}")


@pytest.mark.parametrize(
    "map_of, said",
    [
        (lambda whole: list(whole), "weight_map is no object of file names"),
        (lambda whole: whole | {"x": 3}, "weight_map is no object of file names"),
        (lambda whole: None, "weight_map is no object of file names"),
        (lambda whole: {}, "lists no weights"),
        (lambda whole: whole | {"x": "../../etc/passwd"}, "leads to '../../etc/passwd', outside its folder"),
        (lambda whole: whole | {"x": "/etc/passwd"}, "leads to '/etc/passwd', outside its folder"),
        (lambda whole: whole | {"x": ""}, "leads to '', outside its folder"),
        (
            lambda whole: whole | {"x": "model-9-of-9.safetensors"},
            "lacks model-9-of-9.safetensors; fetch",
        ),
    ],
)
def test_wrong_indices_are_named(map_of, said, sharded):
    folder, _, index = sharded
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": map_of(index["weight_map"])}))
    refused(folder, said)


# --- tied weights and dtypes -------------------------------------------------------------------------

NAMES = {
    "mamba": ("backbone.embeddings.weight", "lm_head.weight"),
    "mamba2": ("backbone.embeddings.weight", "lm_head.weight"),
    "neox-sequential": ("gpt_neox.embed_in.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("family", NAMES)
def test_tied_weights_may_have_either_name_or_both(family, tmp_path):
    folder = checkpoint(tmp_path, family)
    want, tensors = models.load(folder)(IDS), load_file(folder / SAFE)
    names = NAMES[family]
    table = next(tensors.pop(name) for name in (*names, "embed_out.weight") if name in tensors)
    kept = {name: tensor for name, tensor in tensors.items() if name not in (*names, "embed_out.weight")}
    for present in ({names[0]}, {names[1]}, set(names)):
        save_file(kept | {name: table.clone() for name in present}, folder / SAFE, metadata={"format": "pt"})
        model = models.load(folder)
        assert torch.equal(model(IDS), want)
        embedding, head = model.embedding, model.head
        assert head.weight is embedding.weight
    save_file(kept, folder / SAFE)
    refused(folder, "missing: ")


@pytest.mark.parametrize("family", ["mamba", "mamba2", "neox"])
def test_mixed_dtypes_load_as_asked_or_name_the_option(family, tmp_path):
    peer(family).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    folder = tmp_path / "in"

    def one_wider(t):
        key = next(key for key in t if key.endswith(("out_proj.weight", "dense.weight")))
        t[key] = t[key].float()

    change(folder, one_wider)
    with pytest.raises(UserError, match=r"several dtypes, .*bfloat16.*give dtype=torch\.float32"):
        models.load(folder)
    for dtype in (torch.float32, torch.bfloat16):
        model = models.load(folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype} and model(IDS).dtype == dtype


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_step_sizes_and_decays_may_be_wider(family, tmp_path):
    """Recurrences are computed in float32 at least."""
    peer(family).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    apart = ("A_log", ".D", "dt_bias", "dt_proj.bias")
    change(tmp_path / "in", lambda t: t.update({k: v.float() for k, v in t.items() if k.endswith(apart)}))
    model = models.load(tmp_path / "in")
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    assert torch.isfinite(model(IDS)).all()


def test_quantised_weights(tmp_path):
    folder = checkpoint(tmp_path)
    plain = load_file(folder / SAFE)
    change(folder, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()}))
    refused(folder, "is float8_e4m3fn, in which nothing is computed; give dtype=")
    assert torch.isfinite(models.load(folder, dtype=torch.float32)(IDS)).all()
    save_file({k: v.to(torch.int8) for k, v in plain.items()}, folder / SAFE)
    refused(folder, "is int8, not floating")
    edit(folder, quantization_config={"bits": 8})
    refused(folder, "quantization_config=")
