"""The evidence on a GPU: a stack is its members alone there too; and ``make gpu-evidence``, rehearsed."""

import errno
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import evidence, texts, wheels
from s3_megatron.evidence import experiments, quick, text
from s3_megatron.evidence.cells import Cell
from s3_megatron.evidence.experiments import Setup
from s3_megatron.evidence.training import train
from tests.gpu.card import DEVICE
from tests.launcher import ROOT


@pytest.mark.parametrize("optimizer", ["s3", "adamw", "lion", "nadam"])
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_a_stack_is_its_members_alone(optimizer: str, products: str) -> None:
    """50 steps with weight decay: 1e-4 of the loss, since a batched product may add up in another order on a GPU.

    With bfloat16 products the orders differ by roundings of 2^-8, which 50 steps carry on: 1e-2 of the loss.
    """
    setup = Setup(steps=50, layers=2, width=32, heads=2, length=16, batch=4, validation=1024, products=products)
    cells = [Cell("it", optimizer, "base", setup, rate, "{}", seed, "t") for rate in (1e-3, 2e-3) for seed in (1, 2)]
    corpus = text.cut(quick.text()).to(DEVICE)
    stacked = train(cells, corpus, DEVICE)
    assert stacked is not None
    for cell, result in zip(cells, stacked, strict=True):
        (alone,) = train([cell], corpus, DEVICE) or []
        assert (alone["weights"], alone["order"]) == (result["weights"], result["order"])
        tolerance = 1e-4 if products == "float32" else 1e-2
        assert result["losses"] == pytest.approx(alone["losses"], rel=tolerance)
        assert result["validation"] == pytest.approx(alone["validation"], rel=tolerance)
    assert len({result["trained"] for result in stacked}) == 4, "the members are four different runs"


def visit(out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.evidence", "--out", str(out), *words]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


# What a bare Python with torch, numpy and scipy lacks, and the wheels do not bring.
ABSENT = ["typer", "psutil", "pydantic", "omegaconf", "matplotlib", "megatron", "deepspeed", "transformers", "pytest"]
BARE = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *given: None if name.partition(".")[0] in {ABSENT!r} else find(name, *given)
)
"""


@pytest.mark.slow
def test_the_visit_rehearsed(tmp_path: Path) -> None:
    """Every contender of table2, tuning, seeds, report, archive; a second visit runs nothing again.

    Without psutil and others, also in the workers: the first try in a bare environment ended at an import of it.
    """
    (tmp_path / "sitecustomize.py").write_text(BARE)
    path, out = os.pathsep.join([str(tmp_path), str(ROOT)]), tmp_path / "out"
    first = visit(out, "--dry", "--minutes", "5", "table2", PYTHONPATH=path)
    assert first.returncode == 0, first.stderr
    assert sorted(file.name for file in out.iterdir()) == ["evidence.md", "evidence.tgz"]
    summary = (out / "evidence.md").read_text()
    assert summary.startswith("- dry-table2: 144 of 144 cells. 15 of 15 pairs are ranked")
    kept = cells(out)
    assert visit(out, "--dry", "--minutes", "5", "table2", PYTHONPATH=path).returncode == 0
    assert cells(out) == kept and len(kept) == 145


def cells(out: Path) -> list[dict[str, object]]:
    with tarfile.open(out / "evidence.tgz") as tar:
        file = tar.extractfile("dry-table2/cells.jsonl")
        assert file is not None and "dry-table2/report.md" in tar.getnames()
        return [json.loads(line) for line in file]


def test_minutes_too_few_and_experiments_unknown_are_one_line(tmp_path: Path) -> None:
    found = visit(tmp_path / "a", "--minutes", "0.2")
    assert found.returncode == 2 and "--minutes 0.2 leaves no time for a run" in found.stderr
    found = visit(tmp_path / "b", "tabel2", "--minutes", "10")  # a busy machine imports for 38 s
    assert found.returncode == 2 and "tabel2: error: there is no experiment 'tabel2'" in found.stdout
    assert "Traceback" not in found.stderr


class TestFiles:
    """A full disk and a damaged archive: one line, and no run is lost."""

    def test_a_full_disk_keeps_the_folders_and_the_older_archive(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "table2").mkdir()
        (tmp_path / "table2" / "unfinished").mkdir()
        for name in ("cells.jsonl", ".lock", "unfinished/a.pt"):
            (tmp_path / "table2" / name).write_text("{}\n")
        evidence._pack(tmp_path, {"table2": "1 of 600 cells."})
        with tarfile.open(tmp_path / "evidence.tgz") as tar:
            assert tar.getnames() == ["table2", "table2/cells.jsonl"]
        before = (tmp_path / "evidence.tgz").read_bytes()

        def full(self: tarfile.TarFile, *given: object, **named: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(tarfile.TarFile, "add", full)
        with pytest.raises(
            SystemExit, match=r"evidence.tgz cannot be written: No space left on device; the folders in"
        ):
            evidence._pack(tmp_path, {})
        assert sorted(file.name for file in tmp_path.iterdir()) == ["evidence.md", "evidence.tgz", "table2"]
        assert (tmp_path / "evidence.tgz").read_bytes() == before

    @pytest.mark.parametrize("cut", [0, 40, -20])
    def test_a_damaged_archive_is_not_written_over(self, cut: int, tmp_path: Path) -> None:
        (tmp_path / "table2").mkdir()
        (tmp_path / "table2" / "cells.jsonl").write_text("{}\n" * 1000)
        evidence._pack(tmp_path, {})
        data = (tmp_path / "evidence.tgz").read_bytes()
        (tmp_path / "evidence.tgz").write_bytes(data[:cut])
        (tmp_path / "table2" / "cells.jsonl").unlink()
        with pytest.raises(SystemExit, match=r"evidence.tgz cannot be read: .*; move it away") as caught:
            evidence._unpack(tmp_path)
        assert "\n" not in str(caught.value)

    def test_what_a_killed_visit_left_is_newer_than_the_archive(self, tmp_path: Path) -> None:
        for content in ("old\n", "new\n"):
            for name in ("table2", "spike"):
                (tmp_path / name).mkdir(exist_ok=True)
                (tmp_path / name / "cells.jsonl").write_text(content)
            if content == "old\n":
                evidence._pack(tmp_path, {})
        (tmp_path / "spike" / "cells.jsonl").unlink()
        evidence._unpack(tmp_path)
        assert (tmp_path / "table2" / "cells.jsonl").read_text() == "new\n"
        assert (tmp_path / "spike" / "cells.jsonl").read_text() == "old\n"


class TestCarried:
    """What a bare Python lacks comes from .whl/ and .text.tar."""

    def test_a_missing_wheel_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wheels, "is_installed", lambda module: False)
        monkeypatch.setattr(wheels, "FOLDER", tmp_path)
        monkeypatch.setattr(wheels, "carried", lambda package: None)
        with pytest.raises(SystemExit, match=r"error: pytorch-optimizer is neither installed nor, .*: make gpu-wheels"):
            evidence._prepare(tmp_path)

    def test_wheels_and_texts_are_laid_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Plain wheels are unpacked, without pip, and found by this process; texts lie where they are looked for."""
        (tmp_path / "whl").mkdir()
        for package, module in evidence.NEEDED.items():
            with zipfile.ZipFile(tmp_path / "whl" / f"{package.replace('-', '_')}-1.0-py3-none-any.whl", "w") as file:
                file.writestr(f"{module}_of_the_wheel.py", "")
        (tmp_path / "gcide.xz").write_bytes(b"text")
        with tarfile.open(tmp_path / "text.tar", "w") as tar:
            tar.add(tmp_path / "gcide.xz", "gcide.xz")
        monkeypatch.setattr(wheels, "is_installed", lambda module: False)
        find = wheels.carried
        monkeypatch.setattr(wheels, "carried", lambda package: find(package, tmp_path / "whl"))
        monkeypatch.setattr(texts, "FILE", tmp_path / "text.tar")
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
        evidence._prepare(tmp_path / "scratch")
        import yaml_of_the_wheel  # type: ignore[import-not-found]

        assert yaml_of_the_wheel.__file__.startswith(str(tmp_path))
        assert (text.folder() / "gcide.xz").read_bytes() == b"text" and text.folder().is_relative_to(tmp_path)

    def test_every_experiment_of_the_visit_has_its_text_carried(self) -> None:
        for name in evidence.ORDER:
            assert set(experiments.load(name).text.split("+")) <= set(text.PACKAGES)
