"""Experiments, cells files, folders and machines that a comparison refuses; each refusal is one line."""

import errno
import json
import os
import resource
import sys

import pytest
import yaml

from s3_megatron import cli, evidence, machine
from s3_megatron.errors import S3Error
from s3_megatron.evidence import analysis, compare, experiments
from s3_megatron.evidence.cells import CellsFile
from tests.evidence import simulated
from tests.evidence.comparison import run
from tests.terminal import run_main


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
            # Of 128 bytes no sequence came, and every run's loss was no number.
            (
                {"setups": {"base": {"steps": 9, "validation": 128}}},
                "setups.base: validation 128: must be one sequence, 129 tokens, at least",
            ),
            # Looks at |u| every 20 steps were counted as steps: a run had recovered at once, or never.
            (
                {"setups": {"x9": {"steps": 99, "kick": 9, "kick_step": 30}}},
                "setups.x9: watch_every 20: must be 1 with a kick_step",
            ),
            # Nothing was kicked, and all contenders had recovered at once, their largest |u| being no number.
            ({"setups": {"x9": {"steps": 99, "kick": 9, "watch_every": 1}}}, "x9: kick_step -1: must be one of the st"),
            (
                {"setups": {"x9": {"steps": 99, "kick_step": 99, "watch_every": 1}}},
                "setups.x9: kick_step 99: must be one of the steps",
            ),
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
            ({"tuning": {"seeds": [0, 1], "runs": 6}}, "seed 1 is for tuning and among seeds"),
            ({"tuning": {"seed": 0, "seeds": [5], "runs": 4}}, "tuning: seed and seeds: must be one of the two"),
            ({"tuning": {"runs": 4}}, "tuning: seed and seeds: must be one of the two"),
            ({"tuning": {"seeds": [5, 5], "runs": 6}}, r"tuning: seeds \[5, 5\]: must be distinct"),
            ({"tuning": {"seeds": [5, 6], "runs": 7}}, "tuning: runs 7: must be a multiple of 2: each"),
            ({"tuning": {"seeds": [5, 6], "runs": 4}}, r"s3 has 3 rates by 2 seeds: must be at most tuning.runs \(4\)"),
            ({"tuning": {"seed": 10**30, "runs": 4}}, r"tuning seed 10+: must be from 0 to 2147483647"),
            ({"tuning": {"seed": 0, "runs": 0}}, "tuning: runs 0: must be > 0"),
            ({"contenders": {1: {"optimizer": "s3", "rates": [1e-3]}}}, "contenders has the key 1: it must be a text"),
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

    def test_a_key_given_twice(self, quick_file, tmp_path):
        """YAML keeps the last one: a contender that was copied and not renamed was left out in silence."""
        path = tmp_path / "twice.yaml"
        path.write_text(quick_file.read_text() + "seeds: [7]\n")
        with pytest.raises(S3Error, match=r"twice.yaml cannot be read: seeds is given twice .* line ") as caught:
            experiments.load(str(path))
        assert "\n" not in str(caught.value)

    def test_a_rate_without_a_point_is_a_number(self, quick_file, tmp_path):
        """It was refused as a text: "rates[0] is '8e-3': it must be a float". So YAML 1.1 reads it."""
        path = tmp_path / "rates.yaml"
        path.write_text(quick_file.read_text().replace("0.008", "8e-3").replace("0.016", "1.6E-2"))
        assert "8e-3" in path.read_text() and "1.6E-2" in path.read_text()
        assert experiments.load(str(path)).contenders == experiments.load(str(quick_file)).contenders

    @pytest.mark.parametrize(
        "entry",
        [
            {"optimizer": "adamw", "settings": {"betas": [0.9, 1.5]}},
            {"optimizer": "adamw", "sweep": {"betas": [[0.9, 0.99], 0.9]}},
            {"optimizer": "s3", "settings": {"p": 0.5}},
            {"optimizer": "s3", "settings": {"state_dtype": "bfloat17"}},
            {"optimizer": "softsignum", "settings": {"beta": 0.9, "soft_start": 2}},
        ],
    )
    def test_a_setting_that_an_optimizer_does_not_take(self, entry, quick_file, tmp_path, monkeypatch):
        """It was a traceback out of a worker, of a swept value after hours of tuning; now nothing is begun."""
        monkeypatch.setattr(compare, "Workers", _NoWorkers)
        content = yaml.safe_load(quick_file.read_text())
        content["contenders"]["adamw"] = {"rates": [1e-3], **entry}
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        with pytest.raises(S3Error, match=rf"contenders.adamw: with .* {entry['optimizer']} says: ") as caught:
            run(experiments.load(str(tmp_path / "bad.yaml")), tmp_path / "out")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    def test_more_workers_than_cores(self, quick_file, tmp_path, monkeypatch):
        """--workers 100 on two cores: a hundred imports of torch, which a machine's memory does not have."""
        monkeypatch.setattr(machine, "cores", lambda: 2)
        with pytest.raises(S3Error, match=r"--workers is 100: each .*, and this process may use 2"):
            run(experiments.load(str(quick_file)), tmp_path / "out", workers=100)
        assert run_main(monkeypatch, "compare", "quick", "--workers", "0") == 2

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

    def test_a_damaged_first_line_is_not_advised_away(self, tmp_path):
        """Without it the next line, a cell, is taken for it, and the file for another experiment's."""
        path = tmp_path / "cells.jsonl"
        path.write_bytes(b'{"experiment": \n')
        with pytest.raises(S3Error, match=r"line 1: .*; it names the experiment: mend it, or give another folder by"):
            CellsFile(path, simulated.experiment(), simulated.TEXT)

    def test_a_cell_that_is_there_twice(self, tmp_path):
        """As after joining the files of two machines: of two results the last counted, in silence."""
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        CellsFile(path, asked, simulated.TEXT)
        first, second = (json.dumps(cell) for cell in simulated.run(asked, simulated.losses(0.01), 2))
        head = path.read_text()
        path.write_text(f"{head}{first}\n{second}\n{first}\n")
        assert len(CellsFile(path, asked, simulated.TEXT).results) == 2, "the same line says nothing else"
        other = json.dumps({**json.loads(first), "validation": 1.25})
        path.write_text(f"{head}{first}\n{second}\n{other}\n")
        for read in (lambda: CellsFile(path, asked, simulated.TEXT), lambda: analysis.read(path, asked)):
            with pytest.raises(S3Error, match=r"cells.jsonl, line 4: it is line 2's cell once more, and differs"):
                read()

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

    def test_a_last_line_that_was_cut_short_is_dropped(self, tmp_path):
        """Else the next cell is written behind its half, and both are lost."""
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        first, second = simulated.run(asked, simulated.losses(0.01), 2)
        CellsFile(path, asked, simulated.TEXT).add([first])
        with path.open("a") as file:
            file.write('{"key": "0123')
        CellsFile(path, asked, simulated.TEXT).add([second])
        assert [*CellsFile(path, asked, simulated.TEXT).results.values()] == [first, second]

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

    def test_a_disk_that_takes_a_part_of_a_line(self, tmp_path):
        """A limit of the kernel's in the place of a full disk: the bytes that it took are taken back, and no more."""
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        file = CellsFile(path, asked, simulated.TEXT)
        first, second = simulated.run(asked, simulated.losses(0.01), 2)
        file.add([first])
        before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))
        try:
            with pytest.raises(S3Error, match=r"cannot be written: File too large; what it has is whole"):
                file.add([second])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
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
