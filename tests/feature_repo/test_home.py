"""Folders that are replaced as a whole, and what a kill leaves of them."""

from pathlib import Path

import pytest

from feature_repo.home import complete_folder, tidy_folder


def make(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "file").write_text(text, encoding="utf-8")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    make(tmp_path / "tables", "old")
    with pytest.raises(FileExistsError), complete_folder(tmp_path / "tables") as part:
        make(part, "half")  # fails: the folder is there already
    assert (tmp_path / "tables" / "file").read_text(encoding="utf-8") == "old"
    with complete_folder(tmp_path / "tables") as part:
        (part / "file").write_text("new", encoding="utf-8")
    assert (tmp_path / "tables" / "file").read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["tables"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Even where the next run fails before it has a new folder."""
    make(tmp_path / "tables.old.part", "old")
    make(tmp_path / "tables.part", "new")
    with pytest.raises(KeyboardInterrupt), complete_folder(tmp_path / "tables"):
        raise KeyboardInterrupt
    assert (tmp_path / "tables" / "file").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["tables"]


def test_a_kill_after_the_renames_leaves_nothing_behind(tmp_path: Path) -> None:
    make(tmp_path / "tables", "new")
    make(tmp_path / "tables.old.part", "old")
    tidy_folder(tmp_path / "tables")
    assert (tmp_path / "tables" / "file").read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["tables"]
