"""Experiments, cells files, folders and machines that a comparison refuses; each refusal is one line."""

import errno
import json
import os
import sys

import pytest
import yaml

from s3_megatron import cli, evidence
from s3_megatron.errors import S3Error
from s3_megatron.evidence import analysis, compare, experiments
from s3_megatron.evidence.cells import CellsFile
from tests.evidence import simulated
from tests.evidence.comparison import run


class TestRefusals:
    """Bad input: one line, and nothing half-written."""

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"seeds": [0, 1]}, "seed 0 is for tuning and among seeds: must be in one of the two"),
            ({"seeds": [1, 1]}, r"seeds \[1, 1\]: must be distinct"),
            ({"seeds": [10**30]}, r"seeds \[10+\]: must be from 0 to 2147483647"),
            ({"seeds": []}, r"seeds \[\]: must be .*one at least"),
            ({"setups": {}}, "setups: must be one at least"),
            ({"setups": {"base": {"steps": 9, "heads": 0}}}, "setups.base: heads 0: must be > 0"),
            (
                {"contenders": {"s3": {"optimizer": "adamx", "rates": [1e-3]}}},
                "contenders.s3: optimizer adamx: must be one of s3",
            ),
            (
                {"contenders": {"s3": {"optimizer": "s3", "rates": [2e-3, 1e-3]}}},
                "rates .*: must be positive and rising",
            ),
            (
                {"contenders": {"s3": {"optimizer": "lion", "rates": [1e-3], "settings": {"beta": 0.9}}}},
                "setting beta of lion",
            ),
            ({"reference": "s4"}, "reference s4: must be one of s3, adamw"),
            ({"paper": {"s4": "1"}}, "paper.s4: must be one of s3"),
            ({"tuning": {"seed": 0, "runs": 2}}, "contenders.s3 has 3 rates: must be at most tuning.runs"),
            ({"sedes": [1]}, "there is no setting 'sedes'"),
            ({"neighbours": "1"}, "neighbours is '1': it must be a int"),
        ],
    )
    def test_an_experiment_that_contradicts_itself(self, change, message, quick_file, tmp_path):
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(quick_file.read_text()) | change, sort_keys=False))
        with pytest.raises(S3Error, match=message) as caught:
            experiments.load(str(path))
        assert str(caught.value).startswith("bad.yaml: ") and "\n" not in str(caught.value)

    def test_an_unknown_experiment_names_those_there_are(self):
        with pytest.raises(S3Error, match=r"there is no experiment 'tabel2': .*one of .*table2-small"):
            experiments.load("tabel2")

    @pytest.mark.parametrize("what", ["experiment", "rules", "text", "code"])
    def test_cells_of_something_else(self, what, tmp_path):
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        CellsFile(path, asked, simulated.TEXT)
        head = json.loads(path.read_text())
        path.write_text(json.dumps({**head, what: "other", "commit": "abc"}) + "\n")
        before = path.read_bytes()
        with pytest.raises(S3Error, match=rf"cells of another {what} \(other.*check out commit abc") as caught:
            CellsFile(path, asked, simulated.TEXT)
        assert path.read_bytes() == before and "\n" not in str(caught.value)

    def test_a_broken_line_in_the_middle_is_named(self, tmp_path):
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        CellsFile(path, asked, simulated.TEXT)
        with path.open("a") as file:
            good = json.dumps(simulated.run(asked, simulated.losses(0.01), 1)[0])
            file.write(f'{good}\n{{"key": \n{good}\n')
        with pytest.raises(S3Error, match=r"line 3: .*remove the line, and its cell is run again"):
            CellsFile(path, asked, simulated.TEXT)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"validation": "1.5"}, "its validation is '1.5'"),
            ({"spikes": None}, "its spikes is None"),
            ({"contender": ["s3"]}, r"its contender is \['s3'\]"),
            ({"seed": 1.5}, "its seed is 1.5"),
        ],
    )
    def test_a_line_that_was_edited_is_named(self, change, message, tmp_path):
        """A KeyError or a TypeError was all that the report said; it reads the file on its own."""
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        CellsFile(path, asked, simulated.TEXT)
        (cell,) = simulated.run(asked, simulated.losses(0.01), 1)
        with path.open("a") as file:
            file.write(json.dumps({**cell, **change}) + "\n")
        for read in (lambda: CellsFile(path, asked, simulated.TEXT), lambda: analysis.read(path, asked)):
            with pytest.raises(S3Error, match=rf"cells.jsonl, line 2: {message}; remove the line"):
                read()

    @pytest.mark.parametrize("kind", ["a file", "under a file", "read-only"])
    def test_a_folder_that_cannot_be_written(self, kind, quick_file, tmp_path, monkeypatch):
        monkeypatch.setattr(compare, "Workers", _NoWorkers)
        (tmp_path / "a file").touch()
        folder = {"a file": tmp_path / "a file", "under a file": tmp_path / "a file" / "x"}.get(kind, tmp_path / "x")
        if kind == "read-only":  # what a user without rights meets, and the tests' user root does not

            def refused(*_, **__):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

            monkeypatch.setattr(compare, "FileLock", refused)
        with pytest.raises(S3Error, match=r"cannot be written: (File exists|Not a directory|Permission denied)"):
            run(experiments.load(str(quick_file)), folder)

    @pytest.mark.parametrize("torn", ["{", '{"experiment": "simul', '{"experiment": "x"}'])
    def test_a_first_line_that_was_cut_short_begins_anew(self, torn, tmp_path):
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        path.write_text(torn)
        CellsFile(path, asked, simulated.TEXT)
        assert json.loads(path.read_text())["experiment"] == "simulated"

    def test_a_full_disk_leaves_whole_lines(self, tmp_path, monkeypatch):
        """The system takes a part of a line and then has no room: the part is taken back."""
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        file = CellsFile(path, asked, simulated.TEXT)
        first, second = simulated.run(asked, simulated.losses(0.01), 2)
        file.add([first])
        before = path.read_bytes()

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(S3Error, match=r"cannot be written: No space left on device; what it has is whole"):
            file.add([second])
        assert path.read_bytes() == before and second["key"] not in file.results
        monkeypatch.undo()
        file.add([second])
        assert len(CellsFile(path, asked, simulated.TEXT).results) == 2

    def test_scipy_is_asked_for_before_anything_is_trained(self, monkeypatch):
        for name in [name for name in sys.modules if name.startswith(("scipy", "s3_megatron.evidence.statistics"))]:
            monkeypatch.delitem(sys.modules, name)
        for name in ("statistics", "analysis", "report", "record"):
            monkeypatch.delitem(sys.modules, f"s3_megatron.evidence.{name}", raising=False)
            monkeypatch.delattr(evidence, name, raising=False)
        monkeypatch.setitem(sys.modules, "scipy", None)
        with pytest.raises(S3Error, match=r"compare needs scipy: pip install 's3-megatron\[evidence\]'"):
            cli.compare("table2-small")

    def test_a_folder_in_use(self, quick_file, tmp_path, monkeypatch):
        from filelock import FileLock

        monkeypatch.setattr(compare, "Workers", _NoWorkers)
        with FileLock(tmp_path / ".lock"), pytest.raises(S3Error, match="another comparison writes into"):
            run(experiments.load(str(quick_file)), tmp_path)
        assert not (tmp_path / "cells.jsonl").exists()


class _NoWorkers:
    """Nothing is to be started where nothing can be written."""

    def __init__(self, *_) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass
