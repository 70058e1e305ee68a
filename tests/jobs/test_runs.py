"""Run folders, the list of them, and the commands that find them. What needs a queue is in tests/slurm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s3_megatron import cli
from s3_megatron.errors import S3Error
from s3_megatron.jobs import runs
from tests.jobs.run_folders import make

pytestmark = pytest.mark.usefixtures("state_folder")


def test_a_run_folder_has_what_makes_it_again(tmp_path: Path):
    run = make(tmp_path)
    assert runs.find("first") == runs.find(str(run.path)) == run
    assert run.job.recipe.name == "gpt2_tiny" and run.job_ids == [] and not run.finished and run.ended is None
    about = json.loads((run.path / "about.json").read_text())
    assert about["versions"]["torch"] and about["time"] and about["command"]
    assert run.script.name == "job.sh" and (run.path / "logs/ranks").is_dir()
    assert sys.executable in run.script.read_text()
    assert make(tmp_path, "ds", "engine=deepspeed").path.joinpath("deepspeed.json").is_file()


def test_a_name_that_is_taken_is_refused_and_nothing_is_left(tmp_path: Path):
    make(tmp_path)
    with pytest.raises(S3Error, match="is there already: resume it"):
        make(tmp_path)
    with pytest.raises(S3Error, match="--name 'a b' must be"):
        make(tmp_path, "a b")
    with pytest.raises(S3Error, match="there is no deepspeed 'zero9'"):
        make(tmp_path, "second", "engine=deepspeed", "deepspeed=zero9")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
    (tmp_path / "file").touch()
    with pytest.raises(S3Error, match=r"cannot be made .*: set cluster.runs_dir"):
        make(tmp_path / "file")


def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without a name, as in containers started with --user."""
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])


def test_without_a_home_a_run_is_made_and_the_list_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """`runs` and `status` were tracebacks of "Could not determine home directory", and so was `launch`, which left its
    run folder behind."""
    without_home(monkeypatch)
    run = make(tmp_path)
    assert "is missing in the list of s3-megatron runs" in caplog.text and "set HOME" in caplog.text
    assert runs.find(str(run.path)) == run
    with pytest.raises(S3Error, match="set HOME, or XDG_STATE_HOME to a folder that can be written"):
        runs.known_runs()


@pytest.mark.parametrize("state", ["/proc/none", "file"])
def test_where_the_list_cannot_be_written_a_run_is_made_and_named(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / state))
    run = make(tmp_path)
    assert f"{run.path} is missing in the list" in caplog.text
    assert runs.find(str(run.path)) == run


def test_the_list_holds_paths_that_are_no_utf8_and_none_that_is_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Paths are bytes; a relative XDG folder is passed over, as its standard says."""
    run = make(tmp_path)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    run.path.rename(odd)
    runs._enter(odd)
    assert [known.path for known in runs.known_runs()] == [odd]
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert runs._list() == tmp_path / "home/.local/state/s3-megatron/runs"


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_a_run_folder_is_for_whom_the_umask_says(mask: int, tmp_path: Path):
    """It was readable for all under umask 077, and not for the group to write under 002, as shared projects have it."""
    before = os.umask(mask)
    try:
        run = make(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (run.path, run.path / "logs/ranks")} == {0o777 & ~mask}
    assert (run.path / "recipe.yaml").stat().st_mode & 0o777 == 0o666 & ~mask


def test_no_secret_is_written_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2-hunter2")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SLURM_COMMENT", "key=hunter2-hunter2")
    run = make(tmp_path)
    assert json.loads((run.path / "about.json").read_text())["environment"]["NCCL_DEBUG"] == "INFO"
    for path in run.path.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


def test_an_unknown_run_is_answered_with_the_known(tmp_path: Path):
    make(tmp_path)
    with pytest.raises(S3Error, match="there is no run 'frist': give its folder, or one of first"):
        runs.find("frist")


def test_a_name_of_two_runs_means_neither(tmp_path: Path):
    """`resume first` and `cancel first` took the younger of two runs, in another cluster.runs_dir; for the older one,
    status printed `s3-megatron resume first`."""
    one, other = make(tmp_path), make(tmp_path / "other")
    with pytest.raises(S3Error, match=f"2 runs are called 'first': give the folder of one: {one.path}, {other.path}"):
        runs.find("first")
    assert {run.label for run in map(runs.find, (str(one.path), str(other.path)))} == {str(one.path), str(other.path)}
    printed = CliRunner().invoke(cli.app, ["status", str(one.path)], env={"COLUMNS": "300"})
    assert f"s3-megatron resume {one.path}" in printed.output
    other.path.rename(tmp_path / "gone")
    assert runs.find("first").label == "first"


def test_a_folder_that_is_not_listed_is_named_by_its_path_as_a_shell_takes_it(tmp_path: Path):
    """For a copied folder status printed `resume` with a name that no command knew; with a space it was two words."""
    copied = make(tmp_path).path.rename(tmp_path / "my runs")
    assert runs.find(str(copied)).label == f"'{copied}'"


def test_a_line_that_a_full_disk_cut_off_costs_no_other_line(tmp_path: Path):
    """The next number went onto the rest of the torn line, so that neither job was known any more; alike the list of
    runs, and the nodes to leave out."""
    run = make(tmp_path)
    run.submitted("7")
    with run.jobs.open("a") as file:
        file.write('{"job_id": "8", "ti')
    assert run.job_ids == ["7"]
    run.submitted("9")
    assert run.job_ids == ["7", "9"]
    listed = tmp_path / "state/s3-megatron/runs"
    listed.write_bytes(listed.read_bytes() + b"/torn")
    second = make(tmp_path, "second")
    assert runs.known_runs() == [run, second]
    attempt = run.attempt("7-0")
    attempt.path.mkdir(parents=True)
    (attempt.path / "bad_nodes").write_text("node1\tno")
    attempt.report_bad_node("node2", "clock")
    assert attempt.bad_nodes() == ["node1: no", "node2: clock"]


def test_the_commands_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    invoke = CliRunner(env={"COLUMNS": "200"}).invoke
    assert "no runs yet" in invoke(cli.app, ["runs"]).stdout
    make(tmp_path)
    assert "first" in invoke(cli.app, ["runs"]).stdout and "first" in invoke(cli.app, ["status", "first"]).stdout
    for command, message in (
        (["submit", "gpt2_tiny", "--cluster", "local"], "has no scheduler: s3-megatron launch"),
        (["launch", "gpt2_tiny", "--cluster", "slurm"], "has a scheduler: s3-megatron submit"),
        (["cancel", "first"], "has no job in the queue"),
        (["logs", "second"], "there is no run 'second'"),
    ):
        result = invoke(cli.app, command)
        assert isinstance(result.exception, S3Error) and message in str(result.exception)
    shown = invoke(cli.app, ["config", "show", "gpt2_345m", "--cluster", "slurm"]).stdout
    for line in ("global_batch_size: 512", "hang_minutes: 30.0", "16 ranks", "0.01, by the paper's rule"):
        assert line in shown
    script = invoke(cli.app, ["submit", "gpt2_345m", "--cluster", "slurm", "--dry-run"])
    assert script.exit_code == 0 and script.stdout.startswith("#!/bin/bash\n")
    assert not (tmp_path / "shared").exists()


COMMANDS = {
    "config show": "config.show('gpt2_345m', 'slurm', None)",
    "submit --dry-run": "config.submit('gpt2_345m', 'slurm', None, None, True)",
    "status": "config.status(None)",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_for_login_nodes_import_no_torch(command: str):
    code = f"import sys; from s3_megatron.cli import jobs as config; {COMMANDS[command]}; "
    code += "assert not {'torch', 'megatron', 'numpy', 'deepspeed'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=dict(os.environ))
