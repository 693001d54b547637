"""A data set of a user's: the example of docs/data.md, run as it stands there, from a folder of theirs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro

from ssm_retrieval import registry as modules
from ssm_retrieval.errors import UserError
from vlm import evaluate, folders, results
from vlm.config import Run, from_dict, read_file
from vlm.data import registry
from vlm.data.sources import FileSource
from vlm.data.turns import Rules

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'```python title="(\w+\.py)"\n(.*?)```', PAGE, flags=re.DOTALL))
COMMANDS = re.findall(r"^python -m (vlm\.\w+) (my_config\.py .*)$", PAGE, flags=re.MULTILINE)
COLOURS = {"red": (200, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 200)}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder with the files of the page and twelve pictures of one colour, outside this project."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed; .ci/run installs it")
    folder = tmp_path_factory.mktemp("theirs")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    pictures = folder / "pictures"
    (pictures / "images").mkdir(parents=True)
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        rows = []
        for number in numbers:
            name, answer = f"{number}.png", list(COLOURS)[number % 3]
            image.fromarray(np.full((32, 32, 3), COLOURS[answer], np.uint8)).save(pictures / "images" / name)
            rows += [{"image": name, "question": "What colour is the square?", "answer": answer}]
            rows += [{"image": name, "question": "What name is the shape?", "answer": "square"}]
        (pictures / f"{split}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def theirs(outside, monkeypatch):
    """The working directory is `outside`; what is registered there is forgotten afterwards."""
    monkeypatch.chdir(outside)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(registry, "DATASETS", dict(registry.DATASETS))
    yield outside
    sys.modules.pop("my_data", None)


def test_the_declaration_is_all_that_samples_and_scores_need(theirs):
    modules.use(["my_data"])
    train = FileSource("my-data", "pictures", "pictures/images", "train")
    assert len(train) == 8  # two questions about an image are turns of one sample
    told = "".join(chunk.text for chunk in train[1].chunks if chunk.supervised)
    assert "Green." in told and "Square." in told
    assert train.picture("1.png")[0, 0].tolist() == list(COLOURS["green"])
    test = FileSource("my-data", "pictures", "pictures/images", "test", rules=Rules(training=False))
    samples = [test[i] for i in range(len(test))]
    assert len(samples) == 8 and not any(chunk.supervised for s in samples for chunk in s.chunks)
    said = ["Blue.", "Square.", "red", "square", "green", "circle", "blue", "star"]
    (row,) = results.score(samples, said)
    assert (row["metric"], row["value"], row["count"]) == ("accuracy", 6 / 8, 8)
    assert results.declared(samples[0]).max_new_tokens == 8


def test_a_config_file_keeps_modules_but_its_stages_do_not_depend_on_them(theirs):
    (run,) = read_file("my_config.py", ["my_data"])
    assert run.imports == ("my_data",)
    (same,) = read_file("my_config.py")  # imported in this process already
    assert same.imports == () and same.stage_ids() == run.stage_ids()
    assert read_file("my_config.py", ["my_data", "my_data"]) == [run]


def test_a_saved_run_imports_its_modules_before_it_is_parsed(theirs):
    saved = json.loads(json.dumps(read_file("my_config.py", ["my_data"])[0].to_dict()))
    del registry.DATASETS["my-data"], sys.modules["my_data"]
    assert from_dict(saved).stages[0].data["mine"].dataset == "my-data"
    del registry.DATASETS["my-data"]
    with pytest.raises(UserError, match="my-data"):
        from_dict(saved | {"imports": []})


def test_a_run_folder_imports_its_modules_or_names_the_missing_one(theirs, tmp_path, capsys, monkeypatch):
    (run,) = read_file("my_config.py", ["my_data"])
    folder = tmp_path / run.stage_ids()[-1]
    folder.mkdir()
    (folder / folders.CONFIG).write_text(json.dumps({"version": 1, "plans": [run.to_dict()]}))
    (folder / folders.RESULT).write_text(json.dumps({"steps": 1, "seconds": 1.0}))
    assert folders.saved_runs(folder) == [run]
    without = run.to_dict() | {"imports": ()}
    (folder / folders.CONFIG).write_text(json.dumps({"version": 1, "plans": [without]}))
    del registry.DATASETS["my-data"], sys.modules["my_data"]
    assert evaluate.main([str(folder), "--import", "my_data", "--only", "x"]) == 2
    assert "--only x: no run has that in its name" in capsys.readouterr().err  # so it was parsed
    (folder / folders.CONFIG).write_text(json.dumps({"version": 1, "plans": [run.to_dict()]}))
    del registry.DATASETS["my-data"], sys.modules["my_data"]
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{folder} was made with --import my_data, but there is no module my_data" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["my_config.py"], "line 5: Files: data set 'my-data' is unknown; the names are ai2d"),
        (["my_config.py"], "a data set of your own needs --import and the module that registers it"),
        (["my_config.py", "--import", "my_dat"], "--import my_dat: there is no module my_dat"),
        (["my_config.py", "--import", "my_data.py"], "for my_module.py give my_module"),
    ],
)
def test_bad_imports_are_one_line_and_status_2(theirs, capsys, arguments, said):
    assert evaluate.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_processes_that_share_a_training_are_told_the_modules(monkeypatch):
    pytest.importorskip("accelerate", reason="accelerate is not installed; .ci/run installs it")
    from vlm import train

    started = []

    class Process:
        def __init__(self, command, **_):
            started.append(command)

        def terminate(self):
            pass

        def wait(self):
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    with train.helpers(train.Options(Path("my_config.py"), imports=("my_data", "my_mixer")), 2, 1) as wait:
        wait()
    assert len(started) == 2
    for command in started:
        options = tyro.cli(train.Options, args=command[3:])
        assert options.imports == ("my_data", "my_mixer") and options.config == Path("my_config.py")


@pytest.mark.parametrize("imports", ["my_data", [1], {"my_data": 1}])
def test_a_damaged_list_of_modules_is_one_line(theirs, imports):
    saved = json.loads(json.dumps(read_file("my_config.py", ["my_data"])[0].to_dict()))
    with pytest.raises(UserError, match="imports"):
        from_dict(saved | {"imports": imports})
    assert isinstance(from_dict(saved), Run)


def shell(folder: Path, *words: str) -> tuple[int, str]:
    """Exit status and output of a command that finds this project, but not the folder of its sources."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_it_is_trained_evaluated_and_asked_from_outside(outside, tmp_path):
    """By the commands of the page; the last ones are not told the module."""
    for name in ("tokenizers", "sklearn", "accelerate"):
        pytest.importorskip(name, reason=f"{name} is not installed; .ci/run installs it")
    import vlm_runs

    vlm_runs.save_encoder(outside / "runs" / "vlm")
    assert [command for command, _ in COMMANDS] == ["vlm.train", "vlm.evaluate"]
    for command, words in COMMANDS:
        status, said = shell(outside, command, *words.split())
        assert status == 0, said
    assert "mine (test)" in said
    (folder,) = (outside / "runs" / "vlm").glob("mamba-*")
    assert json.loads((folder / folders.CONFIG).read_text())["plans"][0]["imports"] == ["my_data"]
    (table,) = (outside / "runs" / "vlm" / "results").glob("*.parquet")
    rows = results.read(table)
    assert rows["count"].tolist() == [8] and rows["metric"].tolist() == ["accuracy"]
    status, said = shell(outside, "vlm.evaluate", str(folder), "--again")
    assert status == 0 and "mine (test)" in said, said
    picture = str(outside / "pictures" / "images" / "1.png")
    assert shell(outside, "vlm.predict", str(folder), picture, "What colour is the square?")[0] == 0
    status, said = shell(tmp_path, "vlm.evaluate", str(folder))
    assert status == 2 and said.count("\n") == 1 and "was made with --import my_data" in said
