"""Files that are whole or not there, also after a machine went down: what is synced, and in which order."""

import os
from pathlib import Path

import pytest

from s3_megatron import files
from s3_megatron.evidence.cells import CellsFile
from tests.evidence import simulated


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the disk is asked for, in order, by inode: no test can cut the power."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(file: int) -> None:
        done.append(("synced", os.fstat(file).st_ino))
        fsync(file)

    def replaced(old: Path, new: Path) -> None:
        done.append(("named", os.stat(old).st_ino))
        replace(old, new)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", replaced)
    return done


def test_a_files_bytes_are_on_the_disk_before_its_name_and_then_its_name(done, tmp_path: Path) -> None:
    """A pointer of a chain of jobs that is empty after a power cut names no checkpoint."""
    files.write_file(tmp_path / "a", b"whole")
    inode = (tmp_path / "a").stat().st_ino
    assert done == [("synced", inode), ("named", inode), ("synced", tmp_path.stat().st_ino)]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_nothing_is_left_of_a_file_that_could_not_be_named(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(files.S3Error, match="a cannot be written: Is a directory"):
        files.write_file(tmp_path / "a", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_finished_cell_is_on_the_disk_when_it_counts(done, tmp_path: Path) -> None:
    """Hours of a core are in it."""
    asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
    cells = CellsFile(path, asked, simulated.TEXT)
    done.clear()
    cells.add(simulated.run(asked, simulated.losses(0.01), 2))
    assert done == 2 * [("synced", path.stat().st_ino)]
