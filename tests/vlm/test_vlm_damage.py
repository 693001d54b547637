"""Damaged files of VLMs: one line that names the file, what is wrong in it, and what to do."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

from vlm_runs import one_line

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import session, store
from vlm import answering, components, evaluate, folders
from vlm.scenes import encoder

NAN, INF = float("nan"), float("inf")


JSON_DAMAGE = ["", "[]", "{}", "null", '"text"', "7", "{", "[" * 50_000, "\0\0\0", '{"plans": []}',
               '{"plans": [1]}', '{"plans": "x"}', '{"plans": {"a": 1}}', '{"plans": [[]]}',
               '{"plans": [null]}']  # fmt: skip


@pytest.mark.parametrize("content", JSON_DAMAGE)
@pytest.mark.parametrize("name", [folders.CONFIG, folders.RESULT])
def test_damaged_json_of_a_stage_names_file_and_remedy(vlm_folder, name, content):
    (vlm_folder / name).write_text(content)
    with pytest.raises(
        UserError, match=r"is damaged \(.*; delete the folder .* run python -m vlm.train"
    ) as raised:
        folders.saved_run(vlm_folder)
    assert str(vlm_folder / name) in one_line(raised)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("name",), "../../escaped", "name"), (("name",), 7, "name"), (("stages",), [], "no stages"),
        (("stages", 0, "batch_size"), "4", "batch_size"), (("stages", 0, "lr"), None, "lr"),
        (("stages", 0, "lr"), NAN, "lr"), (("stages", 1, "data"), {}, "data"),
        (("stages", 1, "data"), [[1, 2]], "data"),
        (("stages", 0, "train"), "everything", "train"), (("evaluation",), 3, "evaluation"),
        (("evaluation",), {"a": {"task": "sing", "images": 3}}, "sing"), (("layout",), "sideways", "layout"),
        (("flux",), 1, "flux"), (("stages", 0, "flux"), 1, "flux"), (("model",), "flux-tiny", "flux-tiny"),
        (("model_overrides",), {"flux": 2}, "flux"), (("max_new_tokens",), 0, "max_new_tokens"),
    ],
)  # fmt: skip
def test_a_damaged_field_of_a_saved_run_is_named(vlm_folder, place, value, said):
    saved = store.read_json(vlm_folder / folders.CONFIG)
    inner = saved["plans"][0]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (vlm_folder / folders.CONFIG).write_text(json.dumps(saved))
    with pytest.raises(UserError, match=said) as raised:
        folders.saved_run(vlm_folder)
    assert str(vlm_folder / folders.CONFIG) in one_line(raised)


def test_a_newer_file_is_told_as_newer(vlm_folder):
    (vlm_folder / folders.CONFIG).write_text('{"version": 99, "runs": {}}')
    with pytest.raises(UserError, match="version 99, newer than 2, which this toolkit reads; update it"):
        folders.saved_run(vlm_folder)


@pytest.mark.parametrize(
    "content",
    ['{"steps": -1, "seconds": 1}', '{"steps": 1, "seconds": NaN}', '{"steps": "1", "seconds": 1}',
     '{"steps": 1}', '{"steps": 1, "seconds": 1, "flux": 1}', '{"steps": 1.5, "seconds": 1}'],
)  # fmt: skip
def test_damaged_costs_of_a_stage_are_named(vlm_folder, content):
    (vlm_folder / folders.RESULT).write_text(content)
    with pytest.raises(UserError, match=r"stage.json is damaged") as raised:
        folders.saved_run(vlm_folder)
    one_line(raised)


def damage_tensors(path, how):
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "text":
        path.write_text("hello")
    elif how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        found, header = store.load_tensors(path)
        name = next(key for key, value in found.items() if value.ndim == 2)
        changes = {
            "gone": None,
            "shape": found[name][:-1],
            "scalar": torch.tensor(1.0),
            "transposed": found[name].t().contiguous(),
            "nan": torch.full_like(found[name], NAN),
            "integer": found[name].to(torch.int64),
        }
        found[name] = changes[how]
        store.save_tensors(path, {k: v for k, v in found.items() if v is not None}, header)


TENSOR_DAMAGE = [
    "empty",
    "cut",
    "text",
    "missing",
    "folder",
    "gone",
    "shape",
    "scalar",
    "transposed",
    "nan",
    "integer",
]


@pytest.mark.parametrize("how", TENSOR_DAMAGE)
def test_damaged_weights_of_a_stage_are_named(vlm_folder, how):
    damage_tensors(vlm_folder / folders.WEIGHTS, how)
    with pytest.raises(UserError, match=r"model.safetensors.*; delete the folder") as raised:
        answering.load(*folders.saved_run(vlm_folder))
    one_line(raised)


@pytest.mark.parametrize("how", [how for how in TENSOR_DAMAGE if how != "missing"])
def test_a_damaged_scenes_encoder_is_named(vlm_folder, how):
    path = vlm_folder.parent / components.ENCODERS / f"{encoder.key()}.safetensors"
    damage_tensors(path, how)
    with pytest.raises(UserError, match="; delete it, and it is trained anew") as raised:
        components.eyes("scenes", 32, vlm_folder.parent)
    assert str(path) in one_line(raised)


@pytest.mark.parametrize(
    ("how", "said"),
    [(how, "") for how in TENSOR_DAMAGE if how not in ("missing", "folder")]
    + [({"step": -1}, "step"), ({"step": 10**6}, "step"), ({"step": "2"}, "step"),
    ({"seconds": None}, "seconds"),
       ({"flux": 1}, "flux"), ([], "")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named(vlm_folder, how, said):
    wanted = folders.saved_run(vlm_folder)[0]
    model = components.model(wanted, encoder.WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    path, header = vlm_folder / folders.CHECKPOINT, {"step": 1, "seconds": 1.0, "tokens": 10}
    store.save_tensors(path, store.checkpoint_tensors(model, optimizer), header)
    how_to = dict(remedy=folders.remedy(vlm_folder), limit=3)
    assert session.resume(vlm_folder, model, optimizer, session.Progress, **how_to).step == 1
    if isinstance(how, str):
        damage_tensors(path, how)
    else:
        tensors, _ = store.load_tensors(path)
        store.save_tensors(path, tensors, header | how if isinstance(how, dict) else how)
    with pytest.raises(UserError, match=rf"checkpoint.safetensors.*{said}.* delete the folder") as raised:
        session.resume(vlm_folder, model, optimizer, session.Progress, **how_to)
    one_line(raised)


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"loss": 1}', '{"step": "1"}', "\x00"])
def test_a_damaged_row_of_metrics_is_named_and_a_cut_last_one_left_out(vlm_folder, line):
    path = vlm_folder / folders.METRICS
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert folders.metrics(vlm_folder) == [{"step": 1}]
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is damaged .*; delete the folder") as raised:
        folders.metrics(vlm_folder)
    one_line(raised)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"commit": 5}'])
def test_a_damaged_environment_is_named(vlm_folder, content):
    (vlm_folder / folders.ENVIRONMENT).write_text(content)
    with pytest.raises(UserError, match=r"environment.json is damaged"):
        folders.commit(vlm_folder)


@pytest.mark.parametrize("name", ["config.json", "stage.json", "model.safetensors", "encoder"])
@pytest.mark.parametrize("command", ["predict", "information_flow", "demo", "evaluate"])
def test_an_empty_file_of_a_stage_ends_every_command_in_one_line(vlm_folder, tmp_path, capsys, command, name):
    from PIL import Image

    from vlm import predict
    from vlm.demo import __main__ as demo
    from vlm.information_flow import __main__ as information_flow

    pytest.importorskip("gradio", reason="gradio is not installed; .ci/run installs it")
    path = vlm_folder / name
    if name == "encoder":
        path = vlm_folder.parent / components.ENCODERS / f"{encoder.key()}.safetensors"
    path.write_bytes(b"")
    picture = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(picture)
    status = {
        "predict": lambda: predict.main([str(vlm_folder), str(picture), "Is it?"]),
        "information_flow": lambda: information_flow.main(
            [str(vlm_folder), "--out", str(tmp_path / "a.parquet"), "--examples", "2"]
        ),
        "demo": lambda: demo.main([str(vlm_folder), str(vlm_folder)]),
        "evaluate": lambda: evaluate.main([str(vlm_folder)]),
    }[command]()
    said = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(said) == 1 and str(path) in said[0] and "delete" in said[0]


@pytest.mark.parametrize("command", ["predict", "information_flow", "demo", "evaluate"])
def test_ctrl_c_in_every_command_is_status_130_without_a_traceback(
    vlm_folder, tmp_path, capsys, monkeypatch, command
):
    from vlm import predict
    from vlm.demo import __main__ as demo
    from vlm.information_flow import __main__ as information_flow

    def pressed(*_, **__):
        raise KeyboardInterrupt

    for module in (predict, information_flow, evaluate, demo):
        name = {
            "predict": "predict",
            "information_flow": "measure",
            "evaluate": "evaluate_all",
            "demo": "serve",
        }
        monkeypatch.setattr(module, name[command], pressed, raising=False)
    argv = {
        "predict": ["x", "y"],
        "information_flow": ["x", "--out", "y"],
        "demo": ["x", "y"],
        "evaluate": ["x"],
    }
    main = {"predict": predict, "information_flow": information_flow, "demo": demo, "evaluate": evaluate}[
        command
    ].main
    assert main(argv[command]) == 130
    assert capsys.readouterr().err.count("\n") == 1
