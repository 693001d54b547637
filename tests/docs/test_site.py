"""The documentation site: nothing is missing from it, links lead somewhere, it needs no network."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
sys.path.insert(0, str(ROOT / "docs" / "website"))
api, gallery, offline, pages = (
    importlib.import_module(name) for name in ("api", "gallery", "offline", "pages")
)


def entries(nav: object) -> list[str]:
    """Pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in entries(part)]  # type: ignore[attr-defined]


# --- nothing is missing ------------------------------------------------------------------------------------


def test_navigation_has_every_page_once():
    found = [path for pattern in ("*.md", "docs/*.md", "studies/**/*.md") for path in ROOT.glob(pattern)]
    wanted = [pages.uri(path.relative_to(ROOT).as_posix()) for path in found]
    assert {"index.md", "tasks.md", "studies/retrieval_cpu.md"} < set(wanted)
    assert sorted(entries(CONFIG["nav"])) == sorted([*wanted, gallery.PAGE])


def test_api_has_every_public_module():
    """Against what Python itself finds in the packages."""
    found = set()
    for package in api.PACKAGES:
        names = pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
        found |= {package, *(name for _, name, _ in names if "._" not in name)}
    assert {"ssm_retrieval.ops.selective_scan", "synthetic.tasks.position", "vlm.data.registry"} < found
    made = api.pages(ROOT)
    shown = {name: where for where, text in made.items() for name in re.findall(r"^::: (.+)$", text, re.M)}
    assert set(shown) == found
    listed = entries(api.navigation(ROOT))
    assert sorted(listed) == sorted(made) and len(set(listed)) == len(listed)
    for name in found:
        assert f"`{name}`]({shown[name].removeprefix('api/')})" in made["api/index.md"]


def test_a_new_module_gets_a_page_and_a_private_one_none(tmp_path):
    for path, text in {
        "ssm_retrieval/__init__.py": '"""All."""',
        "ssm_retrieval/models/__init__.py": '"""Nets."""',
        "ssm_retrieval/models/new.py": '"""A new\nthing (Black et al. 2022). More."""',
        "ssm_retrieval/models/_own.py": "",
        "ssm_retrieval/models/_ops/fast.py": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    made = api.pages(tmp_path)
    own = "ssm_retrieval.models.new"
    index = "api/ssm_retrieval/models/index.md"
    assert [where for where in made if where.startswith("api/ssm_retrieval/models")] == [
        index,
        "api/ssm_retrieval/models/new.md",
    ]
    row = f"| [`{own}`](ssm_retrieval/models/new.md) | A new thing (Black et al. 2022) |"
    assert row in made["api/index.md"]
    assert f"| [`{own}`](new.md) |" in made[index]
    (tmp_path / "ssm_retrieval/models/new.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"ssm_retrieval/models/new\.py has no docstring"):
        api.pages(tmp_path)


def test_ci_builds_the_site_strictly():
    """So that a warning, a broken link and a missing anchor are errors there."""
    assert re.search(r"^mkdocs build --strict", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert set(CONFIG["validation"].values()) == {"warn"}


def test_the_page_on_installing_names_every_extra():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = set(re.findall(r"^([\w-]+) = \[", text.split("\n[tool")[0], flags=re.MULTILINE))
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page.split("\n## ")[1], flags=re.MULTILINE)
    assert set(re.findall(r"`([\w-]+)`", " ".join(rows))) == extras and "docs" in extras


def test_snippet_of_getting_started(monkeypatch, capsys, tmp_path):
    """With a model of one step."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert "seq_len=8)" in snippet
    snippet = snippet.replace("seq_len=8)", "seq_len=8, steps=1, eval_examples=4, final_eval_examples=8)")
    names: dict = {}
    exec(snippet, names)
    assert names["logits"].shape == (256, 11, 20)
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) < 0.5


# --- links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, text, want",
    [
        ("README.md", "[a](docs/tasks.md#grid)", "[a](tasks.md#grid)"),
        ("README.md", "[a](studies/retrieval_cpu/README.md)", "[a](studies/retrieval_cpu.md)"),
        ("README.md", "[a](studies/retrieval_cpu)", "[a](studies/retrieval_cpu.md)"),
        ("docs/vlm.md", "![a](images/scenes.png)", "![a](images/scenes.png)"),
        ("docs/vlm.md", "[a](../README.md#how-fast)", "[a](index.md#how-fast)"),
        ("docs/vlm.md", "[a](../studies/learnability/grid.csv)", "[a](studies/learnability/grid.csv)"),
        ("studies/why_mamba_lags/README.md", "[a](../../docs/tasks.md)", "[a](../tasks.md)"),
        ("studies/retrieval_cpu/README.md", "[a](figures/)", "[a](retrieval_cpu/figures/index.md)"),
        ("README.md", "[a](https://x.org/b.md) [b](#c)", "[a](https://x.org/b.md) [b](#c)"),
        (
            "README.md",
            "```\n[a](docs/tasks.md)\n```\n[a](LICENSE)",
            "```\n[a](docs/tasks.md)\n```\n[a](LICENSE)",
        ),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(source, text, want):
    assert pages.relinked(text, source) == want


@pytest.mark.parametrize("link", ["docs/nothing.md", "../outside.md"])
def test_a_link_to_nothing_is_refused(link):
    with pytest.raises(ValueError, match=f"README.md links to {link}"):
        pages.relinked(f"[a]({link})", "README.md")


def test_places_on_the_site_lead_back():
    for path in pages.own():
        assert pages.path(pages.uri(path)) == path


# --- gallery -----------------------------------------------------------------------------------------------


def test_gallery_shows_every_picture_of_the_pages():
    page = gallery.page(ROOT)
    for path in pages.own():
        for file in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / path).read_text(encoding="utf-8")):
            assert f"]({pages.uri(pages.goal(file, path))})" in page
    assert all((ROOT / file).exists() for file in gallery.images(ROOT))


# --- the network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "html, count",
    [
        ('<a href="https://x.org"><img src="a.png"></a><link rel="canonical" href="https://x.org">', 0),
        ('<script src="https://cdn.org/a.js"></script>', 1),
        ('<link rel="stylesheet" href="//fonts.org/a.css"><img srcset="https://x.org/a.png 2x, b.png">', 2),
        ('<p style="background: url(https://x.org/a.png)">', 1),
        ('<pre class="mermaid">', 1),
    ],
)
def test_what_a_page_loads_from_elsewhere(html, count):
    assert len(offline.of_page(html)) == count


def test_what_a_folder_loads_from_elsewhere(tmp_path):
    (tmp_path / "a.css").write_text('@import "https://x.org/b.css"; p { background: url(c.png) }')
    (tmp_path / "index.html").write_text('<img src="http://x.org/a.png">')
    assert offline.loads(tmp_path) == ["index.html: http://x.org/a.png", "a.css: https://x.org/b.css"]
