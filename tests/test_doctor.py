"""What the doctor finds in order, and what it says of packages that are broken."""

import os
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

import s3_megatron
from s3_megatron import cli, doctor
from s3_megatron.finding import OK, WARNING

ROOT = Path(s3_megatron.__file__).parents[1]


@pytest.mark.slow
def test_it_finds_this_environment_fit() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    rows = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert "--optimizer s3 or softsignum or softmuon" in rows["engine: Megatron"]
    assert "0.3." in rows["emerging-optimizers"]
    assert "0.19." in rows["megatron-core"]
    assert "foreach" in rows["kernels"]
    assert "GPU" in rows["training"]
    assert "Traceback" not in result.output


def fake_package(folder: Path, name: str, body: str, version: str = "") -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(body)
    if version:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.slow
def test_it_reports_broken_packages_and_never_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that raise, print, abort the process or never come back are rows of the table."""
    fake_package(tmp_path, "deepspeed", "print('noise'); raise RuntimeError('op_builder [bad] failed')", "0.19.8")
    fake_package(tmp_path, "transformer_engine", "import os; os.abort()", "2.0")
    fake_package(tmp_path, "sentencepiece", "import time; time.sleep(600)", "0.2.3")
    fake_package(tmp_path, "apex", "__all__ = []", "0.9.10.dev0")
    fake_package(tmp_path, "megatron", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "PATIENCE", 10)
    monkeypatch.setitem(doctor.PROBES, "torch", "found.update(gpus=[['H100', 80 * 2**30]], cuda='13', nccl='2')")
    monkeypatch.setitem(doctor.PROBES, "megatron", "import megatron.core")  # without torch's import, which may be slow
    monkeypatch.setitem(doctor.PROBES, "transformers", "import a_module_nobody_has")
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner(env={"COLUMNS": "250"}).invoke(cli.app, ["doctor"])
    assert result.exit_code == 1, result.output
    for words in (
        "0.19.8, broken: RuntimeError: op_builder [bad] failed",
        "2.0, broken: its import dies of SIGABRT",
        "0.2.3, not known to work: its import takes more than 10 s",
        "0.9.10.dev0 is an unrelated package of that name from PyPI",
        "ModuleNotFoundError: No module named 'a_module_nobody_has'",
        "pip install 's3-megatron[megatron]'",
        "H100 (80 GiB); CUDA 13, NCCL 2",
        "apt-get install g++",
        "not possible here",
    ):
        assert words in result.stdout
    assert result.stdout.count("\n") == 19


@pytest.mark.slow
def test_a_busy_machine_is_no_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under load megatron-core was "not found", and DeepSpeed "broken: install it again". Both were whole."""
    monkeypatch.setattr(doctor, "PATIENCE", 1)
    monkeypatch.setattr(doctor, "PROBES", dict.fromkeys(doctor.PROBES, "import time; time.sleep(60)"))
    found = doctor.examine()
    assert not found.can_train
    slow = [row for row in found.rows if "its import takes more than 1 s" in row.found or row.name == "megatron-core"]
    assert len(slow) == len(doctor.PROBES) + 1
    assert all(row.fix.startswith("run doctor again") for row in slow)
    assert not [
        row for row in slow if "not installed" in row.found or "broken" in row.found or "not found" in row.found
    ]


def test_softmuon_is_offered_where_its_library_is() -> None:
    """It was listed, and the job's check refused it."""
    offers = [doctor._engine(doctor._Probe({}), gpu=True, has_polar=has_polar).found for has_polar in (True, False)]
    assert offers == ["works: --optimizer s3 or softsignum or softmuon", "works: --optimizer s3 or softsignum"]


def test_it_knows_nvidias_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a FusedAdam makes it NVIDIA's; a version says nothing, NVIDIA's is 0.1."""
    fake_package(tmp_path, "apex", "", "0.1")
    (tmp_path / "apex" / "optimizers.py").write_text("class FusedAdam: ...\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = doctor._apex(doctor._probe(doctor.PROBES["apex"]), "advice")
    assert (finding.state, finding.found) == (OK, "0.1")


def test_it_says_whether_the_own_name_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-host.invalid")
    monkeypatch.setattr("socket.getaddrinfo", _unknown)
    finding = doctor._own_name()
    assert (finding.state, finding.found) == (WARNING, "no-such-host.invalid does not resolve")
    assert "/etc/hosts" in finding.fix


def _unknown(*_: object, **__: object) -> None:
    raise socket.gaierror(-2, "Name or service not known")
