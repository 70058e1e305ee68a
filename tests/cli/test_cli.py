"""The command line as a person meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import s3_megatron
from s3_megatron import cli, data
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table2-tinny"], "there is no experiment 'table2-tinny': give a file's path or one of "),
        (["notes.yaml"], "notes.yaml: it must be a mapping of settings"),
        (["table2-tiny", "--device", "tpu"], "--device is tpu: it must be cpu or cuda"),
    ],
)
def test_compare_refuses_before_it_imports_torch(arguments: list[str], message: str, tmp_path: Path) -> None:
    """A mistyped experiment was refused after torch's import, which is slow on a busy machine."""
    (tmp_path / "notes.yaml").write_text("a text\n")
    code = "import sys; sys.modules['torch'] = None; from s3_megatron.cli import main; main()"
    command, path = [sys.executable, "-c", code, "compare", *arguments], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=os.environ | path, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


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
        # It became corpus.bin beside the folder: the refusal was there, but the command had taken off the slash.
        (["data", "prepare", "none.txt", "--output", "corpus/"], "corpus/ is a folder: give the files' name too"),
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


@pytest.mark.parametrize("package", ["numpy", "torch.distributed"])
def test_a_package_that_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    """On a login node, where jobs.md's packages alone are, ``data inspect`` and ``bench step`` were tracebacks."""

    def missing() -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(cli, "app", missing)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: this command needs {package.partition('.')[0]}, which {sys.executable} does not")
    assert said.count("\n") == 1


def test_a_module_of_ours_that_is_missing_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is a broken installation, or our mistake."""

    def missing() -> None:
        raise ModuleNotFoundError("No module named 's3_megatron.nothing'", name="s3_megatron.nothing")

    monkeypatch.setattr(cli, "app", missing)
    with pytest.raises(ModuleNotFoundError):
        cli.main()


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
