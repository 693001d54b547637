"""Which run a folder is, what its name depends on, and when a table is of it."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import partial

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

import vlm_runs
from vlm_files import CASES, write
from vlm_runs import planned as run
from vlm_runs import stage

from ssm_retrieval.errors import UserError
from vlm import evaluate, folders, metrics, results, stages
from vlm.config import Files, Run, Scenes, from_dict
from vlm.data import config as data_config
from vlm.data import sources
from vlm.data.registry import DATASETS
from vlm.metrics import catalogue
from vlm.scenes import encoder
from vlm.scenes.declared import SCENES

NAN, INF = float("nan"), float("inf")


def test_the_first_stage_alone_is_no_run(vlm_folder):
    wanted, out = folders.saved_run(vlm_folder)
    first = out / wanted.stage_ids()[0]
    with pytest.raises(
        UserError, match=f"is stage 1 of 2 of run 'two'; give the last one, .*{vlm_folder.name}"
    ):
        folders.saved_run(first)


def test_a_renamed_folder_never_answers_with_the_weights_of_another(vlm_folder):
    other = vlm_folder.rename(vlm_folder.with_name("best"))
    with pytest.raises(UserError, match="give it back its name"):
        folders.saved_run(other)


def test_a_link_or_a_point_is_the_folder_that_it_means(vlm_folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(vlm_folder)
    monkeypatch.chdir(vlm_folder)
    for path in (tmp_path / "link", folders.Path(".")):
        assert folders.saved_run(path)[1] == vlm_folder.parent.resolve()


def test_runs_that_share_a_folder_are_all_remembered_the_latest_last(vlm_folder):
    wanted, out = folders.saved_run(vlm_folder)
    other = dataclasses.replace(wanted, name="b", max_new_tokens=5)
    folders.remember(other, out)
    assert [found.name for found in folders.saved_runs(vlm_folder)] == ["two", "b"]
    longer = dataclasses.replace(wanted, evaluation={"count": Scenes("count", 3, "heldout")})
    folders.remember(longer, out)  # its evaluation was edited
    assert folders.saved_runs(vlm_folder) == [other, longer]
    before = (vlm_folder / folders.CONFIG).stat().st_mtime_ns
    folders.remember(longer, out)
    assert (vlm_folder / folders.CONFIG).stat().st_mtime_ns == before  # nothing changes


def test_runs_that_are_asked_in_another_layout_or_size_have_another_folder():
    mixed = (stage(), stage(layouts=("agnostic", "query-first")))
    a, b = (run(name=name, stages=mixed, layout=name) for name in ("agnostic", "query-first"))
    assert a.stage_ids()[0] != b.stage_ids()[0]  # the first one is trained in the run's layout
    named = (stage(layouts=("agnostic", "query-first")),) * 2
    a, b = (run(name=name, stages=named, layout=name) for name in ("agnostic", "query-first"))
    assert a.stage_ids()[0] == b.stage_ids()[0] and a.stage_ids()[1] != b.stage_ids()[1]
    sized = (stage(image_size=64),) * 2
    a, b = (run(name=str(size), stages=sized, image_size=size) for size in (64, 96))
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
                patched.setattr(encoder, "key", partial(encoder.key, images=99))
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


def test_stage_ids_and_tables_know_the_version_of_samples_of_files(monkeypatch):
    from vlm.data import sources

    asked = {"c": Files("coco", "test", "a", "b")}
    trained = run(stages=(stage(data={"c": Files("coco", "train", "a", "b")}),))
    names, made = [trained.stage_ids(), run().stage_ids()], results.fingerprint(run(evaluation=asked))
    with monkeypatch.context() as patched:  # as a data set of one's own may be declared anew
        patched.setitem(DATASETS, "coco", dataclasses.replace(DATASETS["coco"], turns=3))
        assert trained.stage_ids() != names[0]
    monkeypatch.setattr(sources, "VERSION", 99)
    assert trained.stage_ids() != names[0] and run().stage_ids() == names[1]
    assert results.fingerprint(run(evaluation=asked)) != made


def test_a_table_is_asked_anew_when_official_files_are_replaced(tmp_path):
    """As an index on disk is made anew: by size and time, of every file but those of pictures."""
    write(tmp_path, CASES["coco"][1])
    asked = Files("coco", "val", str(tmp_path), str(tmp_path / "images"), index=str(tmp_path / "index"))
    wanted, file = run(evaluation={"c": asked}), tmp_path / "dataset_coco.json"

    def made(content, time):
        file.write_text(content)
        os.utime(file, ns=(time, time))
        return results.fingerprint(wanted)

    content = file.read_text()
    before = made(content, 1)
    (tmp_path / "index").mkdir()
    (tmp_path / "images").mkdir()
    assert made(content, 1) == before
    assert len({before, made(content + " ", 1), made(content, 2)}) == 3


@pytest.mark.parametrize("more", [
    {"published": True}, {"every_slot": False}, {"filtered": True}, {"first": 3},
    {"options": {"expressions": "last"}}, {"regions": "dense captioning"},
])  # fmt: skip
def test_stage_ids_and_tables_know_how_files_are_read(more):
    plain, other = (Files("refcoco", "train", "a", "b", **given) for given in ({}, more))
    ids = {tuple(run(stages=(stage(data={"r": data}),)).stage_ids()) for data in (plain, other)}
    made = {results.fingerprint(run(evaluation={"r": data})) for data in (plain, other)}
    assert len(ids) == len(made) == 2


def test_features_of_scenes_know_their_version(monkeypatch):
    from vlm.scenes import source

    before = source.SceneSource("count", 3).fingerprint
    monkeypatch.setattr(source, "VERSION", 99)
    assert source.SceneSource("count", 3).fingerprint != before


def test_betas_are_part_of_a_stages_name_and_reach_the_optimizer(vlm_folder, monkeypatch):
    from vlm.configs import paper

    assert run(stages=(stage(betas=(0.9, 0.999)),)).stage_ids() != run().stage_ids()
    assert {one.betas for made in paper.get_config() for one in made.stages} == {(0.9, 0.999)}
    assert stage().betas == (0.9, 0.95)
    train = pytest.importorskip("vlm.train", reason="accelerate is not installed; .ci/run installs it")
    wanted = dataclasses.replace(vlm_runs.run("mamba-tiny"), stages=(stage(betas=(0.5, 0.75), steps=1),))
    seen = []

    def watched(loss_of, optimizer, batch, *_):
        seen.append(optimizer.param_groups[0]["betas"])
        return [1.0] * len(batch.samples)

    monkeypatch.setattr(stages, "update", watched)
    stages.train_stage(wanted, 0, vlm_folder.parent, train.accelerate([wanted]))
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
        dataclasses.replace(wanted, image_size=96, stages=(stage(image_size=64),)),
        dataclasses.replace(wanted, precision="bf16"),
        dataclasses.replace(wanted, seed=1),
    ]
    for other in others:
        assert evaluate.current(tmp_path, other) is None
    with monkeypatch.context() as patched:
        patched.setattr(results, "VERSION", 99)
        assert evaluate.current(tmp_path, wanted) is None
    with monkeypatch.context() as patched:  # captions could be scored now, or with other tokens
        other = {"ptb": "regex", "regex": None, None: "regex"}[catalogue.caption_tokenizer()]
        patched.setattr(catalogue, "caption_tokenizer", lambda: other)
        assert evaluate.current(tmp_path, wanted) is None
    with monkeypatch.context() as patched:  # other wordings of official files
        patched.setattr(sources, "VERSION", 99)
        assert evaluate.current(tmp_path, wanted) is None
    with monkeypatch.context() as patched:  # shorter answers than were declared
        patched.setitem(SCENES, "count", dataclasses.replace(SCENES["count"], max_new_tokens=2))
        assert evaluate.current(tmp_path, wanted) is None
    for more in (dict(metric=None), dict(chance=0.125)):
        with monkeypatch.context() as patched:
            patched.setitem(SCENES, "count", dataclasses.replace(SCENES["count"], **more))
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

    monkeypatch.setattr(catalogue, "caption_tokenizer", lambda: None)
    catalogue._warn_of_captions.cache_clear()
    sample = Sample("0", "caption", "0", "caption", (), {"captions": ["a star"]})
    for _ in range(2):
        scored = [(row["metric"], row["value"]) for row in results.score([sample], ["a star"])]
        assert scored == [("object_precision", 1.0), ("object_recall", 1.0)]
    assert metrics.CAPTIONS.rows([sample], ["a star"]) == []
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "pycocoevalcap is missing" in said[0]


def test_evaluate_takes_every_run_of_a_folder_prints_names_as_they_are_and_keeps_what_is_current(
    vlm_folder, capsys
):
    wanted, out = folders.saved_run(vlm_folder)
    asked = {"count": Scenes("count", 3, "heldout")}
    names = ["[red]a", "[link=x]"]
    for name in names:
        folders.remember(dataclasses.replace(wanted, name=name, evaluation=asked), out)
    folders.remember(dataclasses.replace(wanted, evaluation=asked), out)
    assert evaluate.main([str(vlm_folder), "--only", "["]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    path = results.table_path(out, "[red]a")
    before = path.stat().st_mtime_ns
    assert evaluate.main([str(vlm_folder), "--only", "["]) == 0
    assert path.stat().st_mtime_ns == before
    longer = dataclasses.replace(wanted, name="[red]a", evaluation={"count": Scenes("count", 4, "heldout")})
    folders.remember(longer, out)
    assert evaluate.main([str(vlm_folder), "--only", "[red]"]) == 0
    assert set(results.read(path)["count"]) == {4}  # the edited evaluation, not the old table
    assert not results.table_path(out, "two").exists()


def test_guesses_stand_beside_the_scores_in_table_and_summary(vlm_folder, monkeypatch):
    """Of captions two scores are printed; a guess has a number in the rows that it can be scored by."""
    import pandas as pd

    monkeypatch.setattr(data_config, "LEARNED", 40)
    wanted, out = folders.saved_run(vlm_folder)
    asked = {name: Scenes(name, 4, "heldout") for name in ("caption", "grounding", "count", "reading-word")}
    rows, _ = evaluate.evaluate(dataclasses.replace(wanted, evaluation=asked), out)
    found = {(row["task"], row["metric"]): row for row in rows}
    for (task, metric), row in found.items():
        assert row["question_only"] is not None, (task, metric)
        assert (row["image_only"] is not None) == (
            (task, metric) in {("grounding", "iou@0.5"), ("count", "accuracy")}
        )
        assert row.get("tokenizer") == (
            None if metric[:3] not in ("cid", "ble", "rou") else catalogue.caption_tokenizer()
        )
    assert found["count", "accuracy"]["image_only"] == 0.25
    assert found["grounding", "iou@0.5"]["image_only"] == pytest.approx(1 / 6)
    table = pd.DataFrame(rows)
    printed = evaluate.summary(pd.concat([table, table.assign(run="other")]))
    columns = {column.header: list(column.cells) for column in printed.columns}
    assert list(columns) == ["", "chance", "question only", "image only", wanted.name, "other"]
    captions = ["caption (heldout) objects"]
    captions += [] if catalogue.caption_tokenizer() is None else ["caption (heldout) CIDEr"]
    assert columns[""] == [*captions, "grounding (heldout)", "count (heldout)", "reading-word (heldout)"]
    assert columns["image only"] == [*(["-"] * len(captions)), "16.7", "25.0", "-"]
    assert "-" not in columns["question only"]
