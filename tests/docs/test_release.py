"""One version everywhere, and a release that says what is in it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import ssm_retrieval

ROOT = Path(__file__).parents[2]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_package_takes_its_version_from_the_code():
    project = text("pyproject.toml")
    assert 'dynamic = ["version"]' in project and 'attr = "ssm_retrieval.__version__"' in project
    assert not re.search(r"^version = \"", project, re.M)


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## (\S+)", text("CHANGELOG.md"), re.M)
    assert versions[0] == ssm_retrieval.__version__
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert numbers == sorted(set(numbers), reverse=True)


def test_the_citation_is_of_this_version_and_names_the_paper():
    cited = yaml.safe_load(text("CITATION.cff"))
    assert str(cited["version"]) == ssm_retrieval.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= set(cited)
    (paper,) = cited["references"]
    assert paper["title"].startswith("Shaking Up VLMs") and paper["authors"]


def test_a_bug_report_asks_for_what_the_page_on_contributing_asks_for():
    (form,) = (
        yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("bug*.yml")
    )
    fields = {part["id"]: part for part in form["body"] if "id" in part}
    assert {"command", "output", "environment"} <= set(fields)
    assert all(fields[name]["validations"]["required"] for name in ("command", "output"))
    assert "environment.json" in fields["environment"]["attributes"]["label"]
    assert "environment.json" in text("CONTRIBUTING.md")
