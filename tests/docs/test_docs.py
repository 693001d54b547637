"""docs/tasks.md: its examples are what the tasks draw, its commands train, its snippets run."""

from __future__ import annotations

import json
import re
import runpy

import numpy as np
import pytest
from readme_commands import COMMANDS, ROOT, commands, parsed
from task_solvers import kinds, small

from ssm_retrieval import models
from ssm_retrieval.training import store
from synthetic import tasks

PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
GENERATOR = runpy.run_path(str(ROOT / "docs" / "tasks.py"))
EXAMPLES = [m.group("name", "layout", "queries") for m in GENERATOR["EXAMPLE"].finditer(PAGE)]
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
PRINTED = {"evaluate_blocks": 4 + 1, "extrapolate": 7, "OriginalFiles": 1 + 3 + 2}  # lines, by what is shown


def test_examples_are_what_the_tasks_draw():
    """If not: `python docs/tasks.py`, and look at what changed."""
    assert GENERATOR["rewritten"](PAGE) == PAGE


def test_every_task_and_layout_has_one_example():
    assert [kind for kind in kinds() if (*kind, None) not in EXAMPLES] == []
    assert len(set(EXAMPLES)) == len(EXAMPLES) and set(GENERATOR["OPTIONS"]) == set(tasks.names())


@pytest.mark.parametrize("name", tasks.names())
def test_dense_queries_are_shown_where_a_task_allows_them(name):
    """Or three queries are what the task asks anyway."""
    task = tasks.build(name, **GENERATOR["OPTIONS"][name])
    shown = {layout for example, layout, queries in EXAMPLES if example == name and queries == "3"}
    assert ("suffix" in shown) == (task.max_queries() > task.usual_queries())
    assert task.usual_queries() in (1, 3)


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_has_a_command_that_trains_on_it(name):
    """That they can be planned is tested with those of the other documents."""
    section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    found = commands(section)
    assert name in [parsed(command).task for command in found] and set(found) <= set(COMMANDS)
    assert f"[`{name}`](#{name})" in PAGE


@pytest.mark.parametrize(
    "page, said",
    [
        ("<!-- example position suffix -->\n", "1 of '<!-- example', but 0 pairs"),
        ("<!-- example position suffix -->\n<!-- /example -->\n<!-- /example -->", "2 of '<!-- /example'"),
        ("<!-- example position suffix K=3\n-->\n<!-- /example -->", "0 pairs"),
        ("<!-- example position infix -->\n<!-- /example -->", "unknown layout 'infix'"),
        ("<!-- example ngram suffix K=3 -->\n<!-- /example -->", "queries 3 must be in 1"),
    ],
)
def test_wrong_markers_are_refused(page, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        GENERATOR["rewritten"](page)


def test_examples_fit_the_page():
    assert max(map(len, re.findall(r"^(?:input|label) .*$", PAGE, flags=re.MULTILINE))) <= 110


@pytest.mark.parametrize("shown", PRINTED)
def test_snippets_run(shown, tmp_path, monkeypatch, capsys):
    """With a model in place of a trained one, few examples, and miniature files in the original's format."""
    (snippet,) = (text for text in SNIPPETS if shown in text)
    rng = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = dict(target_sequences=[rng.permutation(600)[:576].tolist() for _ in range(3)])
        rows["target_tokens"] = rng.integers(0, 576, 3).tolist()
        (tmp_path / f"data/{split}_synthetic_vg_seqlen576.json").write_text(json.dumps(rows))
    files = shown == "OriginalFiles"
    task = tasks.build("position", seq_len=576, num_symbols=600) if files else small("ngram")
    model = models.build("mamba-tiny", vocab_size=task.vocab_size, n_layer=1)
    monkeypatch.setattr(store, "load_model", lambda folder: model)
    exec(snippet.replace("examples=1024", "examples=4"), {})
    assert len(capsys.readouterr().out.splitlines()) == PRINTED[shown] and len(SNIPPETS) == len(PRINTED)
