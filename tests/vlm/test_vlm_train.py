"""Training of VLMs by stages: resuming, sharing, freezing, averaging; then evaluation and prediction."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from vlm_two_stages import ASKED, FIRST, IMPORT, SECOND, run

pytest.importorskip("accelerate", reason="accelerate is not installed; .ci/run installs it")
pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

from ssm_retrieval.training import store
from vlm import answering, components, evaluate, folders, predict, results, stages, train
from vlm.config import Run, Stage, from_dict, read_file
from vlm.scenes import encoder as scenes


@pytest.fixture
def out(tmp_path):
    """A folder that has a vision encoder, untrained, so that none is trained."""
    import vlm_runs  # not above: processes that read CONFIG below import this file from elsewhere

    vlm_runs.save_encoder(tmp_path)
    return tmp_path


def trained(wanted: Run, out, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    steps = []
    accelerator = train.accelerate([wanted])
    for number in range(len(wanted.stages)):
        stages.train_stage(wanted, number, out, accelerator, steps.append, lambda: len(steps) == stop_at)
    return store.load_tensors(out / wanted.stage_ids()[-1] / stages.WEIGHTS)[0]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", ["transformer", "mamba"])
def test_an_interrupted_stage_ends_with_the_numbers_of_an_uninterrupted_one(out, family):
    chain = (dataclasses.replace(FIRST, group=2), SECOND)
    whole = trained(run(family, stages=chain), out)
    names = run(family, stages=chain).stage_ids()
    rows = [store.read_rows(out / name / stages.METRICS) for name in names]
    for name in names:
        for path in (out / name).iterdir():
            path.unlink()
    with pytest.raises(stages.Interrupted, match="step 3 of stage 1"):
        trained(run(family, stages=chain), out, stop_at=3)
    assert (out / names[0] / stages.CHECKPOINT).exists() and not (out / names[0] / stages.RESULT).exists()
    assert equal(trained(run(family, stages=chain), out), whole)
    again = [store.read_rows(out / name / stages.METRICS) for name in names]
    for column in ("step", "steps", "loss", "tokens"):
        assert [[r[column] for r in part] for part in again] == [[r[column] for r in part] for part in rows]
    assert not (out / names[0] / stages.CHECKPOINT).exists()


def test_runs_share_the_stages_that_they_have_in_common_and_no_others():
    a, b = run(layout="agnostic", name="a"), run(layout="query-first", name="b")
    assert a.stage_ids()[0] == b.stage_ids()[0] and a.stage_ids()[1] != b.stage_ids()[1]
    others = [
        run(seed=1), run(image_size=64), run(precision="bf16"), run("mamba"),
        run(model_overrides={"n_layer": 2}),
        run(stages=(dataclasses.replace(FIRST, lr=1e-3), SECOND)),
        run(stages=(dataclasses.replace(FIRST, weights={"locate": 2, "vqa": 1}), SECOND)),
    ]  # fmt: skip
    assert len({a.stage_ids()[0], *(other.stage_ids()[0] for other in others)}) == 1 + len(others)
    at64 = (
        dataclasses.replace(FIRST, image_size=64),
        SECOND,
    )  # the first stage is the same at any final size
    small, large = run(stages=at64), run(stages=at64, image_size=96)
    assert small.stage_ids()[0] == large.stage_ids()[0] and small.stage_ids()[1] != large.stage_ids()[1]
    workers = run(stages=(dataclasses.replace(FIRST, workers=2), SECOND))
    assert workers.stage_ids() == run().stage_ids()
    # the order of sources decides which example comes when, and files sort the keys of what they hold
    turned = dataclasses.replace(FIRST, data=dict(reversed(FIRST.data.items())))
    assert run(stages=(turned, SECOND)).stage_ids()[0] != a.stage_ids()[0]
    for wanted in (a, run(stages=(turned, SECOND))):
        assert (
            from_dict(json.loads(json.dumps(wanted.to_dict(), sort_keys=True))).stage_ids()
            == wanted.stage_ids()
        )


def test_both_families_see_the_same_examples_in_the_same_order(out, monkeypatch):
    seen: dict[str, list] = {}

    def watched(loss_of, optimizer, batch, stage, accelerator):
        here.append(
            (tuple(s.id for s in batch.samples), batch.input_ids.tolist(), batch.features.sum().item())
        )
        return [0.0] * len(batch.samples)

    monkeypatch.setattr(stages, "update", watched)
    for family in ("transformer", "mamba"):
        here = seen[family] = []
        trained(run(family), out)
    assert seen["transformer"] == seen["mamba"] and len(seen["mamba"]) == FIRST.steps + SECOND.steps


def test_a_connector_stage_changes_the_connector_alone(out):
    wanted = run(stages=(dataclasses.replace(FIRST, train="connector"),))
    after = trained(wanted, out)
    before = dict(components.model(wanted, scenes.WIDTH).named_parameters())
    changed = {name.partition(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"vision_embed_tokens"}


def test_parts_of_a_batch_add_up_to_the_batch(out):
    """Sum of parts' means by size = mean over examples: one step of plain gradient descent is the same."""
    whole = run(stages=(dataclasses.replace(SECOND, steps=1, grad_clip=0.0),))
    halves = run(stages=(dataclasses.replace(SECOND, steps=1, grad_clip=0.0, accumulate=2),))
    accelerator = train.accelerate([whole])
    after = []
    for wanted in (whole, halves):
        model = components.model(wanted, scenes.WIDTH)
        optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=1.0))
        torch.manual_seed(3)
        batch = stages.VLMBatch(
            torch.cat([torch.full((4, 16), -200), torch.randint(5, 90, (4, 6))], 1),
            torch.cat([torch.full((4, 17), -100), torch.randint(5, 90, (4, 5))], 1),
            torch.randn(4, 16, scenes.WIDTH),
            (None,) * 4,
            ("locate",) * 4,
        )
        batch.labels[0, 18:] = -100  # answers of different lengths weigh the same
        stages.update(stages.Loss(model), optimizer, batch, wanted.stages[0], accelerator)
        after.append(dict(model.named_parameters()))
    assert all(torch.allclose(after[0][n], after[1][n], atol=1e-6) for n in after[0])
    fresh = dict(components.model(whole, scenes.WIDTH).named_parameters())
    assert not all(torch.equal(fresh[n], after[0][n]) for n in fresh)


def test_the_learning_rate_rises_then_falls_as_a_cosine():
    stage = dataclasses.replace(SECOND, steps=100, warmup=0.1)
    rates = [stages.rate(k, stage) for k in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 == max(rates)
    assert rates[55] == pytest.approx(0.5) and rates[99] == pytest.approx(0.5 * (1 + np.cos(np.pi * 89 / 90)))
    kept = dataclasses.replace(stage, until={name: 0.5 for name in stage.data})
    assert [stages.rate(k, kept) for k in range(100)] == [*rates[:10], *[1.0] * 90]


def test_a_stage_ends_when_all_its_losses_are_low_enough(out, monkeypatch):
    """Running means by hand: a source's first batch counts whole, later ones by a twentieth."""
    told = iter([4.0, 2.0, 1.0, 0.5, 0.4, 0.3])
    monkeypatch.setattr(stages, "update", lambda _, __, batch, *___: [next(told)] * len(batch.samples))
    goal = 0.95 * (0.95 * 4.0 + 0.05 * 2.0) + 0.05 * 1.0
    for most, until, steps in ((6, {"locate": goal + 1e-9}, 3), (2, {"locate": goal}, 2), (6, {}, 6)):
        told = iter([4.0, 2.0, 1.0, 0.5, 0.4, 0.3])
        stage = Stage({"locate": FIRST.data["locate"]}, steps=most, batch_size=4, lr=1e-3, until=until)
        wanted = run(name=f"until{most}{len(until)}", stages=(stage,))
        stages.train_stage(wanted, 0, out, train.accelerate([wanted]))
        folder = out / wanted.stage_ids()[0]
        assert folders.finished(folder).steps == steps
        assert folders.metrics(folder)[-1]["step"] == steps
    assert stages.running({"a": 1.0}, ["b", "a", "b"], [4.0, 3.0, 2.0]) == {"a": 0.95 + 0.05 * 3, "b": 3.0}
    with pytest.raises(ValueError, match=r"until=\{'vqa': 1.0\} must name sources"):
        Stage({"locate": FIRST.data["locate"]}, steps=2, batch_size=4, lr=1e-3, until={"vqa": 1.0})
    with pytest.raises(ValueError, match=r"must name sources of data \(locate\) and stand beside steps"):
        Stage({"locate": FIRST.data["locate"]}, epochs=1, batch_size=4, lr=1e-3, until={"locate": 1.0})


CONFIG = (
    IMPORT
    + """
def get_config():
    return [run("transformer"), run("mamba", layout="instruction-first")]
"""
)


def test_train_evaluate_predict_from_the_command_line(out, capsys, tmp_path):
    config = tmp_path / "two.py"
    config.write_text(CONFIG)
    assert train.main([str(config), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    folders = [
        line.split(": ")[1] for line in said.splitlines() if line.startswith(("transformer: ", "mamba: "))
    ]
    assert len(folders) == 2
    assert evaluate.main([str(config), "--out", str(out)]) == 0
    assert "grounding (heldout)" in capsys.readouterr().out
    table = pd.concat([pd.read_parquet(path) for path in sorted((out / "results").glob("*.parquet"))])
    assert list(table.columns) == list(results.COLUMNS)
    assert set(table["family"]) == {"transformer", "mamba"}
    assert set(table[table["task"] == "grounding"]["metric"]) == {"iou@0.5", "mean_iou"}
    assert (table[table["task"] == "count"]["chance"] == 0.25).all()
    for family in ("transformer", "mamba"):
        rows = store.read_rows(results.answers_path(out, family))
        mine = table[(table["family"] == family) & (table["metric"] == "accuracy")]
        right = [row["right"] for row in rows if row["task"] == "count"]
        assert mine["value"].item() == np.mean(right)
        assert {row["task"] for row in rows} == set(ASKED)
    # one folder again: evaluated before, so nothing is asked
    assert evaluate.main([folders[0]]) == 0 and "count" in capsys.readouterr().out

    picture = tmp_path / "scene.png"
    from PIL import Image

    Image.fromarray(ASKED["count"].build(answers=False).picture("0")).save(picture)
    assert predict.main([folders[0], str(picture), "How many red shapes are there?"]) == 0
    (answer,) = capsys.readouterr().out.splitlines()[:1]
    answerer = answering.Answerer.of(run(), out)
    assert answer == predict.ask(answerer, predict.read_picture(picture), "How many red shapes are there?")


def test_a_stopped_training_stops_the_processes_that_share_it(out, monkeypatch, tmp_path):
    """Else a SIGTERM to the first one alone would wait for the whole of their training."""
    config = tmp_path / "two.py"
    config.write_text(CONFIG)
    options = train.Options(config, out)
    begun = []
    monkeypatch.setattr(train.subprocess, "Popen", lambda *_, **__: begun.append(Sleeper()) or begun[-1])
    monkeypatch.setattr(train, "train_here", lambda *_: train.INTERRUPTED)
    assert train.train_all(dataclasses.replace(options, jobs=3)) == train.INTERRUPTED
    assert [process.calls for process in begun] == [["terminate", "wait"]] * 2
    monkeypatch.setattr(train, "train_here", lambda *_: 0)
    assert train.train_all(dataclasses.replace(options, jobs=2)) == 0
    assert begun[-1].calls[0] == "wait"


class Sleeper:
    """A process that ends well once it is waited for."""

    def __init__(self):
        self.calls = []

    def wait(self):
        self.calls.append("wait")
        return 0

    def terminate(self):
        self.calls.append("terminate")


def test_a_box_in_the_answer_is_drawn_around_the_object(monkeypatch, out, capsys, tmp_path):
    wanted = run(stages=(SECOND,))
    trained(wanted, out)
    said = components.text("scenes").encode("[0.25,0.50,0.75,1.00].")
    monkeypatch.setattr(answering, "say", lambda *_: [said])
    picture, drawn = tmp_path / "grey.png", tmp_path / "drawn.png"
    from PIL import Image

    Image.new("RGB", (100, 100), (200, 200, 200)).save(picture)
    folder = out / wanted.stage_ids()[-1]
    assert predict.main([str(folder), str(picture), "Where is the star?", "--out", str(drawn)]) == 0
    pixels = np.asarray(Image.open(drawn))
    rows, columns = np.nonzero((pixels == predict.SAID).all(-1))
    assert (columns.min(), columns.max()) == (73, 226) and rows.min() == 148  # times 3, two pixels around it


@pytest.mark.parametrize(
    ("question", "task", "text"),
    [
        ("Where is the red star?", "auto", "Locate the region that is described by:\nThe red star.\n"),
        ("the red star", "grounding", "Locate the region that is described by:\nThe red star.\n"),
        ("Is it?", "auto", "Answer the question using a single word or phrase.\nQuestion: Is it?\nAnswer: "),
        ("", "auto", "Provide a one-sentence caption for the provided image.\n"),
    ],
)
def test_questions_are_worded_as_in_training(question, task, text):
    assert "".join(c.text for c in predict.wording(question, task, 10, 10)) == text


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["nothing.py"], "nothing.py is no Python file with get_config"),
        (["{empty}"], "must have get_config"),
        (["{config}", "--only", "absent"], "--only absent: no run of"),
        (["{uneven}"], "batch_size=4 .* cannot be cut into 1 processes x 3 parts; use a multiple of 3"),
    ],
)
def test_bad_input_of_training_is_one_line(argv, line, out, tmp_path, capsys):
    files = {
        "empty": "x = 1\n",
        "config": CONFIG,
        "uneven": CONFIG + "\nimport dataclasses\n"
        "def get_config():\n    return [run(stages=(dataclasses.replace(SECOND, accumulate=3),))]\n",
    }
    for name, content in files.items():
        (tmp_path / f"{name}.py").write_text(content)
    paths = {name: str(tmp_path / f"{name}.py") for name in files}
    assert train.main([part.format(**paths) for part in argv] + ["--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    import re

    assert re.search(line, said[0])


@pytest.mark.parametrize("command", [evaluate, predict])
def test_bad_input_of_the_others_is_one_line(command, tmp_path, capsys):
    more = [str(tmp_path / "absent.png"), "What?"] if command is predict else []
    assert command.main([str(tmp_path), *more]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and ("holds no trained VLM" in said[0] or "does not exist; give a PNG" in said[0])


def test_evaluate_refuses_what_it_cannot_use(tmp_path, capsys):
    for argv, line in (
        ([str(tmp_path), "--threads", "-1"], "--threads -1 must lie in"),
        ([], "RUN is missing"),
    ):
        assert evaluate.main(argv) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and line in said[0]


@pytest.mark.parametrize("wrong", [{"layout": "sideways"}, {"stages": ()}, {"image_size": 4}])
def test_impossible_runs_are_refused(wrong):
    with pytest.raises(ValueError, match=r"sideways|no stages|image_size=4"):
        run(**wrong)


def test_epochs_are_steps_through_all_the_data(out):
    """40 + 40 examples in batches of 4: 1.5 epochs are 30 steps, and every example comes once or twice."""
    stage = dataclasses.replace(FIRST, weights=None, steps=0, epochs=1.5)
    wanted = run(stages=(stage,))
    trained(wanted, out)
    assert store.read_json(out / wanted.stage_ids()[0] / stages.RESULT)["steps"] == 30
    with pytest.raises(ValueError, match=r"steps=8 and epochs=1.0: give one of them"):
        run(stages=(dataclasses.replace(FIRST, epochs=1.0),))


def test_two_runs_of_one_name_are_refused(tmp_path):
    (tmp_path / "same.py").write_text(CONFIG.replace('"mamba"', '"transformer"'))
    with pytest.raises(ValueError, match="names two runs 'transformer'"):
        read_file(tmp_path / "same.py")
