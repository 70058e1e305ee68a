"""The command line as a person meets it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import s3_megatron
from s3_megatron import cli, data, doctor
from s3_megatron.finding import OK, WARNING
from tests.terminal import run_main

ROOT = Path(s3_megatron.__file__).parents[1]
TEXT = "def area(width, height):\n    # caf\u00e9\n    return width * height\n\n\nprint(area(3, 4))\n" * 50


def test_the_command_starts_without_torch() -> None:
    """Torch's import takes seconds: every command imports what it needs when it runs."""
    code = (
        "import sys; from s3_megatron import cli; from typer.testing import CliRunner; "
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0; "
        "heavy = {'torch', 'megatron', 'numpy', 'sentencepiece', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy; import s3_megatron.data, s3_megatron.data.progress; "
        "heavy = {'torch', 'megatron', 'sentencepiece', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_help_and_version_name_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()
    assert runner.invoke(cli.app, ["--version"]).stdout.strip() == f"s3-megatron {s3_megatron.__version__}"
    top = runner.invoke(cli.app, ["--help"]).stdout
    assert all(word in top for word in ("data", "doctor", "not Amazon's storage"))
    text = runner.invoke(cli.app, ["data", "prepare", "--help"]).stdout
    for option in (
        "tokenizer",
        "tokenizer-model",
        "train-tokenizer",
        "vocab-size",
        "json-key",
        "append-eod",
        "strict",
    ):
        assert f"--{option} " in text
    assert "PREFIX.bin and PREFIX.idx, exactly these names" in text


def test_text_to_dataset_to_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"body": TEXT}) + "\n" + "{broken\n" * 7 + json.dumps({"body": TEXT}) + "\n")
    prefix = tmp_path / "a folder" / "out"
    runner = CliRunner()
    options = [
        "--json-key",
        "body",
        "--append-eod",
        "--train-tokenizer",
        "--vocab-size",
        "300",
        "--workers",
        "1",
    ]
    result = runner.invoke(cli.app, ["data", "prepare", str(source), "--output", str(prefix), *options])
    assert result.exit_code == 0, result.output
    assert "2 documents" in result.stdout
    places = ", ".join(f"{source}:{line}" for line in range(2, 7))
    assert f"skipped 7 with broken JSON: {places}, ...\n" in result.stdout
    assert "2 documents are too few for Megatron's default --split 969, 30, 1" in result.stdout
    assert ".jsonl" in result.stderr, "what is read"
    # To be pasted: on one line however narrow the terminal, and quoted.
    assert result.stdout.endswith(
        f"  --tokenizer-type SentencePieceTokenizer --tokenizer-model '{prefix}.model' "
        f"--vocab-size 300 --data-path '{prefix}'\n"
    )
    result = runner.invoke(cli.app, ["data", "inspect", str(prefix), "--tokenizer-model", f"{prefix}.model"])
    assert result.exit_code == 0, result.output
    assert "documents          2" in result.stdout
    assert TEXT[:80] in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "inspect", "nowhere"], "nowhere.idx is missing"),
        (["data", "prepare", "none.txt", "--output", "a"], "none.txt: no such file"),
        (
            ["data", "prepare", "none.txt", "--output", "a", "--vocab-size", "500"],
            "--train-tokenizer and --vocab-size",
        ),
        (
            ["data", "prepare", "none.txt", "--output", "a", "--train-tokenizer"],
            "--train-tokenizer and --vocab-size",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.strip().count("\n") == 0
    assert err.startswith("error: ")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_unknown_flags_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "data", "prepare", "a.txt", "--output", "a", "--vocabsize", "500") == 2
    assert "--vocabsize" in capsys.readouterr().err


def test_ctrl_c_says_that_nothing_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "prepare", interrupted)
    assert run_main(monkeypatch, "data", "prepare", "a.txt", "--output", "a") == 130
    assert "interrupted: no dataset was written" in capsys.readouterr().err


@pytest.mark.slow
def test_doctor_finds_this_environment_fit() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    rows = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert "--optimizer s3" in rows["engine: Megatron"]
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
def test_doctor_reports_broken_packages_and_never_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setitem(doctor.PROBES, "transformers", "import a_module_nobody_has")
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner(env={"COLUMNS": "250"}).invoke(cli.app, ["doctor"])
    assert result.exit_code == 1, result.output
    for words in (
        "0.19.8, broken: RuntimeError: op_builder [bad] failed",
        "2.0, broken: its import dies of SIGABRT",
        "0.2.3, broken: its import takes more than 10 s",
        "0.9.10.dev0 is an unrelated package of that name from PyPI",
        "ModuleNotFoundError: No module named 'a_module_nobody_has'",
        "pip install 's3-megatron[megatron]'",
        "H100 (80 GiB); CUDA 13, NCCL 2",
        "apt-get install g++",
        "not possible here",
    ):
        assert words in result.stdout
    assert result.stdout.count("\n") == 18


def test_doctor_knows_nvidias_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a FusedAdam makes it NVIDIA's; a version says nothing, NVIDIA's is 0.1."""
    fake_package(tmp_path, "apex", "", "0.1")
    (tmp_path / "apex" / "optimizers.py").write_text("class FusedAdam: ...\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = doctor._apex(doctor._probe(doctor.PROBES["apex"]), "advice")
    assert (finding.state, finding.found) == (OK, "0.1")


def test_doctor_says_whether_the_own_name_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-host.invalid")
    monkeypatch.setattr("socket.getaddrinfo", _unknown)
    finding = doctor._own_name()
    assert (finding.state, finding.found) == (WARNING, "no-such-host.invalid does not resolve")
    assert "/etc/hosts" in finding.fix


def _unknown(*_: object, **__: object) -> None:
    raise socket.gaierror(-2, "Name or service not known")


def test_a_letter_that_the_locale_lacks_ends_no_command(tmp_path: Path) -> None:
    """Where the locale was ASCII and Python's UTF-8 mode off, a path with an umlaut was a UnicodeEncodeError."""
    folder = tmp_path / "Größe"
    folder.mkdir()
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    ascii_only |= {"PYTHONIOENCODING": "ascii:strict"}
    code = "from s3_megatron.cli import main; main()"
    command = [sys.executable, "-c", code, "data", "inspect", str(folder / "none")]
    done = subprocess.run(command, env=os.environ | ascii_only, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert r"Gr\xf6\xdfe" in done.stderr
