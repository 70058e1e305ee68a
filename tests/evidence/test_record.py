"""Records: what is packed into one, that its page is what the command prints, and that it stays as it is."""

import lzma
import os
import re
from pathlib import Path

import pytest

from s3_megatron.errors import S3Error
from s3_megatron.evidence import analysis, experiments, pictures, record, report
from s3_megatron.evidence.cells import CellsFile
from tests.evidence import simulated


class TestRecord:
    """benchmarks/records/DATE-NAME."""

    @pytest.fixture
    def asked(self, tmp_path, monkeypatch):
        """An experiment with a file, and some cells of it."""
        file = tmp_path / "simulated.yaml"
        file.write_text("its file\n")
        asked = simulated.experiment()
        simulated.write(tmp_path / "run" / "cells.jsonl", asked, simulated.run(asked, simulated.losses(0.01), 40))
        return asked

    def test_a_record_has_all_that_the_report_came_from(self, asked, tmp_path):
        (tmp_path / "run" / "engines.md").touch()
        path = record.pack(str(tmp_path / "simulated.yaml"), asked, tmp_path / "run", tmp_path / "records")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d-simulated", path.name)
        names = {"cells.jsonl.xz", "report.md", "engines.md", "simulated.yaml", "rates.png"}
        assert {file.name for file in path.iterdir()} - {"differences.png"} == names
        assert (path / "simulated.yaml").read_text() == "its file\n"
        again = tmp_path / "again" / "cells.jsonl"
        again.parent.mkdir()
        again.write_bytes(lzma.decompress((path / "cells.jsonl.xz").read_bytes()))
        assert report.write(asked, again.parent).read_text() == (path / "report.md").read_text()
        with pytest.raises(S3Error, match="exists: records stay as they are"):
            record.pack(str(tmp_path / "simulated.yaml"), asked, tmp_path / "run", tmp_path / "records")

    def test_a_cell_that_is_being_written_is_left_out(self, asked, tmp_path):
        """A record stays as it is: half a line would be half a line for ever."""
        with (tmp_path / "run" / "cells.jsonl").open("a") as file:
            file.write('{"key": "0123')
        path = record.pack(str(tmp_path / "simulated.yaml"), asked, tmp_path / "run", tmp_path / "records")
        lines = lzma.decompress((path / "cells.jsonl.xz").read_bytes()).splitlines(keepends=True)
        assert len(lines) == 41 and lines[-1].endswith(b"}\n")

    def test_what_a_record_has_is_on_the_disk_before_its_name(self, asked, tmp_path, monkeypatch):
        """A machine that goes down afterwards would leave a record with empty files, and a record is never mended."""
        done, fsync, replace = [], os.fsync, os.replace
        monkeypatch.setattr("os.fsync", lambda file: done.append(os.fstat(file).st_ino) or fsync(file))
        monkeypatch.setattr("os.replace", lambda old, new: done.append(Path(new)) or replace(old, new))
        path = record.pack(str(tmp_path / "simulated.yaml"), asked, tmp_path / "run", tmp_path / "records")
        assert {file.stat().st_ino for file in path.iterdir()} <= {*done[: done.index(path)]}

    def test_a_record_that_is_too_large_is_not_left_behind(self, asked, tmp_path, monkeypatch):
        monkeypatch.setattr(record, "LIMIT", 1000)
        with pytest.raises(S3Error, match="at most"):
            record.pack(str(tmp_path / "simulated.yaml"), asked, tmp_path / "run", tmp_path / "records")
        assert list((tmp_path / "records").iterdir()) == []

    def test_nothing_is_no_record(self, asked, tmp_path):
        simulated.write(tmp_path / "run" / "cells.jsonl", asked, [])
        with pytest.raises(S3Error, match="no finished cell"):
            record.pack(str(tmp_path / "simulated.yaml"), asked, tmp_path / "run", tmp_path / "records")


RECORDS = sorted((Path(__file__).parents[2] / "benchmarks" / "records").glob("????-??-??-*"))


@pytest.mark.parametrize("folder", RECORDS, ids=lambda folder: folder.name)
def test_a_records_page_is_what_the_command_prints_of_its_cells(folder):
    """One that was edited by hand, or printed before a table was mended, fails: `--report --out RECORD` prints it."""
    asked = experiments.load(str(folder / f"{folder.name[11:]}.yaml"))
    head, found = analysis.read(folder / "cells.jsonl", asked)
    drawn = [name for name in pictures.PICTURES if (folder / name).exists()]
    assert report.render(head, found, drawn) == (folder / "report.md").read_text()


def test_nothing_is_trained_into_a_record(tmp_path):
    (tmp_path / "cells.jsonl.xz").touch()
    with pytest.raises(S3Error, match="is a record, which stays as it is: give another folder by --out"):
        CellsFile(tmp_path / "cells.jsonl", simulated.experiment(), simulated.TEXT)
    assert [file.name for file in tmp_path.iterdir()] == ["cells.jsonl.xz"]
