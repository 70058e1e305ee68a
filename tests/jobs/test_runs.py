"""Run folders, and what is reported of them. What needs a queue is in tests/slurm."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from s3_megatron import cli
from s3_megatron.errors import S3Error
from s3_megatron.jobs import compose, edits, logs, runs, status, submit
from s3_megatron.jobs.node.agent import Agent
from s3_megatron.jobs.render import render
from s3_megatron.jobs.runs import Run
from s3_megatron.watch.events import Train
from s3_megatron.watch.file import Writer


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def make(folder: Path, name: str = "first", *settings: str) -> Run:
    job = submit.here(compose.load("gpt2_tiny", "local", [f"cluster.runs_dir={folder}/runs", *settings]))
    path = submit.folder(job, name)
    return runs.create(job, path, render(job, path))


def text(renderable: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


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


def attempt(run: Run, name: str, **verdicts: dict[str, Any]) -> None:
    folder = run.path / "attempts" / name
    folder.mkdir(parents=True)
    for host, verdict in verdicts.items():
        (folder / f"{host}.json").write_text(json.dumps(verdict))
        (folder / f"{host}.failures.json").write_text("[]")
    time.sleep(0.02)  # attempts are told apart by their time


def error(rank: int, host: str, message: str, when: float) -> dict[str, Any]:
    found = {"rank": rank, "host": host, "message": message, "time": when}
    return {"verdict": "failed", "exit_code": 1, "error": found, "iteration": 5}


def test_status_says_how_a_held_job_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A controller that dies while a start leaves bad nodes out, between requeuehold and release, leaves the job held.

    scontrol is a stub: on the real cluster (tests/slurm) it would take a controller that dies within a second."""
    stub = tmp_path / "scontrol"
    stub.write_text("#!/bin/sh\necho JobId=7 JobState=PENDING Reason=JobHeldUser NodeList=\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = SimpleNamespace(
        finished=False, ended=None, job=SimpleNamespace(cluster=SimpleNamespace(scheduler="slurm")), job_ids=["7"]
    )
    assert status._state(run, []) == "pending as job 7 (JobHeldUser): 'scontrol release 7' lets it start"


def test_status_shows_what_failed_first_and_not_what_was_last(tmp_path: Path):
    """Of a hundred lines of NCCL, the first failure on any node is the one to read; and only the last bad start's."""
    run = make(tmp_path)
    assert status.status(run).state == "not started: s3-megatron resume first"
    attempt(run, "7-0", node1=error(0, "node1", "old", 1.0))
    attempt(run, "7-1", node1=error(3, "node1", "NCCL: connection closed", 20.0), node2=error(9, "node2", "OOM", 19.0))
    writer = Writer(run.path / "watch")
    for iteration, seconds in ((1, None), (2, 2.0), (3, 2.0)):
        writer.write(Train(iteration, {"lm_loss": 8.5}, seconds=seconds))
    found = status.status(run)
    assert found.error == "rank 9 on node2: OOM" and found.restarts == 1
    assert (found.iteration, found.iterations, found.loss) == (3, 128, 8.5)
    assert found.tokens_per_second == 16 * 128 / 2
    assert found.state == "stopped (failed): s3-megatron resume first"
    shown = text(status.table(found))
    for fact in ("3 of 128", "8.5000", "1,024", "rank 9 on node2: OOM"):
        assert fact in shown
    (run.path / "ENDED").write_text("configuration error: [bold]wrong[/bold]\n")
    assert "ended: configuration error: [bold]wrong[/bold]" in text(status.overview([run]))
    (run.path / "FINISHED").write_text("{}")
    found = status.status(run)
    assert (found.state, found.error) == ("finished", None)
    with pytest.raises(S3Error, match="has finished: to train on"):
        submit.resume(run, print)


def test_one_run_that_cannot_be_read_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A recipe.yaml with a slip, or one of a version before with a key that is gone, ended ``s3-megatron runs``."""
    for name in ("first", "second", "third"):
        make(tmp_path, name)
    recipe = tmp_path / "runs/second/recipe.yaml"
    recipe.write_text(recipe.read_text() + "no_such_key: 1\n")
    (tmp_path / "runs/third/jobs.jsonl").mkdir()  # OSError, as of a file server that is away
    (tmp_path / "runs/third/watch").mkdir()
    (tmp_path / "runs/third/watch/metrics.jsonl").mkdir()
    rows = {line.split()[0]: line for line in text(status.overview(runs.known_runs())).splitlines()[1:]}
    assert "not started" in rows["first"]
    assert "cannot be read: " in rows["second"] and "no_such_key" in rows["second"]
    assert "cannot be read: " in rows["third"] and "Is a directory" in rows["third"]


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


def test_what_is_missing_in_a_run_folder_is_one_line(tmp_path: Path):
    run = make(tmp_path)
    attempt(run, "local-1", node1={"verdict": "saved", "error": None})
    (run.path / "attempts/local-1/node0.json").write_text('{"verdict": "fai')
    assert status.status(run).error is None, "what cannot be read is no error"
    script, about = run.script.read_text(), run.about.read_text()
    for broken in ("{", "[]"):
        run.about.write_text(broken)
        with pytest.raises(S3Error, match=r"about\.json .*bring it back, or submit its recipe\.yaml as a new run"):
            edits.apply(run)
    run.about.unlink()
    with pytest.raises(S3Error, match=r"about\.json cannot be read .*bring it back"):
        edits.apply(run)
    run.about.write_text(about)
    run.script.unlink()
    with pytest.raises(S3Error, match=r"first has neither job\.sbatch nor job\.sh: "):
        submit.resume(run, print)
    (run.path / "job.sh").write_text(script)
    with pytest.raises(S3Error, match="there is no run 'aaa"):
        runs.find("a" * 300)  # an OSError: a longer name than any file's


def test_bad_nodes_are_the_error_of_a_start_that_did_not_train(tmp_path: Path):
    run = make(tmp_path)
    (run.path / "attempts/7-0").mkdir(parents=True)
    (run.path / "attempts/7-0/bad_nodes").write_text("node2\tonly 0.1 GiB free\n")
    assert status.status(run).error == "node2: only 0.1 GiB free"


def test_logs_of_all_nodes_in_one_stream(tmp_path: Path):
    run = make(tmp_path)
    with pytest.raises(S3Error, match="has written no log yet"):
        next(logs.lines(run, follow=False))
    (run.path / "logs/job.log").write_text("start 1\n")
    (run.path / "logs/node1.log").write_text("[local_rank0]: hello\n[local_rank1]: torn")
    assert list(logs.lines(run, follow=False)) == [
        "job: start 1",
        "node1: [local_rank0]: hello",
        "node1: [local_rank1]: torn",
    ]
    following = logs.lines(run, follow=True)
    assert [next(following), next(following)] == ["job: start 1", "node1: [local_rank0]: hello"]
    with (run.path / "logs/node1.log").open("a") as file:
        file.write(" no more\n")
    assert next(following) == "node1: [local_rank1]: torn no more"


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


def test_what_a_local_run_prints_is_printed_and_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = make(tmp_path)
    for _ in range(2):
        run.script.write_text("echo trains; echo fails >&2; exit 3\n")
        assert submit.start(run) == 3
    assert capfd.readouterr().out == "trains\nfails\n" * 2
    assert list(logs.lines(run, follow=False)) == ["job: trains", "job: fails"] * 2


# A script that says what reaches it, as a node agent that saves and ends would.
LISTENS = """trap 'echo asked; exit 143' TERM
echo trains
touch "$0.trains"
for _ in {1..600}; do sleep 0.1; done
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_launch_that_is_asked_to_end_asks_its_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """``timeout 560 s3-megatron launch`` ended alone: agent, torchrun and ranks trained on without a terminal."""
    run = make(tmp_path)
    run.script.write_text(LISTENS)

    def ask() -> None:
        while not run.script.with_name(f"{run.script.name}.trains").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    asking = threading.Thread(target=ask)
    asking.start()
    assert submit.start(run) == 143
    asking.join()
    assert capfd.readouterr().out == "trains\nasked\n"
    assert signal.getsignal(number) == before


def test_nohup_keeps_a_launch_and_its_agent_from_the_terminals_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent listened to SIGHUP again: a run under nohup ended with the terminal."""
    run = make(tmp_path)
    run.script.write_text("trap '' HUP; kill -HUP $PPID; echo trains\n")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert submit.start(run) == 0
        agent = Agent(run.path, "local-1", 1, 1)
        monkeypatch.setattr(Agent, "_train", lambda *_: 0)
        monkeypatch.setattr("s3_megatron.jobs.node.agent.adopt_orphans", lambda: None)  # of pytest itself
        monkeypatch.setenv("SLURM_NODEID", "1")
        assert agent.main(["true"]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == agent._remember
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_terminal_that_is_gone_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ``launch | head`` the run's own prints failed, and with them the run."""
    run = make(tmp_path)
    run.script.write_text("echo one; echo two\n")

    class Gone:
        class buffer:
            @staticmethod
            def write(_: bytes) -> int:
                raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone)
    assert submit.start(run) == 0
    assert run.job_log.read_text() == "one\ntwo\n"


def edit(run: Run, **settings: Any) -> Run:
    """Write ``settings``, by dotted keys, into the run's recipe.yaml, as a person does in an editor."""
    recipe = yaml.safe_load((run.path / "recipe.yaml").read_text())
    for key, value in settings.items():
        *sections, last = key.split("__")
        section = recipe
        for name in sections:
            section = section[name]
        section[last] = value
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Run(run.path)


def test_what_was_edited_in_a_run_is_printed_and_applied(tmp_path: Path):
    """The script was rendered once: whoever edited recipe.yaml and resumed silently got the old settings."""
    run = make(tmp_path)
    script = run.script.read_text()
    assert edits.apply(Run(run.path)) == [] and run.script.read_text() == script
    flag = "--override-opt-param-scheduler"
    run = edit(run, checkpoint__save_interval=7)
    assert edits.apply(run) == ["checkpoint.save_interval 32 -> 7"]
    assert "--save-interval 7" in run.script.read_text() and flag not in run.script.read_text()
    lines = edits.apply(edit(run, optimizer__lr=0.001, schedule__train_iters=999))
    assert lines == [
        "schedule.train_iters 128 -> 999",
        "optimizer.lr 0.003 -> 0.001",
        f"flags [] -> ['{flag}']",
    ]
    script = run.script.read_text()
    assert all(words in script for words in ("--lr 0.001", "--train-iters 999", "--save-interval 7", flag))
    assert edits.apply(Run(run.path)) == [], "applied once"
    assert Run(run.path).job.recipe.flags == (flag,)


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path: Path):
    """Its script named the old folder: a demonstration that was set aside trained on in the one that came after it."""
    run = make(tmp_path)
    moved = run.path.rename(tmp_path / "runs/größer")
    assert edits.apply(Run(moved)) == [f"folder {run.path} -> {moved}"]
    script = Run(moved).script.read_text()
    assert str(run.path) not in script and f"run='{moved}'" in script
    assert edits.apply(Run(moved)) == [], "applied once"
    about = json.loads(Run(moved).about.read_text())
    del about["settings"]["folder"]
    Run(moved).about.write_text(json.dumps(about))
    assert edits.apply(Run(moved)) == [], "made before the folder was written down"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__num_layers": 3}, "cannot go on with model.num_layers 4 -> 3"),
        ({"engine": "deepspeed"}, "cannot go on with engine megatron -> deepspeed"),
        ({"model__num_layer": 3}, "model.num_layer is unknown; did you mean num_layers"),
        ({"schedule__train_iters": "many"}, 'schedule.train_iters = "many"'),
    ],
)
def test_what_a_run_cannot_change_is_refused_and_nothing_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
):
    run = make(tmp_path)
    script, about = run.script.read_text(), (run.path / "about.json").read_text()
    with pytest.raises(S3Error, match=re.escape(message)):
        edits.apply(edit(run, **settings))
    assert (run.script.read_text(), (run.path / "about.json").read_text()) == (script, about)


def test_a_recipe_that_is_no_yaml_any_more_is_one_line(tmp_path: Path):
    run = make(tmp_path)
    (run.path / "recipe.yaml").write_text("name: [")
    with pytest.raises(S3Error, match=r"recipe\.yaml is no YAML"):
        submit.resume(Run(run.path), print)
