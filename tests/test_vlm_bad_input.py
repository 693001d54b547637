"""Bad configs and damaged files of VLMs: one line that names the file or the field, and what to do."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

import vlm_runs

from ssm_retrieval.errors import UserError
from synthetic import store
from vlm import evaluate, folders, parts, results, stages
from vlm.config import Files, Run, Scenes, Stage, from_dict, read_file
from vlm.scenes import encoder

NAN, INF = float("nan"), float("inf")


def stage(**more) -> Stage:
    return Stage(**dict(data={"locate": Scenes("locate", 40)}, batch_size=4, lr=1e-3, steps=3) | more)


def run(**more) -> Run:
    given = dict(name="a", model="mamba-tiny", stages=(stage(),), evaluation={}) | more
    return Run(**given)


def one_line(raised) -> str:
    text = str(raised.value)
    assert text and "\n" not in text and len(text) < 1000
    return text


# --- configs ------------------------------------------------------------------------------------------------

BAD_STAGES = [
    ("batch_size", "4"), ("batch_size", 0), ("batch_size", -1), ("batch_size", 4.5), ("batch_size", True),
    ("batch_size", None), ("batch_size", 10**20), ("data", {}), ("data", []), ("data", [1]),
    ("data", "locate"),
    ("data", {"locate": 5}), ("data", {"": Scenes("locate", 4)}), ("data", None), ("lr", 0), ("lr", -1e-3),
    ("lr", NAN), ("lr", INF), ("lr", "1e-3"), ("lr", 1e30), ("steps", -3), ("steps", 1.5), ("steps", 10**20),
    ("epochs", NAN), ("epochs", INF), ("train", "everything"), ("train", None), ("layouts", "agnostic"),
    ("layouts", ("sideways",)), ("layouts", {"agnostic"}), ("image_size", 8), ("image_size", -16),
    ("image_size", 10**9), ("warmup", -0.1), ("warmup", 1.5), ("warmup", NAN), ("weight_decay", -1.0),
    ("weight_decay", INF), ("betas", (0.9, 1.0)), ("betas", (0.9,)), ("betas", (-0.1, 0.9)),
    ("grad_clip", NAN),
    ("grad_clip", -1.0), ("max_length", 0), ("group", 0), ("accumulate", 0), ("workers", -1),
    ("workers", 10**6), ("weights", {"other": 1.0}), ("weights", {"locate": NAN}), ("weights", [1.0]),
]  # fmt: skip
BAD_RUNS = [
    ("name", ""), ("name", " "), ("name", ".."), ("name", "../../escaped"), ("name", "a/b"), ("name", "a\\b"),
    ("name", "/etc/x"), ("name", "a..b"), ("name", ".hidden"), ("name", "a\nb"), ("name", "a\0b"),
    ("name", "x" * 300), ("name", 5), ("name", None), ("model", "mamba-gigantic"), ("model", 5),
    ("model_overrides", {"flux": 1}), ("model_overrides", {"d_model": "wide"}), ("model_overrides", [1]),
    ("model_overrides", {"d_model": {1}}), ("model_overrides", {"norm_eps": NAN}), ("stages", ()),
    ("stages", {}), ("stages", stage()), ("stages", (stage(), None)), ("stages", ("stage",)),
    ("evaluation", []), ("evaluation", {"a": None}), ("evaluation", "grounding"), ("layout", "sideways"),
    ("layout", None), ("image_size", 8), ("image_size", 64.0), ("image_size", 10**9), ("seed", -1),
    ("seed", 2**64), ("seed", "0"), ("precision", "fp8"), ("precision", True), ("max_new_tokens", 0),
    ("max_new_tokens", 10**9), ("cache", "yes"), ("encoder", ""), ("tokenizer", None), ("init", ""),
]  # fmt: skip
BAD_DATA = [
    (Scenes, "task", ("sing", 4)), (Scenes, "task", (None, 4)), (Scenes, "images", ("locate", 0)),
    (Scenes, "images", ("locate", "40")), (Scenes, "split", ("locate", 4, "test")),
    (Scenes, "seed", ("locate", 4, "train", -1)), (Scenes, "turns", ("locate", 4, "train", 0, 0)),
    (Files, "data set", ("cocoa", "train", "a", "b")), (Files, "split", ("coco", "training", "a", "b")),
    (Files, "annotations", ("coco", "train", "", "b")), (Files, "images", ("coco", "train", "a", None)),
    (Files, "first", ("coco", "train", "a", "b", -1)), (Files, "regions",
    ("coco", "train", "a", "b", 0, "x")),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_STAGES)
def test_a_bad_stage_is_refused_where_it_is_made(field, value):
    with pytest.raises(UserError, match=rf"Stage: .*{field}") as raised:
        stage(**{field: value})
    one_line(raised)


@pytest.mark.parametrize(("field", "value"), BAD_RUNS)
def test_a_bad_run_is_refused_where_it_is_made(field, value):
    with pytest.raises(UserError, match=rf"Run .*: .*({field}|no stages|model )") as raised:
        run(**{field: value})
    one_line(raised)


@pytest.mark.parametrize(("kind", "field", "values"), BAD_DATA)
def test_bad_data_is_refused_where_it_is_made(kind, field, values):
    with pytest.raises(UserError, match=rf"{kind.__name__}: .*{field}") as raised:
        kind(*values)
    one_line(raised)


@pytest.mark.parametrize(
    "call", [lambda: stage(flux=1), lambda: run(flux=1), lambda: Scenes("locate", 4, flux=1)]
)
def test_a_field_that_does_not_exist_is_named(call):
    with pytest.raises(UserError, match="flux: unexpected keyword argument"):
        call()


@pytest.mark.parametrize("name", ["a", "transformer-64px-seed0", "grün [b]", "x=1,y=2", "a.b"])
def test_usual_names_are_accepted(name):
    assert run(name=name).name == name


def test_steps_or_epochs_and_not_both():
    for more in (dict(steps=3, epochs=1.0), dict(steps=0)):
        with pytest.raises(UserError, match="give one of them"):
            stage(**more)


HEAD = "from vlm.config import Run, Scenes, Stage\n"
GOOD = 'Run("a", "mamba-tiny", (Stage({"x": Scenes("locate", 4)}, 4, 1e-3, 3),), {})'
BAD_FILES = {
    "syntax": ("def get_config(:\n", "line 1: SyntaxError"),
    "name": (f"{HEAD}x = 1\ny = undefined\n", "line 3: NameError"),
    "import": ("import no_such_package_anywhere\n", "line 1: ModuleNotFoundError"),
    "divide": ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
    "library": ("import json\njson.loads('{')\n", "line 2: JSONDecodeError"),
    "field": (
        f'{HEAD}\n\nStage({{"x": Scenes("locate", 4)}}, "4", 1e-3, 3)\n',
        "line 4: Stage: batch_size='4'",
    ),
    "missing": (f"{HEAD}Run()\n", "line 2: Run: name: field required"),
    "empty": ("", "must have get_config"),
    "not callable": ("get_config = 5\n", "must have get_config"),
    "arguments": ("def get_config(x):\n    return []\n", "line 1: TypeError"),
    "none": ("def get_config():\n    pass\n", "must have get_config"),
    "no list": ("def get_config():\n    return 7\n", "must have get_config"),
    "text": ("def get_config():\n    return 'runs'\n", "must have get_config"),
    "no run": ("def get_config():\n    return [1]\n", "must have get_config"),
    "one run": (f"{HEAD}def get_config():\n    return {GOOD}\n", "must have get_config"),
    "twice": (f"{HEAD}def get_config():\n    return [{GOOD}] * 2\n", "names two runs 'a'"),
    "bytes": ("\0\0", "null bytes|must have"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_config_file_is_one_line_with_its_name(name, tmp_path):
    content, line = BAD_FILES[name]
    path = tmp_path / "bad.py"
    path.write_text(content)
    with pytest.raises(UserError, match=line) as raised:
        read_file(path)
    assert str(path) in one_line(raised)


def test_a_bug_of_ours_under_a_config_file_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(self):
        raise KeyError("a bug")

    monkeypatch.setattr(vlm_runs.Run, "to_dict", broken)
    path = tmp_path / "good.py"
    path.write_text("import vlm_runs\ndef get_config():\n    return [vlm_runs.run('mamba-tiny').to_dict()]\n")
    with pytest.raises(KeyError, match="a bug"):
        read_file(path)


# --- damaged files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run that was saved untrained; tests copy it."""
    out = tmp_path_factory.mktemp("vlm")
    vlm_runs.save_encoder(out)
    wanted = dataclasses.replace(vlm_runs.run("mamba-tiny", name="two"), stages=(stage(), stage(lr=2e-3)))
    for number, name in enumerate(wanted.stage_ids()):
        kept = dataclasses.replace(wanted, stages=wanted.stages[: number + 1])
        assert kept.stage_ids()[-1] == name
        vlm_runs.save(kept, out)
        store.write_json(out / name / folders.CONFIG, {"version": 1, "plans": [wanted.to_dict()]})
    return out / wanted.stage_ids()[-1]


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made.parent, tmp_path / "out")
    parts.eyes.cache_clear()
    return tmp_path / "out" / made.name


JSON_DAMAGE = ["", "[]", "{}", "null", '"text"', "7", "{", "[" * 50_000, "\0\0\0", '{"plans": []}',
               '{"plans": [1]}', '{"plans": "x"}', '{"plans": {"a": 1}}', '{"plans": [[]]}',
               '{"plans": [null]}']  # fmt: skip


@pytest.mark.parametrize("content", JSON_DAMAGE)
@pytest.mark.parametrize("name", [folders.CONFIG, folders.RESULT])
def test_damaged_json_of_a_stage_names_file_and_remedy(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(
        UserError, match=r"is damaged \(.*; delete the folder .* run python -m vlm.train"
    ) as raised:
        folders.saved_run(folder)
    assert str(folder / name) in one_line(raised)


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
def test_a_damaged_field_of_a_saved_run_is_named(folder, place, value, said):
    saved = store.read_json(folder / folders.CONFIG)
    inner = saved["plans"][0]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (folder / folders.CONFIG).write_text(json.dumps(saved))
    with pytest.raises(UserError, match=said) as raised:
        folders.saved_run(folder)
    assert str(folder / folders.CONFIG) in one_line(raised)


def test_a_newer_file_is_told_as_newer(folder):
    (folder / folders.CONFIG).write_text('{"version": 99, "runs": {}}')
    with pytest.raises(UserError, match="version 99, newer than 1, which this toolkit reads; update it"):
        folders.saved_run(folder)


@pytest.mark.parametrize(
    "content",
    ['{"steps": -1, "seconds": 1}', '{"steps": 1, "seconds": NaN}', '{"steps": "1", "seconds": 1}',
     '{"steps": 1}', '{"steps": 1, "seconds": 1, "flux": 1}', '{"steps": 1.5, "seconds": 1}'],
)  # fmt: skip
def test_damaged_costs_of_a_stage_are_named(folder, content):
    (folder / folders.RESULT).write_text(content)
    with pytest.raises(UserError, match=r"stage.json is damaged") as raised:
        folders.saved_run(folder)
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
def test_damaged_weights_of_a_stage_are_named(folder, how):
    damage_tensors(folder / folders.WEIGHTS, how)
    with pytest.raises(UserError, match=r"model.safetensors.*; delete the folder") as raised:
        evaluate.load(*folders.saved_run(folder))
    one_line(raised)


@pytest.mark.parametrize("how", [how for how in TENSOR_DAMAGE if how != "missing"])
def test_a_damaged_scenes_encoder_is_named(folder, how):
    path = folder.parent / parts.ENCODERS / f"{encoder.key()}.safetensors"
    damage_tensors(path, how)
    with pytest.raises(UserError, match="; delete it, and it is trained anew") as raised:
        parts.eyes("scenes", 32, folder.parent)
    assert str(path) in one_line(raised)


@pytest.mark.parametrize(
    ("how", "said"),
    [(how, "") for how in TENSOR_DAMAGE if how not in ("missing", "folder")]
    + [({"step": -1}, "step"), ({"step": 10**6}, "step"), ({"step": "2"}, "step"),
    ({"seconds": None}, "seconds"),
       ({"flux": 1}, "flux"), ([], "")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named(folder, how, said):
    wanted = folders.saved_run(folder)[0]
    model = parts.model(wanted, encoder.WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    path, header = folder / folders.CHECKPOINT, {"step": 1, "seconds": 1.0, "tokens": 10}
    store.save_tensors(path, store.checkpoint_tensors(model, optimizer), header)
    assert stages.resume(folder, model, optimizer, 3).step == 1
    if isinstance(how, str):
        damage_tensors(path, how)
    else:
        tensors, _ = store.load_tensors(path)
        store.save_tensors(path, tensors, header | how if isinstance(how, dict) else how)
    with pytest.raises(UserError, match=rf"checkpoint.safetensors.*{said}.*; delete the folder") as raised:
        stages.resume(folder, model, optimizer, 3)
    one_line(raised)


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"loss": 1}', '{"step": "1"}', "\x00"])
def test_a_damaged_row_of_metrics_is_named_and_a_cut_last_one_left_out(folder, line):
    path = folder / folders.METRICS
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert folders.metrics(folder) == [{"step": 1}]
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is damaged .*; delete the folder") as raised:
        folders.metrics(folder)
    one_line(raised)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"commit": 5}'])
def test_a_damaged_environment_is_named(folder, content):
    (folder / folders.ENVIRONMENT).write_text(content)
    with pytest.raises(UserError, match=r"environment.json is damaged"):
        folders.commit(folder)


# --- which run a folder is ----------------------------------------------------------------------------------


def test_the_first_stage_alone_is_no_run(folder):
    wanted, out = folders.saved_run(folder)
    first = out / wanted.stage_ids()[0]
    with pytest.raises(UserError, match=f"is stage 1 of 2 of run 'two'; give the last one, .*{folder.name}"):
        folders.saved_run(first)


def test_a_renamed_folder_never_answers_with_the_weights_of_another(folder):
    other = folder.rename(folder.with_name("best"))
    with pytest.raises(UserError, match="give it back its name"):
        folders.saved_run(other)


def test_a_link_or_a_point_is_the_folder_that_it_means(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for path in (tmp_path / "link", folders.Path(".")):
        assert folders.saved_run(path)[1] == folder.parent.resolve()


def test_runs_that_share_a_folder_are_all_remembered_the_latest_last(folder):
    wanted, out = folders.saved_run(folder)
    other = dataclasses.replace(wanted, name="b", max_new_tokens=5)
    folders.remember(other, out)
    assert [found.name for found in folders.saved_runs(folder)] == ["two", "b"]
    longer = dataclasses.replace(wanted, evaluation={"count": Scenes("count", 3, "heldout")})
    folders.remember(longer, out)  # its evaluation was edited
    assert folders.saved_runs(folder) == [other, longer]
    before = (folder / folders.CONFIG).stat().st_mtime_ns
    folders.remember(longer, out)
    assert (folder / folders.CONFIG).stat().st_mtime_ns == before  # nothing is written where nothing changes


def test_runs_that_are_asked_in_another_layout_have_another_folder():
    mixed = (stage(), stage(layouts=("agnostic", "query-first")))
    a, b = (run(name=name, stages=mixed, layout=name) for name in ("agnostic", "query-first"))
    assert a.stage_ids()[0] != b.stage_ids()[0]  # the first one is trained in the run's layout
    named = (stage(layouts=("agnostic", "query-first")),) * 2
    a, b = (run(name=name, stages=named, layout=name) for name in ("agnostic", "query-first"))
    assert a.stage_ids()[0] == b.stage_ids()[0] and a.stage_ids()[1] != b.stage_ids()[1]
    # asked as it was trained: the same folder as where it is a stage of a longer run
    assert run().stage_ids()[0] == run(stages=(stage(), stage())).stage_ids()[0]


# --- what names depend on -----------------------------------------------------------------------------------


def test_stage_ids_know_encoder_tokenizer_and_scenes(monkeypatch, tmp_path):
    import vlm.scenes
    from vlm import tokenizer

    before = run().stage_ids()
    assert run().stage_ids() == before
    for module, name, value in (
        (encoder, "VERSION", 99), (encoder, "IMAGES", 99), (encoder, "EPOCHS", 99), (encoder, "LR", 1.0),
        (encoder, "SCENES_VERSION", 99), (vlm.scenes, "VERSION", 99), (tokenizer, "PIECES", "x"),
        (tokenizer, "SPECIAL", ("x",)),
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            if name == "IMAGES":  # a default argument
                patched.setattr(encoder, "key", lambda images=99, made=encoder.key: made(images))
            assert run().stage_ids() != before, name
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    own = run(tokenizer=str(tmp_path)).stage_ids()
    assert own == run(tokenizer=str(file)).stage_ids()
    file.write_text("{} ")
    assert run(tokenizer=str(tmp_path)).stage_ids() != own
    elsewhere = run(
        tokenizer=str(file), encoder="eva02_large_patch14_clip_336"
    )  # only the samples are of scenes
    before = elsewhere.stage_ids()
    monkeypatch.setattr(vlm.scenes, "VERSION", 99)
    assert elsewhere.stage_ids() != before


def test_features_of_scenes_know_their_version(monkeypatch):
    from vlm.scenes import source

    before = source.SceneSource("count", 3).fingerprint
    monkeypatch.setattr(source, "VERSION", 99)
    assert source.SceneSource("count", 3).fingerprint != before


def test_betas_are_part_of_a_stages_name_and_reach_the_optimizer(folder, monkeypatch):
    from vlm.configs import paper

    assert run(stages=(stage(betas=(0.9, 0.999)),)).stage_ids() != run().stage_ids()
    assert {one.betas for made in paper.get_config() for one in made.stages} == {(0.9, 0.999)}
    assert stage().betas == (0.9, 0.95)
    train = pytest.importorskip("vlm.train", reason="accelerate is not installed; .ci/run installs it")
    wanted = dataclasses.replace(vlm_runs.run("mamba-tiny"), stages=(stage(betas=(0.5, 0.75), steps=1),))
    seen = []
    monkeypatch.setattr(
        stages, "update", lambda _, optimizer, *__: seen.append(optimizer.param_groups[0]["betas"]) or 1.0
    )
    stages.train_stage(wanted, 0, folder.parent, train.accelerate([wanted]))
    assert seen == [(0.5, 0.75)]


def test_a_saved_run_is_read_as_it_was():
    wanted = run(
        evaluation={"c": Files("coco", "test", "a", "b", options={"x": "y"})}, model_overrides={"n_layer": 1}
    )
    assert from_dict(json.loads(json.dumps(wanted.to_dict(), sort_keys=True))) == wanted


# --- tables -------------------------------------------------------------------------------------------------


def rows_of(wanted: Run, **more) -> list[dict]:
    base = dict.fromkeys(results.COLUMNS) | dict(
        run=wanted.name, stage=wanted.stage_ids()[-1], evaluation=results.fingerprint(wanted), family="mamba",
        model=wanted.model, layout=wanted.layout, image_size=64, image_tokens=73, seed=0, task="count",
        split="heldout", metric="accuracy", value=0.5, count=10, parameters=1, steps=1, seconds=1.0,
    )  # fmt: skip
    return [base | more]


def test_a_table_is_current_until_what_is_asked_changes(tmp_path, monkeypatch):
    asked = {"count": Scenes("count", 12, "heldout"), "grounding": Scenes("grounding", 12, "heldout")}
    wanted = run(evaluation=asked)
    results.write(tmp_path, "a", rows_of(wanted), [])
    assert evaluate.current(tmp_path, wanted) is not None
    others = [
        dataclasses.replace(wanted, max_new_tokens=17),
        dataclasses.replace(wanted, evaluation={**asked, "count": Scenes("count", 13, "heldout")}),
        dataclasses.replace(wanted, evaluation={**asked, "count": Scenes("count", 12, "combination")}),
        dataclasses.replace(wanted, evaluation={"count": asked["count"]}),
        dataclasses.replace(wanted, layout="query-first", stages=(stage(layouts=("agnostic",)),)),
        dataclasses.replace(wanted, seed=1),
    ]
    for other in others:
        assert evaluate.current(tmp_path, other) is None
    with monkeypatch.context() as patched:
        patched.setattr(results, "VERSION", 99)
        assert evaluate.current(tmp_path, wanted) is None
    with monkeypatch.context() as patched:  # captions could be scored now
        patched.setattr(
            results, "captions_are_scored", lambda: not results.importlib.util.find_spec("pycocoevalcap")
        )
        assert evaluate.current(tmp_path, wanted) is None
    assert evaluate.current(tmp_path, wanted) is not None


@pytest.mark.parametrize("how", ["empty", "text", "cut", "column", "number", "null", "nan", "folder"])
def test_a_damaged_table_is_said_and_made_anew(tmp_path, capsys, how):
    import pandas as pd

    wanted, path = run(), results.table_path(tmp_path, "a")
    results.write(tmp_path, "a", rows_of(wanted), [])
    table = pd.read_parquet(path)
    if how == "folder":
        path.unlink()
        path.mkdir()
    elif how in ("empty", "text", "cut"):
        path.write_bytes({"empty": b"", "text": b"hello" * 99, "cut": path.read_bytes()[:-30]}[how])
    else:
        value = {"column": None, "number": "half", "null": None, "nan": NAN}[how]
        changed = table.drop(columns="value") if how == "column" else table.assign(value=value)
        changed.to_parquet(path)
    with pytest.raises(UserError, match=str(path)):
        results.read(path)
    assert evaluate.current(tmp_path, wanted) is None
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and str(path) in said[0] and "evaluated again" in said[0]


def test_what_a_killed_evaluation_left_is_removed(tmp_path):
    wanted = run()
    left = [
        tmp_path / "results" / name for name in (".a.parquet.0123456789ab.tmp", ".a.jsonl.0123456789ab.tmp")
    ]
    others = tmp_path / "results" / ".b.parquet.0123456789ab.tmp"
    others.parent.mkdir()
    for path in (*left, others):
        path.write_text("half")
    results.write(tmp_path, "a", rows_of(wanted), [])
    assert not any(path.exists() for path in left) and others.exists()


def test_captions_that_are_not_scored_are_said_in_one_line(monkeypatch, capsys):
    from vlm.data.samples import Sample

    monkeypatch.setattr(results, "captions_are_scored", lambda: False)
    results._warn_of_captions.cache_clear()
    sample = Sample("0", "caption", "0", "caption", (), {"captions": ["a star"]})
    assert results.score([sample], ["a star"]) == results.score([sample], ["a star"]) == []
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "pycocoevalcap is missing" in said[0]


# --- commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "stage.json", "model.safetensors", "encoder"])
@pytest.mark.parametrize("command", ["predict", "looking", "demo", "evaluate"])
def test_an_empty_file_of_a_stage_ends_every_command_in_one_line(folder, tmp_path, capsys, command, name):
    from PIL import Image

    from vlm import looking, predict
    from vlm.demo import __main__ as demo

    pytest.importorskip("gradio", reason="gradio is not installed; .ci/run installs it")
    path = folder / name
    if name == "encoder":
        path = folder.parent / parts.ENCODERS / f"{encoder.key()}.safetensors"
    path.write_bytes(b"")
    picture = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(picture)
    status = {
        "predict": lambda: predict.main([str(folder), str(picture), "Is it?"]),
        "looking": lambda: looking.main(
            [str(folder), "--out", str(tmp_path / "a.parquet"), "--examples", "2"]
        ),
        "demo": lambda: demo.main([str(folder), str(folder)]),
        "evaluate": lambda: evaluate.main([str(folder)]),
    }[command]()
    said = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(said) == 1 and str(path) in said[0] and "delete" in said[0]


@pytest.mark.parametrize("command", ["predict", "looking", "demo", "evaluate"])
def test_ctrl_c_in_every_command_is_status_130_without_a_traceback(
    folder, tmp_path, capsys, monkeypatch, command
):
    from vlm import looking, predict
    from vlm.demo import __main__ as demo

    def pressed(*_, **__):
        raise KeyboardInterrupt

    for module in (predict, looking, evaluate, demo):
        name = {"predict": "predict", "looking": "measure", "evaluate": "evaluate_all", "demo": "serve"}
        monkeypatch.setattr(module, name[command], pressed, raising=False)
    argv = {"predict": ["x", "y"], "looking": ["x", "--out", "y"], "demo": ["x", "y"], "evaluate": ["x"]}
    main = {"predict": predict, "looking": looking, "demo": demo, "evaluate": evaluate}[command].main
    assert main(argv[command]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_evaluate_takes_every_run_of_a_folder_prints_names_as_they_are_and_keeps_what_is_current(
    folder, capsys
):
    wanted, out = folders.saved_run(folder)
    asked = {"count": Scenes("count", 3, "heldout")}
    names = ["[red]a", "[link=x]"]
    for name in names:
        folders.remember(dataclasses.replace(wanted, name=name, evaluation=asked), out)
    folders.remember(dataclasses.replace(wanted, evaluation=asked), out)
    assert evaluate.main([str(folder), "--only", "["]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    path = results.table_path(out, "[red]a")
    before = path.stat().st_mtime_ns
    assert evaluate.main([str(folder), "--only", "["]) == 0
    assert path.stat().st_mtime_ns == before
    longer = dataclasses.replace(wanted, name="[red]a", evaluation={"count": Scenes("count", 4, "heldout")})
    folders.remember(longer, out)
    assert evaluate.main([str(folder), "--only", "[red]"]) == 0
    assert set(results.read(path)["count"]) == {4}  # the edited evaluation, not the old table
    assert not results.table_path(out, "two").exists()
