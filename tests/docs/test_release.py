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


def releases() -> dict[str, str]:
    """Date by version, as the changelog lists them."""
    return dict(re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", text("CHANGELOG.md"), re.M))


def test_the_changelog_begins_with_this_version():
    versions = list(releases())
    assert versions[0] == ssm_retrieval.__version__
    assert len(versions) == len(re.findall(r"^## ", text("CHANGELOG.md"), re.M))
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert numbers == sorted(set(numbers), reverse=True)


def test_the_citation_is_of_this_version_and_names_the_paper():
    cited = yaml.safe_load(text("CITATION.cff"))
    assert str(cited["version"]) == ssm_retrieval.__version__
    assert cited["date-released"].isoformat() == releases()[ssm_retrieval.__version__]
    assert f'license = "{cited["license"]}"' in text("pyproject.toml")
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    (paper,) = cited["references"]
    assert (
        paper["title"].startswith("Shaking Up VLMs")
        and paper["authors"][0]["family-names"] == "Pantazopoulos"
    )
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2409.05395"}]


def test_the_source_distribution_has_what_a_wheel_is_installed_and_cited_with():
    (line,) = re.findall(r"^include (.*)$", text("MANIFEST.in"), re.M)
    for pattern in line.split():
        assert list(ROOT.glob(pattern)), pattern
    named = {path.name for pattern in line.split() for path in ROOT.glob(pattern)}
    assert set(re.findall(r"-c (\S+\.txt)", text("docs/install.md"))) <= named
    assert {"CHANGELOG.md", "CITATION.cff"} <= named


def test_ci_compares_every_package_of_the_wheel_with_the_checkout():
    (compared,) = re.findall(r"^packages=\((.*)\)$", text(".ci/run"), re.M)
    (installed,) = re.findall(r"^include = \[(.*)\]$", text("pyproject.toml"), re.M)
    assert {f'"{name}*"' for name in compared.split()} == set(installed.split(", "))


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
