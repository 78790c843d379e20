"""Claims about fastres.files: a file is written whole or not at all."""

import os

import pytest

from fastres import files


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    files.write(file, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_written_file_can_be_read_by_others(tmp_path):
    files.write(tmp_path / "a", b"\x00")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
