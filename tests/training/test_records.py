"""Files that a run wrote, read back damaged: one line that names file, field and what to do."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import loop, store
from ssm_retrieval.training.records import FORMAT, Count, checked, environment, record_of
from synthetic import records, results, trainer
from synthetic.config import RunConfig, plan

SMALL = RunConfig(
    seq_len=8, model=("mamba",), layers=1, d_state=4, queries=4, steps=4, eval_every=2, eval_examples=8,
    final_eval_examples=16, batch_tokens=64, device="cpu", precision="float32",
)  # fmt: skip
PLAN = plan(SMALL, "mamba")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run, as `synthetic.run` leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    results.begin(folder, SMALL, PLAN)
    results.train_recorded(PLAN, folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs" / "run")


READ = {
    "config.json": lambda folder: records.config(folder),
    "environment.json": lambda folder: environment(folder),
    "metrics.jsonl": lambda folder: records.metrics(folder),
    "by_position.jsonl": lambda folder: records.by_position(folder),
    "by_length.jsonl": lambda folder: records.by_length(folder),
    "result.json": records.result,
}
FIELD = {  # a field that each kind cannot do without
    "config.json": "plan",
    "environment.json": "sessions",
    "metrics.jsonl": "accuracy",
    "by_position.jsonl": "rate",
    "by_length.jsonl": "accuracy",
    "result.json": "loss",
}


def test_what_a_run_wrote_can_be_read(folder):
    assert records.config(folder)["plan"]["seq_len"] == 8
    assert [row["step"] for row in records.metrics(folder) if row["length"] == 8] == [2, 4]
    assert records.result(folder)["count"] == 16
    assert sum(row["count"] for row in records.by_position(folder)) == 16


def refused(read, folder, *said):
    with pytest.raises(UserError) as error:
        read(folder)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in said), line


def damage(path, change):
    """Change the value of a file, of its first row if it has several."""
    lines = path.suffix == ".jsonl"
    texts = path.read_text().splitlines() if lines else [path.read_text()]
    texts[0] = json.dumps(change(json.loads(texts[0])))
    path.write_text("\n".join(texts) + "\n")


@pytest.mark.parametrize("value", [[], "text", None, 7, True, [1], [[]]], ids=repr)
@pytest.mark.parametrize("name", READ)
def test_another_kind_of_value(folder, name, value):
    damage(folder / name, lambda old: value)
    refused(
        READ[name], folder, name.split("/")[-1], "instead of an object with fields", "run its command again"
    )


@pytest.mark.parametrize("name", READ)
def test_an_empty_object_lacks_something(folder, name):
    damage(folder / name, lambda old: {})
    refused(READ[name], folder, name.split("/")[-1], "lacks ")


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), {}, [1], "much", -1e400], ids=repr)
@pytest.mark.parametrize("name", READ)
def test_a_wrong_field_is_named(folder, name, value):
    damage(folder / name, lambda old: old | {FIELD[name]: value})
    refused(READ[name], folder, name.split("/")[-1], FIELD[name])


@pytest.mark.parametrize("name", READ)
def test_a_missing_field_is_named(folder, name):
    def drop(old):
        extra = {"packages": None} if name == "environment.json" else {}  # else a file of before sessions
        return {k: v for k, v in (old | extra).items() if k not in (FIELD[name], "packages")}

    damage(folder / name, drop)
    refused(READ[name], folder, f"lacks {FIELD[name]}")


@pytest.mark.parametrize("name", [name for name in READ if name.endswith(".json")])
def test_a_newer_file_is_told_as_newer(folder, name):
    damage(folder / name, lambda old: old | {"format": FORMAT + 1, "flux": 1})
    refused(READ[name], folder, "written by a newer version (format 3; this one reads up to 2)", "update")


@pytest.mark.parametrize("text", ["{", '{"a": }', "[1, 2", "\x00", "nan", "[" * 100_000], ids=range(6))
@pytest.mark.parametrize("name", READ)
def test_no_json_is_named_with_its_line(folder, name, text):
    path = folder / name
    rest = path.read_text().splitlines()[1:] if name.endswith("l") else []
    path.write_text("\n".join([text, *rest]) + "\n")
    refused(READ[name], folder, f"{path} is damaged")
    path.write_bytes(b"\xff\xfe\x00")
    refused(READ[name], folder, f"{path} is damaged: no UTF-8")


def test_the_line_of_a_damaged_row_is_named(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "{oops\n", *lines[1:]]))
    refused(records.metrics, folder, f"{path} is damaged: no JSON in line 2")
    refused(lambda folder: store.read_rows(path), folder, "line 2")


def test_a_last_line_that_was_cut_is_left_out(folder):
    before = records.metrics(folder)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"model": "mamba", "st')
    assert records.metrics(folder) == before


BAD_PLANS = [
    (lambda p: p | {"flux": 1}, "plan.flux is unknown, of a newer version perhaps"),
    (lambda p: p | {"family": "lstm"}, "plan.family is 'lstm'"),
    (lambda p: p | {"seq_len": 0}, "plan.seq_len is 0"),
    (lambda p: p | {"seq_len": "8"}, "plan.seq_len is '8'"),
    (lambda p: p | {"betas": 0.9}, "plan.betas is 0.9"),
    (lambda p: p | {"task_options": []}, "plan.task_options is []"),
    (lambda p: 1, "plan is 1"),
    (lambda p: {k: v for k, v in p.items() if k != "lr"}, "lacks plan.lr"),
]


@pytest.mark.parametrize("change, said", BAD_PLANS)
def test_a_wrong_plan_is_named(folder, change, said):
    damage(folder / "config.json", lambda old: old | {"plan": change(old["plan"])})
    refused(lambda folder: results.record(folder), folder, str(folder / "config.json"), said)


def test_a_folder_of_the_older_layout_is_told_as_such(folder):
    """It held several models, each in a folder of its own."""
    damage(folder / "config.json", lambda old: {**old, "format": 1, "plans": [old["plan"]]})
    said = (str(folder), "is of an older version, which kept several models", "move it away")
    for read in (records.config, lambda folder: results.begin(folder, SMALL, PLAN)):
        refused(read, folder, *said)


# --- weights and tables ----------------------------------------------------------------------------------


def unfinished(folder):
    (folder / "result.json").unlink()
    return folder / store.CHECKPOINT


def rewrite(path, change, header=None):
    tensors, old = store.load_tensors(path)
    store.save_tensors(path, change(tensors), old if header is None else header)


NAME = "model.backbone.layers.0.mixer.out_proj.weight"
CHECKPOINTS = {
    "a tensor is gone": (lambda t: {k: v for k, v in t.items() if k != NAME}, None, f"lacks {NAME}"),
    "another shape": (lambda t: t | {NAME: torch.zeros(3, 3)}, None, f"{NAME} of shape (3, 3) instead of"),
    "a scalar, which would broadcast": (lambda t: t | {NAME: torch.zeros(())}, None, f"{NAME} of shape ()"),
    "whole numbers": (lambda t: t | {NAME: t[NAME].long()}, None, f"{NAME} in torch.int64 instead of"),
    "NaN among the numbers": (lambda t: t | {NAME: t[NAME] / 0 * 0}, None, f"NaN in {NAME}"),
    "no progress": (lambda t: t, {}, "lacks step"),
    "progress of a newer version": (lambda t: t, {"flux": 1}, "flux is unknown"),
    "progress that is none": (lambda t: t, {"step": "two"}, "step is 'two'"),
    "progress before its start": (lambda t: t, {"step": -1}, "step is -1"),
}


@pytest.mark.parametrize("change, header, said", CHECKPOINTS.values(), ids=list(CHECKPOINTS))
def test_a_checkpoint_of_something_else(folder, change, header, said):
    path = unfinished(folder)
    assert NAME in store.load_tensors(path)[0]
    if header:
        header = store.load_tensors(path)[1] | header
    rewrite(path, change, header)
    refused(lambda folder: trainer.train(PLAN, folder), folder, str(path), said, "delete it")


def test_deleting_a_damaged_checkpoint_starts_the_model_anew(folder, made):
    """As its line advises: the same numbers as of an undisturbed run, and no row twice."""
    path = unfinished(folder)
    path.write_bytes(path.read_bytes()[:500])
    refused(lambda folder: trainer.train(PLAN, folder), folder, f"{path} is damaged", "delete it")
    path.unlink()
    trainer.train(PLAN, folder)
    mine, other = records.metrics(folder), records.metrics(made)
    assert [r | {"seconds": 0} for r in mine] == [r | {"seconds": 0} for r in other]


def test_deleting_a_damaged_finished_model_starts_it_anew(folder, made):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    refused(lambda folder: store.load_tensors(path), folder, f"delete the folder {path.parent}")
    shutil.rmtree(path.parent)
    result = trainer.train(PLAN, folder)
    assert result | {"seconds": 0} == records.result(made) | {"seconds": 0}
    assert store.load_tensors(path)[1]["step"] == 4


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PAR1", b"[]", b"PAR1" + b"\0" * 20 + b"PAR1"])
@pytest.mark.parametrize("name", ["results", "targets"])
def test_a_damaged_table_is_behind(folder, content, name):
    path = folder.parent / name / f"{folder.name}.parquet"
    results.record(folder)
    assert not results.behind(folder)
    path.write_bytes(content)
    assert results.behind(folder)


# --- the environment's sessions --------------------------------------------------------------------------


def test_every_session_has_its_environment(folder, monkeypatch):
    """A resumed run keeps where and with what each part was trained; the table has every commit."""
    first = environment(folder)["sessions"]
    threads = torch.get_num_threads()
    assert len(first) == 1 and first[0]["threads"] == threads
    store.prepare(folder, {}, threads)  # the same again: nothing new
    assert environment(folder)["sessions"] == first
    monkeypatch.setattr(
        store, "environment", lambda threads: first[0] | {"threads": threads, "commit": "abc+"}
    )
    store.prepare(folder, {}, threads + 1)
    found = environment(folder)
    assert [session["threads"] for session in found["sessions"]] == [threads, threads + 1]
    assert found["threads"] == threads + 1
    rows, _ = results.tables(folder)
    commits = [first[0]["commit"], "abc+"]
    assert {row["commit"] for row in rows} == {", ".join(c for c in commits if c)}


def test_an_environment_of_before_is_one_session(folder):
    path = folder / "environment.json"
    old = store.environment(3)
    store.write_json(path, old)
    assert environment(folder)["sessions"] == [old]


# --- diverged runs ---------------------------------------------------------------------------------------


def test_a_run_that_diverges_stops_in_one_line_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    """The loss is NaN from step 3 on; the checkpoint of step 2 has finite weights, and nothing follows it."""
    real, calls = trainer.update, []

    def update(model, *rest, **more):
        calls.append(1)
        if len(calls) == 3:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        return real(model, *rest, **more)

    monkeypatch.setattr(trainer, "update", update)
    monkeypatch.setattr(trainer.Session, "checkpoint_seconds", 0.0)
    monkeypatch.setattr(loop, "SHARE", 1e9)
    refused(
        lambda f: trainer.train(PLAN, f),
        tmp_path,
        "mamba: the training loss is nan",
        "diverged with --lr",
        "step 2",
    )
    tensors, header = store.load_tensors(tmp_path / store.CHECKPOINT)
    assert header["step"] == 2 and all(t.isfinite().all() for t in tensors.values())
    assert not (tmp_path / "result.json").exists()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, -1])
def test_weights_that_a_step_ruined_are_no_checkpoint(tmp_path, which, value):
    session = trainer.Session(PLAN, tmp_path, lambda event, row: None)
    session.step()
    session.checkpoint()
    session.step()
    with torch.no_grad():
        list(session.model.parameters())[which].view(-1)[0] = value
    with pytest.raises(trainer.Diverged, match="a weight is no finite number at step 2"):
        session.checkpoint()
    assert store.load_tensors(tmp_path / store.CHECKPOINT)[1]["step"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_file_ever_holds_what_json_has_not(tmp_path, value):
    for write in (store.write_json, store.append_row, lambda path, row: store.write_rows(path, [row])):
        path = tmp_path / "file.json"
        with pytest.raises(ValueError, match="not JSON compliant"):
            write(path, {"loss": value})
        assert not path.exists()


# --- schemas of dataclasses ------------------------------------------------------------------------------


@dataclasses.dataclass
class Size:
    wide: Count
    ratio: float | None
    sides: tuple[float, float]
    name: str = "square"


RIGHT = {"wide": 2, "ratio": 1, "sides": [1, 2.5]}


@pytest.mark.parametrize("value", [RIGHT, RIGHT | {"ratio": None, "name": "box"}])
def test_json_of_a_dataclass_fits_its_schema(value):
    assert checked(value, record_of(Size, complete=False), "a file") is value


@pytest.mark.parametrize(
    "change, said",
    [
        ({"wide": -1}, "wide is -1"), ({"wide": "2"}, "wide is '2'"), ({"wide": 2.0}, "wide is 2.0"),
        ({"wide": True}, "wide is True"), ({"ratio": "1"}, "ratio"), ({"sides": [1]}, "sides"),
        ({"sides": [1, 2, 3]}, "sides"), ({"sides": [1, "2"]}, "sides.1 is '2'"),
        ({"sides": 1}, "sides is 1"), ({"name": None}, "name is None"), ({"flux": 1}, "flux is unknown"),
    ],
)  # fmt: skip
def test_json_that_a_dataclass_cannot_have_is_named(change, said):
    value = {"name": "box"} | RIGHT | change
    for complete in (True, False):
        refused(lambda _, c=complete: checked(value, record_of(Size, c), "a file"), None, "a file", said)


def test_a_complete_schema_wants_fields_with_a_default_too():
    refused(lambda _: checked(RIGHT, record_of(Size), "a file"), None, "a file lacks name; move")
    lacking = {"name": "box", "ratio": 1.0, "sides": [1, 2]}
    refused(lambda _: checked(lacking, record_of(Size, complete=False), "a file"), None, "lacks wide")
