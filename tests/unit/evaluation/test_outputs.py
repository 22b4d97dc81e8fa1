"""Files that could not be written are refused before the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvquant.errors import OptionValueError
from kvquant.evaluation.outputs import check_writable


@pytest.mark.parametrize("name", ["a.yaml", "a.JSON", "old.json"])
def test_a_file_that_can_be_written(name: str, tmp_path: Path) -> None:
    """New, or in the place of another; nothing is made of it yet, and an old one stays what it is."""
    (tmp_path / "old.json").write_text("old")
    check_writable("config_out", tmp_path / name, ".yaml", ".yml", ".json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", "config_out='.*a.txt' cannot work: expected a file name that ends in .yaml, .yml or .json"),
        ("nowhere/a.json", "expected a file in a folder that exists"),
        ("folder.json", "expected a file, and not a folder or a device"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(name: str, message: str, tmp_path: Path) -> None:
    """With the option, and what would work."""
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OptionValueError, match=message):
        check_writable("config_out", tmp_path / name, ".yaml", ".yml", ".json")


def test_a_place_without_the_right_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's for a new file, the file's own for one that is there."""
    asked: list[Path] = []
    monkeypatch.setattr(os, "access", lambda path, _: asked.append(Path(path)))  # None: no
    old = tmp_path / "old.png"
    old.touch()
    for path in (tmp_path / "new.png", old):
        with pytest.raises(OptionValueError, match="expected a file that may be written"):
            check_writable("plot", path, ".png")
    assert asked == [tmp_path, old]
