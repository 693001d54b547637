"""The first losses of every family are those of this TRAINING_VERSION."""

from __future__ import annotations

import json

import golden
import pytest

from synthetic.config import TRAINING_VERSION

# Sums in another order, of other processors and libraries, move these losses by less than 1e-6.
NEAR = 1e-5


@pytest.mark.parametrize("name", [name + now for now in ("", golden.NOW) for name in golden.FAMILIES])
def test_training_gives_the_numbers_of_its_version(name):
    known = golden.kept()
    assert str(TRAINING_VERSION) in known, f"version {TRAINING_VERSION} is new: run python tests/golden.py"
    losses = golden.trajectory(name)
    assert losses == pytest.approx(known[str(TRAINING_VERSION)][name], rel=NEAR), (
        "the same plan leads to other numbers than before: raise TRAINING_VERSION in synthetic/identity.py, "
        "then run python tests/golden.py"
    )


def test_numbers_of_a_version_are_never_replaced(tmp_path, monkeypatch, capsys):
    path = tmp_path / "golden.json"
    monkeypatch.setattr(golden, "PATH", path)
    monkeypatch.setattr(golden, "FAMILIES", ("transformer",))
    assert golden.main() == 0
    known = json.loads(path.read_text())
    assert list(known) == [str(TRAINING_VERSION)] and len(known[str(TRAINING_VERSION)]["transformer"]) == 5
    path.write_text(path.read_text().replace(str(known[str(TRAINING_VERSION)]["transformer"][0]), "1.5"))
    changed = path.read_text()
    assert golden.main() == 1 and path.read_text() == changed
    assert "raise TRAINING_VERSION" in capsys.readouterr().out
